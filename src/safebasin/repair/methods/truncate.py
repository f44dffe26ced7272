"""Truncate: the best approximation of an update of a lower rank, with the energy that it holds.

    dW' = T_k(dW) = U_k S_k V_k^T,   energy = |dW'|^2 / |dW|^2                                                       (1)

What makes an adapter of a dense update, such as that of ``irr``. Half of the entries of an update of rank 8, drawn at
random, have 0.5 to 0.7 of their energy in the best rank 8: the report states it for every module.
"""

from pydantic import PositiveInt

from safebasin.layer import Update
from safebasin.repair import edit
from safebasin.repair.update import Share
from safebasin.repair.walk import Layer


@edit("truncate", strength=("energy", 1.0, 0.0), truncates=True)
class Truncate:
    """Bring an update to a lower rank, and state what is lost."""

    energy: Share = 1.0  # that is held, in the fewest directions
    rank: PositiveInt | None = None  # at most

    def __post_init__(self) -> None:
        if self.energy == 1 and self.rank is None:
            raise ValueError("set rank, energy or both")

    def edit(self, layer: Layer) -> Update:
        update = layer.tuned.balanced(self.rank)
        if self.energy < 1:
            sizes = update.b.double().square().sum(0) ** 2  # squares of the singular values
            count = int((sizes.cumsum(0) < self.energy * (1 - 1e-6) * layer.tuned.norm() ** 2).sum()) + 1
            update = layer.tuned.balanced(min(count, self.rank or count))
        return update
