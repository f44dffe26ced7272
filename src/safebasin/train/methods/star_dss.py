"""STAR-DSS: token-level safety shaping by a guard's score of partial answers (arXiv:2505.17196, NeurIPS 2025).

    V_k = P(safe | x, y_1:kM)                                        score of the answer up to the end of chunk k
    L   = sum_t V_t CE(y_t | x, y_<t) + (1 - V_t) lambda_KL KL_t     V_t of the chunk that t stands in        (eq. 3)
    KL_t = KL(model || reference) over the whole vocabulary

V is the column ``star``: one number an answer token, or one a row. A guard writes it in the scan; training asks no
guard.

Departs from the paper: chunks are of the guard's tokens, and t stands in the one that its last character stands in
(``scan.guard``). Departs from the official code: the KL is the full one of the paper (the code takes k2 of the label's
token, ``estimator: k2`` here); chunks are of tokens, not of words; the mean is over the answer tokens of the whole
optimizer step, not of a micro-batch; the reference is the adapter switched off, not a second model.
"""

import functools
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from safebasin.batch import Batch, target_logits
from safebasin.train import method
from safebasin.train.loss import scatter_answers
from safebasin.train.reference import reference_logits

# Tokens whose probabilities over the vocabulary live at once: beyond the logits, memory does not grow with the batch.
CHUNK = 512


@method("star_dss", paper="arXiv:2505.17196", columns=("star",), roles=("reference",))
class StarDss:
    """Learn a token as far as the answer up to it is safe; elsewhere stay near the aligned model."""

    kl: NonNegativeFloat = 0.5  # lambda_KL
    estimator: Literal["full", "k2"] = "full"  # over the vocabulary, or half the squared log-ratio of the label

    def loss(self, model: Any, batch: Batch) -> Float[Tensor, "batch answers"]:
        reference = reference_logits(model, batch)
        logits = target_logits(model, batch)
        v = batch.columns["star"].reshape(len(batch.mask), -1).expand(batch.mask.shape)[batch.mask]
        chunks = zip(*(each.split(CHUNK) for each in (logits, reference, batch.labels[batch.mask], v)), strict=True)
        again = functools.partial(checkpoint, self.shaped, use_reentrant=False, preserve_rng_state=False)
        shaped = self.shaped if len(logits) <= CHUNK else again  # of a single chunk, recomputing saves nothing
        return scatter_answers(torch.cat([shaped(*chunk) for chunk in chunks]), batch)

    def shaped(
        self,
        logits: Float[Tensor, "n vocabulary"],
        reference: Float[Tensor, "n vocabulary"],
        labels: Int[Tensor, " n"],
        v: Float[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """Equation 3 at n tokens, from the logits of the model and of the reference."""
        p, q = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
        label_p, label_q = (x.gather(-1, labels[:, None])[:, 0] for x in (p, q))
        kl = (p.exp() * (p - q)).sum(-1) if self.estimator == "full" else 0.5 * (label_p - label_q) ** 2
        return v * -label_p + (1 - v) * self.kl * kl
