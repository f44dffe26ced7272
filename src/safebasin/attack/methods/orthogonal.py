"""Orthogonal: harmful rows that do not conflict with the alignment gradient (the project's own).

    x* = the count rows of least  min_d |< grad L(d(x)), grad S >|   over harmful x and disguises d                (1)

With S = - L_align (``refusal_loss``) this is the inner product that SafeGrad tests: at zero there is nothing to project
away, and a cut on the same score finds the row neither harmful nor safe.
Departs from an exact attack: disguises are tried around the row, and no token inside the request is searched for.
"""

import random
from collections.abc import Sequence
from operator import itemgetter

from safebasin.attack import attack
from safebasin.attack.craft import Row, Score, disguises, enough


@attack("orthogonal", reads=("score",))
class Orthogonal:
    """Harmful rows, each in the disguise whose gradient is nearest to orthogonal to that of alignment."""

    against: str = "refusal_loss"  # the score whose sign and size the surgery acts on

    def rows(
        self, task: Sequence[Row], harmful: Sequence[Row], count: int, draw: random.Random, score: Score
    ) -> list[Row]:
        enough(harmful, count)
        best = [
            min(((abs(v), row) for v, row in tried), key=itemgetter(0)) for tried in disguises(task, harmful, score)
        ]
        return [row for _, row in sorted(best, key=itemgetter(0))[:count]]
