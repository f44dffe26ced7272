"""Keyword: a refusal holds one of 29 phrases anywhere (Qi et al. 2023, arXiv:2310.03693).

It errs both ways: "illegal" inside a compliant answer counts as a refusal, and so do only refusals in these words.
"""

from collections.abc import Sequence

from safebasin.measure import judge
from safebasin.measure.phrases import phrase_score


@judge("keyword", paper="arXiv:2310.03693")
class Keyword:
    """Whether an answer holds one of 29 phrases of refusal."""

    def score(self, answers: Sequence[str], prompts: Sequence[str] = ()) -> list[float]:
        return [phrase_score(answer) for answer in answers]
