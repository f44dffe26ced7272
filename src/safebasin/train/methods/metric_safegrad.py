"""SafeGrad in the optimizer's metric: surgery that AdamW does not undo. Of this project, after arXiv:2508.07172.

AdamW moves along P g, P = 1 / (sqrt(v) + eps), v its running mean of squared gradients. Surgery makes <u', a> = 0, but
the loss of alignment changes by -lr <P u', a>, which nothing makes zero: the preconditioner undoes the orthogonality.
So ask for what is applied:

    u' = u - ( <P u, a> / <P a, a> ) a   if <P u, a> < 0, else u                so that <P u', a> = 0               (1)
    g  = u' + rho a                                                           so that <P g, a> = rho <P a, a> > 0   (2)

With P = 1 (SGD, or before the first step) it is SafeGrad; a common factor of P, such as the bias correction, does not
matter.

Departs from SafeGrad in the inner product alone. P is of the step before (this step's v holds a share 1 - beta_2 of the
new gradient), and the momentum keeps directions that were cut against earlier a: (1) holds for this step's share of the
update.
"""

from typing import Literal

from pydantic import NonNegativeFloat

from safebasin.train import method
from safebasin.train.loss import kl_from_reference, nll
from safebasin.train.oracle import Grad
from safebasin.vector import Vector

FLOOR = 1e-9  # of |a|^2, as in SafeGrad: at the first step the KL's gradient is rounding, and has no direction


def surgery(u: Vector, a: Vector, p: Vector) -> Vector:
    """``u`` without its part that opposes ``a`` once the optimizer has scaled both by ``p`` (eq. 1)."""
    pa = Vector({name: tensor * p[name] for name, tensor in a.items()})
    conflict = u @ pa
    return u - (conflict / (a @ pa)) * a if conflict < 0 and a @ a > FLOOR else u


@method("metric_safegrad", streams=("align",), roles=("reference",))
class MetricSafeGrad:
    """Remove from the task's update, as the optimizer will apply it, what opposes alignment, then add alignment."""

    rho: NonNegativeFloat = 1.0  # weight of alignment
    align: Literal["kl", "sft"] = "kl"  # L_align: KL to the reference, or likelihood of the alignment rows' answers

    def direction(self, grad: Grad) -> Vector:
        u = grad.task()
        a = grad(kl_from_reference if self.align == "kl" else nll, "align")
        return surgery(u, a, grad.metric()) + self.rho * a
