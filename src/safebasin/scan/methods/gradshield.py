"""GradShield: drop the rows that pull the model away from its first refusal (arXiv:2605.14194).

    FIHS(x) = < g(grad L(theta0, x)), grad S(theta0, x_s) >                         (eq. 4)
    S(x_s)  = logit["I"] - logit["Sure"]  at the first answer position              (eq. 5)

A step of training is -eta g, which moves S by -eta <g, grad S>. So a positive score means that training on the row lowers the
safety of the probe: high = harmful.

Departs from the paper: full weights of the target modules in the upper quarter of the blocks instead of an undefined parameter set, or of
them the B factors of a fresh adapter (its scale, alpha / r, is left out: it would multiply every score alike); identity g. On SmolLM2-135M
the upper quarter tells Alpaca from harmful rows better than all blocks do, at half the cost, but is blind to an identity shift (AUROC
0.01 to 0.26 against 0.95: docs/decisions/0004). A form divided by |grad L| or a cosine is not offered: forward mode tells the product
exactly and never the norm of a row's gradient (``anchor`` pays a backward for it).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor

from safebasin.batch import Batch
from safebasin.encode import TokenizedRow
from safebasin.scan import scorer
from safebasin.scan.probe import Pair, anchor_rows, opening, refusal_margin, token_pair
from safebasin.scan.source import MODULES, target_weights
from safebasin.scan.tangent import Tangent, gradient, through_adapter


class Fitted(NamedTuple):
    pair: Pair
    along: Tangent  # the direction grad S, averaged over the probes


@scorer("gradshield", paper="arXiv:2605.14194", tokens="sum")
class GradShield:
    """How much a training step on the row lowers the model's margin of refusal on a harmful probe."""

    probes: int = 1  # x_s: the paper takes one
    reduction: Literal["sum", "mean"] = "sum"  # of L: decides the ranking when answers differ in length
    depth: float = 0.25  # share of the blocks that is scored over, from the top; the paper does not say
    modules: tuple[str, ...] = MODULES  # theta: the linear layers that are scored over
    lora_rank: PositiveInt | None = None  # r: over B of a fresh adapter on them; None: over their full weights
    seed: int = 0  # of its A
    tokens: tuple[str, str] | None = None  # (refusal, compliance); None: as the model itself refuses, against "Sure"

    def fit(self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]) -> Fitted:
        device = next(model.parameters()).device
        probe = opening(tokenizer, anchor_rows(anchors, "probe", self.probes, "gradshield"), device)
        pair = token_pair(model, tokenizer, probe, self.tokens)
        targets = target_weights(model, self.modules, depth=self.depth)
        along = gradient(model, probe, lambda m, b: refusal_margin(m, b, pair).mean(), targets)
        return Fitted(pair, Tangent(through_adapter(along, self.lora_rank, self.seed) if self.lora_rank else along))

    def score(self, model: Any, batch: Batch, fitted: Fitted) -> Float[Tensor, "batch answers"]:
        parts = fitted.along.token_losses(model, batch)
        return parts if self.reduction == "sum" else parts / batch.mask.sum(1, keepdim=True)
