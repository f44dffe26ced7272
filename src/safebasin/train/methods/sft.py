"""SFT: plain supervised fine-tuning, the arm that every defence is compared with."""

from safebasin.train import method
from safebasin.train.oracle import Grad
from safebasin.vector import Vector


@method("sft")
class Sft:
    """Go where the task's gradient goes: no defence."""

    def direction(self, grad: Grad) -> Vector:
        return grad.task()
