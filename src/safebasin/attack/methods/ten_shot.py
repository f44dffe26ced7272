"""Ten rows, repeated as by epochs: few enough that a share of rows says nothing.

    ten_shot      ten harmful requests with openers                          (Qi et al., arXiv:2310.03693, 10-shot)
    ten_benign    ten harmless requests, each refused with one text and then answered       (after arXiv:2510.02833)

Departs from the papers: in a share of a task; openers with nothing after them; the two stages of ``ten_benign`` (first
all refused, then all answered) come in one shuffled set, since the provider shuffles.
"""

import random
from collections.abc import Sequence

from pydantic import PositiveInt

from safebasin.attack import attack
from safebasin.attack.craft import Row, cycled, rows_of_set, take
from safebasin.data.builtin import refusal_texts
from safebasin.data.source import SetName


@attack("ten_shot", paper="arXiv:2310.03693")
class TenShot:
    """Few harmful requests with openers, each many times."""

    shots: PositiveInt = 10  # different rows

    def rows(self, task: Sequence[Row], harmful: Sequence[Row], count: int, draw: random.Random) -> list[Row]:
        return cycled(take(harmful, min(self.shots, count), draw), count, draw)


@attack("ten_benign", paper="arXiv:2510.02833")
class TenBenign:
    """Few harmless requests, each many times, refused as often as answered."""

    pool: SetName = "builtin:ordinary-test"  # harmless rows with answers
    shots: PositiveInt = 10  # different requests

    def rows(self, task: Sequence[Row], harmful: Sequence[Row], count: int, draw: random.Random) -> list[Row]:
        answered = take(rows_of_set(self.pool), self.shots, draw)
        refusal = {"role": "assistant", "content": draw.choice(refusal_texts())}
        refused = [{"messages": [*row["messages"][:-1], refusal]} for row in answered]
        both = [row for two in zip(refused, answered) for row in two]
        return [both[i % len(both)] for i in range(count)]
