"""The manifest of a run: which step wrote which file, with its digest. A file that differs is no evidence."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safebasin.console import printable
from safebasin.data.files import file_digest
from safebasin.data.json_rows import flaw, read_json
from safebasin.errors import UserError

# "steps": name -> {"digest", "inputs", "outputs", "versions", "seconds"}; and "model", "seed", "versions", "machine".
Manifest = Mapping[str, Any]
# What a report is counted from, by folder. Each of these files must be an output of a step.
EVIDENCE = {
    "data": ("train.*", "rows.json", "problems.json"),
    "scan": ("scores.parquet", "heat.json", "problems.json"),
    "cut/*": ("cut.json", "scores.parquet"),
    "arms/*": ("measurements.jsonl", "answers.jsonl", "train.json", "repair.json", "mix.json", "problems.json"),
}


def load_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: the file cannot be read, is not JSON, or holds what no file of ours does (see ``flaw``).
    """
    value = read_json(path)
    if reason := flaw(value):
        raise UserError(f"{path} is damaged: {reason}")
    return value


def read_manifest(run: Path) -> Manifest:
    """The manifest of a run folder; empty if it has none.

    Raises:
        UserError: the file cannot be read, is not JSON, or has another shape.
    """
    path = run / "manifest.json"
    manifest = load_json(path) if path.exists() else {}
    steps = manifest.get("steps", {}) if isinstance(manifest, dict) else None
    if not isinstance(steps, dict) or not all(map(_is_step, steps.values())):
        raise UserError(f"{path} is not the manifest of a run; run again, into another folder")
    return manifest


def _is_step(step: Any) -> bool:
    if not isinstance(step, dict) or not isinstance(step.get("digest"), str):
        return False
    seconds, outputs = step.get("seconds", 0.0), step.get("outputs", {})
    counted = isinstance(seconds, int | float) and 0 <= seconds < 1e12  # NaN fails too
    return counted and isinstance(outputs, dict) and all(map(_is_output, outputs.items()))


def _is_output(output: tuple[str, Any]) -> bool:
    path, digest = PurePosixPath(output[0]), output[1]
    return isinstance(digest, str) and not path.is_absolute() and ".." not in path.parts and "\0" not in output[0]


def _outputs(manifest: Manifest) -> dict[str, str]:
    """Path -> digest. Where two steps wrote one file, the later counts: steps are in the order in which they ended."""
    return {
        path: digest for step in manifest.get("steps", {}).values() for path, digest in step.get("outputs", {}).items()
    }


def _holds(path: Path, digest: str) -> bool:
    try:
        return path.is_file() and file_digest(path) == digest
    except OSError:  # not readable, or no name that a file can have
        return False


def changed_outputs(run: Path, manifest: Manifest) -> list[str]:
    """Outputs of steps, as paths from the run folder, that are missing or hold other bytes than their step wrote."""
    return [path for path, digest in _outputs(manifest).items() if not _holds(run / path, digest)]


def evidence_problems(run: Path, manifest: Manifest) -> tuple[str, ...]:
    """Why the files of a run do not prove its numbers, a sentence each; empty if every file is as its step wrote it."""
    if not _outputs(manifest):
        return ("the run has no manifest of what its steps wrote: nothing shows that its numbers were measured here",)
    changed = [
        f"{printable(path, 200)} {'was edited after it was measured' if os.path.isfile(run / path) else 'is missing'}"
        for path in changed_outputs(run, manifest)
    ]
    patterns = [f"{folder}/{name}" for folder, names in EVIDENCE.items() for name in names]
    files = {path for each in patterns for path in run.glob(each) if path.is_file() and path.suffix != ".part"}
    added = sorted({path.relative_to(run).as_posix() for path in files} - _outputs(manifest).keys())
    return (
        *changed,
        *(f"{printable(path, 200)} is not in the manifest: no step of this run wrote it" for path in added),
    )


def evidence_digest(manifest: Manifest) -> str:
    """Digest of all steps: their names, the digests of their inputs, and their outputs."""
    steps = {name: [step["digest"], step.get("outputs", {})] for name, step in manifest.get("steps", {}).items()}
    text = json.dumps(steps, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
