"""Scorers by one direction of the weights: how much a training step on a row lowers a quantity S of the aligned model.

    score(x) = < grad L(theta0, x), grad S(theta0) >                (eq. 4 of GradShield, arXiv:2605.14194)

A step of training is -eta grad L, which moves S by -eta <grad L, grad S>: a positive score means that training on the
row lowers S, so high = harmful. L is a sum over answer tokens, and so is the score: every token has its part of it.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Float
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
        """The probe rows, and S."""

    def fit(self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]) -> Tangent:
        probe, objective = self.objective(model, tokenizer, anchors)
        targets = target_weights(model, self.modules, depth=self.depth)
        return Tangent(gradient(model, probe.to(next(model.parameters()).device), objective, targets))

    def score(self, model: Any, batch: Batch, fitted: Tangent) -> Float[Tensor, "batch answers"]:
        return fitted.token_losses(model, batch)
