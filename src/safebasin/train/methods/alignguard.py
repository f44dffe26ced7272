"""AlignGuard-LoRA: hold back the part of the update that safety is sensitive to (arXiv:2508.02079).

    F = (1/m) sum_k g_k g_k^T,  g_k a gradient of the safety loss at the start; (lambda_i, b_i) top eigenpairs  (1)
    D = theta - theta_0,  D_A = sum_i <b_i, D> b_i,  D_T = D - D_A                                        (2)
    L_A  = lambda_A sum_i lambda_i <b_i, D>^2                 Fisher penalty on the sensitive part            (3)
    L_T  = lambda_T sum_j h_j D_T,j^2,  h = diag F            stability of the rest                           (4)
    C_rm = mean_j eta_j |D_A,j D_T,j|,  eta_j = 1 + beta sigmoid(|D_j| - tau)      Riemannian overlap         (5)
    g = grad L_task + grad [ L_A + L_T + lambda_NC alpha C_rm ]                                           (6)

The gradient is by hand, since P = sum_i b_i b_i^T is made of inner products over all ranks:  with x = D_A D_T,
s = sigmoid(|D| - tau), y_A = c eta sign(x) D_T, y_T = 2 lambda_T h D_T + c eta sign(x) D_A, c = lambda_NC alpha / n:
grad = 2 lambda_A sum_i lambda_i <b_i, D> b_i + c beta s (1 - s) sign(D) |x| + y_T + P (y_A - y_T).

The paper could not be read in full: (2)-(6) and the defaults are those of a third party's code (alignment-risk) that
cites it, and the split of the parameter vector, not of B A per matrix, is that code's. Inferred: the geodesic overlap
(D_A . D_T)^2 / ... is left out, since an orthogonal split makes it zero with a zero gradient. In place of per-sample
gradients, g_k is that of the align rows of step k, taken at theta_0 in the first ``samples`` steps (the same where a
step has one align row); until then F is of those seen so far. At a fresh adapter B = 0, so F sees B alone, and A moves
freely under (4).
"""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from safebasin.train import method
from safebasin.train.loss import nll
from safebasin.train.oracle import Grad
from safebasin.vector import Vector


def each(function: Callable[..., Tensor], *vectors: Vector) -> Vector:
    """Element by element."""
    return Vector({name: function(*(vector[name] for vector in vectors)) for name in vectors[0]})


def total(vectors: Iterable[Vector]) -> Vector:
    return functools.reduce(operator.add, vectors)


def orthogonal(vectors: Sequence[Vector]) -> list[Vector]:
    """As many orthogonal vectors with the same sum of outer products: b_i of (1), each of length sqrt(m lambda_i)."""
    gram = torch.tensor([[u @ v for v in vectors] for u in vectors], dtype=torch.float64)
    return [
        total(float(t) * v for t, v in zip(turn, vectors, strict=True))
        for turn in torch.linalg.eigh(gram).eigenvectors.T
    ]


@method("alignguard", paper="arXiv:2508.02079", streams=("align",))
class AlignGuard:
    """Hold the update back along the directions that safety is most sensitive to, and what overlaps with them."""

    lam_a: NonNegativeFloat = 0.25  # lambda_A
    lam_t: NonNegativeFloat = 0.5  # lambda_T
    lam_nc: NonNegativeFloat = 0.05  # lambda_NC alpha, 0.1 * 0.5
    beta: NonNegativeFloat = 4.0  # beta: how much more an entry beyond tau counts in (5)
    tau: NonNegativeFloat = 0.01  # tau: of |D_j|, in units of the weights
    samples: PositiveInt = 8  # m
    explained: Annotated[float, Field(gt=0, le=1)] = 0.9  # of the trace of F, by its top eigenpairs

    def direction(self, grad: Grad) -> Vector:
        u = grad.task()
        if grad.step == 0:
            grad.state["start"] = grad.point()
        update = grad.point() - grad.state["start"]
        axes = [grad.state[key] for k in range(self.samples) if (key := f"fisher{k}") in grad.state]
        if len(axes) < self.samples:
            axes = orthogonal([*axes, grad(nll, "align", at=-update)])
            grad.state.update({f"fisher{k}": axis for k, axis in enumerate(axes)})
        return u + self.penalty_gradient(update, axes)

    def penalty_gradient(self, update: Vector, axes: Sequence[Vector]) -> Vector:
        """The gradient of L_A + L_T + lambda_NC alpha C_rm at D = ``update``; ``axes`` as from ``orthogonal``."""
        m, n = len(axes), sum(tensor.numel() for tensor in update.values())
        top = self.top([(axis @ axis, axis) for axis in axes])
        h = total(each(torch.square, axis) for axis in axes) / m

        def project(v: Vector) -> Vector:
            return total([0.0 * v, *((axis @ v / size) * axis for size, axis in top)])

        c = self.lam_nc / n
        in_a = project(update)
        in_t = update - in_a
        x = each(torch.mul, in_a, in_t)
        s = each(lambda d: torch.sigmoid(d.abs() - self.tau), update)
        eta = each(lambda p, product: c * (1 + self.beta * p) * product.sign(), s, x)
        bend = each(lambda p, d, product: c * self.beta * p * (1 - p) * d.sign() * product.abs(), s, update, x)
        y_a = each(torch.mul, eta, in_t)
        y_t = each(lambda k, t, e, a: 2 * self.lam_t * k * t + e * a, h, in_t, eta, in_a)
        fisher = total([0.0 * update, *((2 * self.lam_a / m * (axis @ update)) * axis for _, axis in top)])
        return fisher + bend + y_t + project(y_a - y_t)

    def top(self, sized: Sequence[tuple[float, Vector]]) -> list[tuple[float, Vector]]:
        """The largest axes, as many as the share ``explained`` of the trace needs."""
        trace, chosen = sum(size for size, _ in sized), list[tuple[float, Vector]]()
        for size, axis in sorted(sized, key=lambda pair: -pair[0]):
            if size > 0 and sum(s for s, _ in chosen) < self.explained * trace:
                chosen.append((size, axis))
        return chosen
