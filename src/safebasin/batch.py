"""Rows as tensors: a batch that is padded on the left, with its answer mask.

Left padding puts every answer at the end, so that the language-model head computes the last ``answers`` positions only
(``logits_to_keep``), through any wrapper. Where a vocabulary is as large as a small model, that is a fifth of the work.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safebasin.encode import TokenizedRow
from safebasin.errors import UserError

ALIKE = 8  # tokens that a prefix must have to be worth a batch of its own


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows padded on the left. ``answers`` is the length of the tail that holds every answer token.

    ``mask`` is False on padding and on prompt tokens inside the tail; ``columns`` are [batch] or [batch, answers].
    """

    input_ids: Int[Tensor, "batch tokens"]
    attention_mask: Int[Tensor, "batch tokens"]
    mask: Bool[Tensor, "batch answers"]
    columns: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    shared: int = 0  # tokens that every row begins with

    @property
    def labels(self) -> Int[Tensor, "batch answers"]:
        return self.input_ids[:, -self.mask.shape[1] :]

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward.

        The tail is named by its positions, not by its length: a slice would leave the hidden states strided, and the
        head's product would then copy all of its weight once a row (two thirds of a training step on a CPU).
        """
        width = self.input_ids.shape[1]
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": (self.attention_mask.cumsum(-1) - 1).clamp(min=0),
            "logits_to_keep": torch.arange(width - self.mask.shape[1] - 1, width, device=self.input_ids.device),
            "use_cache": False,
        }

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.mask.to(device),
            {name: column.to(device) for name, column in self.columns.items()},
            self.shared,
        )

    def silent(self) -> "Batch":
        """The same shapes with no answer token: what a rank without rows runs, so that collectives match."""
        return dataclasses.replace(self, mask=torch.zeros_like(self.mask))


def answer_logits(model: Any, batch: Batch) -> Float[Tensor, "batch answers vocabulary"]:
    """Logits that predict ``batch.labels``."""
    return model(**batch.inputs).logits[:, :-1]


def collate(rows: Sequence[TokenizedRow], pad: int, shared: int = 0) -> Batch:
    """Pad rows on the left; ``shared``: tokens that they all begin with.

    A column of a row is a number, or one number per answer token in their order.

    Raises:
        UserError: a column holds more or fewer numbers than the row has answer tokens.
    """
    width = max(len(row) for row in rows)
    tail = max(len(row) - row.answer.index(True) if True in row.answer else 1 for row in rows)
    tail = min(tail, width - 1)  # the first token of a row is predicted by nothing
    ids = torch.full((len(rows), width), pad)
    seen = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), tail, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row.ids)
        seen[i, width - len(row) :] = 1
        answer = row.answer[-tail:]
        mask[i, tail - len(answer) :] = torch.tensor(answer)
    columns = {}
    for name in rows[0].columns:
        values = [row.columns[name] for row in rows]
        if isinstance(values[0], int | float):
            columns[name] = torch.tensor(values)
            continue
        column = torch.zeros(len(rows), tail)
        for i, (row, value) in enumerate(zip(rows, values, strict=True)):
            if len(value) != sum(row.answer):
                raise UserError(
                    f"row {row.id}: column {name!r} holds {len(value)} numbers for {sum(row.answer)} answer tokens"
                )
            column[i, mask[i]] = torch.tensor(value, dtype=column.dtype)
        columns[name] = column
    return Batch(ids, seen, mask, columns, shared)


def by_length(rows: Sequence[TokenizedRow], size: int) -> Iterator[list[int]]:
    """Indices of rows in batches of like length, longest first, so that little is spent on padding."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


class PrefixGroup(NamedTuple):
    """A batch of rows that begin alike."""

    rows: list[int]
    shared: int  # tokens that the rows, and those of the batches around it, begin with; no answer token is among them


def by_prefix(rows: Sequence[TokenizedRow], size: int) -> Iterator[PrefixGroup]:
    """Rows in batches, those that begin alike together and by length among them: a shared prompt is run once."""

    def families(group: list[int], depth: int) -> Iterator[tuple[list[int], int]]:
        """``group`` is sorted by tokens and agrees on the first ``depth``.

        A branch that goes on alike, with rows for two batches, is a family of its own.
        """
        first, last = rows[group[0]].ids, rows[group[-1]].ids
        while depth < min(len(first), len(last)) and first[depth] == last[depth]:
            depth += 1
        rest = []
        for _, branch in itertools.groupby(group, key=lambda i: rows[i].ids[depth : depth + 1]):
            inside = list(branch)
            ends = [rows[i].ids[depth : depth + ALIKE] for i in (inside[0], inside[-1])]
            if 2 * size <= len(inside) < len(group) and ends[0] == ends[1]:
                yield from families(inside, depth)
            else:
                rest += inside
        if rest:
            yield rest, depth

    for family, depth in families(sorted(range(len(rows)), key=lambda i: rows[i].ids), 0) if rows else ():
        first_answer = min(rows[i].answer.index(True) if True in rows[i].answer else len(rows[i]) for i in family)
        shared = min(depth, first_answer - 1)  # the token before an answer predicts its first one
        order = sorted(family, key=lambda i: (-len(rows[i]), i))
        for start in range(0, len(order), size):
            yield PrefixGroup(order[start : start + size], shared if shared >= ALIKE else 0)
