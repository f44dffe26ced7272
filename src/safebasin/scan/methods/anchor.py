"""Bi-directional gradient anchoring: rows that pull as harmful ones do and as safe ones do not (He et al.,
arXiv:2404.01099).

    g(x)     = grad L(x) / |grad L(x)|                                            L: the first 10 tokens of the answer
    score(x) = g(x) . V,   V = g_harm - g_safe1 - g_safe2                         each the mean of g over 10 anchor rows

The anchor sets are ``harmful`` (harmful requests with a compliant opening), ``probe`` (the same with refusals) and
``safe`` (ordinary rows). One backward to the activations serves all rows of a batch, X being a layer's input, D =
dL/dY:

    <grad_W L, V> = sum_t D_t . (V X_t),        |grad_W L|^2 = sum_{t,t'} (D_t . D_t') (X_t . X_t')

Departs from the paper: g_safe2 is the mean over ordinary rows (there, a second set of refusals); theta is the linear
layers of the blocks (there, all parameters). The form by hidden states is left to ``larf``, which is bi-directional
too.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional

from safebasin.batch import Batch, answer_logits, collate
from safebasin.encode import TokenizedRow
from safebasin.errors import DefenceError
from safebasin.scan import scorer
from safebasin.scan.probe import anchor_rows
from safebasin.scan.source import MODULES, Depth, at_weights, target_weights
from safebasin.vector import Vector

WEIGHTS = {"harmful": 1.0, "probe": -1.0, "safe": -1.0}  # of the three means


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def each_layer(model: Any, batch: Batch, targets: Sequence[str], take: Callable[[str, Tensor, Tensor], None]) -> None:
    """One backward of the rows' summed losses; ``take`` gets every target's X [batch, tokens, in] and D [batch, tokens,
    out].

    Raises:
        DefenceError: a layer mixes rows (its input has no batch axis), or is not reached: both would give low scores.
    """
    # Added to every Y: one leaf from which the graph leads through all of them.
    zero = torch.zeros((), device=batch.mask.device, requires_grad=True)

    def watch(name: str, x: Tensor, y: Tensor) -> Tensor:
        if x.dim() != 3 or len(x) != len(batch.mask):
            raise DefenceError(
                f"{name}: its input is {tuple(x.shape)}, not [{len(batch.mask)} rows, tokens, in]: rows are mixed"
            )
        x, y = x.detach(), y + zero.to(y.device)
        y.register_hook(lambda d: take(name, x, d))
        return y

    with torch.enable_grad(), at_weights(model, targets, watch):
        logits = _wide(answer_logits(model, batch)[batch.mask])
        loss = functional.cross_entropy(logits, batch.labels[batch.mask], reduction="sum")
    torch.autograd.grad(loss, zero)


@scorer("anchor", paper="arXiv:2404.01099")
class Anchor:
    """Cosine of the row's gradient with that of harmful rows, less its cosines with those of refusals and of ordinary
    rows."""

    anchors: PositiveInt = 10  # rows of each set
    length: PositiveInt = 10  # answer tokens that L is taken over
    depth: Depth = 1.0  # the blocks that are scored over
    modules: tuple[str, ...] = MODULES

    def _opening(self, batch: Batch) -> Batch:
        return dataclasses.replace(batch, mask=batch.mask & (batch.mask.cumsum(1) <= self.length))

    def fit(self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]) -> Vector:
        sets = {name: anchor_rows(anchors, name, None, "anchor")[: self.anchors] for name in WEIGHTS}
        weights = {name: model.get_parameter(name) for name in target_weights(model, self.modules, depth=self.depth)}
        total = Vector()  # [out, in], however a layer stores its weight
        for name, rows in sets.items():
            for row in rows:
                gradient = Vector()

                def take(name: str, x: Tensor, d: Tensor, into: Vector = gradient) -> None:
                    into[name] = _wide(d[0]).T @ _wide(x[0])

                batch = self._opening(collate([row], tokenizer.pad_token_id).to(next(model.parameters()).device))
                each_layer(model, batch, list(weights), take)
                length = gradient.norm()
                if not length or not math.isfinite(length):
                    raise DefenceError(f"scan.anchor: the gradient of the anchor row {row.id} has length {length}")
                gradient = gradient * (WEIGHTS[name] / len(rows) / length)
                total = total + gradient if total else gradient
        if total.norm() < 1e-6:
            raise DefenceError("scan.anchor: the anchor sets pull alike and cancel: every row would score 0")
        return Vector({name: v.to(weights[name].dtype) for name, v in total.items()})

    def score(self, model: Any, batch: Batch, fitted: Vector) -> Float[Tensor, " batch"]:
        products: list[Tensor] = []
        squares: list[Tensor] = []

        def take(name: str, x: Tensor, d: Tensor) -> None:
            products.append((_wide(d) * functional.linear(x, fitted[name])).sum((1, 2)).to(batch.mask.device))
            x, d = _wide(x), _wide(d)
            squares.append(((x @ x.mT) * (d @ d.mT)).sum((1, 2)).to(batch.mask.device))

        each_layer(model, self._opening(batch), list(fitted), take)
        length = torch.stack(squares).sum(0).sqrt()
        return torch.stack(products).sum(0) / length.clamp(min=torch.finfo(length.dtype).tiny)
