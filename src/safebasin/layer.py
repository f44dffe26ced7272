"""The change of a weight as an ``Update``, and the alignment direction d = W_aligned - W_base of a pair.

The pair is streamed: one matrix at a time, paired by name, subtracted in float32 (the difference of close bfloat16
weights cancels most of their digits). Nothing here holds a model in memory, and no matrix is larger than the weight.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from safebasin.data.files import atomic_write, shown
from safebasin.data.tensor_files import float_shape, open_tensors, tensor_files
from safebasin.errors import UserError

Key = TypeVar("Key")
Value = TypeVar("Value", covariant=True)


class LazyMapping(Mapping[Key, Value]):
    """A mapping whose values are read or computed when they are asked for. ``names``: its keys, in their order."""

    names: Collection[Key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """The change dW of one weight: B A in low rank, or dense where A is None and B is dW itself.

    ``b`` is [out, r] and ``a`` [r, in], the scale of the adapter folded into B. Sums of low ranks are concatenations,
    so that nothing of the size of the weight is formed.

    >>> Update(torch.ones(2, 1), torch.tensor([[3.0, 4.0]])).norm()  # [[3, 4], [3, 4]]
    7.0710678118654755
    """

    b: Tensor
    a: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight."""
        return self.b.shape[0], (self.b if self.a is None else self.a).shape[1]

    @property
    def rank(self) -> int:
        """Of the factors: the rank of dW is at most this."""
        return min(self.b.shape)

    def dense(self) -> Tensor:
        """dW itself, [out, in]."""
        return self.b if self.a is None else self.b @ self.a

    def __mul__(self, scale: float | int) -> "Update":
        return Update(self.b * scale, self.a)

    def __add__(self, other: "Update") -> "Update":
        if self.a is None or other.a is None:
            return Update(self.dense() + other.dense())
        return Update(torch.cat([self.b, other.b], 1), torch.cat([self.a, other.a]))

    def __sub__(self, other: "Update") -> "Update":
        return self + other * -1.0

    def __matmul__(self, other: "Update") -> float:
        """The inner product <dW, dW'>, in float64."""
        if self.a is None and other.a is None:
            parts = zip(self.b.split(1024), other.b.split(1024), strict=True)
            return sum(float((x.double() * y.double()).sum()) for x, y in parts)
        if self.a is None or other.a is None:
            full, low = (self, other) if self.a is None else (other, self)
            assert low.a is not None
            return float(((full.b @ low.a.T).double() * low.b.double()).sum())
        return float(((self.b.double().T @ other.b.double()) * (self.a.double() @ other.a.double().T)).sum())

    def norm(self) -> float:
        """The Frobenius norm of dW."""
        return math.sqrt(max(self @ self, 0.0))

    def left(self, function: Callable[[Tensor], Tensor]) -> "Update":
        """M dW, of a function that gives M X of [out, n]."""
        return Update(function(self.b), self.a)

    def right(self, function: Callable[[Tensor], Tensor]) -> "Update":
        """dW M, of a function that gives X M of [n, in]."""
        return Update(function(self.b)) if self.a is None else Update(self.b, function(self.a))

    def balanced(self, rank: int | None = None) -> "Update":
        """The best approximation of a rank, as U sqrt(S) and sqrt(S) V^T; by default exact, at its own rank."""
        if self.a is None:
            u, s, v = torch.linalg.svd(self.b, full_matrices=False)
        else:
            (q, left), (p, right) = torch.linalg.qr(self.b), torch.linalg.qr(self.a.T)
            u, s, v = torch.linalg.svd(left @ right.T)
            u, v = q @ u, v @ p.T
        root = s[:rank].sqrt()
        return Update(u[:, :rank] * root, root[:, None] * v[:rank])


class Pair(LazyMapping[str, Tensor]):
    """Two folders read by name; every name is checked, in shape and kind, before the first matrix is read.

    A mapping: module -> d = W_aligned - W_base, ``[out, in]`` float32.

    Raises:
        UserError: a folder that cannot be read, a name that one side lacks, different shapes, quantized weights.
    """

    def __init__(self, base: str | Path, aligned: str | Path, modules: Iterable[str]):
        self.base, self.aligned = tensor_files(base), tensor_files(aligned)
        self.names = self.shapes = dict[str, tuple[int, int]]()
        for module in modules:
            name = f"{module}.weight"
            shape, other = float_shape(self.base, name, base), float_shape(self.aligned, name, aligned)
            if shape != other or len(shape) != 2:
                raise UserError(
                    f"{name} is {shape} in {shown(base)} and {other} in {shown(aligned)}; equal matrices are needed"
                )
            self.shapes[module] = (shape[0], shape[1])

    def __getitem__(self, module: str) -> Tensor:
        name = f"{module}.weight"
        with open_tensors(self.base[name]) as base, open_tensors(self.aligned[name]) as aligned:
            return aligned.get_tensor(name).float() - base.get_tensor(name).float()


def write_alignment_directions(base: str | Path, aligned: str | Path, modules: Iterable[str], path: Path) -> None:
    """d = W_aligned - W_base of every module, as one safetensors file, module -> d in float32.

    It is written one matrix at a time, and every rank may write it.

    Args:
        base: folder of the weights before alignment.
        aligned: folder of the weights after it.
        modules: names without ``.weight``, for example ``model.layers.0.self_attn.q_proj``.
        path: of the file.

    Raises:
        UserError: see ``Pair``.
    """
    pair = Pair(base, aligned, modules)
    sizes = [4 * out * into for out, into in pair.shapes.values()]
    ends = list(itertools.accumulate(sizes))
    header: Mapping[str, Any] = {
        module: {"dtype": "F32", "shape": list(shape), "data_offsets": [end - size, end]}
        for (module, shape), size, end in zip(pair.shapes.items(), sizes, ends, strict=True)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format asks for tensors on 8-byte bounds
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for direction in pair.values():
            file.write(direction.contiguous().numpy().astype("<f4", copy=False).tobytes())


def read_directions(path: Path, modules: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Directions of a file of ``write_alignment_directions``, one at a time."""
    with open_tensors(path) as file:
        for module in modules:
            yield module, file.get_tensor(module)


def largest_singular(direction: Tensor) -> float:
    """sigma_1 of a direction, by a randomized sketch: within a thousandth."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float(torch.svd_lowrank(direction.cpu(), q=min(24, *direction.shape), niter=8)[1][0])


def left_singular(direction: Tensor, k: int) -> Tensor:
    """The top ``k`` left singular vectors U ``[out, k]`` of a direction, by a randomized sketch.

    Columns beyond its rank are zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the sketch is random; with its seed the result is a function of the direction
        rank = min(2 * k + 16, *direction.shape)
        u, s, _ = torch.svd_lowrank(direction.cpu(), q=rank, niter=4)
    return (u * (s > 1e-6 * direction.norm().cpu()))[:, :k]
