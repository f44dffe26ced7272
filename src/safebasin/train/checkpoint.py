"""Checkpoints that a kill cannot spoil: one counts only with its mark, written last, of every file's digest."""

import contextlib
import json
import shutil
from pathlib import Path

from accelerate.utils import broadcast_object_list

from safebasin.data.files import file_digest, write_json
from safebasin.runtime import processes

REFERENCE = "reference"  # folder beside the checkpoints of full fine-tuning: hidden states of the start
MARK = "complete.json"  # relative path -> digest, of every other file of the checkpoint


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a folder; None where there is none. Broken ones are skipped.

    Collective: rank 0 decides, and every rank must ask.
    """
    newest = None
    if processes().is_main_process:
        newest = next(filter(is_complete, reversed(checkpoints(Path(folder)))), None)
    return broadcast_object_list([newest])[0]


def checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint of a folder by step, complete or not."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def is_complete(checkpoint: Path) -> bool:
    """Whether the mark is there and every file is what it was when the mark was written."""
    try:
        digests = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
        if not (isinstance(digests, dict) and digests):
            return False
        return all(file_digest(checkpoint / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):  # no mark, no file, no JSON
        return False


def mark_complete(checkpoint: Path) -> None:
    """Write the mark. From here on the checkpoint counts."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    write_json(checkpoint / MARK, {path.relative_to(checkpoint).as_posix(): file_digest(path) for path in files})


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint, its mark first: one that is half removed does not count."""
    (checkpoint / MARK).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def clear_checkpoints(root: Path) -> None:
    """Remove the checkpoints and stored references of every tuning under a folder. What a tracker wrote stays."""
    for folder in (*root.glob("*/"), root):
        shutil.rmtree(folder / REFERENCE, ignore_errors=True)
        for checkpoint in checkpoints(folder):
            remove_checkpoint(checkpoint)
        with contextlib.suppress(OSError):  # not there, or not empty
            folder.rmdir()


def rotate(checkpoint: Path, limit: int | None) -> None:
    """Remove what a complete checkpoint replaces: all but the newest ``limit`` (None: none), and what has no mark."""
    marked = [path for path in checkpoints(checkpoint.parent) if (path / MARK).is_file()]
    for path in checkpoints(checkpoint.parent):
        if path != checkpoint and path not in (marked[-limit:] if limit else marked):
            remove_checkpoint(path)
