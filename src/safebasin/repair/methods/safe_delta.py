"""Safe Delta: let in as much of the update as a budget of safety loss allows, and make up for it (arXiv:2505.12038,
ICML 2025).

    H = (2 / n) sum x x^T over safe rows,   H^-1 = U^T U,   p_m = 1 / U_mm^2                                         (1)
    loss_m = |dW_:m|^2 p_m                                                                                           (2)
    S = the longest run of columns, cheapest p first, whose losses sum to at most keep sum_m loss_m                  (3)
    dW'_S = dW_S,   dW'_N = -dW_S H_SN H_NN^-1    the best change of the other columns                               (4)

Every step acts on the rows of dW alike, so on A alone: a LoRA of rank r comes out.

Departs from the official code: the budget is a share, not an absolute size of the update; columns are taken complete,
once over the matrix, not in blocks of 2048; (4) is exact, where the code's sweep moves later columns only; the last
``drop`` share of the columns is never let in, as there.
"""

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from safebasin.layer import Update
from safebasin.repair import edit
from safebasin.repair.obs import compensated, damped, inverse_factor
from safebasin.repair.update import Share
from safebasin.repair.walk import Layer


@edit("safe_delta", paper="arXiv:2505.12038", streams=("probe",), strength=("keep", 1.0, 0.0))
class SafeDelta:
    """Keep the columns of the update that move the answers to safe rows least, and compensate for them."""

    keep: Share = 0.5  # of the sum of losses that may stay: the paper's s, relative
    drop: Share = 0.0  # of the columns, those of highest price, that never stay; the code: 0.15
    damp: NonNegativeFloat = 0.01  # of the mean diagonal of H
    compensate: bool = True  # the columns that stay move for those that go

    def columns(self, layer: Layer) -> Tensor:
        """S, a mask of the columns."""
        h = layer.moments["probe"]
        price = inverse_factor(h, self.damp, layer.name).diagonal() ** -2
        loss = column_sizes(layer.tuned) * price
        order = torch.sort(price, stable=True).indices
        order = order[: len(order) - int(self.drop * len(order))]
        fits = loss[order].cumsum(0) <= self.keep * loss.sum()
        count = int(fits.sum()) if self.keep < 1 else len(order)
        mask = torch.zeros(len(loss), dtype=torch.bool)
        mask[order[:count]] = True
        return mask

    def edit(self, layer: Layer) -> Update:
        stays, h = self.columns(layer), damped(layer.moments["probe"], self.damp)
        if stays.all():
            return layer.tuned
        if self.compensate and stays.any():
            return layer.tuned.right(lambda a: compensated(a, stays, h))
        return layer.tuned.right(lambda a: torch.where(stays, a, 0))


def column_sizes(update: Update) -> Tensor:
    """|dW_:m|^2 of every column, float64, without forming dW."""
    b = update.b.double()
    if update.a is None:
        return b.square().sum(0)
    a = update.a.double()
    return (a * (b.T @ b @ a)).sum(0).clamp(min=0)
