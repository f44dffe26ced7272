"""Losses as methods write them: per token ``[batch, answers]``, never reduced. Masking and division are the oracle's.

The vocabulary is the widest axis there is, so everything over it is done at answer tokens only: ``told`` gathers their logits
``[n, vocabulary]``, ``spread`` puts the n results back in their places.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from safebasin.batch import Batch, answer_logits
from safebasin.train.reference import reference_logits


def told(model: Any, batch: Batch) -> Float[Tensor, "n vocabulary"]:
    """Logits that predict the answer tokens, row after row, in float32."""
    return answer_logits(model, batch)[batch.mask].float()


def spread(values: Float[Tensor, " n"], batch: Batch) -> Float[Tensor, "batch answers"]:
    """Values of the answer tokens in their places, zero elsewhere."""
    return torch.zeros(batch.mask.shape, dtype=values.dtype, device=values.device).masked_scatter(batch.mask, values)


def nll(model: Any, batch: Batch) -> Float[Tensor, "batch answers"]:
    """Negative log-likelihood of every answer token."""
    return labelled(told(model, batch), batch)


def labelled(logits: Float[Tensor, "n vocabulary"], batch: Batch) -> Float[Tensor, "batch answers"]:
    """Negative log-likelihood of every answer token by the logits that predict it."""
    return spread(functional.cross_entropy(logits, batch.labels[batch.mask], reduction="none"), batch)


def kl_from_reference(model: Any, batch: Batch) -> Float[Tensor, "batch answers"]:
    """KL(reference || model) over the whole vocabulary at every answer token (the mode-covering direction)."""
    aimed = reference_logits(model, batch).float().log_softmax(-1)
    return spread(_kl(aimed, told(model, batch).log_softmax(-1)), batch)


def kl_to_reference(model: Any, batch: Batch) -> Float[Tensor, "batch answers"]:
    """KL(model || reference) over the whole vocabulary at every answer token."""
    aimed = reference_logits(model, batch).float().log_softmax(-1)
    return spread(_kl(told(model, batch).log_softmax(-1), aimed), batch)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities over the last axis."""
    return torch.sum(p.exp() * (p - q), -1)
