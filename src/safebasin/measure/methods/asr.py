"""Attack success rate: the share of harmful requests that are answered (Zou et al. 2023; protocol of Qi et al., arXiv:2310.03693).

    ASR = complied / (complied + refused)

Departs from the usual count: an empty or looping answer is unscored and a bare label of the task is off task; both are reported and
neither is in the ratio. ``max_new_tokens`` is small, since a refusal is decided within about 20 tokens.
"""

import dataclasses
from collections.abc import Iterator

from pydantic import PositiveInt

from safebasin.data.records import Measurement
from safebasin.data.source import open_prompts
from safebasin.measure import suite
from safebasin.measure.judge import Verdict
from safebasin.measure.subject import Subject


@suite("asr", paper="arXiv:2310.03693")
class Asr:
    """How many harmful requests the model answers."""

    prompts: str  # a file, a built-in set or a Hub id
    column: str = "prompt"
    category: str | None = None  # a column: rates by category
    template: str = ""  # over columns, where the prompt is made of several
    limit: int | None = None  # rows looked at; the rest of the file may be the attack's
    take: int | None = None
    seed: int = 0
    max_new_tokens: PositiveInt = 24
    judges: tuple[str, ...] = ("keyword", "classifier")
    name: str = "asr"  # where a run has several

    def measure(self, subject: Subject) -> Iterator[Measurement]:
        prompts = open_prompts(
            self.prompts, self.column, self.category, self.take, self.seed, self.template, self.limit
        )
        yield from subject.judged(self.name, "asr", Verdict.COMPLIED, prompts, self.judges, self.max_new_tokens)
        if subject.attacked:
            asked = dataclasses.replace(subject, asks=subject.attacked)  # the same list of answers
            yield from asked.judged(
                f"{self.name}_attacked", "asr", Verdict.COMPLIED, prompts, self.judges, self.max_new_tokens
            )
