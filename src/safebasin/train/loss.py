"""Losses as methods write them: per token ``[batch, answers]``, never reduced. Masking and division are the oracle's.

The vocabulary is the widest axis there is, so everything over it is done at answer tokens only: ``target_logits``
gives their logits ``[n, vocabulary]``, ``scatter_answers`` puts the n results back in their places.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from safebasin.batch import Batch, target_logits
from safebasin.train.reference import reference_logits


def scatter_answers(values: Float[Tensor, " n"], batch: Batch) -> Float[Tensor, "batch answers"]:
    """Values of the answer tokens in their places, zero elsewhere."""
    return torch.zeros(batch.mask.shape, dtype=values.dtype, device=values.device).masked_scatter(batch.mask, values)


def nll(model: Any, batch: Batch) -> Float[Tensor, "batch answers"]:
    """Negative log-likelihood of every answer token."""
    return labelled(target_logits(model, batch).float(), batch)


def labelled(logits: Float[Tensor, "n vocabulary"], batch: Batch) -> Float[Tensor, "batch answers"]:
    """Negative log-likelihood of every answer token by the logits that predict it."""
    return scatter_answers(functional.cross_entropy(logits, batch.labels[batch.mask], reduction="none"), batch)


def kl_from_reference(model: Any, batch: Batch) -> Float[Tensor, "batch answers"]:
    """KL(reference || model) over the whole vocabulary at every answer token (the mode-covering direction)."""
    p = reference_logits(model, batch).float().log_softmax(-1)
    q = target_logits(model, batch).float().log_softmax(-1)
    return scatter_answers(torch.sum(p.exp() * (p - q), -1), batch)
