"""Prune: switch off the modules whose update lies farthest from its image under the alignment matrix (SPLoRA,
arXiv:2506.18931).

    d = |C dW - dW|_F / |dW|_F,   z = (d - median) / IQR   over the modules                                          (1)
    dW' = 0   in the largest share by z, or where z > above                                                          (2)

Departs from the official code: that scores 50 copies of one pair, so that its score is unrelated to the distance; and
its `number` zeroes all but K - 1 modules. This is the statistic that the paper names.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import FiniteFloat, PositiveInt

from safebasin.layer import Update
from safebasin.repair import edit
from safebasin.repair.update import Matrix, Share, cosine, multiplier
from safebasin.repair.walk import Layer


@edit("prune", paper="arXiv:2506.18931", roles=("base",), strength=("share", 0.0, 1.0))
class Prune:
    """Switch off the modules that moved farthest from the alignment direction."""

    share: Share = 0.1  # K over the number of modules, rounded up
    above: FiniteFloat | None = None  # z, in the place of a share
    by: Literal["distance", "cos"] = "distance"  # cos: 1 - cos(C dW, dW) in the place of d
    matrix: Matrix = "official"  # V V^T / |V|, or the projector on its k largest directions
    k: PositiveInt = 16  # of topk

    def statistic(self, layer: Layer) -> float:
        projected = layer.tuned.left(multiplier(layer.v, self.matrix, self.k))
        if self.by == "cos":
            return 1 - cosine(projected, layer.tuned)
        return (projected - layer.tuned).norm() / layer.tuned.norm()

    def select(self, values: Mapping[str, float]) -> list[str]:
        names = sorted(values, key=lambda name: -values[name])
        if self.above is None:
            return names[: int(np.ceil(self.share * len(names)))]
        return [name for name, z in robust_z(values).items() if z > self.above]

    def edit(self, layer: Layer) -> Update:
        return layer.tuned * 0.0


def robust_z(values: Mapping[str, float]) -> dict[str, float]:
    """Equation 1: distances from the median in interquartile ranges."""
    low, median, high = np.quantile(list(values.values()), (0.25, 0.5, 0.75))
    return {name: float((value - median) / max(high - low, 1e-12)) for name, value in values.items()}
