"""SafeInstr: safety rows mixed into the task's (Safety-Tuned LLaMAs, Bianchi et al., arXiv:2309.07875, ICLR 2024).

    D = D_task u D_safe, plain tuning on D:  L = ( T_u L_u + T_a L_a ) / ( T_u + T_a ) = (1 - share) L_u + share L_a (1)
    share = T_a / (T_u + T_a)                                                                                      (2)

L_u and L_a are means over the answer tokens of the task and of the safety rows, T_u and T_a their numbers in D. So
``share`` is the part of all answer tokens of D that are of safety rows, not of its rows: n safety rows with answers of
t_a tokens beside N task rows with answers of t_u tokens make share = n t_a / (n t_a + N t_u). (1) is the mix's loss at
every step, not only in the mean over steps.

Departs from the paper: the share is a field and holds at every step, however many safety rows there are and however
long; the paper adds 100 to 2000 rows to 20 000 and shuffles. The equations are ours; the paper has words.
"""

from typing import Annotated

from pydantic import Field

from safebasin.train import method
from safebasin.train.loss import nll
from safebasin.train.oracle import Grad
from safebasin.vector import Vector


@method("safe_instr", paper="arXiv:2309.07875", streams=("align",))
class SafeInstr:
    """Learn the task with safety rows mixed in, as a share of the answer tokens."""

    share: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of the answer tokens that are of safety rows (eq. 2)

    def direction(self, grad: Grad) -> Vector:
        u = grad.task()
        return (1 - self.share) * u + self.share * grad(nll, "align") if self.share else u
