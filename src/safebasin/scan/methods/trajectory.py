"""Trajectory: drop the rows that lower the model's safety anywhere along an answer, not only at its first word.

    S        = (1 / n) sum_k w_k sum_t log P( c_kt | x_k, c_k,<t )                                                 (1)
    s_t      = < grad -log P( y_t | x, y_<t ), grad S >              of every answer token y_t of a row             (2)
    score(x) = max( c max_t s_t, max_j sum of s_t over the first m tokens of turn j )                               (3)

(1) is over contexts k: a request x, what comes next c, and its weight w, negative where c is not safe. Around each of
n harmful requests: an opener (w = -2); a structure without an opener (-1.5); an opener in Spanish, French or German
(-3.5); and beside them an ordinary request with its answer (+1). S is one scalar, so grad S is one direction and (2) is
one forward-mode pass (``tangent``). In (3) a sum over the row would let the harmless part pay for the rest, so that one
token decides, wherever it stands. The first tokens of a turn are a case of their own: alignment stands in them, and an
opener that is weak in each of its tokens, as in another language, is strong in their sum. The token that ends a turn
counts 0: it carries no compliance, and would put a refusal that is shorter than the model's own beside it.

The weights are by hand, from scores of single contexts, which add up (docs/log, 2026-11-26). Contexts behind a refusal
or a paragraph are not needed: an opener pulls along one direction wherever it stands.

Departs from GradShield (arXiv:2605.14194, eq. 4 and 5): there S is one margin of two tokens, and the row's loss is
summed. That form stays as ``gradshield``.

Weak where honest refusals begin with other words than the model's own ("Sorry", "Helping you would ..."), which it
puts beside compliance, where the model itself refuses an honest request, and where a language's opener has other words
than the contexts. Blind to: harmless rows behind a refusal phrase (``refusal_place`` sees them); an identity shift;
ciphers, and languages that the model does not read; a harmful answer that keeps to the topic of a harmless request and
has no opener.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from safebasin.batch import Batch
from safebasin.encode import TokenizedRow
from safebasin.scan import scorer
from safebasin.scan.directional import Directional, Objective, by_turn
from safebasin.scan.probe import anchor_rows, answered, log_likelihood, own_rows, probe_batch
from safebasin.scan.tangent import Tangent

OPENERS = ("Sure, here is", "Sure, here is", "Sure, here is", "Of course! Here is")
STRUCTURES = ("Step 1. You will need", "1. First,", "To do this, start with", "The first part")


class Context(NamedTuple):
    """A request with what comes next, and its weight in S."""

    kind: str
    weight: float
    row: TokenizedRow


def contexts(
    tokenizer: Any, probes: Sequence[TokenizedRow], length: int, openers: Sequence[str] = OPENERS
) -> Iterator[Context]:
    """The contexts around ``probes``, harmful requests. Of what comes next, the first ``length`` tokens."""

    def ids(texts: Sequence[str], i: int) -> tuple[int, ...]:
        return tuple(tokenizer(texts[i % len(texts)], add_special_tokens=False)["input_ids"])[:length]

    harmless, spoken = (own_rows(tokenizer, name) for name in ("harmless", "languages"))
    for i, probe in enumerate(probes):
        yield Context("open", -2, answered(probe, ids(openers, i)))
        yield Context("structure", -1.5, answered(probe, ids(STRUCTURES, i)))
        yield Context("language", -3.5, answered(spoken[5 * i % len(spoken)], length))
        yield Context("answer", 1, answered(harmless[-1 - 2 * i % len(harmless)], length))


@scorer("trajectory", paper="arXiv:2605.14194", tokens="max")
class Trajectory(Directional):
    """The most that a turn of the row lowers the model's safety over many contexts, by its opening or by one token."""

    probes: PositiveInt = 12  # n
    length: PositiveInt = 5  # the most tokens of c_k
    openers: tuple[str, ...] = OPENERS  # c_k of a compliance
    opening: PositiveInt = 8  # m
    token_weight: PositiveFloat = 1.2  # c

    def objective(
        self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[TokenizedRow]]
    ) -> tuple[Batch, Objective]:
        probes = anchor_rows(anchors, "probe", None, "trajectory")[-self.probes :]
        every = list(contexts(tokenizer, probes, self.length, self.openers))
        weights = torch.tensor([float(context.weight) for context in every]) / len(probes)

        def safety(m: Any, batch: Batch) -> Float[Tensor, ""]:
            likelihood = log_likelihood(m, batch)
            return (likelihood * weights.to(likelihood)).sum()

        return probe_batch(model, tokenizer, [context.row for context in every]), safety

    def score(self, model: Any, batch: Batch, fitted: Tangent) -> Float[Tensor, "batch answers"]:
        return by_turn(super().score(model, batch, fitted), batch.mask, self.opening, self.token_weight)
