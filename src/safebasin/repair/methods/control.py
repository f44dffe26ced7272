"""Control: an edit that moves every module as far as another one does, and knows nothing.

    d = |E(dW) - dW| / |dW|   of the edit E that it is a control of, module by module                                (1)
    shrink   dW' = (1 - d) dW
    noise    dW' = dW + N,            N of rank r, random, |N| = d |dW|
    mask     dW' = dW M,              random entries become 0, until |dW' - dW| = d |dW|; d > 1 is refused

An edit that is no safer than its control at one utility has used none of what it was given.
"""

import functools
import hashlib
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt

from safebasin.errors import DefenceError
from safebasin.layer import Update
from safebasin.repair import edit
from safebasin.repair.walk import Layer, facts


@edit("control")
class Control:
    """Move every module as far as another edit does, at random or back to the start."""

    of: str | dict[str, Any]  # the edit: its name, or {name: {field: value}}
    by: Literal["shrink", "noise", "mask"] = "noise"  # less of the same, Gaussian noise, or entries at random
    seed: NonNegativeInt = 0  # of the drawing

    def __post_init__(self) -> None:
        _ = self.inner  # what is wrong with it is said at once

    @functools.cached_property
    def inner(self) -> Any:
        return edit.make(self.of)

    def more(self, fact: str) -> tuple[str, ...]:
        return (self.by,) * (self.by == "mask") if fact == "dense" else facts(self.inner, fact)

    def statistic(self, layer: Layer) -> float:
        return float(self.inner.statistic(layer)) if self.inner.entry.implements("statistic") else 0.0

    def select(self, values: Any) -> Any:
        return self.inner.select(values) if self.inner.entry.implements("select") else values

    def edit(self, layer: Layer) -> Update:
        tuned = layer.tuned
        distance = (self.inner.edit(layer) - tuned).norm() / tuned.norm()
        if self.by == "shrink":
            return tuned * (1 - distance)
        key = f"{self.seed}/{layer.name}".encode()
        draw = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest()))
        if self.by == "noise":
            noise = Update(
                *(torch.randn(part.shape, generator=draw) for part in (tuned.b, tuned.a) if part is not None)
            )
            return tuned + noise * (distance * tuned.norm() / noise.norm())
        if distance > 1 + 1e-6:
            raise DefenceError(
                f"{layer.name}: {self.inner.entry.name} moves it by {distance:.0%} of its length, a mask by "
                "100 % at most; take by: noise"
            )
        w = tuned.dense()
        order = torch.randperm(w.numel(), generator=draw)
        lost = w.flatten()[order].double().square().cumsum(0)
        count = int((lost <= (distance * tuned.norm()) ** 2 * (1 + 1e-9)).sum())
        masked = w.flatten().clone()
        masked[order[:count]] = 0
        return Update(masked.view_as(w))
