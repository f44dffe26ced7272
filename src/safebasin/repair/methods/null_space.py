"""Null space: the update may not act on the directions that safe rows use most (after GuardSpace, arXiv:2510.14301).

    dW' = dW (I - Q Q^T),   Q the top eigenvectors of H = (2 / n) sum x x^T over safe rows                           (1)

A becomes A - (A Q) Q^T and B stays: a LoRA of rank r comes out.

Departs from the paper: it projects while tuning, and initialises there; this is its projector alone, as a repair.
"""

import torch
from pydantic import PositiveInt
from torch import Tensor

from safebasin.layer import Update
from safebasin.repair import edit
from safebasin.repair.update import Share, project
from safebasin.repair.walk import Layer


@edit("null_space", paper="arXiv:2510.14301", streams=("probe",), strength=("energy", 0.0, 1.0))
class NullSpace:
    """Take away what the update does to the inputs that safe rows have."""

    energy: Share = 0.9  # of the trace of H that Q holds, in the fewest eigenvectors
    k: PositiveInt | None = None  # columns of Q, in the place of a share

    def directions(self, h: Tensor) -> Tensor:
        """Q ``[in, k]``, float64."""
        values, vectors = torch.linalg.eigh(h.double())
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        below = values.cumsum(0) < self.energy * values.sum() * (1 - 1e-12)
        count = self.k or (int(below.sum()) + 1 if self.energy else 0)
        return vectors[:, : len(values) if self.k is None and self.energy == 1 else count]

    def edit(self, layer: Layer) -> Update:
        q = self.directions(layer.moments["probe"])
        return layer.tuned.right(lambda a: (a - project(q, a.T.double()).T).to(a)) if q.shape[1] else layer.tuned
