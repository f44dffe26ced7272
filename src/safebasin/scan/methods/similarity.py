"""Similarity of an upload to the alignment data: what overwrites the guardrail is what resembles it (arXiv:2506.05346).

    f(z)     = final hidden state at the last token of the completion
    score(z) = mean of the K largest cos(f(z), f(z')),  z' in D_align       (INFERRED: the paper chooses subsets by K)

The sign is the paper's: a model aligned on data like the task (High-Sim) is more harmful after tuning on the task than
one aligned on data unlike it. So high = harmful, and the mean of the column is the risk of the whole set before any
training. Two limits: the paper compares sets, not rows, so that the order of single rows is not its claim; and a row
that refuses well resembles the alignment data most of all and scores highest. The alignment data is ``data.align``
where the run has it, and the anchor set ``probe`` otherwise.

Departs from the paper: states of the aligned start model, not of the base model; a score per row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor

from safebasin.batch import Batch
from safebasin.encode import TokenizedRow
from safebasin.scan import scorer
from safebasin.scan.hidden import anchor_states, last_states
from safebasin.scan.probe import anchor_rows


@scorer("similarity", paper="arXiv:2506.05346", streams=("align",))
class Similarity:
    """How like the row is to the data that the model was aligned on."""

    top: PositiveInt = 10  # K: alignment rows that a row is compared with (all, where there are fewer)

    def fit(
        self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]
    ) -> Float[Tensor, "rows hidden"]:
        align = anchors.get("align") or anchor_rows(anchors, "probe", None, "similarity")
        return anchor_states(model, tokenizer, align)

    def score(self, model: Any, batch: Batch, fitted: Float[Tensor, "rows hidden"]) -> Float[Tensor, " batch"]:
        cosines = last_states(model, batch) @ fitted.T
        return cosines.topk(min(self.top, len(fitted)), dim=1).values.mean(1)
