"""IRR: take back the entries that pull against safety, the least safe first, and make up for the task
(arXiv:2412.11041, ACL 2025 Findings).

    v = -dW_harmful,   flagged: sign(dW) != sign(v)                                                                  (1)
    removed: of the flagged entries of a block of columns all but the share ``keep`` of lowest F                     (2)
    F = mean of squared gradients on refusals of the start;   the sweep of OBS over the task's inputs makes up for it

An update that has nothing to do with safety has half of its entries flagged: compare it with ``control``, by mask.

Departs from the official code: every linear module, not q and v alone; inputs are those of the start, taken once;
padding is left out of H.
"""

import torch
from pydantic import NonNegativeFloat, PositiveInt

from safebasin.layer import Update
from safebasin.repair import edit
from safebasin.repair.obs import inverse_factor, sweep
from safebasin.repair.update import Share
from safebasin.repair.walk import Layer


@edit(
    "irr",
    paper="arXiv:2412.11041",
    roles=("harmful",),
    streams=("task",),
    reads=("gradients",),
    strength=("keep", 1.0, 0.0),
    entrywise=True,
)
class Irr:
    """Remove the entries that oppose safety, and compensate on the inputs of the task."""

    keep: Share = 0.0  # "sparsity" of the code: of the flagged entries, those of lowest F that stay
    block: PositiveInt = 128  # columns
    damp: NonNegativeFloat = 0.01  # of the mean diagonal of H

    def edit(self, layer: Layer) -> Update:
        if self.keep == 1:
            return layer.tuned
        w, v = layer.tuned.dense().double(), -layer.roles["harmful"].dense()
        upper = inverse_factor(layer.moments["task"], self.damp, layer.name)
        assert layer.gradients is not None
        for first in range(0, w.shape[1], self.block):
            last = min(first + self.block, w.shape[1])
            flagged = w[:, first:last].sign() != v[:, first:last].sign()
            target = torch.full(flagged.shape, float("nan"), dtype=w.dtype)
            places = flagged.nonzero()
            order = torch.sort(layer.gradients[:, first:last][flagged], stable=True).indices
            rows, columns = places[order[int(self.keep * len(order)) :]].T
            target[rows, columns] = 0
            sweep(w, target, upper, first, last)
        return Update(w.float())
