"""Rows that begin alike: in batches with their shared prefix, or as one sequence, a tree of tokens.

In a tree what rows begin with alike stands once, and every token attends to those before it in its own row. Not every
model takes the mask of a tree.
"""

import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from safebasin.encode import TokenizedRow

ALIKE = 8  # tokens that a prefix must have to be worth a batch of its own
# Tokens of rows in one sequence, beside what they share: attention costs their square, and few leave a GPU idle.
SEQUENCE = 4096 if torch.cuda.is_available() else 512


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


def tree_mask(attends: Bool[Tensor, "tokens all_tokens"], dtype: torch.dtype) -> Tensor:
    """As attention takes it: booleans, or numbers that are added to its scores."""
    mask = attends[None, None]
    return mask if dtype == torch.bool else (~mask).to(dtype) * torch.finfo(dtype).min


def mask_dtype(model: Any) -> torch.dtype:
    """The type of the mask that a model's attention takes."""
    return torch.bool if model.config._attn_implementation == "sdpa" else model.dtype


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
