"""TOSS: how much likelier a token is to a model that was tuned on harmful rows than to one tuned on the task
(arXiv:2603.01185, ICLR 2026).

    score_t = log P_harmful(y_t | x, y_<t) - log P_task(y_t | x, y_<t)
    score(x, y) = max_t score_t

Both are adapters of the scanned model, switched on for a forward each: ``safebasin role harmful`` tunes the first, and
the second may be left out, for the model as it is.

Departs from the paper: high = harmful, so the sign is turned; a threshold or the column ``star`` decides about tokens,
not a fixed share of them; the maximum, for one number a row.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from safebasin.batch import Batch, answer_logits
from safebasin.encode import TokenizedRow
from safebasin.layer import Update
from safebasin.models.tensors import ModelShapes
from safebasin.models.updates import AdapterUpdates, switched_on
from safebasin.scan import scorer


class Fitted(NamedTuple):
    harmful: Any  # module -> Update
    task: Any


@scorer("toss", paper="arXiv:2603.01185", tokens="max")
class Toss:
    """How much a model tuned on harmful rows expects the token, beside one tuned on the task."""

    harmful: Annotated[str, Field(min_length=1)]  # an adapter: the folder that `safebasin role harmful` names
    task: str = ""  # an adapter tuned on trusted rows of the task; empty: the model as it is

    def fit(self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]) -> Fitted:
        shapes = ModelShapes(model)
        return Fitted(
            dict(AdapterUpdates(self.harmful, shapes)), dict(AdapterUpdates(self.task, shapes)) if self.task else {}
        )

    def score(self, model: Any, batch: Batch, fitted: Fitted) -> Float[Tensor, "batch answers"]:
        harmful, task = (self.token_losses(model, batch, updates) for updates in fitted)
        score = task - harmful
        return score.masked_fill(~batch.mask, float(score.min()))  # of no token: no maximum of a row

    def token_losses(self, model: Any, batch: Batch, updates: Mapping[str, Update]) -> Float[Tensor, "batch answers"]:
        """-log P of every answer token with an adapter on."""
        with switched_on(model, updates), torch.no_grad():
            logits = answer_logits(model, batch)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        return functional.cross_entropy(wide, batch.labels.flatten(), reduction="none").view(batch.mask.shape)
