"""GradShield: drop the rows that pull the model away from its first refusal (arXiv:2605.14194).

    FIHS(x) = < g(grad L(theta0, x)), grad S(theta0, x_s) >                       (eq. 4)
    S(x_s)  = logit["I"] - logit["Sure"]  at the first answer position            (eq. 5)

Departs from the paper: full weights of the target modules in the upper quarter of the blocks instead of an undefined
parameter set, or of them the B factors of a fresh adapter (its scale, alpha / r, is left out: it would multiply every
score alike); identity g. On SmolLM2-135M the upper quarter separates Alpaca from harmful rows better than all blocks
do, at half the cost, but is blind to an identity shift (AUROC 0.01 to 0.26 against 0.95: docs/decisions/0004). A form
divided by |grad L| or a cosine is not offered: forward mode gives the product exactly and never the norm of a row's
gradient (``anchor`` pays a backward for it).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from safebasin.batch import Batch
from safebasin.encode import TokenizedRow
from safebasin.scan import scorer
from safebasin.scan.directional import Directional, Objective
from safebasin.scan.probe import Word, anchor_rows, opening, refusal_margin, token_pair
from safebasin.scan.tangent import Tangent, through_adapter


@scorer("gradshield", paper="arXiv:2605.14194", tokens="sum")
class GradShield(Directional):
    """How much a training step on the row lowers the model's margin of refusal on a harmful probe."""

    probes: PositiveInt = 1  # x_s: the paper takes one
    reduction: Literal["sum", "mean"] = "sum"  # of L: decides the ranking when answers differ in length
    lora_rank: PositiveInt | None = None  # r: over B of a fresh adapter on the modules; None: over their full weights
    seed: NonNegativeInt = 0  # of its A
    tokens: tuple[Word, Word] | None = None  # (refusal, compliance); None: as the model itself refuses, against "Sure"

    def objective(
        self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]
    ) -> tuple[Batch, Objective]:
        probe = opening(model, tokenizer, anchor_rows(anchors, "probe", self.probes, "gradshield"))
        pair = token_pair(model, tokenizer, probe, self.tokens)
        return probe, lambda m, b: refusal_margin(m, b, pair).mean()

    def fit(self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]) -> Tangent:
        fitted = super().fit(model, tokenizer, anchors)
        return Tangent(through_adapter(fitted.direction, self.lora_rank, self.seed)) if self.lora_rank else fitted

    def score(self, model: Any, batch: Batch, fitted: Tangent) -> Float[Tensor, "batch answers"]:
        parts = super().score(model, batch, fitted)
        return parts if self.reduction == "sum" else parts / batch.mask.sum(1, keepdim=True)
