"""Booster: make a harmful step teach less, before the model is released (arXiv:2409.01586, ICLR 2025, algorithm 1).

    f = loss of the task (the alignment rows: this stage hardens a model), h = loss of harmful rows with harmful answers
    g = grad f(w) + lambda ( grad h(w) - grad h( w - alpha grad h(w) / |grad h(w)| ) )

The bracket is the gradient of how much h falls by one normalised harmful step, second derivatives dropped.

Departs from the official code: three gradients of the whole optimizer step, not of a micro-batch; the norm is over all
trainable parameters; h has the same random state (dropout) at both points, so that their difference is the step's
alone.
"""

from pydantic import NonNegativeFloat, PositiveFloat

from safebasin.errors import DefenceError
from safebasin.train import method
from safebasin.train.loss import nll
from safebasin.train.oracle import Grad
from safebasin.vector import Vector


@method("booster", paper="arXiv:2409.01586", streams=("harmful",))
class Booster:
    """Learn the task where a harmful step would lower the harmful loss least."""

    lam: NonNegativeFloat = 5.0  # lambda
    alpha: PositiveFloat = 0.1  # length of the simulated harmful step

    def direction(self, grad: Grad) -> Vector:
        f, h = grad.task(), grad(nll, "harmful")
        size = h.norm()
        if not size:
            raise DefenceError("booster: the harmful stream gives no gradient, so there is no harmful step to simulate")
        after = grad(nll, "harmful", at=h * (-self.alpha / size))
        return f + self.lam * (h - after)
