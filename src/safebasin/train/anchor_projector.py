"""AsFT's penalty and its gradient in low rank: an alignment direction is factored once, and a step reads it once.

    (I - C)^2 = I - D H D^T         H a square on the shorter side of d; where that is the side of B, no D           (1)
    Q = B - D H D^T B,  M = A A^T,  S = B^T Q                                                                        (2)
    |(I - C) B A|_F^2 = <S, M>,   grad_B = 2 Q M,   grad_A = 2 S A                                                   (3)
    rank1: D = d / |d|, Q = B, t = <D, B A>;  t^2, 2 t D A^T and 2 t B^T D are subtracted                            (4)

No matrix is larger than d. A product is written as r rows times a matrix, several times faster on a CPU than a matrix
times r columns.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from safebasin.console import line
from safebasin.data.tensor_files import tensor_files
from safebasin.errors import UserError
from safebasin.layer import (
    largest_singular,
    left_singular,
    read_directions,
    write_alignment_directions,
)
from safebasin.models.bundled import cache, resolve

TINY = 1e-30  # in the place of |d| = 0


class AnchorProjector(NamedTuple):
    """The factors of equation 1 for one matrix; without H those of equation 4, where d stands for D."""

    shape: torch.Size  # of d
    d: Tensor | None
    h: Tensor | None
    eigenvalue: float = 1.0  # the largest of C, before an official C is scaled

    @classmethod
    def of(cls, d: Tensor, projector: str, k: int) -> "AnchorProjector":
        if projector == "rank1":
            return cls(d.shape, d / d.norm().clamp(min=TINY), None)
        if projector == "topk":
            u = left_singular(d, k).to(d)
            return cls(d.shape, u, torch.eye(u.shape[1]).to(u))
        size = float(d.norm())
        eigenvalue = largest_singular(d) ** 2 / max(size, TINY)  # of d d^T / |d|_F, the largest
        # C = root root^T; above 2 the direction d itself would be punished more than any other
        root = d / max(size * (eigenvalue if eigenvalue > 2 else 1), TINY) ** 0.5
        if d.shape[0] > d.shape[1]:
            return cls(d.shape, root, 2 * torch.eye(d.shape[1]).to(d) - root.T @ root, eigenvalue)
        c = root @ root.T
        return cls(d.shape, None, 2 * c - c @ c, eigenvalue)

    def departure(self, b: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """|(I - C) B A|_F^2 and its gradients at ``b`` [out, r] and ``a`` [r, in]; without ``a``, B is dW itself."""
        if a is None:
            return self._dense(b)
        m, bt = a @ a.T, b.T.contiguous()
        if self.h is None:
            assert self.d is not None  # rank1
            p, s = bt @ self.d, bt @ b
            t = (p * a).sum()
            return (s * m).sum() - t**2, 2 * (b @ m - t * (a @ self.d.T).T), 2 * (s @ a - t * p)
        qt = bt - (bt @ self.h if self.d is None else bt @ self.d @ self.h @ self.d.T)
        s = qt @ b
        return (s * m).sum(), qt.T @ (2 * m), (2 * s) @ a

    def _dense(self, w: Tensor) -> tuple[Tensor, Tensor, None]:
        """Equation 3 with A = I: <Q, dW> and 2 Q; of rank1 |dW|^2 - <D, dW>^2."""
        if self.h is None:
            assert self.d is not None
            q = w - (self.d * w).sum() * self.d
        else:
            q = w - (self.h @ w if self.d is None else self.d @ (self.h @ (self.d.T @ w)))
        return (q * w).sum(), 2 * q, None


def directions(
    base: str, aligned: str, modules: tuple[str, ...], projector: str, k: int, device: torch.device
) -> dict[str, AnchorProjector]:
    """The projector of every module. The directions of two models are computed once and stored in the cache folder.

    Raises:
        UserError: a model that cannot be read, or two that hold the same weights.
    """
    folders = resolve(base), resolve(aligned)
    files = [path.resolve() for folder in folders for path in sorted(set(tensor_files(folder).values()))]
    facts = (modules, [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    path = cache() / f"directions-{hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()}.safetensors"
    if not path.is_file():
        write_alignment_directions(*folders, modules, path)
    if not any(d.any() for _, d in read_directions(path, modules)):
        raise UserError(
            f"asft: {aligned!r} and {base!r} hold the same weights, so there is no alignment direction between them"
        )
    every = {module: AnchorProjector.of(d.to(device), projector, k) for module, d in read_directions(path, modules)}
    high = sorted(each.eigenvalue for each in every.values() if each.eigenvalue > 2)
    if high:
        share = f"{len(high)} of {len(every)} modules"
        line(f"  asft: sigma_1^2 / |d|_F is above 2 in {share} (at most {high[-1]:.3g}): C is scaled to a largest of 1")
    return every


def full(parameter: Tensor) -> Tensor:
    """All of a parameter that may be sharded, in float32; gradients flow back to the shards."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).float()


class Departure(torch.autograd.Function):
    """The sum over matrices, ``apply(projectors, b, a, b, a, ...)``, a None for a dense update.

    Its gradient is taken in the forward, so that each direction is read once.
    """

    @staticmethod
    def forward(ctx: Any, projectors: Sequence[AnchorProjector], *pairs: Any) -> Tensor:
        parts = [p.departure(b, a) for p, b, a in zip(projectors, pairs[::2], pairs[1::2], strict=True)]
        ctx.gradients = [gradient for _, *both in parts for gradient in both]
        return torch.stack([value for value, *_ in parts]).sum()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        return None, *(None if gradient is None else scale * gradient for gradient in ctx.gradients)
