"""The algebra of parameter space: a Vector is a point or a direction, name -> tensor.

Inner products are taken in float64 over local shards and reduced once over the ranks that hold them, so that every rank
takes the same branch. Everything else is element by element and never leaves the shard.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from safebasin.errors import DefenceError

WRAPPED = re.compile(r"^module\.|_checkpoint_wrapped_module\.|_orig_mod\.")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copies(tensor: DTensor) -> int:
    """On how many ranks every shard lies: one, except with sharding inside replicas."""
    return math.prod(
        tensor.device_mesh.size(i) for i, placement in enumerate(tensor.placements) if not placement.is_shard()
    )


class Vector(dict[str, Tensor]):
    """A vector in the space of trainable parameters: ``+ - * /``, ``u @ v`` (inner product, float), ``norm``."""

    def _map(self, function: Callable[..., Tensor], *others: Mapping[str, Tensor]) -> "Vector":
        for other in others:
            if other.keys() != self.keys():
                names = sorted(set(self) ^ set(other))[:3]
                raise DefenceError(f"two vectors of different spaces: they differ at {', '.join(names)}")
        return Vector({name: function(tensor, *(other[name] for other in others)) for name, tensor in self.items()})

    def __add__(self, other: "Vector") -> "Vector":
        return self._map(torch.add, other)

    def __sub__(self, other: "Vector") -> "Vector":
        return self._map(torch.sub, other)

    def __mul__(self, scale: float | int) -> "Vector":
        return self._map(lambda tensor: tensor * scale)

    __rmul__ = __mul__

    def __truediv__(self, scale: float | int) -> "Vector":
        return self * (1 / scale)

    def __neg__(self) -> "Vector":
        return self * -1.0

    def __matmul__(self, other: "Vector") -> float:
        """Inner product: summed in float64, shards reduced in one all-reduce."""
        if other.keys() != self.keys():
            raise DefenceError("an inner product of two vectors of different spaces")
        replicated: list[Tensor] = []
        sharded: list[Tensor] = []
        for name, tensor in self.items():
            part = torch.dot(local(tensor).flatten().double(), local(other[name]).flatten().double())
            if isinstance(tensor, DTensor) and any(placement.is_shard() for placement in tensor.placements):
                sharded.append(part / _copies(tensor))
            else:
                replicated.append(part)
        groups = [parts for parts in (replicated, sharded) if parts]
        sums = [torch.stack([part.to(parts[0].device) for part in parts]).sum() for parts in groups]
        if sharded:
            dist.all_reduce(sums[-1])
        return sum(float(part) for part in sums)  # an accelerator is waited for once, not once a tensor

    def norm(self) -> float:
        return math.sqrt(self @ self)

    def clone(self) -> "Vector":
        return self._map(torch.clone)

    def fill(self, number: float) -> "Vector":
        return self._map(lambda tensor: torch.full_like(tensor, number))


def gather_full(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU with all shards gathered. Collective: every rank must call it."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu().clone().contiguous()
        for name, t in tensors.items()
    }


def trainable(model: Any) -> dict[str, Tensor]:
    """The trainable parameters of a model by name, without the prefixes of DDP, checkpointing and torch.compile."""
    named = ((WRAPPED.sub("", name), p) for name, p in model.named_parameters())
    return {name: p for name, p in named if p.requires_grad}
