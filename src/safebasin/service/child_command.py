"""The command line of a job's process."""

import json
import math
from pathlib import Path
from typing import Any

from safebasin.pipeline.config import Recipe
from safebasin.pipeline.parse import plain
from safebasin.report.limits import parse_gate
from safebasin.service.policy import Settings
from safebasin.service.store import Job


def stage_of(job: Job, settings: Settings) -> str:
    """What the job's next child does.

    "screen": the model as it was and the arm of the model. Where that one passes and its cut names no row, the other
    arms would change nothing, and the job is over. Not where the gate or the arm itself needs another one.
    "run": all arms of the recipe, in the same folder. "search" and "final": see ``policy.search``.
    """
    base, recipe = settings.policy.models[job.model], settings.recipes[job.model]
    screened = base.model and recipe.arms[base.model].of is None and not parse_gate(recipe.gate).losses
    return str(job.settings.get("stage") or ("screen" if screened else "run"))


def command_of(job: Job, settings: Settings, folder: Path) -> list[str]:
    """The command line of a job's child. Three numbers, a seed and paths of ours: nothing else of a request gets in."""
    base, recipe = settings.policy.models[job.model], settings.recipes[job.model]
    stage = stage_of(job, settings)
    changes: dict[str, Any] = {
        "data.task": {"path": str(folder / "rows.jsonl")},
        "data.on_bad": "stop",
        "seed": job.seed or recipe.seed,
        **_training(recipe, job.settings["hyperparameters"]),
    }
    if stage == "screen":
        arms = plain(recipe.arms)
        changes["arms"] = {name: arms[name] for name in (next(iter(arms)), base.model)}
        changes["gate"] = {k: v for k, v in plain(recipe.gate).items() if k != "plain"} | {"arm": base.model}
    suites = plain(recipe.measure.suites)
    if job.validation_file and not any("token_accuracy" in suite for suite in suites):
        held_out = {"token_accuracy": {"data": {"path": str(folder / "validation.jsonl")}}}
        changes["measure.suites"] = [*suites, held_out]
    verb = ["search", str(base.recipe), "--arm", base.without, "--rounds", str(settings.policy.search)]
    words = verb if stage == "search" else ["run", str(base.recipe)]
    words += ["--out", str(folder / "run"), "--events", str(folder / "events.jsonl")]
    for key, value in changes.items():
        words += ["--change", f"{key}={json.dumps(value)}"]
    return [*settings.policy.child.command, *words]


def _training(recipe: Recipe, options: dict[str, int | float]) -> dict[str, int | float]:
    """A customer's three settings as those of the recipe."""
    changes: dict[str, int | float] = {}
    if epochs := options.get("n_epochs"):
        changes["train.num_train_epochs"] = epochs
    if batch := options.get("batch_size"):
        # the largest part of it that the recipe's device holds; the rest is accumulated
        size = math.gcd(int(batch), int(recipe.train.get("per_device_train_batch_size", 8)))
        changes["train.per_device_train_batch_size"] = size
        changes["train.gradient_accumulation_steps"] = int(batch) // size
    if factor := options.get("learning_rate_multiplier"):
        changes["train.learning_rate"] = factor * recipe.train.get("learning_rate", 5e-5)
    return changes
