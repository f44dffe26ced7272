"""RESTA: subtract what tuning on harmful rows does (arXiv:2402.11746, ACL 2024).

    W' = W_tuned + beta (W_start - W_harmful),   so   dW' = dW - beta dW_harmful                                     (1)

Departs from the paper: no DARE. The unaligned model is the start tuned on harmful rows, as the paper means it, not the
model before alignment.
"""

from pydantic import NonNegativeFloat

from safebasin.layer import Update
from safebasin.repair import edit
from safebasin.repair.walk import Layer


@edit("resta", paper="arXiv:2402.11746", roles=("harmful",), strength=("beta", 0.0, 1.0))
class Resta:
    """Subtract the update of harmful tuning."""

    beta: NonNegativeFloat = 1.0  # gamma of the paper

    def edit(self, layer: Layer) -> Update:
        return layer.tuned - layer.roles["harmful"] * self.beta if self.beta else layer.tuned
