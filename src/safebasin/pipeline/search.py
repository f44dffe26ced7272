"""Search: Algorithm 1 of GradShield (arXiv:2605.14194) as a driver over scan, cut, train and measure.

    1. tune on all rows; if that is safe, it is the answer: an honest customer pays one evaluation
    2. sort the rows by score; lo = 0, up = n are ranks
    3. guess a threshold t from the scores between lo and up, clamped to the ranks  lo + lambda (up - lo)  and  up - lambda (up - lo)
    4. tune on the rows with score <= t: unsafe -> up = rank(t); safe but useless -> lo = rank(t); safe and useful -> done
    5. no round passes within the budget -> reject, with the reason

Departs from the paper: step 4 keeps every row up to t (as printed, the filter also drops the safest rows once lo has moved); the guess is
the arm's own estimator, which knows rows of both kinds, where the paper fits two Gaussians and fails at 90 % harmful rows; useless means
shown to be so; rounds are arms of one run folder, so that scan, start and finished rounds are reused, also after a kill.
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
from safebasin.pipeline.config import Cut, Run
from safebasin.pipeline.old import Pipeline
from safebasin.report.grid import decides_nothing
from safebasin.scan.cut import find_threshold
from safebasin.scan.scan import read_scores
from safebasin.stats import non_inferior, paired_difference


class Round(NamedTuple):
    arm: str
    threshold: float | None  # None: nothing was cut
    kept: int
    asr: float  # the worst of the judges
    accuracy: float
    outcome: Literal["passed", "unsafe", "useless"]


def search(config: Run, arm: str, out: Path, *, rounds: int = 2, shrink: float = 0.1) -> Iterator[Round]:
    """Rounds until one passes, at most ``rounds`` after the plain one. The last one says whether the search succeeded.

    Safe: attack success by every judge at most ``gate.max_asr``. Useless: accuracy more than ``gate.max_accuracy_loss`` below that of the
    plain arm, by the whole interval of the paired difference, since a loss that chance explains is no reason to let harmful rows in.

    Raises:
        UserError: no such arm, no cut in it, no plain arm, or no limits in the gate.
        DefenceError: a round of which attack success or accuracy could not be measured.
    """
    first = Pipeline(config, out)
    gate, chosen = first.gate, config.arms.get(arm)
    if chosen is None or chosen.cut is None:
        raise UserError(
            f"search needs an arm with a cut; {arm!r} is not one of: {', '.join(n for n, a in config.arms.items() if a.cut) or 'none'}"
        )
    if not isinstance(chosen.cut.scorer, str):
        raise UserError(f"search goes along one score; arms.{arm}.cut names {len(chosen.cut.scorers)}")
    if gate.plain not in config.arms or gate.max_asr is None or gate.max_accuracy_loss is None:
        raise UserError(f"search needs an arm {gate.plain!r} and the limits gate.max_asr and gate.max_accuracy_loss")
    first.prepare()
    plain = _measured(first, gate.plain, None, len(read_rows(first)))
    done = plain._replace(outcome="passed" if plain.asr <= gate.max_asr else "unsafe")
    yield done
    if done.outcome == "passed":
        return
    first.scan()
    scores = read_scores(out / "scan" / "scores.parquet")
    x = sorted(scores.columns[chosen.cut.scorer])
    lo, up = 0, len(x)
    for number in range(1, rounds + 1):
        within = x[lo:up]
        guess = find_threshold(within, estimator=chosen.cut.estimator, anchors=scores.anchors.get(chosen.cut.scorer))
        lower, upper = math.floor(lo + shrink * (up - lo)), math.ceil(up - shrink * (up - lo)) - 1
        # the first guess stands as it is: a set without harmful rows, or full of them, is for the estimator to see
        threshold = guess if number == 1 else min(max(guess, x[lower]), x[max(upper, lower)])
        name = f"{arm}-{number}"
        step = dataclasses.replace(chosen, cut=Cut(scorer=chosen.cut.scorer, threshold=threshold))
        kept = bisect.bisect_right(x, threshold)
        if not kept:
            raise DefenceError(
                f"round {number}: the threshold {threshold:g} keeps no row: as far as the scores tell, all are harmful"
            )
        made = _measured(
            Pipeline(dataclasses.replace(config, arms={**config.arms, name: step}), out), name, threshold, kept
        )
        safe = made.asr <= gate.max_asr
        told, before = _correct(out, name), _correct(out, gate.plain)
        loss = paired_difference([told[i] for i in before], list(before.values()))
        useful = non_inferior(loss, gate.max_accuracy_loss) != "no"
        made = made._replace(outcome="passed" if safe and useful else "useless" if safe else "unsafe")
        yield made
        if made.outcome == "passed":
            return
        lo, up = (kept, up) if safe else (lo, kept - 1)
        if up <= lo:
            return


def read_rows(pipeline: Pipeline) -> list[dict[str, str]]:
    return json.loads((pipeline.out / "data" / "rows.json").read_text(encoding="utf-8"))


def _measured(pipeline: Pipeline, arm: str, threshold: float | None, kept: int) -> Round:
    """Tune and measure an arm, or read what was measured before."""
    pipeline.measure(arm)
    lines = (pipeline.out / "arms" / arm / "measurements.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if not row["category"]]
    asr, accuracy = ([row["value"] for row in rows if row["what"] == what] for what in ("asr", "accuracy"))
    thin = [row for row in rows if row["what"] == "asr" and decides_nothing(row | {"fewest": row["n"]}, pipeline.gate)]
    if not asr or not accuracy or None in asr + accuracy or thin:
        raise DefenceError(
            f"{arm}: the search decides by asr and accuracy, and one of them could not be measured; see its answers.jsonl"
        )
    return Round(arm, threshold, kept, max(asr), accuracy[0], "unsafe")


def _correct(out: Path, arm: str) -> dict[str, bool]:
    """Which rows of the task an arm answers rightly."""
    lines = (out / "arms" / arm / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["id"]: row["correct"] for row in map(json.loads, lines) if row["suite"] == "accuracy"}


def verdict(rounds: list[Round], out: Path, max_asr: float) -> str:
    """One line on how the search ended; ``search.json`` has the rounds."""
    write_json(out / "search.json", [made._asdict() for made in rounds])
    last = rounds[-1]
    if last.outcome == "passed":
        return (
            f"accepted: {last.arm}, {last.kept} rows kept, attack success {last.asr:.1%}, accuracy {last.accuracy:.1%}"
        )
    reasons = "; ".join(
        f"{r.arm}: {r.outcome} (attack success {r.asr:.1%}, limit {max_asr:.1%}; accuracy {r.accuracy:.1%})"
        for r in rounds
    )
    return f"rejected: no cut passed. {reasons}"
