"""The run folder: the one owner of its paths, and of what is done. Every step goes through ``RunFolder.step``.

``manifest.json`` holds for each step the digest of what went in (by content: ``pipeline.fingerprint``), the digests of
the files that came out, the versions and the seconds. A step is skipped where the inputs are the same and the files
are as it wrote them; otherwise its files are removed, with the report that rests on them, and made again.

Several processes (torchrun, ``accelerate launch``) go through the same steps. Rank 0 writes the manifest; the others
wait at the end of each step.
"""

import contextlib
import datetime
import fnmatch
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
from accelerate.utils import broadcast_object_list

from safebasin.console import console
from safebasin.data.files import atomic_write, file_digest, make_folder, write_json
from safebasin.errors import UserError
from safebasin.events import emit
from safebasin.pipeline.fingerprint import fingerprint, package_digest, versions
from safebasin.report.manifest import changed_outputs, read_manifest
from safebasin.runtime import processes

CARD = "README.md"  # of an adapter or a model: written with the report, and the user may add to it
PROBLEMS = "problems.json"  # of a step: rows that were left out or cut short
REPORT = ("report.html", "report.md", "report.json")


class RunFolder:
    """A run folder: paths by name, and the steps that are done.

    Raises:
        UserError: the path is a file, or the manifest in it is damaged.
    """

    def __init__(self, path: Path):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; the run needs a folder: --out DIR")
        self.path = path
        self.answer_cache = path / "answers.db"  # a grid's folders share one
        self.manifest: dict[str, Any] = dict(read_manifest(path))

    # --- paths --------------------------------------------------------------------------------------------------------

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def scores(self) -> Path:
        return self.path / "scan" / "scores.parquet"

    @property
    def tokens(self) -> Path:
        """Of encoded rows, which the scan and the arms share; see ``pipeline.token_files``."""
        return self.path / "tokens"

    @property
    def anchors(self) -> Path:
        return self.path / "scan" / "anchors.json"

    def cut(self, arm: str) -> Path:
        return self.path / "cut" / arm

    def arm(self, name: str) -> Path:
        return self.path / "arms" / name

    def adapter(self, arm: str) -> Path:
        return self.arm(arm) / "adapter"

    def result(self, arm: str, *, full: bool) -> Path:
        """What an arm ends with: its adapter, or with full fine-tuning its model."""
        return self.arm(arm) / ("model" if full else "adapter")

    def tuned(self, arm: str) -> Path:
        """The adapter or the model of an arm that is tuned and then repaired, before the repair."""
        return self.arm(arm) / "tuned"

    def answers(self, arm: str) -> Path:
        return self.arm(arm) / "answers.jsonl"

    def measurements(self, arm: str) -> Path:
        return self.arm(arm) / "measurements.jsonl"

    # --- steps --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Inside, no other run may work in this folder.

        Raises:
            UserError: another run does.
        """
        if not processes().is_main_process:
            yield
            return
        make_folder(self.path)
        lock = filelock.FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"another run works in {self.path}; wait for it, or give this one another folder: --out DIR"
            ) from None
        try:
            self.manifest = dict(read_manifest(self.path))
            for part in self.path.rglob("*.part"):  # what a killed run had begun to write
                shutil.rmtree(part) if part.is_dir() else part.unlink()
            yield
        finally:
            lock.release()

    def describe(self, recipe: str, facts: Mapping[str, Any]) -> None:
        """Write the resolved recipe and what the run stands on."""
        if not processes().is_main_process:
            return
        make_folder(self.path)
        with atomic_write(self.path / "run.yaml") as part:
            part.write_text(recipe, encoding="utf-8")
        self.manifest["versions"] = versions()
        python, cores = platform.python_version(), os.cpu_count()
        self.manifest["machine"] = f"{platform.machine()} {platform.system()}, Python {python}, {cores} cores"
        self.manifest.update(facts)
        self._save()

    def _save(self) -> None:
        write_json(self.path / "manifest.json", self.manifest)

    @contextlib.contextmanager
    def step(
        self, name: str, inputs: Mapping[str, Any], outputs: Sequence[Path], *, shared: bool = False
    ) -> Iterator[str]:
        """``with folder.step(...) as work: if work: ...``: the digest of the inputs where there is work to do, else
        nothing.

        Args:
            name: of the step, in the manifest.
            inputs: by name, everything that decides the outputs; see ``fingerprint``.
            outputs: files and folders that the step leaves.
            shared: the work of all processes; any other step is that of rank 0.

        Raises:
            UserError: see ``fingerprint``.
            RuntimeError: the step left no file where it should.
        """
        ranks = processes()
        with self._step(name, inputs, outputs) if ranks.is_main_process else contextlib.nullcontext("") as work:
            yield broadcast_object_list([work])[0] if shared else work
        ranks.wait_for_everyone()

    def adopt(self, other: Path, patterns: Sequence[str]) -> None:
        """Copy the steps of another run folder whose names match and that this folder lacks. A step is then skipped
        only where its inputs are those of this run; if not, it is made again.

        Raises:
            UserError: the manifest of the other folder is damaged.
        """
        own = self.manifest.setdefault("steps", {})
        for name, entry in read_manifest(other).get("steps", {}).items():
            wanted = name not in own and any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
            if not wanted or changed_outputs(other, {"steps": {name: entry}}):
                continue
            for output in entry["outputs"]:
                make_folder((self.path / output).parent)
                shutil.copyfile(other / output, self.path / output)
            own[name] = entry
            self._save()

    @contextlib.contextmanager
    def _step(self, name: str, inputs: Mapping[str, Any], outputs: Sequence[Path]) -> Iterator[str]:
        steps = self.manifest.setdefault("steps", {})
        digests = {key: fingerprint(value) for key, value in inputs.items()}
        digests |= {"package": package_digest(), "versions": fingerprint(versions())}
        digest, entry = fingerprint(digests), steps.get(name, {})
        changed = sorted(changed_outputs(self.path, {"steps": {name: entry}}))
        if entry.get("digest") == digest and not changed and all(path.exists() for path in outputs):
            emit("step", step=name, state="skipped")
            yield ""
            return
        emit("step", step=name, state="started")
        if entry and changed:
            console.print(
                f"  {name}: {', '.join(changed[:3])} is not as it was written; it is made again", markup=False
            )
        steps.pop(name, None)
        self._save()
        for path in (*outputs, *(self.path / report for report in REPORT)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        start, cpu = time.perf_counter(), time.process_time()
        yield digest
        missing = [str(path) for path in outputs if not path.exists()]
        if missing:
            raise RuntimeError(f"the step {name} left nothing at {missing[0]}")
        self.manifest["date"] = datetime.date.today().isoformat()  # of the latest work that was done
        seconds = round(time.perf_counter() - start, 2)
        written = {file.relative_to(self.path).as_posix(): file_digest(file) for file in _files(outputs)}
        steps[name] = {
            "digest": digest,
            "inputs": digests,
            "outputs": written,
            "versions": versions(),
            "seconds": seconds,
            "cpu_seconds": round(time.process_time() - cpu, 2),  # of all threads: on a busy machine less than seconds
        }
        self._save()
        emit("step", step=name, state="done", seconds=seconds)


def files_of(result: Path) -> list[Path]:
    """The files of an adapter or a model, without the card, which comes with the report."""
    return [path for path in sorted(result.iterdir()) if path.name != CARD]


def _files(outputs: Sequence[Path]) -> list[Path]:
    inside = [[path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) for path in outputs]
    return [file for files in inside for file in files if file.name != CARD]
