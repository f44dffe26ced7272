"""LoX: go on along the top directions of the alignment (arXiv:2506.15606, COLM 2025).

    dW' = dW + coef T_k(V),   V = W_start - W_base,   T_k its best approximation of rank k                           (1)

Departs from the paper: there it comes before tuning, on every tensor; here after it, on the modules of the update. The
official code subtracts in bfloat16, which loses V.
"""

from pydantic import NonNegativeFloat, NonNegativeInt

from safebasin.layer import Update
from safebasin.repair import edit
from safebasin.repair.update import truncated
from safebasin.repair.walk import Layer


@edit("lox", paper="arXiv:2506.15606", roles=("base",), strength=("coef", 0.0, 1.25))
class Lox:
    """Extrapolate the alignment along its top directions."""

    coef: NonNegativeFloat = 1.0  # of the truncated V that is added
    k: NonNegativeInt = 6  # k; 0: all of V, dense

    def more(self, fact: str) -> tuple[str, ...]:
        return ("k",) if fact == "dense" and not self.k else ()

    def edit(self, layer: Layer) -> Update:
        return layer.tuned + truncated(layer.v, self.k) * self.coef if self.coef else layer.tuned
