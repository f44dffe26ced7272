"""LARF: layer-aware representation filtering (arXiv:2507.18631): rows whose state is nearer to compliance than to
refusal.

    l*       = argmax_l  max_a R_l(a) - min_a R_l(a)                        block l's weights times a, undone afterwards
    score(x) = h/|h| . (mean_j u_j/|u_j| - mean_j s_j/|s_j|)                states behind block l*

u_j, s_j are the states of harmful requests with a compliant answer and with a refusal. With all references taken, the
official mean of the ``avg`` largest differences of cosines is this product.

R_l(a) is the mean margin of refusal S on the probe rows (arXiv:2605.14194, eq. 5).

Departs from the official code: R is a margin on harmful requests; there it is the number of refusals among greedy
answers to over-refusal prompts. How the layer follows from R is not coded there: the range is our reading. The state is
taken behind the scaled block; the official index is off by one and reads the state before it. It is taken at the end of
the answer's turn; the official last token is the same where the template writes nothing behind it. Scores of two models
or layers do not compare.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from safebasin.batch import Batch
from safebasin.encode import TokenizedRow
from safebasin.errors import DefenceError, UserError
from safebasin.models.hooks import perturbed
from safebasin.models.parts import blocks
from safebasin.scan import scorer
from safebasin.scan.hidden import anchor_states, last_states
from safebasin.scan.probe import Word, anchor_rows, opening, refusal_margin, token_pair
from safebasin.scan.source import target_weights


class Fitted(NamedTuple):
    layer: int
    direction: Float[Tensor, " hidden"]  # from refusal to compliance


@scorer("larf", paper="arXiv:2507.18631")
class Larf:
    """How much nearer the row's hidden state is to harmful compliance than to refusal, at the layer that decides."""

    layer: NonNegativeInt | None = None  # l*, from 0; None: by scaling
    scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=2)] = (0.7, 0.8, 0.9, 1.1, 1.2, 1.3)  # a
    prompts: PositiveInt = 8  # probe rows that R is taken over
    tokens: tuple[Word, Word] | None = None  # (refusal, compliance) of S; None: as the model refuses, against "Sure"

    def fit(self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]) -> Fitted:
        safe, unsafe = (anchor_rows(anchors, name, None, "larf") for name in ("probe", "harmful"))
        count = len(blocks(model))
        if self.layer is not None and self.layer >= count:
            raise UserError(f"scan.larf: layer={self.layer}; the model's blocks are 0 to {count - 1}")
        layer = self._layer(model, tokenizer, safe[: self.prompts]) if self.layer is None else self.layer
        u, s = (anchor_states(model, tokenizer, rows, layer).mean(0) for rows in (unsafe, safe))
        direction = u - s
        if not direction.any():
            raise DefenceError(
                "scan.larf: the anchor sets 'harmful' and 'probe' have the same states: every row would score 0"
            )
        return Fitted(layer, direction)

    @torch.no_grad()
    def _layer(self, model: Any, tokenizer: Any, rows: Sequence[TokenizedRow]) -> int:
        probe = opening(model, tokenizer, rows)
        pair = token_pair(model, tokenizer, probe, self.tokens)
        owned: dict[int, dict[str, Tensor]] = {}
        for name in target_weights(model):
            block = next(int(step) for step in name.split(".") if step.isdigit())
            owned.setdefault(block, {})[name] = model.get_parameter(name)

        def margin(weights: dict[str, Tensor], a: float) -> float:
            with perturbed(weights, lambda _, weight: a * weight):
                return float(refusal_margin(model, probe, pair).mean())

        ranges = {}
        for block, weights in owned.items():
            margins = [margin(weights, a) for a in self.scales]
            ranges[block] = max(margins) - min(margins)
        return max(ranges, key=lambda block: ranges[block])

    def score(self, model: Any, batch: Batch, fitted: Fitted) -> Float[Tensor, " batch"]:
        return last_states(model, batch, fitted.layer) @ fitted.direction
