"""Optimal brain surgeon on the inputs of a linear layer: what an edit costs there, and how the rest makes up for it.

    H = (2 / n) sum_t x_t x_t^T  [in, in],    H^-1 = U^T U,   u = diag U
    loss(D) = tr(D H D^T)                      how far outputs move under the change D                               (1)
    p_m = 1 / u_m^2                            the price of column m, given that later columns may make up for it    (2)
    D_N = -D_S H_SN H_NN^-1                    the best change of the columns N, given that of the columns S         (3)
    err = (w - q) / u_i,  w_>=i -= err U_i,>=i                         the sweep, column by column                   (4)

Numbers are in float64: H of a few hundred rows is nearly singular.
"""

import torch
from torch import Tensor

from safebasin.errors import DefenceError

DAMPINGS = 3  # a factorisation that fails is tried again with ten times the damping


def damped(h: Tensor, damp: float) -> Tensor:
    """H in float64 with ``damp`` of its mean diagonal added; inputs that are never used count as 1."""
    h = h.double().clone()
    h.diagonal()[h.diagonal() == 0] = 1
    h.diagonal().add_(damp * h.diagonal().mean())
    return h


def inverse_factor(h: Tensor, damp: float, name: str) -> Tensor:
    """U, upper, of H^-1 = U^T U.

    Raises:
        DefenceError: H is not positive definite, even with more damping; it names the module.
    """
    for _ in range(DAMPINGS):
        lower, failed = torch.linalg.cholesky_ex(damped(h, damp))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damp = 10 * damp or 1e-8
    raise DefenceError(f"{name}: the moments of its inputs cannot be factored; give more calibration rows")


def compensated(x: Tensor, remaining: Tensor, h: Tensor) -> Tensor:
    """Equation 3: x ``[n, in]`` with the columns ``remaining`` (a mask) bit for bit, the others at their best."""
    rest = ~remaining
    result = x.clone()
    if rest.any():
        lower = torch.linalg.cholesky(h[rest][:, rest])
        part = torch.cholesky_solve(h[rest][:, remaining] @ x[:, remaining].T.double(), lower)
        result[:, rest] = -part.T.to(x.dtype)
    return result


def sweep(w: Tensor, target: Tensor, upper: Tensor, first: int, last: int) -> None:
    """Equation 4 on the columns ``first`` to ``last`` of w, in place; later ones make up for them.

    Args:
        w: [out, in], the present values.
        target: [out, last - first], what the columns are to become; NaN: the value that it has by then.
        upper: U.
    """
    errors = torch.empty_like(target)
    for i in range(first, last):
        goal = target[:, i - first]
        errors[:, i - first] = err = torch.where(goal.isnan(), 0, w[:, i] - goal) / upper[i, i]
        w[:, i:last] -= torch.outer(err, upper[i, i:last])
        w[:, i] = torch.where(goal.isnan(), w[:, i], goal)
    w[:, last:] -= errors @ upper[first:last, last:]
