"""Static shaping: rows are learnt or dropped as wholes, STAR-DSS's baseline (rejection sampling in arXiv:2505.17196).

    L = sum_t keep CE(y_t | x, y_<t)        keep in {0, 1}, one a row

Departs from the paper: the mean stays over the answer tokens of all rows of the step, dropped ones too, so that the
learning rate means the same with and without it and the loss is STAR-DSS with V = keep and lambda_KL = 0.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from safebasin.batch import Batch
from safebasin.train import method
from safebasin.train.loss import nll


@method("static", paper="arXiv:2505.17196", columns=("keep",))
class Static:
    """Learn every token of the rows with weight 1; learn nothing from the others."""

    def loss(self, model: Any, batch: Batch) -> Float[Tensor, "batch answers"]:
        losses = nll(model, batch)
        return batch.columns["keep"].to(losses.dtype).reshape(len(losses), -1) * losses
