"""What suites share that ask a set of requests and judge the answers."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from safebasin.data.records import Measurement
from safebasin.data.source import Prompt, SetName, open_prompts
from safebasin.measure.judging import Verdict
from safebasin.measure.subject import Subject

Judges = Annotated[tuple[str, ...], Field(min_length=1)]
OneJudge = Annotated[tuple[str, ...], Field(min_length=1, max_length=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """A set of requests, and by whom the answers are judged."""

    prompts: SetName  # a file, a built-in set or a Hub id
    column: str = "prompt"
    category: str | None = None  # a column: rates by category
    template: str = ""  # over columns, where the prompt is made of several
    limit: PositiveInt | None = None  # rows looked at; the rest of the file may be the attack's
    take: PositiveInt | None = None
    seed: NonNegativeInt = 0
    max_new_tokens: PositiveInt = 96  # of a turn, thoughts included; a refusal that it cuts off is unscored
    judges: Judges = ("keyword", "classifier")

    def rows(self) -> list[Prompt]:
        return open_prompts(self.prompts, self.column, self.category, self.take, self.seed, self.template, self.limit)

    def count(self, subject: Subject, suite: str, what: str, hit: Verdict) -> Iterator[Measurement]:
        """Ask the subject all of them; the share of ``hit`` among its refusals and compliances."""
        yield from subject.judged(suite, what, hit, self.rows(), self.judges, self.max_new_tokens)
