"""SafeGrad: gradient surgery for safe fine-tuning (arXiv:2508.07172, algorithm 1).

    g_u' = g_u - (<g_u, g_a> / |g_a|^2) g_a   if <g_u, g_a> < 0, else g_u        (eq. 3-4)
    g    = g_u' + rho g_a                                                       (eq. 5)
    L_align = KL(reference || model) on alignment rows                          (eq. 6)

Two options make alignment cheaper than the paper has it; with either, g_a is no longer the exact gradient of the step:

    every: k      g_a is taken once in k steps and reused between them: at up to k - 1 steps it is of an earlier point
                  and of earlier alignment rows, and only one in k batches of alignment rows is seen
    average: b    g_a is a moving average, b g_a + (1 - b) times the new one: of several batches of rows and of points

A g_a that has no direction (a KL at the start) is never reused nor averaged. g_u is exact at every step.

Departs from the official code: KL over answer tokens only and divided by them (the code sums over the prompt and the
padding and divides by the answer tokens); surgery once an optimizer step, on the gradient of the whole step; the
reference is the adapter switched off, not a second model. At the first step g_a of the KL is zero but for rounding, and
the task gradient passes untouched.
"""

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from safebasin.train import method
from safebasin.train.loss import kl_from_reference, nll
from safebasin.train.oracle import Grad
from safebasin.vector import Vector

FLOOR = 1e-9  # of |g_a|^2, as in the official code: at the first step the KL's gradient is rounding, without direction


def surgery(u: Vector, a: Vector) -> Vector:
    """``u`` without its part that opposes ``a`` (eq. 3-4)."""
    conflict, size = u @ a, a @ a
    return u - (conflict / size) * a if conflict < 0 and size > FLOOR else u


@method("safegrad", paper="arXiv:2508.07172", streams=("align",), roles=("reference",))
class SafeGrad:
    """Remove from the task gradient what opposes alignment, then add alignment."""

    rho: NonNegativeFloat = 1.0  # weight of alignment (eq. 5)
    align: Literal["kl", "sft"] = "kl"  # L_align: KL to the reference, or likelihood of the alignment rows' answers
    every: PositiveInt = 1  # k: steps to a new g_a; the paper takes one at every step
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0  # b: share of the older ones in g_a; none in the paper

    def direction(self, grad: Grad) -> Vector:
        u = grad.task()
        a = self.alignment(grad)
        projected, size = surgery(u, a), u.norm()
        grad.numbers["safegrad.ratio"] = a.norm() / size if size else math.nan  # |g_a| / |g_u|
        grad.numbers["safegrad.conflict"] = float(projected is not u)  # its mean is the share of conflicting steps
        return projected + self.rho * a

    def alignment(self, grad: Grad) -> Vector:
        """g_a of this step. What is reused or averaged is in the state of the run, and so in its checkpoints."""
        last = grad.state.get("safegrad.align")
        last = last if last is not None and last @ last > FLOOR else None
        if last is not None and grad.step % self.every:
            return last
        a = grad(kl_from_reference if self.align == "kl" else nll, "align")
        if self.average and last is not None:
            a = self.average * last + (1 - self.average) * a
        if self.average or self.every > 1:
            grad.state["safegrad.align"] = a
        return a
