"""Rows as tensors: a batch that is padded on the left, with its answer mask, and the same rows packed for a forward.

Left padding puts every answer at the end, so that the language-model head computes the last ``answers`` positions only
(``logits_to_keep``), through any wrapper. Where a vocabulary is as large as a small model, that is a fifth of the work.

``target_logits`` runs the rows as one sequence where the model takes it, a tree of tokens (``safebasin.tree``), and the
head runs at the positions that predict an answer token. No position is run for nothing, and the logits are those of
the padded rows.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from safebasin.encode import TokenizedRow
from safebasin.errors import UserError
from safebasin.models.adapter import without_adapter
from safebasin.tree import mask_dtype, takes_tree, tree_mask, tree_of


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


def padded_because(model: Any) -> str | None:
    """Why the rows of this model are padded and not packed; None: they are packed."""
    if not takes_tree(without_adapter(model)):
        return "its attention takes no mask of our own"
    if model.training and any(_drops(module) for module in model.modules()):
        return "dropout would be drawn once for a prefix that rows share"
    return None


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
