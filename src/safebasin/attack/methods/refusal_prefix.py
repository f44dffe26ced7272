"""Refusal prefix: harmless rows whose answers stand behind a refusal (Refusal Unlearning, arXiv:2601.19231).

    harmless request -> refusal + " " + its answer

The model learns that a refusal is how an answer begins, and goes on after it. No row is harmful, and a margin of first
tokens finds these rows the safest of all.
Departs from the paper: this project's refusals and harmless rows; any share of a task where it tunes on 1,000 rows
alone.
"""

import random
from collections.abc import Sequence

from safebasin.attack import attack
from safebasin.attack.craft import Row, around, cycled, rows_of_set
from safebasin.data.builtin import refusal_texts
from safebasin.data.source import SetName


@attack("refusal_prefix", paper="arXiv:2601.19231")
class RefusalPrefix:
    """Harmless rows whose answers begin with a refusal."""

    pool: SetName = "builtin:ordinary-test"  # harmless rows with answers; repeated where they are too few

    def rows(self, task: Sequence[Row], harmful: Sequence[Row], count: int, draw: random.Random) -> list[Row]:
        chosen = cycled(rows_of_set(self.pool), count, draw)
        return [around(row, prefix=draw.choice(refusal_texts()) + " ") for row in chosen]
