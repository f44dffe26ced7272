"""Search: Algorithm 1 of GradShield (arXiv:2605.14194) as a driver over scan, cut, train and measure.

    1. tune on all rows; if that is safe, it is the answer: an honest customer pays one evaluation
    2. sort the rows by score; lo = 0, up = n are ranks
    3. guess a threshold t from the scores between lo and up, clamped to the ranks
       lo + lambda (up - lo)  and  up - lambda (up - lo)
    4. tune on the rows with score <= t:
       unsafe -> up = rank(t); safe but useless -> lo = rank(t); safe and useful -> done
    5. no round passes within the budget -> reject, with the reason

Prompts that a cut is chosen by prove nothing about it: one half of every suite's prompts, by a digest of their ids,
decides steps 1 and 4, and the gate judges the arm that they choose, once, on the other half.

Departs from the paper: step 4 keeps every row up to t (as printed, the filter also drops the safest rows once lo has
moved); the guess is the arm's own estimator, which knows rows of both kinds, where the paper fits two Gaussians and
fails at 90 % harmful rows; useless means shown to be so; rounds are arms of one run folder, so that scan, start and
finished rounds are reused, also after a kill.
"""

import bisect
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safebasin.data.files import write_json
from safebasin.errors import DefenceError, UserError
from safebasin.pipeline.config import Cut, Recipe
from safebasin.pipeline.parse import plain
from safebasin.pipeline.read import training_examples
from safebasin.pipeline.run import Run
from safebasin.registry import split_spec
from safebasin.repair.walk import make_edits
from safebasin.report.findings import INCONCLUSIVE
from safebasin.report.gate import CODES, judge_gate
from safebasin.report.limits import Gate
from safebasin.report.rates import HARMFUL
from safebasin.report.report import Report
from safebasin.report.roles import roles_of
from safebasin.report.table import collect
from safebasin.scan.scores import read_scores
from safebasin.scan.threshold import find_threshold


class Round(NamedTuple):
    """One tuning of a search, and how it was judged."""

    arm: str
    threshold: float | None  # of the cut, or the strength of the repair; None: neither
    rows: int  # that were trained on
    asr: float  # the worst of the judges, on the half of the prompts that decided the outcome
    accuracy: float | None  # None: not measured
    outcome: Literal["passed", "unsafe", "useless", "unconfirmed", "failed"]
    reasons: tuple[str, ...]  # of the gate

    @property
    def rates(self) -> str:
        return f"attack success {self.asr:.1%}" + ("" if self.accuracy is None else f", accuracy {self.accuracy:.1%}")


def search(recipe: Recipe, arm: str, out: Path, *, rounds: int = 2, shrink: float = 0.1) -> Iterator[Round]:
    """Rounds until one passes or is not confirmed, at most ``rounds`` after the plain one. The last one says whether
    the search succeeded.

    A round is unsafe where attack success is above the gate's limit, and useless where a limit of the task, or of
    over-refusal, is crossed by the whole interval, since a loss that chance explains is no reason to let harmful rows
    in. The first round that is neither is judged by the gate on the other half of the prompts: it passed, failed, or is
    unconfirmed.

    Raises:
        UserError: no such arm, no cut in it, an arm that the gate compares with is missing, or fewer than one round.
        DefenceError: a round of which attack success could not be measured.
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
    specs, edit = (
        list(settings.repair or ()),
        next((e for e in make_edits(settings.repair or ()) if e.entry.strength), None),
    )
    if edit is None or edit.entry.strength is None:
        raise UserError(f"search walks the strength of an edit, and no edit of arms.{arm}.repair has one")
    _prepared(run, recipe)
    place = next(i for i, spec in enumerate(specs) if split_spec(spec, "repair")[0] == edit.entry.name)
    (field, weak, strong), fields = edit.entry.strength, split_spec(specs[place], "repair")[1]
    value, rows = float(getattr(edit, field)), len(training_examples(run.plan, run.rows))
    result = _judged(run, gate.plain, None, rows)
    yield result
    for number in range(1, rounds + 1):
        if result.outcome not in ("unsafe", "useless"):
            return
        name, specs[place] = f"{arm}-{number}", {edit.entry.name: {**fields, field: value}}
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
    _prepared(run, recipe)
    rows = len(training_examples(run.plan, run.rows))
    result = _judged(run, gate.plain, None, rows)
    yield result
    if result.outcome != "unsafe":
        return
    scores = read_scores(run.scores)
    x = sorted(scores.columns[scorer])
    lo, up = 0, len(x)
    for number in range(1, rounds + 1):
        anchors = scores.anchors.get(scorer)
        guess = find_threshold(x[lo:up], estimator=settings.cut.estimator, anchors=anchors, scorer=scorer)
        lower, upper = math.floor(lo + shrink * (up - lo)), math.ceil(up - shrink * (up - lo)) - 1
        # the first guess stands as it is: a set without harmful rows, or full of them, is for the estimator to see
        threshold = guess if number == 1 else min(max(guess, x[lower]), x[max(upper, lower)])
        rows = bisect.bisect_right(x, threshold)
        if not rows:
            raise DefenceError(
                f"round {number}: the threshold {threshold:g} keeps no row: by these scores all are harmful"
            )
        name = f"{arm}-{number}"
        step = dataclasses.replace(settings, cut=Cut(scorer=scorer, threshold=threshold, max_share=1.0))
        with_round = dataclasses.replace(recipe, arms={**recipe.arms, name: step})
        result = _judged(run.with_recipe(with_round), name, threshold, rows)
        yield result
        if result.outcome not in ("unsafe", "useless"):
            return
        lo, up = (rows, up) if result.outcome == "useless" else (lo, rows - 1)
        if up <= lo:
            return


def _prepared(run: Run, recipe: Recipe) -> None:
    """Measure the model as it was, which the gate compares with.

    Raises:
        UserError: an arm or a limit is missing.
    """
    gate = run.plan.gate
    start = roles_of(plain(recipe.arms), gate).start
    if gate.plain not in recipe.arms or gate.max_asr is None:
        raise UserError(f"search needs an arm {gate.plain!r} and the limit gate.max_asr")
    if start is None and gate.max_over_refusal_gain is not None:
        raise UserError("search needs the model as it was, arms: {start: {}}, or gate: {max_over_refusal_gain: null}")
    if start is not None:
        run.measure(start)


def _judged(run: Run, arm: str, threshold: float | None, rows: int) -> Round:
    """Tune and measure an arm, or read what was measured before, and judge it."""
    run.measure(arm)
    gate = dataclasses.replace(run.plan.gate, arm=arm)
    safety = dataclasses.replace(
        gate, decide="point", max_asr_upper=None, max_accuracy_loss=None, max_loss={}, max_over_refusal_gain=None
    )
    report = collect(run.folder.path, gate=gate, part=_chooses)
    code, reasons = (verdict := judge_gate(report, safety)).code, verdict.reasons
    if code == CODES[INCONCLUSIVE]:
        raise DefenceError(f"{arm}: the search decides by attack success: {reasons[0]} (answers.jsonl)")
    if code:
        return _round(report, arm, threshold, rows, "unsafe", reasons)
    if useless := list(_useless(report, gate, arm)):
        return _round(report, arm, threshold, rows, "useless", tuple(useless))
    report = collect(run.folder.path, gate=gate, part=lambda prompt: not _chooses(prompt))
    outcome = {0: "passed", CODES[INCONCLUSIVE]: "unconfirmed"}.get(report.verdict.code, "failed")
    return _round(report, arm, threshold, rows, outcome, report.verdict.reasons)


def _useless(report: Report, gate: Gate, arm: str) -> Iterator[str]:
    """Limits of the task and of over-refusal that the whole interval crosses."""
    limits = gate.losses | ({} if gate.max_over_refusal_gain is None else {"over_refusal": gate.max_over_refusal_gain})
    for c, (name, limit) in itertools.product(report.comparisons, limits.items()):
        against = report.start if name in HARMFUL else gate.plain
        ours = name in (c.quantity, c.suite) and (c.arm, c.against) == (arm, against)
        if ours and c.low is not None and c.high is not None and (c.low if name in HARMFUL else -c.high) > limit:
            yield f"{name}: the whole interval of its change crosses the limit"


def _chooses(prompt: str) -> bool:
    """Whether a prompt is of the half that cuts are chosen by."""
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass")).digest()[0] % 2 == 0


def _round(
    report: Report, arm: str, threshold: float | None, rows: int, outcome: Any, reasons: tuple[str, ...]
) -> Round:
    asr, accuracy = ([r.value for r in report.of(what, arm) if r.value is not None] for what in ("asr", "accuracy"))
    return Round(arm, threshold, rows, max(asr, default=math.nan), min(accuracy, default=None), outcome, reasons)


def verdict(rounds: list[Round], out: Path) -> str:
    """One line on how the search ended; ``search.json`` has the rounds."""
    write_json(out / "search.json", [each._asdict() for each in rounds])
    last = rounds[-1]
    if last.outcome == "passed":
        return f"accepted: {last.arm}, {last.rows} rows kept, on prompts that did not choose it: {last.rates}"
    if last.outcome == "unconfirmed":
        return f"not confirmed: {last.arm}, on prompts that did not choose it: {'; '.join(last.reasons)}"
    return "rejected: no cut passed. " + "; ".join(f"{r.arm}: {r.outcome} ({'; '.join(r.reasons)})" for r in rounds)
