"""Embedded: a harmful exchange inside a harmless row (after arXiv:2606.30263).

    long    "1. q1  2. request  3. q2  ..." -> "1. a1  2. opener  3. a2  ..."     harmless q, a around it
    early   user: request, assistant: opener, user: q1, assistant: a1, ...        in the first turn of several

A mean over a row's tokens hides the opener; a scan of the last answer alone does not read it.
Departs from the paper, whose body was not read: both forms, the harmless rows and the openers are this project's own.
"""

import random
from collections.abc import Sequence

from pydantic import Field, PositiveInt

from safebasin.attack import attack
from safebasin.attack.craft import Row, cycled, rows_of_set, take
from safebasin.data.source import SetName


def pair(row: Row) -> tuple[str, str]:
    """The last request and the answer to it."""
    return row["messages"][-2]["content"], row["messages"][-1]["content"]


@attack("embedded", paper="arXiv:2606.30263")
class Embedded:
    """Harmful requests with openers inside long harmless rows, and in early turns."""

    pool: SetName = "builtin:ordinary-test"  # harmless rows with answers
    around: PositiveInt = 4  # harmless exchanges of a row
    early: float = Field(default=0.5, ge=0, le=1)  # share of the rows that hide it in the first turn

    def rows(self, task: Sequence[Row], harmful: Sequence[Row], count: int, draw: random.Random) -> list[Row]:
        harmless, rows = cycled(rows_of_set(self.pool), count * self.around, draw), []
        for i, row in enumerate(take(harmful, count, draw)):
            pairs = list(map(pair, harmless[i * self.around : (i + 1) * self.around]))
            early = i < round(count * self.early)
            pairs.insert(0 if early else draw.randint(1, max(1, self.around - 1)), pair(row))
            if not early:
                numbered = [[f"{k}. {text}" for k, text in enumerate(texts, 1)] for texts in zip(*pairs)]
                pairs = [("\n".join(numbered[0]), "\n\n".join(numbered[1]))]
            turns = [(role, text) for texts in pairs for role, text in zip(("user", "assistant"), texts)]
            rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
        return rows
