"""GradShield: drop the rows that pull the model away from its first refusal (arXiv:2605.14194).

    FIHS(x) = < g(grad L(theta0, x)), grad S(theta0, x_s) >                         (eq. 4)
    S(x_s)  = logit["I"] - logit["Sure"]  at the first answer position              (eq. 5)

A step of training is -eta g, which moves S by -eta <g, grad S>. So a positive score means that training on the row lowers the
safety of the probe: high = harmful.

Departs from the paper: full weights of the target modules instead of an undefined parameter set; identity g.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from safebasin.batch import Batch, Encoded
from safebasin.scan import scorer
from safebasin.scan.ghost import answer_nll, ghost_product, probe_gradient
from safebasin.scan.probe import Pair, anchor_rows, opening, refusal_margin, token_pair
from safebasin.scan.source import MODULES, target_weights
from safebasin.vector import Vector


class Fitted(NamedTuple):
    pair: Pair
    direction: Vector  # grad S, averaged over the probes


@scorer("gradshield", paper="arXiv:2605.14194")
class GradShield:
    """How much a training step on the row lowers the model's margin of refusal on a harmful probe."""

    probes: int = 1  # x_s: the paper takes one
    reduction: Literal["sum", "mean"] = "sum"  # of L: decides the ranking when answers differ in length; see docs
    layers: int | None = None  # only the last k blocks
    modules: tuple[str, ...] = MODULES  # theta: the linear layers that are scored over
    tokens: tuple[str, str] | None = None  # (refusal, compliance); None: as the model itself refuses, against "Sure"

    def fit(self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[Encoded]]) -> Fitted:
        device = next(model.parameters()).device
        probe = opening(tokenizer, anchor_rows(anchors, "probe", self.probes, "gradshield"), device)
        pair = token_pair(model, tokenizer, probe, self.tokens)
        targets = target_weights(model, self.modules, layers=self.layers)
        return Fitted(pair, probe_gradient(model, probe, lambda m, b: refusal_margin(m, b, pair).mean(), targets))

    def score(self, model: Any, batch: Batch, fitted: Fitted) -> Float[Tensor, " batch"]:
        return ghost_product(model, batch, answer_nll, fitted.direction, reduction=self.reduction)
