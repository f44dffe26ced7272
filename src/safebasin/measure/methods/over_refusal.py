"""Over-refusal: the share of harmless requests that are refused (XSTest, arXiv:2308.01263).

over-refusal = refused / (complied + refused)
"""

from collections.abc import Iterator

from pydantic import PositiveInt

from safebasin.data.records import Measurement
from safebasin.data.source import open_prompts
from safebasin.measure import suite
from safebasin.measure.judge import Verdict
from safebasin.measure.subject import Subject


@suite("over_refusal", paper="arXiv:2308.01263")
class OverRefusal:
    """How many harmless requests the model refuses."""

    prompts: str
    column: str = "prompt"
    category: str | None = None
    template: str = ""
    limit: int | None = None
    take: int | None = None
    seed: int = 0
    max_new_tokens: PositiveInt = 24
    judges: tuple[str, ...] = ("keyword", "classifier")
    name: str = "over_refusal"

    def measure(self, subject: Subject) -> Iterator[Measurement]:
        prompts = open_prompts(
            self.prompts, self.column, self.category, self.take, self.seed, self.template, self.limit
        )
        yield from subject.judged(self.name, "over_refusal", Verdict.REFUSED, prompts, self.judges, self.max_new_tokens)
