"""Scorers by one direction of the weights: how much a training step on a row lowers a quantity S of the aligned model.

    score(x) = < grad L(theta0, x), grad S(theta0) >                (eq. 4 of GradShield, arXiv:2605.14194)

A step of training is -eta grad L, which moves S by -eta <grad L, grad S>: a positive score means that training on the
row lowers S, so high = harmful. L is a sum over answer tokens, and so is the score: every token has its part of it.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safebasin.batch import Batch
from safebasin.encode import TokenizedRow
from safebasin.scan.source import MODULES, Depth, target_weights
from safebasin.scan.tangent import Tangent, gradient

Objective = Callable[[Any, Batch], Float[Tensor, ""]]  # of the model and the probe rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Directional(abc.ABC):
    """The common body: a method adds ``objective`` and its fields."""

    depth: Depth = 0.25  # the blocks that are scored over; the paper does not say
    modules: tuple[str, ...] = MODULES  # theta: the linear layers that are scored over

    @abc.abstractmethod
    def objective(
        self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]
    ) -> tuple[Batch, Objective]:
        """The probe rows (``probe_batch``), and S."""

    def fit(self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]) -> Tangent:
        probe, objective = self.objective(model, tokenizer, anchors)
        targets = target_weights(model, self.modules, depth=self.depth)
        return Tangent(gradient(model, probe, objective, targets))

    def score(self, model: Any, batch: Batch, fitted: Tangent) -> Float[Tensor, "batch answers"]:
        return fitted.token_losses(model, batch)


def by_turn(
    slopes: Float[Tensor, "batch answers"], mask: Bool[Tensor, "batch answers"], opening: int, weight: float
) -> Float[Tensor, "batch answers"]:
    """Values of tokens whose maximum is the row's worst turn: its opening as a sum, or one token anywhere in it.

    value_t = max( weight s_t, sum of s over the turn's first ``opening`` tokens )       in the opening
            = weight s_t                                                                behind it
            = 0                                            at the last token of a turn, which ends it, and s_t = 0
    """
    before, after = ((1, 0), mask[:, :-1]), ((0, 1), mask[:, 1:])
    starts, ends = (mask & ~torch.nn.functional.pad(part, pad) for pad, part in (before, after))
    slopes = slopes.masked_fill(~mask | ends, 0)
    turn, count = starts.cumsum(1), mask.cumsum(1)  # which turn of the row, and how many answer tokens so far
    begun = torch.where(starts, count, 0).cummax(1).values
    opens = mask & (count - begun < opening)
    sums = torch.zeros_like(slopes).scatter_add(1, (turn - 1).clamp(min=0), slopes.masked_fill(~opens, 0))
    values = weight * slopes
    values = torch.where(opens, torch.maximum(values, sums.gather(1, (turn - 1).clamp(min=0))), values)
    return values.masked_fill(~mask | ends, 0)
