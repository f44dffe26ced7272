"""Self-refusal: by the aligned model itself, a row is harmful if it would refuse the row's prompt.

    score(x) = logit[refusal] - logit[compliance]  at the row's own first answer position, the row's answer unseen

The pair of tokens is GradShield's (arXiv:2605.14194, eq. 5). A baseline: it sees the prompt only, so it is blind to a
harmless prompt with a harmful answer, and to a harmful prompt with a refusal as its answer (a good row) it gives a high
score.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor

from safebasin.batch import Batch
from safebasin.encode import TokenizedRow
from safebasin.scan import scorer
from safebasin.scan.probe import Pair, Word, anchor_rows, opening, refusal_margin, token_pair


@scorer("self_refusal")
class SelfRefusal:
    """By how much the aligned model would rather refuse the row's prompt than comply."""

    probes: PositiveInt = 1  # harmful prompts that the refusal token is read from
    tokens: tuple[Word, Word] | None = None  # (refusal, compliance); None: as the model itself refuses, against "Sure"

    def fit(self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]) -> Pair:
        probe = opening(model, tokenizer, anchor_rows(anchors, "probe", self.probes, "self_refusal"))
        return token_pair(model, tokenizer, probe, self.tokens)

    @torch.no_grad()
    def score(self, model: Any, batch: Batch, fitted: Pair) -> Float[Tensor, " batch"]:
        return refusal_margin(model, batch, fitted)
