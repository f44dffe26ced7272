"""Refusal loss: drop the rows that make refusals of harmful prompts less likely, the whole refusal and not only how it
begins.

    score(x) = < grad L(x), grad S >                                    (eq. 4 of GradShield, arXiv:2605.14194)
    S        = (1 / N) sum_k sum_t log P(r_kt | x_k, r_k,<t)  over the N answer tokens of k refusals r_k to x_k

-S is the loss of a step of alignment on the k rows: a row of high score opposes that step, as a conflict in SafeGrad
does.

Departs from the paper: S is no margin of two tokens. It needs no compliance opener, and it does not show whether the
model refuses at all.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor

from safebasin.batch import Batch
from safebasin.encode import TokenizedRow
from safebasin.scan import scorer
from safebasin.scan.directional import Directional, Objective
from safebasin.scan.probe import anchor_rows, answered, log_likelihood, probe_batch


def mean_log_likelihood(model: Any, batch: Batch) -> Float[Tensor, ""]:
    """S: the mean over all answer tokens of the batch, in nats."""
    return log_likelihood(model, batch).sum() / batch.mask.sum()


@scorer("refusal_loss", paper="arXiv:2605.14194", tokens="sum")
class RefusalLoss(Directional):
    """How much a training step on the row raises the model's loss on refusals."""

    probes: PositiveInt = 4  # k

    def objective(
        self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]
    ) -> tuple[Batch, Objective]:
        rows = [answered(row, len(row)) for row in anchor_rows(anchors, "probe", self.probes, "refusal_loss")]
        return probe_batch(model, tokenizer, rows), mean_log_likelihood
