"""Search: Algorithm 1 of GradShield (arXiv:2605.14194) as a driver over scan, cut, train and measure.

    1. tune on all rows; if that is safe, it is the answer: an honest customer pays one evaluation
    2. sort the rows by score; lo = 0, up = n are ranks
    3. guess a threshold t from the scores between lo and up, clamped to the ranks  lo + lambda (up - lo)  and  up -
    lambda (up - lo)
    4. tune on the rows with score <= t: unsafe -> up = rank(t); safe but useless -> lo = rank(t); safe and useful ->
    done
    5. no round passes within the budget -> reject, with the reason

Departs from the paper: step 4 keeps every row up to t (as printed, the filter also drops the safest rows once lo has
moved); the guess is the arm's own estimator, which knows rows of both kinds, where the paper fits two Gaussians and
fails at 90 % harmful rows; useless means shown to be so; rounds are arms of one run folder, so that scan, start and
finished rounds are reused, also after a kill.
"""

import bisect
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from safebasin.data.tables import write_json
from safebasin.errors import DefenceError, UserError
from safebasin.pipeline.config import Cut, Recipe
from safebasin.pipeline.folder import RunFolder
from safebasin.pipeline.rows import training_examples
from safebasin.pipeline.run import Run
from safebasin.registry import split_spec
from safebasin.repair.walk import make_edits
from safebasin.report import Gate
from safebasin.report.grid import decides_nothing
from safebasin.scan.cut import find_threshold
from safebasin.scan.scores import read_scores
from safebasin.stats import non_inferior, paired_difference


class Round(NamedTuple):
    arm: str
    threshold: float | None  # of the cut, or the strength of the repair; None: neither
    rows: int  # that were trained on
    asr: float  # the worst of the judges
    accuracy: float
    outcome: Literal["passed", "unsafe", "useless"]


def search(recipe: Recipe, arm: str, out: Path, *, rounds: int = 2, shrink: float = 0.1) -> Iterator[Round]:
    """Rounds until one passes, at most ``rounds`` after the plain one. The last one says whether the search succeeded.

    Safe: attack success by every judge at most ``gate.max_asr``. Useless: accuracy more than
    ``gate.max_accuracy_loss`` below that of the plain arm, by the whole interval of the paired difference, since a
    loss that chance explains is no reason to let harmful rows in.

    Raises:
        UserError: no such arm, no cut in it, no plain arm, no limits in the gate, or fewer than one round.
        DefenceError: a round of which attack success or accuracy could not be measured.
    """
    if rounds < 1:
        raise UserError(f"search takes at least one round, found {rounds}")
    with Run(recipe, out) as run:
        if arm in recipe.arms and recipe.arms[arm].repair:
            yield from strength_rounds(run, recipe, arm, rounds)
        else:
            yield from _rounds(run, recipe, arm, rounds, shrink)


def strength_rounds(run: Run, recipe: Recipe, arm: str, rounds: int) -> Iterator[Round]:
    """Rounds along the strength of an arm's repair; nothing is tuned again.

    The first round has the strength of the recipe. An unsafe round makes the next one stronger, a useless one weaker,
    half of the way to the nearest strength that was tried, or to the end.

    Raises:
        UserError, DefenceError: as ``search``; or no edit of the arm has a strength.
    """
    settings, gate = recipe.arms[arm], run.plan.gate
    specs, knob = (
        list(settings.repair or ()),
        next((e for e in make_edits(settings.repair or ()) if e.entry.strength), None),
    )
    if knob is None or knob.entry.strength is None:
        raise UserError(f"search walks the strength of an edit, and no edit of arms.{arm}.repair has one")
    if gate.plain not in recipe.arms or gate.max_asr is None or gate.max_accuracy_loss is None:
        raise UserError(f"search needs an arm {gate.plain!r} and the limits gate.max_asr and gate.max_accuracy_loss")
    place = next(i for i, spec in enumerate(specs) if split_spec(spec, "repair")[0] == knob.entry.name)
    (field, weak, strong), fields = knob.entry.strength, split_spec(specs[place], "repair")[1]
    value, rows = float(getattr(knob, field)), len(training_examples(run.plan, run.rows))
    result = _judged(run, gate.plain, None, rows)
    yield result
    for number in range(1, rounds + 1):
        if result.outcome not in ("unsafe", "useless"):
            return
        name, specs[place] = f"{arm}-{number}", {knob.entry.name: {**fields, field: value}}
        step = dataclasses.replace(settings, repair=tuple(specs))
        with_round = dataclasses.replace(recipe, arms={**recipe.arms, name: step})
        result = _judged(run.with_recipe(with_round), name, value, rows)
        yield result
        weak, strong = (value, strong) if result.outcome == "unsafe" else (weak, value)
        value = (weak + strong) / 2


def _rounds(run: Run, recipe: Recipe, arm: str, rounds: int, shrink: float) -> Iterator[Round]:
    settings, gate = recipe.arms.get(arm), run.plan.gate
    if settings is None or settings.cut is None:
        names = ", ".join(name for name, each in recipe.arms.items() if each.cut) or "none"
        raise UserError(f"search needs an arm with a cut; {arm!r} is not one of: {names}")
    scorer = settings.cut.scorer
    if not isinstance(scorer, str):
        raise UserError(f"search goes along one score; arms.{arm}.cut names {len(scorer)}")
    if gate.plain not in recipe.arms or gate.max_asr is None or gate.max_accuracy_loss is None:
        raise UserError(f"search needs an arm {gate.plain!r} and the limits gate.max_asr and gate.max_accuracy_loss")
    rows = len(training_examples(run.plan, run.rows))
    plain = _judged(run, gate.plain, None, rows)
    yield plain
    if plain.outcome == "passed":
        return
    scores = read_scores(run.scores)
    x = sorted(scores.columns[scorer])
    lo, up = 0, len(x)
    for number in range(1, rounds + 1):
        guess = find_threshold(x[lo:up], estimator=settings.cut.estimator, anchors=scores.anchors.get(scorer))
        lower, upper = math.floor(lo + shrink * (up - lo)), math.ceil(up - shrink * (up - lo)) - 1
        # the first guess stands as it is: a set without harmful rows, or full of them, is for the estimator to see
        threshold = guess if number == 1 else min(max(guess, x[lower]), x[max(upper, lower)])
        rows = bisect.bisect_right(x, threshold)
        if not rows:
            raise DefenceError(
                f"round {number}: the threshold {threshold:g} keeps no row: by these scores all are harmful"
            )
        name = f"{arm}-{number}"
        step = dataclasses.replace(settings, cut=Cut(scorer=scorer, threshold=threshold))
        with_round = dataclasses.replace(recipe, arms={**recipe.arms, name: step})
        result = _judged(run.with_recipe(with_round), name, threshold, rows)
        safe = result.outcome != "unsafe"
        yield result
        if result.outcome == "passed":
            return
        lo, up = (rows, up) if safe else (lo, rows - 1)
        if up <= lo:
            return


def _judged(run: Run, arm: str, threshold: float | None, rows: int) -> Round:
    """Tune and measure an arm, and judge it: safe by the gate, useful beside the plain arm."""
    result, gate = _measured(run, arm, threshold, rows), run.plan.gate
    assert gate.max_asr is not None and gate.max_accuracy_loss is not None
    if result.asr > gate.max_asr:
        return result
    correct, correct_plain = (_correct(run.folder, each) for each in (arm, gate.plain))
    loss = paired_difference([correct[i] for i in correct_plain], list(correct_plain.values()))
    useful = arm == gate.plain or non_inferior(loss, gate.max_accuracy_loss) != "no"
    return result._replace(outcome="passed" if useful else "useless")


def _measured(run: Run, arm: str, threshold: float | None, rows: int) -> Round:
    """Tune and measure an arm, or read what was measured before."""
    run.measure(arm)
    lines = run.folder.measurements(arm).read_text(encoding="utf-8").splitlines()
    measured = [row for row in map(json.loads, lines) if not row["category"]]
    asr, accuracy = ([row["value"] for row in measured if row["what"] == what] for what in ("asr", "accuracy"))
    thin = [
        row for row in measured if row["what"] == "asr" and decides_nothing(row | {"fewest": row["n"]}, run.plan.gate)
    ]
    if not asr or not accuracy or None in asr + accuracy or thin:
        raise DefenceError(
            f"{arm}: the search decides by asr and accuracy, and one of them could not be measured (answers.jsonl)"
        )
    return Round(arm, threshold, rows, max(asr), accuracy[0], "unsafe")


def _correct(folder: RunFolder, arm: str) -> dict[str, bool]:
    """Which rows of the task an arm answers rightly."""
    lines = folder.answers(arm).read_text(encoding="utf-8").splitlines()
    return {row["id"]: row["correct"] for row in map(json.loads, lines) if row["suite"] == "accuracy"}


def verdict(rounds: list[Round], out: Path, gate: Gate) -> str:
    """One line on how the search ended; ``search.json`` has the rounds."""
    write_json(out / "search.json", [each._asdict() for each in rounds])
    last = rounds[-1]
    if last.outcome == "passed":
        return (
            f"accepted: {last.arm}, {last.rows} rows kept, attack success {last.asr:.1%}, accuracy {last.accuracy:.1%}"
        )
    reasons = (
        f"{r.arm}: {r.outcome} (attack success {r.asr:.1%}, limit {gate.max_asr:.1%}; accuracy {r.accuracy:.1%})"
        for r in rounds
    )
    return f"rejected: no cut passed. {'; '.join(reasons)}"
