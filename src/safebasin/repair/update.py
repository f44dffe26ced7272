"""The alignment matrix and related products in low rank: out x out is never built.

    C = V V^T / |V|_F                 the official matrix of Safe LoRA; no projector: eigenvalues sigma_i^2 / |V|_F  (1)
    P = U_k U_k^T                     the projector on the top k left singular vectors of V                          (2)
    cos(M dW, dW) = <M dW, dW> / (|M dW| |dW|)                                                                       (3)
    T_k(V) = U_k S_k V_k^T            the best approximation of V of rank k                                          (4)

V = W_start - W_base [out, in], read one module at a time.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from safebasin.layer import Update

Matrix = Literal["official", "topk"]  # equation 1 or 2
Share = Annotated[float, Field(ge=0, le=1)]
COLUMNS = 512  # of a dense update that are multiplied at once


def image(v: Tensor, x: Tensor) -> Tensor:
    """C x of equation 1: V ``[out, in]``, x ``[out, n]``."""
    parts = [v @ (v.T @ part) for part in x.split(COLUMNS, 1)]
    return torch.cat(parts, 1) / v.norm()


def svd(v: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The top k singular vectors and values, U ``[out, k]``, S, V ``[in, k]``, by a sketch whose seed is fixed."""
    rank = min(2 * k + 16, *v.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, w = torch.svd_lowrank(v, q=rank, niter=4)
    alive = s > 1e-6 * s[:1]  # beyond the rank of V there are no directions
    return (u * alive)[:, :k], s[:k], (w * alive)[:, :k]


def project(u: Tensor, x: Tensor) -> Tensor:
    """U U^T x."""
    return u @ (u.T @ x)


def truncated(v: Tensor, k: int) -> Update:
    """T_k(V) of equation 4; k = 0 is V itself."""
    if not k:
        return Update(v)
    u, s, w = svd(v, k)
    return Update(u * s.sqrt(), s.sqrt()[:, None] * w.T)


def multiplier(v: Tensor, matrix: Matrix, k: int) -> Callable[[Tensor], Tensor]:
    """x -> C x or P x."""
    return functools.partial(image, v) if matrix == "official" else functools.partial(project, svd(v, k)[0])


def cosine(update: Update, other: Update) -> float:
    """Equation 3 of two updates; 0 where one of them is zero."""
    size = update.norm() * other.norm()
    return (update @ other) / size if size else 0.0
