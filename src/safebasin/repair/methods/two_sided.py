"""Two-sided: attenuate what lies outside of the alignment subspace, on either side (after CSULoRA, arXiv:2605.30640).

    dW' = L dW R,   L = c I + (1 - c) U_k U_k^T,   R = c I + (1 - c) V_k V_k^T                                       (1)

U_k and V_k are the top singular vectors of V = W_start - W_base. It minimises |X - dW|^2 with penalties on the parts
outside on one side and on both, whose weights follow from c; so the rank stays r.

Departs from the paper: its coefficients, by relative energy, could not be read; c is one field.
"""

from pydantic import PositiveInt

from safebasin.layer import Update
from safebasin.repair import edit
from safebasin.repair.update import Share, project, svd
from safebasin.repair.walk import Layer


@edit("two_sided", paper="arXiv:2605.30640", roles=("base",), strength=("c", 1.0, 0.0))
class TwoSided:
    """Scale down what lies outside of the top directions of the alignment."""

    c: Share = 0.5  # what remains outside on one side; 1: everything
    k: PositiveInt = 16  # singular vectors of V on each side

    def edit(self, layer: Layer) -> Update:
        if self.c == 1:
            return layer.tuned
        u, _, v = svd(layer.v, self.k)
        c = self.c
        left = layer.tuned.left(lambda b: c * b + (1 - c) * project(u, b))
        return left.right(lambda a: c * a + (1 - c) * project(v, a.T).T)
