"""The step that measures one arm: arms/ARM/measurements.jsonl and arms/ARM/answers.jsonl."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safebasin.data.files import write_json
from safebasin.data.tables import write_table
from safebasin.measure.answers import AnswerCache
from safebasin.measure.judging import Judge, make_judges, needs_aligned
from safebasin.measure.pool import AskWorker, Pool
from safebasin.measure.subject import Subject
from safebasin.models.adapter import merged
from safebasin.models.load import ModelAndTokenizer
from safebasin.pipeline.config import Recipe
from safebasin.pipeline.folder import RunFolder, files_of
from safebasin.pipeline.mix import of_arm, write_mix
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.read import load_start
from safebasin.pipeline.rows import attack_format
from safebasin.spread import make_engine
from safebasin.spread.here import Here

Judges = Mapping[str, Judge]
ENGINE = "engine.json"  # of an arm whose answers a server gave: how many were compared with ours, and were equal


def build_judges(plan: Plan) -> Judges:
    """The judges that the suites ask for. Those that read a model read the start model, so that no tuned model judges
    itself."""
    aligned = load_start(plan) if needs_aligned(plan.judges) else None
    return make_judges(plan.judges, aligned, plan.recipe.measure.judges)


def open_arm(recipe: Recipe, adapter: Path | None) -> ModelAndTokenizer:
    """An arm's model, where a worker of a pool is."""
    return load_start(Plan.of(recipe), adapter)


def write_measurements(
    plan: Plan, folder: RunFolder, arm: str, adapter: Path | None, judges: Callable[[], Judges]
) -> None:
    """The step ``measure.ARM``: ask the arm's model every prompt of every suite.

    Args:
        adapter: of the arm, or its full model; None for the model as it was.
        judges: gives the judges where the step has work to do, since they may cost a model.
    """
    system = plan.system_prompt(arm)
    attacker = attack_format(plan, arm)
    inputs: dict[str, Any] = {
        "model": plan.recipe.model,
        "adapter": files_of(adapter) if adapter else None,
        "suites": plan.suites,
        "judges": plan.recipe.measure.judges,
        "labels": "\n".join(["", *plan.recipe.measure.labels]),  # a line break: a label is no file's name
        "system": f"\n{system}" if system else None,
        "attack": [plan.attack, attacker("")] if attacker else None,
    }
    outputs, server = [folder.measurements(arm), folder.answers(arm)], plan.served_by
    if server and arm in server.models:
        inputs["server"] = server
        outputs.append(folder.arm(arm) / ENGINE)
    if mix := plan.recipe.arms[arm].mix:
        inputs |= {"mix": mix, "guard": plan.guards.get(arm), "anchors": plan.anchors if mix.guard else None}
        outputs.append(folder.arm(arm) / "mix.json")
    with folder.step(f"measure.{arm}", inputs, outputs) as work:
        if not work:
            return
        folder.arm(arm).mkdir(parents=True, exist_ok=True)
        loaded, settings = load_start(plan, adapter), plan.recipe.measure
        subject = Subject(loaded, arm, judges(), settings.labels, system, attacker)
        subject.mixing = of_arm(plan, arm, loaded)
        subject.cache, subject.server = AnswerCache(folder.answer_cache), server
        engine = make_engine(plan.recipe.engine)
        if not isinstance(engine, Here):
            make = partial(AskWorker, partial(open_arm, plan.recipe, adapter and adapter.absolute()))
            subject.pool = Pool(engine, folder.arm(arm) / "parts", make)
        if any("start" in suite.entry.roles for suite in plan.suites):
            start = load_start(plan) if adapter else loaded
            subject.start = start._replace(model=merged(start.model))
        measurements = [dataclasses.asdict(each) for suite in plan.suites for each in suite.measure(subject)]
        write_table(folder.answers(arm), [dataclasses.asdict(answer) for answer in subject.answers])
        write_table(folder.measurements(arm), measurements)
        if "server" in inputs:
            write_json(folder.arm(arm) / ENGINE, [each._asdict() for each in subject.compared])
        if subject.mixing:
            write_mix(plan, arm, subject.mixing.requests, folder.arm(arm) / "mix.json")
