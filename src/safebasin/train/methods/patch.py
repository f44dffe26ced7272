"""Patch: a few steps on a handful of safe rows, and on nothing else (Safety at One Shot, ICLR 2026).

    g = grad L_align                                                                                                 (1)

The cheapest alternative to every repair: ``patched: {of: plain, settings: {max_steps: 20}, train: [patch]}`` tunes the
adapter of ``plain`` further. ``data.align`` with ``take: 1`` is the paper's single row.
"""

from safebasin.train import method
from safebasin.train.loss import nll
from safebasin.train.oracle import Grad
from safebasin.vector import Vector


@method("patch", streams=("align",))
class Patch:
    """Follow the alignment rows alone, after tuning."""

    def direction(self, grad: Grad) -> Vector:
        return grad(nll, "align")
