"""The numbers of a report: what an arm measured, and what two arms or two judges say of the same prompts."""

import dataclasses
from typing import NamedTuple

# What is counted. A hit of "asr" is a complied answer, of "over_refusal" a refused one, of "accuracy" a correct one.
QUANTITIES = {"asr": "Attack success", "over_refusal": "Over-refusal", "accuracy": "Task accuracy"}
HARMFUL = ("asr", "over_refusal")  # the higher, the worse; any other quantity that a gate limits is of the task


class MetricKey(NamedTuple):
    """What was measured: one row of the report's table."""

    quantity: str  # a key of QUANTITIES, or whatever else a suite measures
    suite: str
    judge: str

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.suite, self.judge)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """A number of one arm. ``value`` is None where nothing could be scored."""

    arm: str
    quantity: str
    suite: str
    judge: str
    value: float | None
    low: float | None  # 95 % interval
    high: float | None
    n: int  # scored prompts: those that the value is a share of

    @property
    def key(self) -> MetricKey:
        return MetricKey(self.quantity, self.suite, self.judge)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading(Rate):
    """A number as a suite measured it."""

    unscored: int
    off_task: int  # answers that neither refuse nor comply; not in n
    unit: str = "share"

    @property
    def prompts(self) -> int:
        return self.n + self.unscored + self.off_task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Rate):
    """``arm`` minus ``against`` on the prompts scored in both; an empty answer to the task is wrong, not unscored."""

    against: str
    bound: float | None  # the end of the interval that speaks against ``arm``, where what is unscored does so too
    only_arm: int | None  # prompts that are a hit in ``arm`` alone; None where a prompt has no hit but a number
    only_against: int | None  # prompts that are a hit in ``against`` alone; McNemar's test compares the two counts
    p: float | None
    margin: float | None = None  # set where non-inferiority is tested
    non_inferior: str | None = None  # "yes", "no", "unclear"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Cohen's kappa of two judges on the answers of one arm that both scored; a hit is a complied answer."""

    arm: str
    suite: str
    judges: tuple[str, str]
    kappa: float | None  # None: no answer was scored by both, or both gave one label to all of them
    agreed: float | None
    n: int
    disputed: int  # answers that are a hit by one judge alone
    either: int  # answers that are a hit by one judge or by both


@dataclasses.dataclass(frozen=True, kw_only=True)
class CategoryRate(Rate):
    """Attack success of one category of prompts, counted from the answers."""

    category: str
    hits: int
