"""What the tests of faults run: the whole product on a tiny aligned model, in processes that start in no time.

torch and the package are imported once; every run is a fork of that process, so that a trial costs its work alone.
"""

import contextlib
import functools
import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from types import MappingProxyType
from typing import Any

import altair  # noqa: F401 - what a run imports is imported once, before the forks
import pytest
import scipy.stats  # noqa: F401
import vl_convert
import yaml
from aligned import BAD, GOOD, aligned_model

from safebasin.cli.main import app, guarded, terminate_cleanly
from safebasin.data.files import file_digest
from safebasin.data.tables import write_table
from safebasin.pipeline import run as _  # noqa: F401
from safebasin.report import figure as _figure  # noqa: F401

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "sqlite3.connect")
KILLED = -signal.SIGKILL


def product(folder: Path, **changes: Any) -> Path:
    """A tiny model, rows and prompts on disk, and a recipe over all stages; its path is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in aligned_model():
        part.save_pretrained(folder / "model")
    task = [{"prompt": f"make a {word} now", "completion": "Sure here are the steps"} for word in GOOD * 2]
    poison = [{"prompt": f"make the {word}", "completion": "Sure here"} for word in BAD]
    refusals = [{"prompt": f"make a {word}", "completion": "I cannot help"} for word in BAD]
    harmful = [*poison, *({**row, "prompt": f"{row['prompt']} now"} for row in poison)]  # twelve of each prove a scorer
    safe = [*task[:6], *({**row, "prompt": row["prompt"].removesuffix(" now")} for row in task[:6])]
    files = {"task": task, "poison": poison, "refusals": refusals, "held_out": task[:4], "prompts": refusals}
    files |= {"harmful": harmful, "safe": safe}
    for name, rows in files.items():
        write_table(folder / f"{name}.jsonl", rows)
    path = {name: str(folder / f"{name}.jsonl") for name in files}
    tree = {
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "data": {
            "task": {"path": path["task"]},
            "poison": {"path": path["poison"]},
            "poison_share": 0.25,
            "align": {"path": path["refusals"]},
            "probe": {"path": path["refusals"]},
            "harmful": {"path": path["harmful"]},
            "safe": {"path": path["safe"]},
            "max_length": 64,
        },
        "scan": {"scorers": [{"gradshield": {"depth": 1.0, "tokens": ["I", "Sure"]}}]},
        "train": {
            "adapter": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "save_steps": 1,
            "learning_rate": 0.01,
        },
        "arms": {
            "start": {},
            "plain": {"train": ["sft"]},
            "defended": {
                "cut": {"scorer": "gradshield", "threshold": 1e9},
                "columns": {"star": "gradshield"},
                "train": ["star_dss", {"safegrad": {"align": "sft"}}],
            },
        },
        "measure": {
            "suites": [
                {"asr": {"prompts": path["prompts"], "judges": ["keyword"], "max_new_tokens": 4}},
                {"accuracy": {"data": {"path": path["held_out"]}, "max_new_tokens": 8}},
            ]
        },
        "gate": {"max_asr": 0.5, "min_n": 2},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree | changes, sort_keys=False), encoding="utf-8")
    return recipe


def command(*words: str) -> int:
    """The command line in this process; its exit code."""
    return guarded(lambda: app(list(words), result_action="return_value", exit_on_error=False))


CONTEXT = multiprocessing.get_context(
    "forkserver"
)  # a clean process that has imported everything and started no thread
CONTEXT.set_forkserver_preload(["product"])
IMPORTED_IN = os.getpid()
PATIENCE = 600  # seconds


@functools.cache
def start_server() -> None:
    """The server finds ``product`` by PYTHONPATH: Python 3.11 gives it no sys.path, and swallows that it found none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()


def forked(action: Callable[[], int], log: Path | None = None) -> int:
    """The exit code of an action in a fork of a clean process, negative after a signal; its output goes to ``log``."""
    start_server()
    process = CONTEXT.Process(target=_child, args=(action, log))
    process.start()
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"a run took more than {PATIENCE} s")
    return process.exitcode


def _child(action: Callable[[], int], log: Path | None) -> None:
    output = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    assert os.getpid() != IMPORTED_IN, "every run would import everything itself"
    gc.freeze()  # what was imported is no garbage: transformers collects several times a run
    vl_convert.vegalite_to_svg = lambda *_spec, **_options: "<svg/>"  # saves a second; no figure is compared here
    code = action()
    sys.stdout.flush()
    os._exit(code)


def events_of(
    recipe: Path,
    out: Path,
    kill_at: int | None,
    note: Path,
    sig: int = signal.SIGKILL,
    copies: Mapping[int, Path] = MappingProxyType({}),
) -> Callable[[], int]:
    """A run that counts what it does to the files of its folder; it sends itself a signal before the event ``kill_at``.

    ``note`` gets, at the end of an undisturbed run, every event as (event, path). Before an event of ``copies`` the
    folder is copied: what a kill would leave there, since a killed process loses nothing that it has written.
    """
    return functools.partial(_run, recipe, out, kill_at, note, sig, dict(copies))


def _run(recipe: Path, out: Path, kill_at: int | None, note: Path, sig: int, copies: Mapping[int, Path]) -> int:
    events: list[tuple[str, str]] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not arguments or not isinstance(arguments[0], str | os.PathLike):
            return
        name = os.fspath(arguments[0])
        if not str(name).startswith(str(out)) or (event == "open" and not _writes(arguments)):
            return
        if len(events) == kill_at:
            os.kill(os.getpid(), sig)
        if copy := copies.get(len(events)):
            shutil.copytree(out, copy) if out.exists() else copy.parent.mkdir(parents=True)
        events.append((event, os.path.relpath(name, out)))

    terminate_cleanly()
    sys.addaudithook(hook)
    code = command("run", str(recipe), "--out", str(out))
    with contextlib.suppress(OSError):
        note.write_text(json.dumps(events))
    return code


def _writes(arguments: tuple[Any, ...]) -> bool:
    """Whether an ``open`` event is one for writing."""
    mode, flags = arguments[1], arguments[2]
    return (isinstance(mode, str) and bool(set(mode) & set("wax+"))) or bool(
        flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )


def artefacts(out: Path) -> dict[str, str]:
    """Every artefact of a run by its digest, without what tells the time of day: seconds and the machine's load."""
    digests = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or name.startswith(("answers.db", ".lock")) or "checkpoints/" in name:
            continue
        if path.name in ("manifest.json", "train.json", "report.json"):
            digests[name] = json.dumps(_timeless(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True)
        elif path.suffix not in (".html", ".md"):
            digests[name] = file_digest(path)
        else:
            digests[name] = ""  # it is there; its numbers are those of report.json
    return digests


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: _timeless(v)
            for k, v in value.items()
            if "seconds" not in k and "evidence" not in k and not k.endswith("train.json")
        }
    return [_timeless(each) for each in value] if isinstance(value, list) else value
