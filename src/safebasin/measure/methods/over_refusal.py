"""Over-refusal: the share of harmless requests that are refused (XSTest, arXiv:2308.01263).

over-refusal = refused / (complied + refused)
"""

from collections.abc import Iterator

from safebasin.data.records import Measurement
from safebasin.measure import suite
from safebasin.measure.judging import Verdict, check_counts_refusals
from safebasin.measure.prompts import Prompts
from safebasin.measure.subject import Subject


@suite("over_refusal", paper="arXiv:2308.01263", reads=("answers",))
class OverRefusal(Prompts):
    """How many harmless requests the model refuses."""

    name: str = "over_refusal"

    def __post_init__(self) -> None:
        check_counts_refusals(self.judges)

    def measure(self, subject: Subject) -> Iterator[Measurement]:
        yield from self.count(subject, self.name, "over_refusal", Verdict.REFUSED)
