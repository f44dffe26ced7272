"""The step that measures one arm: arms/ARM/measurements.jsonl and arms/ARM/answers.jsonl."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safebasin.data.tables import write_table
from safebasin.measure.answers import AnswerCache
from safebasin.measure.judging import Judge, make_judges, needs_aligned
from safebasin.measure.subject import Subject
from safebasin.models.adapter import merged
from safebasin.pipeline.folder import RunFolder, files_of
from safebasin.pipeline.mix import of_arm, write_mix
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.rows import attack_format, load_start

Judges = Mapping[str, Judge]


def build_judges(plan: Plan) -> Judges:
    """The judges that the suites ask for. Those that read a model read the start model, so that no tuned model judges
    itself."""
    aligned = load_start(plan) if needs_aligned(plan.judges) else None
    return make_judges(plan.judges, aligned, plan.recipe.measure.judges)


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
    outputs = [folder.measurements(arm), folder.answers(arm)]
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
        subject.cache = AnswerCache(folder.answer_cache)
        if any("start" in suite.entry.roles for suite in plan.suites):
            start = load_start(plan) if adapter else loaded
            subject.start = start._replace(model=merged(start.model))
        measurements = [dataclasses.asdict(each) for suite in plan.suites for each in suite.measure(subject)]
        write_table(folder.answers(arm), [dataclasses.asdict(answer) for answer in subject.answers])
        write_table(folder.measurements(arm), measurements)
        if subject.mixing:
            write_mix(plan, arm, subject.mixing.requests, folder.arm(arm) / "mix.json")
