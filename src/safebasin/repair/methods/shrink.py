"""Shrink: go back part of the way to the start, in every module alike (WiSE-FT, arXiv:2109.01903).

    dW' = (1 - alpha) dW                                                                                             (1)

The control of every repair: it needs nothing, so a method whose safety and utility lie on its curve has used none of
what it was given.

Departs from the paper: of an adapter's update, not of all weights.
"""

from safebasin.layer import Update
from safebasin.repair import edit
from safebasin.repair.update import Share
from safebasin.repair.walk import Layer


@edit("shrink", paper="arXiv:2109.01903", strength=("alpha", 0.0, 1.0))
class Shrink:
    """Scale the update down: the control that every repair must beat."""

    alpha: Share = 0.5  # alpha: 0 tuned, 1 start

    def edit(self, layer: Layer) -> Update:
        return layer.tuned * (1 - self.alpha)
