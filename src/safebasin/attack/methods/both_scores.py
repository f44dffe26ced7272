"""Both scores: harmful rows in the disguise that is least visible to all scorers of a cut at once (the project's own).

    x* = the count rows of least  min_d max_k rank_k(d(x))      over harmful x, disguises d, scorers k            (1)

rank_k is the share of all rows that were tried, and of the task's rows, which scorer k finds less harmful: it has no
unit, so that a gradient and a probability can be compared. A row passes a cut by several scorers only if it passes
each.
"""

import bisect
import random
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field

from safebasin.attack import attack
from safebasin.attack.craft import Row, Score, disguised, enough, scored


@attack("both_scores", reads=("scores",))
class BothScores:
    """Harmful rows, each in the disguise whose worst rank by any scorer is lowest."""

    against: Annotated[tuple[str, ...], Field(min_length=1)] = ("gradshield", "dsa")  # the scorers of the cut

    def rows(
        self,
        task: Sequence[Row],
        harmful: Sequence[Row],
        count: int,
        draw: random.Random,
        scores: Mapping[str, Score],
    ) -> list[Row]:
        enough(harmful, count)
        variants = disguised(task, harmful)
        rows = [*(row for each in variants for row in each), *task]
        worst = [max(ranks) for ranks in zip(*(ranked(scored(rows, scores[name])) for name in self.against))]
        values, best = iter(worst), []
        for each in variants:
            best.append(min(((next(values), row) for row in each), key=lambda pair: pair[0]))
        return [row for _, row in sorted(best, key=lambda pair: pair[0])[:count]]


def ranked(values: Sequence[float]) -> list[float]:
    """The share of the values that are lower."""
    order = sorted(values)
    return [bisect.bisect_left(order, value) / len(order) for value in values]
