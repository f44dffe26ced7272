"""Rows as tensors: a batch that is padded on the left, with its answer mask, and the same rows packed for a forward.

Left padding puts every answer at the end, so that the language-model head computes the last ``answers`` positions only
(``logits_to_keep``), through any wrapper. Where a vocabulary is as large as a small model, that is a fifth of the work.

``target_logits`` runs the rows as one sequence where the model takes it: a tree of tokens, in which what rows begin
with alike stands once, every token attends to those before it in its own row, and the head runs at the positions that
predict an answer token. No position is run for nothing, and the logits are those of the padded rows.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from safebasin.encode import TokenizedRow
from safebasin.errors import UserError
from safebasin.models.adapter import without_adapter

ALIKE = 8  # tokens that a prefix must have to be worth a batch of its own
# Tokens of rows in one sequence, beside what they share: attention costs their square, and few leave a GPU idle.
SEQUENCE = 4096 if torch.cuda.is_available() else 512


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
        """The token ids of the tail, answers and others."""
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

    def targets(self, values: Float[Tensor, "batch positions width"]) -> Float[Tensor, "n width"]:
        """Of values at the positions of ``logits_to_keep``: those that predict an answer token, row after row."""
        return values[:, :-1][self.mask]

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
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
    """Logits that predict ``batch.labels``, from padded rows."""
    return model(**batch.inputs).logits[:, :-1]


def target_logits(model: Any, batch: Batch) -> Float[Tensor, "n vocabulary"]:
    """Logits that predict the answer tokens, row after row: ``answer_logits(model, batch)[batch.mask]``, with less
    work where the model takes packed rows.
    """
    rows = layout(model, batch)
    return rows.targets(model(**rows.inputs).logits)


@dataclasses.dataclass(frozen=True)
class Packed:
    """A batch as one sequence. A token that rows begin with alike stands once; each stands behind those before it.

    ``attends``: whether the first token attends to the second, which may be one of a prefix that is in a cache;
    ``predicts``: the place that predicts each answer token, row after row.
    """

    input_ids: Int[Tensor, "1 tokens"]
    position_ids: Int[Tensor, "1 tokens"]
    attends: Bool[Tensor, "tokens all_tokens"]
    predicts: Int[Tensor, " n"]
    mask_dtype: torch.dtype  # bool, or the type of numbers that are added to attention's scores

    @property
    def inputs(self) -> dict[str, Any]:
        return {
            "input_ids": self.input_ids,
            "attention_mask": tree_mask(self.attends, self.mask_dtype),
            "position_ids": self.position_ids,
            "logits_to_keep": self.predicts,
            "use_cache": False,
        }

    def targets(self, values: Float[Tensor, "1 n width"]) -> Float[Tensor, "n width"]:
        return values[0]


def layout(model: Any, batch: Batch) -> Batch | Packed:
    """The form in which a model runs a batch: packed where it takes that and less is computed, else padded."""
    rows = packed_or_why(model, batch)
    return batch if isinstance(rows, str) else rows


def packed_or_why(model: Any, batch: Batch) -> Packed | str:
    """The batch as one sequence, or why it is padded."""
    reason = padded_because(model)
    if reason is not None or not batch.mask.any():
        return reason or "it has no answer token"
    inner = without_adapter(model)
    packed = pack(batch, mask_dtype(inner))
    # A token costs 12 h^2 multiply-adds in a layer of width h, a pair of tokens 2 h: 6 h to 1, in units of 2 h.
    width = 6 * inner.config.get_text_config().hidden_size
    rows, padded = batch.input_ids.shape
    if packed is None:
        return "a row begins with its answer"
    if len(packed.attends) * (width + len(packed.attends)) > rows * padded * (width + padded):
        return f"its rows are long ({padded} tokens) and share little: one sequence of them would cost more"
    return packed


def tree_mask(attends: Bool[Tensor, "tokens all_tokens"], dtype: torch.dtype) -> Tensor:
    """As attention takes it: booleans, or numbers that are added to its scores."""
    mask = attends[None, None]
    return mask if dtype == torch.bool else (~mask).to(dtype) * torch.finfo(dtype).min


def mask_dtype(model: Any) -> torch.dtype:
    """The type of the mask that a model's attention takes."""
    return torch.bool if model.config._attn_implementation == "sdpa" else model.dtype


def padded_because(model: Any) -> str | None:
    """Why the rows of this model are padded and not packed; None: they are packed."""
    if not takes_tree(without_adapter(model)):
        return "its attention takes no mask of our own"
    if model.training and any(_drops(module) for module in model.modules()):
        return "dropout would be drawn once for a prefix that rows share"
    return None


def takes_tree(model: Any) -> bool:
    """Whether attention takes any mask: of transformers, eager or SDPA, full in every layer, positions given."""
    if not isinstance(model, PreTrainedModel):
        return False
    parameters = inspect.signature(model.forward).parameters
    given = parameters.keys() >= {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
    return given and by_positions(model) and model.config._attn_implementation in ("eager", "sdpa")


def by_positions(model: PreTrainedModel) -> bool:
    """Whether attention is full in every layer and goes by the positions that it is given. A window and ALiBi count
    places, and a recurrent state has none."""
    given = "position_ids" in inspect.signature(model.forward).parameters and not getattr(model.config, "alibi", False)
    return (
        given
        and "local" not in (getattr(model.config, "attention_layers", None) or ())  # of GPT-Neo
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    )


def _drops(module: nn.Module) -> bool:
    rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0)
    return isinstance(rate, float) and rate > 0


def pack(batch: Batch, mask_dtype: torch.dtype = torch.bool, cached: int = 0) -> Packed | None:
    """The rows of a batch as a tree of tokens, a branch after the other; None: nothing predicts a row's first token.

    The first ``cached`` tokens, which all rows share and no answer follows at once, are in a cache and left out.
    """
    begin = batch.input_ids.shape[1] - batch.mask.shape[1]  # the first column of the mask
    ranks = batch.attention_mask.cumsum(1)[:, begin:] - 1  # of its columns, among the tokens of their row
    rows = zip(batch.input_ids, batch.attention_mask.bool(), strict=True)
    tree = tree_of([row[real].tolist() for row, real in rows])
    answers = [rank[mask].tolist() for rank, mask in zip(ranks, batch.mask, strict=True)]
    if any(0 in row for row in answers):
        return None
    predicts = [path[i - 1] - cached for path, row in zip(tree.paths, answers, strict=True) for i in row]
    device = batch.input_ids.device
    line, depth = (torch.tensor([each[cached:]], device=device) for each in (tree.ids, tree.positions))
    tail = torch.tensor(predicts, dtype=torch.long, device=device)
    return Packed(line, depth, tree.attends[cached:].to(device), tail, mask_dtype)


class Tree(NamedTuple):
    """Rows as a tree of tokens, a branch after the other: what they begin with alike stands once."""

    ids: list[int]
    positions: list[int]
    paths: list[list[int]]  # of each row: the places of its tokens
    attends: Bool[Tensor, "tokens tokens"]


def tree_of(rows: Sequence[Sequence[int]]) -> Tree:
    """The tree of rows of token ids; what all of them begin with stands first."""
    ids: list[int] = []
    positions: list[int] = []
    places: dict[tuple[int, int], int] = {}  # (place of the token before, token) -> place
    paths: list[list[int]] = []
    begins: list[int] = []  # of each row: its first new place
    for row in rows:
        path, before = list[int](), -1
        begins.append(len(ids))
        for position, token in enumerate(row):
            place = places.setdefault((before, token), len(ids))
            if place == len(ids):
                ids.append(token)
                positions.append(position)
            path.append(place)
            before = place
        paths.append(path)
    attends = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for first, path in zip(begins, paths, strict=True):
        new = sum(place >= first for place in path)
        attends[first : first + new, path] = torch.ones(new, len(path)).tril(len(path) - new).bool()
    return Tree(ids, positions, paths, attends)


def collate(rows: Sequence[TokenizedRow], pad: int, shared: int = 0) -> Batch:
    """Pad rows on the left; ``shared``: tokens that they all begin with.

    A column of a row is a number, or one number per answer token in their order.

    Raises:
        UserError: a column holds more or fewer numbers than the row has answer tokens.
    """
    width = max(len(row) for row in rows)
    tail = max(1, *(len(row) - row.first_answer for row in rows))
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
            if len(value) != row.answer.sum():
                raise UserError(
                    f"row {row.id}: column {name!r} holds {len(value)} numbers for {row.answer.sum()} answer tokens"
                )
            column[i, mask[i]] = torch.tensor(value, dtype=column.dtype)
        columns[name] = column
    return Batch(ids, seen, mask, columns, shared)


def by_length(rows: Sequence[TokenizedRow], size: int) -> Iterator[list[int]]:
    """Indices of rows in batches of like length, longest first, so that little is spent on padding."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def sequences(lengths: Sequence[int]) -> Iterator[slice]:
    """Rows, one behind the other, that are each time worth one sequence; ``lengths``: their tokens but those shared."""
    start = total = 0
    for i, length in enumerate(lengths):
        if total + length > SEQUENCE and i > start:
            yield slice(start, i)
            start, total = i, 0
        total += length
    if lengths:
        yield slice(start, len(lengths))


class PrefixGroup(NamedTuple):
    """A batch of rows that begin alike."""

    rows: list[int]
    shared: int  # tokens that the rows, and those of the batches around it, begin with; no answer token is among them


def by_prefix(rows: Sequence[TokenizedRow], size: int) -> Iterator[PrefixGroup]:
    """Rows in batches, those that begin alike together and by length among them: a shared prompt is run once."""

    def families() -> Iterator[tuple[list[int], int]]:
        """Rows sorted by tokens, in groups that agree on their first ``depth`` tokens.

        A branch that goes on alike, with rows for two batches, is a family of its own, before the rest of its group.
        """
        order = sorted(range(len(rows)), key=lambda i: rows[i].ids.astype(">u4").tobytes())  # as the ids are sorted
        stack = [(order, 0, False)] if rows else []
        while stack:
            group, depth, split = stack.pop()
            if split:
                yield group, depth
                continue
            first, last = rows[group[0]].ids[depth:], rows[group[-1]].ids[depth:]
            least = min(len(first), len(last))
            depth += int(np.append(first[:least] != last[:least], True).argmax())
            rest, branches = list[int](), list[tuple[list[int], int, bool]]()
            for _, branch in itertools.groupby(group, key=lambda i: rows[i].ids[depth : depth + ALIKE].tobytes()):
                inside = list(branch)
                if 2 * size <= len(inside) < len(group):
                    branches.append((inside, depth, False))
                else:
                    rest += inside
            stack += [(rest, depth, True)] * bool(rest) + branches[::-1]

    for family, depth in families():
        first_answer = min(rows[i].first_answer for i in family)
        shared = min(depth, first_answer - 1)  # the token before an answer predicts its first one
        order = sorted(family, key=lambda i: (-len(rows[i]), i))
        for start in range(0, len(order), size):
            yield PrefixGroup(order[start : start + size], shared if shared >= ALIKE else 0)
