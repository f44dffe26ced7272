"""Antidote: zero the weights that matter most on harmful inputs (arXiv:2408.09600, ICML 2025).

    score_ij = |W_ij| sqrt(mean_t x_tj^2)      of A with the inputs x, of B with the inputs A x                      (1)
    the top share ``dense`` of every row becomes 0                                                                   (2)

The result depends on the factors and not on their product alone, which has many: ``canonical`` brings them to balanced
singular vectors first.

Departs from the official code: all modules of the adapter; inputs are those of the tuned model, taken once.
"""

from torch import Tensor

from safebasin.layer import Update
from safebasin.repair import edit
from safebasin.repair.update import Share
from safebasin.repair.walk import Layer


@edit("antidote", paper="arXiv:2408.09600", roles=("tuned",), streams=("harmful",), strength=("dense", 0.0, 1.0))
class Antidote:
    """Zero the weights of the adapter that matter most on harmful rows."""

    dense: Share = 0.1  # of a row's entries
    canonical: bool = False  # factors by the singular values of dW, whatever they were

    def edit(self, layer: Layer) -> Update:
        h = layer.moments["harmful"].double()
        update = layer.tuned.balanced() if self.canonical and layer.tuned.a is not None else layer.tuned
        if update.a is None:
            return Update(self.pruned(update.b, h.diagonal()))
        a = update.a.double()
        return Update(self.pruned(update.b, (a @ h * a).sum(1)), self.pruned(update.a, h.diagonal()))

    def pruned(self, w: Tensor, squares: Tensor) -> Tensor:
        """W without the entries of highest score; ``squares`` are mean squared inputs, up to a factor."""
        count = w.shape[1] - int(w.shape[1] * (1 - self.dense))
        score = w.abs() * squares.clamp(min=0).sqrt().to(w)
        return w.scatter(1, score.topk(count, 1).indices, 0.0)
