"""Tune the tiny model, be killed at a chosen place, and go on: ``python killed.py FOLDER`` writes FOLDER/outcomes.json.

Every run is a fork of this process, which loads the libraries once and takes no gradient itself. A kill is
``os._exit``: no handler runs and no buffer is flushed. Four steps, of which an epoch has three, and a checkpoint after
each.
"""

import contextlib
import gc
import itertools
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import safetensors.torch
import torch
from away import adapted
from tiny import PAD, random_rows
from transformers import Trainer, TrainerState

from safebasin.data.files import file_digest
from safebasin.train import checkpoint, trainer
from safebasin.train.checkpoint import last_checkpoint
from safebasin.train.compose import Composition
from safebasin.train.settings import training_arguments
from safebasin.train.trainer import OracleTrainer, streams_of

KILLED = 137
STEPS = 4
TWICE = "in the optimizer, twice"


def tune(folder: Path) -> None:
    """Tune from the last complete checkpoint, and write the outcome: adapter, curve, steps in all and taken here."""
    settings = {"per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 0.05, "seed": 0, "save_steps": 1}
    args = training_arguments(settings, folder / "checkpoints")
    streams = streams_of({"task": random_rows(12, 1), "align": random_rows(7, 2)}, args, PAD, 0.5)
    methods = Composition.of([{"lisa": {"align_steps": 1, "task_steps": 2}}])
    taken: list[int] = []
    host = OracleTrainer(
        adapted(0.1), args, methods, streams, advance=lambda loss: taken.append(host.state.global_step)
    )
    host.train(resume_from_checkpoint=last_checkpoint(folder / "checkpoints"))
    before_adapter()
    host.model.save_pretrained(folder / "adapter")
    facts = {"curve": host.curve, "steps": host.state.global_step, "taken": taken}
    facts["adapter"] = file_digest(folder / "adapter" / "adapter_model.safetensors")
    facts["left"] = sorted(path.name for path in (folder / "checkpoints").iterdir())
    (folder / "outcome.json").write_text(json.dumps(facts))


def before_adapter() -> None:
    """A place to be killed at."""


def die(*_: Any, **__: Any) -> None:
    os._exit(KILLED)


@contextlib.contextmanager
def wrapped(owner: Any, name: str, call: int, how: Callable[..., Any], only: str) -> Iterator[None]:
    """At the ``call``-th call (from 1) of a function, of those with ``only`` in an argument, ``how`` runs instead."""
    original, calls = getattr(owner, name), itertools.count(1)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        if only in " ".join(str(arg) for arg in args if isinstance(arg, str | Path)) and next(calls) == call:
            return how(original, *args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, replaced)
    yield
    setattr(owner, name, original)


def before(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    die()


def after(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    original(*args, **kwargs)
    die()


def halfway(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Half of the file is there; its path is the argument that is one."""
    original(*args, **kwargs)
    path = next(Path(arg) for arg in args if isinstance(arg, str | Path))
    os.truncate(path, path.stat().st_size // 2)
    die()


def half_removed(original: Callable[..., Any], folder: Any, *args: Any, **kwargs: Any) -> None:
    (Path(folder) / "optimizer.pt").unlink()
    die()


# Place -> (owner, function, call, how, only). Most are in the writing of the second checkpoint.
PLACES: dict[str, tuple[Any, str, int, Callable[..., Any], str]] = {
    "in the first step": (OracleTrainer, "training_step", 1, before, ""),
    "before any checkpoint is complete": (trainer, "mark_complete", 1, before, ""),
    "in the second step": (OracleTrainer, "training_step", 2, after, ""),
    "before the weights": (Trainer, "save_model", 2, before, ""),
    "after the weights": (Trainer, "save_model", 2, after, ""),
    "before the optimizer": (torch, "save", 2, before, "optimizer.pt"),
    "in the optimizer": (torch, "save", 2, halfway, "optimizer.pt"),
    "after the optimizer": (torch, "save", 2, after, "optimizer.pt"),
    "before the methods' state": (safetensors.torch, "save_file", 2, before, "method_state"),
    "in the methods' state": (safetensors.torch, "save_file", 2, halfway, "method_state"),
    "in the random state": (torch, "save", 2, halfway, "rng_state"),
    "in the Trainer's state": (TrainerState, "save_to_json", 2, before, ""),
    "before the mark": (trainer, "mark_complete", 2, before, ""),
    "in the mark": (Path, "replace", 2, before, "complete.json"),
    "after the mark": (trainer, "mark_complete", 2, after, ""),
    "before the older one is removed": (checkpoint, "remove_checkpoint", 1, before, ""),
    "while the older one is removed": (shutil, "rmtree", 1, half_removed, "checkpoint-1"),
    "after the older one is removed": (trainer, "rotate", 2, after, ""),
    "in the last step": (OracleTrainer, "training_step", STEPS, before, ""),
    "in the last checkpoint": (trainer, "mark_complete", STEPS, before, ""),
    "after the last step, before the adapter": (sys.modules[__name__], "before_adapter", 1, before, ""),
    "after the adapter": (Path, "write_text", 1, before, "outcome.json"),
}


def forked(work: Callable[[], None]) -> int:
    """The exit status of a fork that does the work."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(place: str, folder: Path) -> None:
    with wrapped(*PLACES[place]):
        tune(folder)


def outcome(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "outcome.json").read_text())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is no garbage: the Trainer collects at every start
    outcomes: dict[str, Any] = {}
    forked(lambda: tune(folder / "undisturbed"))
    outcomes["undisturbed"] = outcome(folder / "undisturbed")
    for number, place in enumerate(PLACES):
        run = folder / str(number)
        died = forked(lambda place=place, run=run: killed_at(place, run))
        again = forked(lambda run=run: tune(run))
        outcomes[place] = {"died": died, "again": again, **outcome(run)}
    run = folder / "twice"  # in the second run too, there in the writing of the third checkpoint
    died = [forked(lambda: killed_at("in the optimizer", run)) for _ in range(2)]
    again = forked(lambda: tune(run))
    outcomes[TWICE] = {"died": died[1], "again": again, **outcome(run)}
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
