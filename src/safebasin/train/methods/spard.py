"""SPARD's safety projection: after the utility step, back into the half-space of low safety loss (arXiv:2605.28030).

    theta+    = theta - lr u                                                          utility step
    theta_new = theta+ - min( (l_safe - tau) / |g|^2, eta_safe ) g   if l_safe > tau, else theta+
    l_safe, g = loss and gradient of the safe rows

Here, as one direction for one optimizer step:  u + min( (l_safe - tau) / |g|^2, eta ) g   if l_safe > tau + tolerance.

Departs from the paper: l_safe and g are taken at theta, not at theta+, and both parts go through the optimizer
together, so that the projection is measured in learning rates and AdamW makes its length nominal: a rule of when and
how much, not an exact projection (with SGD, lr 1 and u = 0 it is one). Departs from the official code, which takes a
second AdamW step at theta+ with g scaled by (l_safe - tau) / |g| per tensor: one norm over all tensors, squared as in
the paper. The choice of safe rows (DPP) is the data's.
"""

from pydantic import NonNegativeFloat

from safebasin.errors import DefenceError
from safebasin.train import method
from safebasin.train.loss import nll
from safebasin.train.oracle import Grad
from safebasin.vector import Vector


@method("spard", paper="arXiv:2605.28030", streams=("align",))
class Spard:
    """Go where the task goes, and back as far as the loss of the safe rows asks."""

    tau: NonNegativeFloat = 0.2  # bound of the safety loss (script)
    tolerance: NonNegativeFloat = 0.1  # of the bound (script: safe_tolerance)
    eta: NonNegativeFloat = 1.0  # eta_safe, in learning rates (script: alpha_max)

    def direction(self, grad: Grad) -> Vector:
        u, g = grad.task(), grad(nll, "align")
        over, size = grad.losses["align"] - self.tau, g @ g
        if over <= self.tolerance:
            return u
        if not size:
            raise DefenceError(
                "spard: the safe rows' loss is above its bound and their gradient is zero; nothing can lower it"
            )
        return u + min(over / size, self.eta) * g
