"""Lisa: lazy safety alignment, two states that take turns, each with a pull to the other's last point.

    align state, K1 steps:   min_w  f(w) + (rho / 2) |w - w_task|^2       f: likelihood of the alignment rows        (1)
    task state,  K2 steps:   min_w  h(w) + (rho / 2) |w - w_align|^2      h: loss of the task                        (2)
    g = grad f + rho (w - w_task)   or   grad h + rho (w - w_align)                                                  (3)

arXiv:2405.18641, NeurIPS 2024, algorithm 1.

w_task and w_align are where the other state ended, so both are one thing: the point of the last switch, at first the
start. The task rows of an align step are passed over until the next epoch. A run shorter than K1 never sees the task.

Departs from the paper: K1, K2 = 5, 45, not 100, 900 (its runs have 20 000 steps; the share of alignment is the same).
The numbers of equations are ours. Departs from the official code: the pull stands from the first step, as in the
equations (the code leaves it off for a tenth of the run), and is a gradient once an optimizer step, not once a
micro-batch; one point is kept instead of two.
"""

from pydantic import NonNegativeFloat, PositiveInt

from safebasin.train import method
from safebasin.train.loss import nll
from safebasin.train.oracle import Grad
from safebasin.vector import Vector


@method("lisa", paper="arXiv:2405.18641", streams=("align",))
class Lisa:
    """Take turns between alignment and the task, and never go far from where the other left off."""

    rho: NonNegativeFloat = 1.0  # strength of the pull
    align_steps: PositiveInt = 5  # K1
    task_steps: PositiveInt = 45  # K2

    def direction(self, grad: Grad) -> Vector:
        turn = grad.step % (self.align_steps + self.task_steps)
        if turn in (0, self.align_steps):
            grad.state["switch"] = grad.point()
        g = grad(nll, "align") if turn < self.align_steps else grad.task()
        return g + self.rho * (grad.point() - grad.state["switch"])
