"""Refusal loss: drop the rows that make refusals of harmful prompts less likely, the whole refusal and not only how it begins.

    score(x) = < grad L(x), grad S >                                              (eq. 4 of GradShield, arXiv:2605.14194)
    S        = (1 / N) sum_k sum_t log P(r_kt | x_k, r_k,<t)                      over the N answer tokens of k refusals r_k to x_k

-S is the loss of a step of alignment on the k rows: a row of high score opposes that step, as a conflict in SafeGrad does.

Departs from the paper: S is no margin of two tokens. It needs no compliance opener, and it cannot tell whether the model refuses at all.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor

from safebasin.batch import Batch, collate
from safebasin.encode import TokenizedRow
from safebasin.scan import scorer
from safebasin.scan.likelihood import answered, log_likelihood
from safebasin.scan.probe import anchor_rows
from safebasin.scan.source import MODULES, target_weights
from safebasin.scan.tangent import Tangent, gradient


@scorer("refusal_loss", paper="arXiv:2605.14194", tokens="sum")
class RefusalLoss:
    """How much a training step on the row raises the model's loss on refusals."""

    probes: PositiveInt = 4  # k
    depth: float = 0.25  # share of the blocks that is scored over, from the top
    modules: tuple[str, ...] = MODULES

    def fit(self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]) -> Tangent:
        rows = [answered(row, len(row)) for row in anchor_rows(anchors, "probe", self.probes, "refusal_loss")]
        probe = collate(rows, tokenizer.pad_token_id).to(next(model.parameters()).device)
        targets = target_weights(model, self.modules, depth=self.depth)
        return Tangent(gradient(model, probe, lambda m, b: log_likelihood(m, b).sum() / b.mask.sum(), targets))

    def score(self, model: Any, batch: Batch, fitted: Tangent) -> Float[Tensor, "batch answers"]:
        return fitted.token_losses(model, batch)
