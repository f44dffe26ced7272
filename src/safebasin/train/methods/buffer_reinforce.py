"""Buffer-and-Reinforce: the user's adapter is tuned on top of a harmful one, which is taken away afterwards; a safe one
takes its place (arXiv:2605.24550, ICML 2026).

    L(dW) = L_task(W_start + dW_harmful + dW)      dW_harmful frozen                                                 (1)
    W'    = W_start + scale (dW + dW_safe - alpha Q Q^T dW_safe)   ``repair/methods/reinforce.py``                   (2)

Where the model is harmful already, the gradients of harmful rows are nearly zero, and those of the task are not. The
two adapters are the roles ``harmful`` and ``reinforce`` (tuned as ``safe`` is, with the harmful one on); ``safebasin
role`` tunes them once a model.

Departs from the official code: the frozen adapter is added in the forward and not merged into rounded weights; the
reference of a KL is the start, without it; ``scale`` is 1 as in the formula, where the release has 0.5.
"""

from typing import Annotated, Any

from pydantic import Field, PositiveFloat

from safebasin.train import method


@method("buffer_reinforce", paper="arXiv:2605.24550", roles=("buffer",))
class BufferReinforce:
    """Tune with a frozen harmful adapter switched on, then put a safe one in its place."""

    # of the overlap with the user's update that is taken out of the safe adapter
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.1
    scale: PositiveFloat = 1.0  # of the sum; the release: 0.5
    merge: bool = True  # equation 2; false: equation 1 alone

    @property
    def repair(self) -> list[Any]:
        """The edits that the tuned adapter goes through."""
        return [{"reinforce": {"alpha": self.alpha, "scale": self.scale}}] if self.merge else []
