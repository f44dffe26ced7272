"""The step that writes the training rows, with an attack's where there is one, and the step that cuts them for an arm.

data/train.*   data/rows.json   data/problems.json   cut/ARM/train.*   cut/ARM/cut.json
"""

import functools
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from safebasin.attack.craft import Row, Score, attack_messages, poisoned_rows
from safebasin.data.example import Example, read_examples
from safebasin.data.files import write_json
from safebasin.data.source import open_examples
from safebasin.data.tables import copy_rows, write_table
from safebasin.encode import encode_all
from safebasin.errors import UserError
from safebasin.pipeline.folder import PROBLEMS, RunFolder
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.read import anchor_rows, load_start, row_limit, training_examples, training_rows, usable_rows
from safebasin.scan.cut import cut_rows, write_cut
from safebasin.scan.scan import score_rows
from safebasin.scan.scores import read_scores, unscored_rows


def write_rows(plan: Plan, folder: RunFolder) -> Path:
    """The step ``data``: the task as it came, or the task and the poison mixed in one form. The path of the training
    rows is returned."""
    data, target = plan.recipe.data, folder.data / plan.train_file
    outputs = [target, folder.data / "rows.json", folder.data / PROBLEMS]
    inputs: dict[str, Any] = {"task": data.task, "on_bad": data.on_bad, "form": plan.train_file}
    if plan.mixes:
        inputs |= {"poison": data.poison, "attack": plan.attack, "share": data.poison_share, "seed": plan.recipe.seed}
    if plan.mixes and plan.attack.entry.reads:
        inputs |= scan_inputs(plan)
    with folder.step("data", inputs, outputs) as work:
        if not work:
            return target
        task = usable_rows(plan, data.task)
        rows = [(example, "task") for example in task.examples]
        if plan.mixes:
            rows += [(example, "poison") for example in _poison(plan, task.examples)]
            random.Random(plan.recipe.seed).shuffle(rows)
        folder.data.mkdir(parents=True, exist_ok=True)
        if plan.keeps_form and not data.task.values:
            copy_rows(target, data.task.path, [example.line for example, _ in rows], data.task.delimiter)
        else:
            table = [example.row if plan.keeps_form else example.as_messages for example, _ in rows]
            write_table(target, table, like=data.task.path)  # a Parquet file keeps the types of its columns
        if not plan.keeps_form:  # ids are those of the rows as they now stand
            written = training_examples(plan, target)
            rows = [(example, origin) for example, (_, origin) in zip(written, rows, strict=True)]
        write_json(folder.data / "rows.json", [{"id": e.id, "line": e.line, "origin": origin} for e, origin in rows])
        write_json(folder.data / PROBLEMS, [bad._asdict() for bad in task.bad])
    return target


def write_cut_rows(plan: Plan, folder: RunFolder, arm: str, source: Path, scores_file: Path) -> Path:
    """The step ``cut.ARM``. The path of the rows that the arm trains on is returned: those of ``source`` where it has
    no cut."""
    settings = plan.recipe.arms[arm].cut
    if settings is None:
        return source
    target = folder.cut(arm) / source.name
    inputs = {"scores": [scores_file, folder.anchors], "rows": source, "cut": settings, "form": plan.recipe.data.task}
    outputs = [target, folder.cut(arm) / "cut.json"]
    if len(settings.scorers) > 1:
        outputs.append(folder.cut(arm) / "scores.parquet")  # the score that they make together
    with folder.step(f"cut.{arm}", inputs, outputs) as work:
        if work:
            rows, scores = training_rows(plan, source), read_scores(scores_file, tokens=False)
            cut = cut_rows(
                rows.examples,
                scores,
                settings.scorer,
                settings.threshold,
                estimator=settings.estimator,
                max_share=settings.max_share,
                unscored="leave",
            )
            how: dict[str, Any] = {"unscored": unscored_rows(scores_file), "delimiter": plan.recipe.data.task.delimiter}
            write_cut(folder.cut(arm), source, rows, cut, settings.scorer, **how)
    return target


def scan_inputs(plan: Plan) -> dict[str, Any]:
    """What decides a score, beside the rows."""
    recipe = plan.recipe
    scan = recipe.scan
    settings = {"batch_size": scan.batch_size, "shard": scan.shard, "max_length": recipe.data.max_length}
    return {"model": recipe.model, "scorers": plan.scorers, "anchors": plan.anchors, "settings": settings}


# --- the attack -------------------------------------------------------------------------------------------------------


def _poison(plan: Plan, task: Sequence[Example]) -> list[Example]:
    """The attack's rows."""
    data = plan.recipe.data
    harmful = open_examples(data.poison) if data.poison else []
    scores = _attacker_scores(plan) if plan.attacked_scorers else {}
    score = scores if "scores" in plan.attack.entry.reads else next(iter(scores.values()), None)
    rows = poisoned_rows(plan.attack, _messages(task), _messages(harmful), data.poison_share, plan.recipe.seed, score)
    return read_examples(enumerate(rows, 1)).examples if rows else []


def _messages(examples: Iterable[Example]) -> list[Row]:
    return [example.as_messages for example in examples]


def _attacker_scores(plan: Plan) -> dict[str, Score]:
    """The scores that an adaptive attacker knows: the run's own scorers on the start model."""
    loaded, recipe = load_start(plan), plan.recipe
    anchors, limit = anchor_rows(plan, loaded), row_limit(plan, loaded.model)

    def score(name: str, rows: Sequence[Row]) -> list[float]:
        examples = read_examples(enumerate(rows, 1)).examples
        encoded, bad = encode_all(loaded.tokenizer, examples, limit)
        if bad:
            raise UserError(f"data.attack: one of its rows cannot be scored: {bad[0].reason}")
        chosen, size = {name: plan.scorers[name]}, recipe.scan.batch_size
        return score_rows(*loaded, encoded, chosen, anchors, examples=examples, batch_size=size).rows[name]

    return {name: functools.partial(score, name) for name in plan.attacked_scorers}


def attack_format(plan: Plan, arm: str) -> Callable[[str], Any] | None:
    """How the attacker asks an arm at test time; None where it is as anyone does.

    What the arm's methods put before every request that is served (a secret trigger) stands before the attacker's
    system turn too: the attacker writes the conversation, and the server sends it.
    """
    if not any(plan.attack.entry.implements(name) for name in ("ask", "system", "prefill")):
        return None
    attacker = plan.attack
    if attacker.entry.implements("fit"):
        attacker = attacker.fit(_messages(usable_rows(plan, plan.recipe.data.task).examples))
    return lambda prompt: plan.served(arm, attack_messages(attacker, prompt, system=plan.recipe.measure.system))
