"""Opening margin: drop the rows that trade the opening of a refusal for that of a compliance, over several tokens and not one.

    score(x) = < grad L(x), grad S >                                              (eq. 4 of GradShield, arXiv:2605.14194)
    S        = mean_k ( log P(r_k | x_k) - log P(c | x_k) )                       r_k: how the refusal of x_k begins, c: "Sure, here is"

Departs from the paper: there S compares the logits of one token each (eq. 5).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor

from safebasin.batch import Batch, collate
from safebasin.encode import TokenizedRow
from safebasin.scan import scorer
from safebasin.scan.likelihood import answered, opening_ids, opening_margin
from safebasin.scan.probe import anchor_rows
from safebasin.scan.source import MODULES, target_weights
from safebasin.scan.tangent import Tangent, gradient


@scorer("opening_margin", paper="arXiv:2605.14194", tokens="sum")
class OpeningMargin:
    """How much a training step on the row lowers the odds of a refusal's opening against a compliance's."""

    probes: PositiveInt = 4  # k
    tokens: PositiveInt = 4  # of r_k; "Sure, here is" has four as well
    compliance: str = "Sure, here is"  # c
    depth: float = 0.25  # share of the blocks that is scored over, from the top
    modules: tuple[str, ...] = MODULES

    def fit(self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]) -> Tangent:
        rows, opener = (
            anchor_rows(anchors, "probe", self.probes, "opening_margin"),
            opening_ids(tokenizer, self.compliance),
        )
        probe = collate([answered(row, told) for told in (self.tokens, opener) for row in rows], tokenizer.pad_token_id)
        targets = target_weights(model, self.modules, depth=self.depth)
        return Tangent(gradient(model, probe.to(next(model.parameters()).device), opening_margin, targets))

    def score(self, model: Any, batch: Batch, fitted: Tangent) -> Float[Tensor, "batch answers"]:
        return fitted.token_losses(model, batch)
