"""A stream of rows: those of a step are a function of (seed, step) alone, whatever the ranks and micro-batches.

So one process with 8 rows, four micro-batches of 2 and two ranks of 4 see the same rows at every step, and the state of
a stream is the number of the step.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from safebasin.batch import Batch, collate
from safebasin.encode import TokenizedRow
from safebasin.errors import UserError


@runtime_checkable
class BatchSource(Protocol):
    """What the oracle asks of a stream."""

    def at(self, step: int, rank: int = 0, ranks: int = 1) -> list[Batch]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Rows in a seeded order: ``batch`` an optimizer step over all ranks, in micro-batches of at most ``micro``."""

    name: str
    rows: Sequence[TokenizedRow]
    batch: int
    micro: int
    seed: int
    pad: int

    def __post_init__(self) -> None:
        if not self.rows:
            raise UserError(f"the stream {self.name!r} has no rows")

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch; the last one may be smaller."""
        return math.ceil(len(self.rows) / self.batch)

    def rows_at(self, step: int) -> list[TokenizedRow]:
        """The rows of an optimizer step over all ranks, longest first."""
        epoch, position = divmod(step, self.steps)
        order = np.random.default_rng((self.seed, epoch, *self.name.encode())).permutation(len(self.rows))
        rows = [self.rows[i] for i in order[position * self.batch : (position + 1) * self.batch]]
        return sorted(rows, key=len, reverse=True)

    def at(self, step: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """This rank's micro-batches. Every rank has as many; one without rows runs a silent batch."""
        rows = self.rows_at(step)
        count = math.ceil(math.ceil(len(rows) / ranks) / self.micro)
        batches = []
        for i in range(count):
            mine = rows[rank::ranks][i * self.micro : (i + 1) * self.micro]
            batches.append(collate(mine, self.pad) if mine else collate(rows[:1], self.pad).silent())
        return batches
