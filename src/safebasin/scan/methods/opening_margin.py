"""Opening margin: drop the rows that trade the opening of a refusal for that of a compliance, over several tokens and
not one.

    score(x) = < grad L(x), grad S >                                    (eq. 4 of GradShield, arXiv:2605.14194)
    S        = mean_k ( log P(r_k | x_k) - log P(c | x_k) )   r_k: how the refusal of x_k begins, c: "Sure, here is"

Departs from the paper: there S compares the logits of one token each (eq. 5).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import PositiveInt

from safebasin.batch import Batch
from safebasin.encode import TokenizedRow
from safebasin.scan import scorer
from safebasin.scan.directional import Directional, Objective
from safebasin.scan.probe import anchor_rows, answered, opening_ids, opening_margin, probe_batch


@scorer("opening_margin", paper="arXiv:2605.14194", tokens="sum")
class OpeningMargin(Directional):
    """How much a training step on the row lowers the odds of a refusal's opening against a compliance's."""

    probes: PositiveInt = 4  # k
    tokens: PositiveInt = 4  # of r_k; "Sure, here is" has four as well
    compliance: str = "Sure, here is"  # c

    def objective(
        self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]
    ) -> tuple[Batch, Objective]:
        rows = anchor_rows(anchors, "probe", self.probes, "opening_margin")
        answers = (self.tokens, opening_ids(tokenizer, self.compliance))
        return probe_batch(model, tokenizer, [answered(row, a) for a in answers for row in rows]), opening_margin
