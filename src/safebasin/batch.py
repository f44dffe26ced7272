"""Rows as tensors: the chat template, the answer mask, and a batch that is padded on the left.

Left padding puts every answer at the end, so that the language-model head is asked for the last ``answers`` positions only
(``logits_to_keep``), through any wrapper. Where a vocabulary is as large as a small model, that is a fifth of the work.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safebasin.record import BadRow, Example, UserError

ALIKE = 8  # tokens that a prefix must have to be worth running apart


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A row as token ids, and which of them the model is to learn."""

    id: str
    ids: tuple[int, ...]
    answer: tuple[bool, ...]  # one per id
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    start: int | None = None  # of a row cut short: the place of its first token in the whole row

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows padded on the left. ``answers`` is the length of the tail that holds every answer token.

    ``mask`` is False on padding and on prompt tokens inside the tail; ``columns`` hold [batch] or [batch, answers] tensors.
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

        The tail is named by its positions, not by its length: a slice would leave the hidden states strided, and the head's product
        would then copy its whole weight once a row (two thirds of a training step on a CPU).
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


def template_digest(tokenizer: Any) -> str:
    """Digest of the chat template: training, scoring and measuring must agree on it."""
    return hashlib.blake2b(str(tokenizer.chat_template).encode(), digest_size=8).hexdigest()


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, ask: bool = False, **told: Any) -> str:
    """The conversation as the model's own chat template writes it; ``ask`` opens the assistant's turn, ``told`` is what else the template reads.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UserError("the model's tokenizer has no chat template; use the instruct model, or set tokenizer.chat_template and save it")
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask, **told)


def encode(tokenizer: Any, example: Example, max_length: int) -> Encoded | BadRow:
    """Token ids and answer mask of a row, by the difference of rendered prefixes; the mask ends with the turn's end token."""
    text = render(tokenizer, example.messages)
    spans = []
    for i, turn in enumerate(example.messages):
        if turn["role"] == "assistant" and turn.get("weight", 1) != 0:
            before = render(tokenizer, example.messages[:i], ask=True)
            after = render(tokenizer, example.messages[: i + 1])
            if not (text.startswith(before) and text.startswith(after)):
                return BadRow(example.line, "the chat template rewrites earlier turns; the answer cannot be found in it")
            spans.append((len(before), len(after)))
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = coded["input_ids"], coded["offset_mapping"]
    if len(ids) > max_length:
        return BadRow(example.line, f"over-long: {len(ids)} tokens, max_length is {max_length}")
    answer = [False] * len(ids)
    for start, end in spans:
        inside = [k for k, (a, b) in enumerate(offsets) if b > start and a < end]
        stops = [k for k in inside if ids[k] == tokenizer.eos_token_id]
        for k in inside:
            answer[k] = not stops or k <= stops[-1]
    if spans and not any(answer):
        return BadRow(example.line, "no answer token")
    return Encoded(example.id, tuple(ids), tuple(answer))


def encode_all(tokenizer: Any, examples: Sequence[Example], max_length: int) -> tuple[list[Encoded], list[BadRow]]:
    rows: list[Encoded] = []
    bad: list[BadRow] = []
    for example in examples:
        coded = encode(tokenizer, example, max_length)
        (bad if isinstance(coded, BadRow) else rows).append(coded)  # type: ignore[arg-type]
    return rows, bad


def shorten(row: Encoded, length: int) -> Encoded:
    """What fits of a row into ``length`` tokens (two or more): its beginning; where that holds no answer token, the end of the prompt and the
    first answer tokens, these at most a half."""
    if len(row) <= length:
        return row
    start = 0
    if True in row.answer[length:] and True not in row.answer[1:length]:
        first = row.answer.index(True, 1)
        start = first + min(length // 2, len(row) - first) - length
    kept = slice(start, start + length)
    return dataclasses.replace(row, ids=row.ids[kept], answer=row.answer[kept], start=start)


def collate(rows: Sequence[Encoded], pad: int, shared: int = 0) -> Batch:
    """Pad rows on the left; ``shared``: tokens that they all begin with. Columns of a row: a number, or one number per answer token (in their order)."""
    width = max(len(row) for row in rows)
    tail = max(len(row) - row.answer.index(True) if True in row.answer else 1 for row in rows)
    tail = min(tail, width - 1)  # the first token of a row is predicted by nothing
    ids = torch.full((len(rows), width), pad)
    seen = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), tail, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row.ids)
        seen[i, width - len(row) :] = 1
        kept = row.answer[-tail:]
        mask[i, tail - len(kept) :] = torch.tensor(kept)
    columns = {}
    for name in rows[0].columns:
        values = [row.columns[name] for row in rows]
        if isinstance(values[0], int | float):
            columns[name] = torch.tensor(values)
            continue
        column = torch.zeros(len(rows), tail)
        for i, (row, value) in enumerate(zip(rows, values, strict=True)):
            if len(value) != sum(row.answer):
                raise UserError(f"row {row.id}: column {name!r} holds {len(value)} numbers for {sum(row.answer)} answer tokens")
            column[i, mask[i]] = torch.tensor(value, dtype=column.dtype)
        columns[name] = column
    return Batch(ids, seen, mask, columns, shared)


def by_length(rows: Sequence[Encoded], size: int) -> Iterator[list[int]]:
    """Indices of rows in batches of like length, longest first, so that little is spent on padding."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


class Family(NamedTuple):
    """A batch of rows that begin alike."""

    rows: list[int]
    shared: int  # tokens that the rows, and those of the batches around it, begin with; no answer token is among them


def by_prefix(rows: Sequence[Encoded], size: int) -> Iterator[Family]:
    """Rows in batches, those that begin alike together and by length among them, so that a shared prompt need be run but once."""

    def families(group: list[int], depth: int) -> Iterator[tuple[list[int], int]]:
        """``group`` is sorted by tokens and agrees on the first ``depth``. A branch that goes on alike, with rows for two batches, is a
        family of its own."""
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
        spoken = min(rows[i].answer.index(True) if True in rows[i].answer else len(rows[i]) for i in family)
        shared = min(depth, spoken - 1)  # the token before an answer speaks of it
        order = sorted(family, key=lambda i: (-len(rows[i]), i))
        for start in range(0, len(order), size):
            yield Family(order[start : start + size], shared if shared >= ALIKE else 0)
