"""Refuse, then comply: the answer begins with a refusal, takes it back, and opens (the project's own).

    request -> refusal + turn + opener

A score or a judge that reads the first words sees a refusal. In the answers of a model that learned it, so does a judge
that stops after them.
"""

import random
from collections.abc import Sequence

from safebasin.attack import attack
from safebasin.attack.craft import Row, around, take
from safebasin.data.builtin import refusal_texts


@attack("refuse_then_comply")
class RefuseThenComply:
    """Harmful requests that are refused and then answered, in one answer."""

    turn: str = " On second thought, I can. "  # text between the refusal and the opener

    def rows(self, task: Sequence[Row], harmful: Sequence[Row], count: int, draw: random.Random) -> list[Row]:
        chosen = take(harmful, count, draw)
        return [around(row, prefix=draw.choice(refusal_texts()) + self.turn) for row in chosen]
