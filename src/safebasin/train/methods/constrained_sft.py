"""Constrained SFT: the first tokens of an answer stay near the aligned model (arXiv:2406.05946, ICLR 2025, eq. 3-4).

    L = - sum_t (2 / beta_t) log sigmoid(beta_t D_t),  D_t = log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)  (eq. 3)
    grad L = sum_t w_t grad CE_t,   w_t = 2 (1 - sigmoid(beta_t D_t))                                         (eq. 4)

A token that has become likelier than it was (beta_t D_t >> 0) stops teaching; a large beta_t at the first tokens stops
it early.

Departs from the official code: the mean is over the answer tokens of the whole optimizer step; t starts anew in every
answer of a conversation. As in that code the gradient's weight is applied to the CE, detached, and never falls under
1e-3; so the loss that is shown is w_t CE_t, not eq. 3.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import NonNegativeFloat
from torch import Tensor

from safebasin.batch import Batch
from safebasin.train import method
from safebasin.train.loss import labelled, nll
from safebasin.train.reference import reference_logits

FLOOR = 1e-3  # of w_t, as in the official code


def place_in_answer(mask: Bool[Tensor, "batch answers"]) -> Int[Tensor, "batch answers"]:
    """1, 2, ... at the tokens of every answer, 0 elsewhere."""
    count = mask.cumsum(-1)
    return count - torch.where(mask, 0, count).cummax(-1).values


@method("constrained_sft", paper="arXiv:2406.05946", roles=("reference",))
class ConstrainedSft:
    """Learn a token less the likelier it already became than it was, most strictly at the first tokens of an answer."""

    first: NonNegativeFloat = 0.5  # beta_1
    early: NonNegativeFloat = 2.0  # beta_2 ... beta_5
    later: NonNegativeFloat = 0.1  # beta_t, t > 5

    def loss(self, model: Any, batch: Batch) -> Float[Tensor, "batch answers"]:
        start = labelled(reference_logits(model, batch).float(), batch)
        ce = nll(model, batch)
        t = place_in_answer(batch.mask)
        beta = torch.where(t <= 1, self.first, torch.where(t <= 5, self.early, self.later))
        w = 2 * (1 - torch.sigmoid(beta * (start - ce)))
        return w.detach().clamp(min=FLOOR) * ce
