"""The run folder: every step's artefacts are written whole and once, and a step that is proven done is not done again.

``manifest.json`` holds, for each step, the digest of what went in (configuration, files, sources of methods) and its seconds. A step
with the same digest whose artefacts stand is skipped; with another digest its artefacts are removed and made again.

Several processes (torchrun, ``accelerate launch``) walk through the same steps: the first one keeps the book, and none goes on before a step is done.
"""

import contextlib
import json
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from safebasin.data.tables import write_json
from safebasin.errors import UserError
from safebasin.pipeline.config import Run, digest, dump
from safebasin.runtime import processes

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "pyarrow", "numpy")


class Folder:
    """A run folder.

    Raises:
        UserError: the path is a file, or a manifest in it is broken.
    """

    def __init__(self, path: Path):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; the run needs a folder: --out DIR")
        self.path = path
        self._file = path / "manifest.json"
        try:
            self.manifest: dict[str, Any] = json.loads(self._file.read_text()) if self._file.is_file() else {}
        except json.JSONDecodeError as error:
            raise UserError(f"{self._file} is broken ({error.msg}); remove the folder and run again") from None

    def open(self, run: Run, facts: Mapping[str, Any]) -> None:
        """Write the resolved configuration and what the run stands on."""
        if not processes().is_main_process:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "run.yaml").write_text(dump(run), encoding="utf-8")
        self.manifest["versions"] = {"safebasin": version("safebasin"), **{name: version(name) for name in PACKAGES}}
        self.manifest["machine"] = f"{platform.machine()} {platform.system()}, Python {platform.python_version()}"
        self.manifest.update(facts)
        self._save()

    def _save(self) -> None:
        write_json(self._file, self.manifest)

    @contextlib.contextmanager
    def step(self, name: str, inputs: Any, artefacts: Sequence[Path], *, shared: bool = False) -> Iterator[bool]:
        """``with folder.step(...) as needed: if needed: ...``: whether there is work, and the note that it was done.

        A ``shared`` step is the work of all processes; any other is that of the first one, and the others wait.
        """
        ranks = processes()
        with (
            self._booked(name, inputs, artefacts) if ranks.is_main_process else contextlib.nullcontext(False) as needed
        ):
            yield broadcast_object_list([needed])[0] if shared else needed
        ranks.wait_for_everyone()

    @contextlib.contextmanager
    def _booked(self, name: str, inputs: Any, artefacts: Sequence[Path]) -> Iterator[bool]:
        steps = self.manifest.setdefault("steps", {})
        key = digest(inputs)
        done = steps.get(name, {}).get("digest") == key and all(path.exists() for path in artefacts)
        if done:
            yield False
            return
        for path in artefacts:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        steps.pop(name, None)
        self._save()
        start = time.perf_counter()
        yield True
        missing = [str(path) for path in artefacts if not path.exists()]
        if missing:
            raise RuntimeError(f"the step {name} left nothing at {missing[0]}")
        steps[name] = {"digest": key, "seconds": round(time.perf_counter() - start, 2)}
        self._save()
