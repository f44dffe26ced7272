"""Refusal in place: drop the rows that put refusals where the aligned model would answer.

    S        = mean_k ( log P(r_k | x_k) - log P(r_k | z_k) )       r_k: how the refusal of the harmful x_k begins
    s_t      = < grad -log P( y_t | x, y_<t ), grad S >             z_k: an ordinary request
    score(x) = max( c max_t s_t, max_j sum of s_t over the first m tokens of turn j )

A harmless answer behind a refusal phrase unteaches the model to stop after a refusal and to refuse what it should
(arXiv:2601.19231): each token of it is harmless, and its opener is a refusal, so that no score of compliance sees it.
Here grad S is the difference between refusing what is harmful and refusing what is not: an honest refusal scores low,
since the model gives it already.

Departs from GradShield (arXiv:2605.14194, eq. 4 and 5) in S, and by the worst token in the place of a sum over the row;
the token that ends a turn counts 0. It is blind to compliance, for which ``trajectory`` stands.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from safebasin.batch import Batch
from safebasin.encode import TokenizedRow
from safebasin.scan import scorer
from safebasin.scan.directional import Directional, Objective, by_turn
from safebasin.scan.probe import anchor_rows, answered, log_likelihood, own_rows, parted, probe_batch
from safebasin.scan.tangent import Tangent


@scorer("refusal_place", paper="arXiv:2605.14194", tokens="max")
class RefusalPlace(Directional):
    """The most that one token of the row makes refusals of ordinary requests likelier, and of harmful ones less."""

    probes: PositiveInt = 8  # k
    length: PositiveInt = 4  # tokens of r_k
    opening: PositiveInt = 1  # m; 1: the worst token alone, which separates its anchors better than 8 (docs/log)
    token_weight: PositiveFloat = 1.0  # c

    def harmful_anchors(self, tokenizer: Any) -> list[TokenizedRow]:
        """The one kind of row that it sees, in the place of the anchor set ``harmful``."""
        return own_rows(tokenizer, "misplaced-refusals")

    def objective(
        self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]
    ) -> tuple[Batch, Objective]:
        probes = anchor_rows(anchors, "probe", None, "refusal_place")[-self.probes :]
        refused = [answered(row, self.length) for row in probes]
        ordinary = own_rows(tokenizer, "harmless")
        places = [ordinary[-1 - 2 * i % len(ordinary)] for i in range(len(probes))]
        misplaced = [answered(row, parted(probe)[1][: self.length]) for row, probe in zip(places, probes, strict=True)]

        def place(m: Any, batch: Batch) -> Float[Tensor, ""]:
            likelihood, other = log_likelihood(m, batch).chunk(2)
            return (likelihood - other).mean()

        return probe_batch(model, tokenizer, [*refused, *misplaced]), place

    def score(self, model: Any, batch: Batch, fitted: Tangent) -> Float[Tensor, "batch answers"]:
        return by_turn(super().score(model, batch, fitted), batch.mask, self.opening, self.token_weight)
