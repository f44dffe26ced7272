"""The report: one object, read from the files of a run folder. It becomes JSON, Markdown, a page and an exit code.

What was not measured is None, never zero. Every string that came from a row has passed ``printable`` before it enters
this tree.
"""

import dataclasses
from typing import Any

from safebasin.report.limits import Gate
from safebasin.report.rates import Agreement, CategoryRate, Comparison, MetricKey, Reading

SCHEMA = 3  # of report.json: raised when a field changes its meaning or goes away


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of the gate. ``code`` is the exit code: 0 pass, 3 fail, 4 inconclusive."""

    code: int
    status: str
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """Counts of rows per bin, of one origin (None where unknown): removed or not."""

    origin: str | None
    removed: bool
    counts: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Histogram:
    """The scores that an arm was cut by. ``symlog``: the constant of a symlog axis, None for a linear one."""

    scorer: str
    threshold: float | None
    symlog: float | None
    edges: tuple[float, ...]
    series: tuple[Series, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Removed:
    row_id: str
    line: int | None
    score: float | None
    reason: str
    origin: str | None
    category: str | None
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class OriginCount:
    """Rows of one origin ("task", "poison", ...) in the set, and how many of them were removed."""

    origin: str
    rows: int
    removed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """Rows removed before an arm was tuned. ``origins`` and ``false_share`` are None where origins are unknown."""

    arm: str
    scorer: str
    estimator: str
    threshold: float | None
    rows: int  # before the cut
    removed: int
    origins: tuple[OriginCount, ...] | None
    false_share: float | None  # removed rows of origin "task", of all rows of origin "task"
    histogram: Histogram | None
    shown: tuple[Removed, ...]  # highest scores first; at most ``rows.SHOWN``


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeatToken:
    text: str
    value: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeatRow:
    """A row's answer by token, with each token's part of the row's score; high = harmful."""

    row_id: str
    line: int
    scorer: str
    score: float | None
    peak: float  # largest absolute value of a token of the answer: it has the full colour
    tokens: tuple[HeatToken, ...]  # at most ``rows.TOKENS``
    omitted: int  # tokens after these

    @property
    def strongest(self) -> tuple[tuple[int, HeatToken], ...]:
        """The three tokens of largest absolute value among those shown, with their positions from 1."""
        return tuple(sorted(enumerate(self.tokens, 1), key=lambda item: abs(item[1].value or 0), reverse=True)[:3])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    arm: str
    methods: tuple[str, ...]
    steps: int | None
    seconds: float | None
    loss: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepairedModule:
    """A module of a repaired arm: cosine with its image under the alignment matrix, lengths, ranks, what took it."""

    module: str
    cosine: float | None
    norm: float | None
    norm_after: float | None
    distance: float | None  # over the length before
    ranks: tuple[int | None, int | None]  # before and after
    selected: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repair:
    """What was done to an arm's adapter after tuning."""

    arm: str
    of: str  # the arm whose adapter it is
    edits: tuple[str, ...]
    distance: float | None
    norm_left: float | None
    energy: float | None  # of what a truncation has left
    rank: int | None
    modules: tuple[RepairedModule, ...]

    @property
    def edited(self) -> int:
        return sum(bool(each.selected) for each in self.modules)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed:
    """An arm whose answers come from the logits of the start and of another arm, mixed."""

    arm: str
    of: str
    share: float  # of the start's logits
    guard: str  # that decides which requests are mixed; empty: all are
    above: float
    requests: tuple[tuple[str, int, int], ...]  # suite, requests that were mixed, requests


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    arm: str
    verdicts: dict[str, str]
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One attack prompt and every arm's answer to it."""

    suite: str
    id: str
    category: str
    prompt: str
    answers: tuple[Answer, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A row or a file of the run that could not be used, or that is no evidence."""

    place: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    schema: int
    run: str  # the folder's name
    redacted: bool
    verdict: Verdict
    gate: Gate
    evidence_digest: str  # of the manifest's steps; the gate compares it with the manifest as it is then
    evidence_problems: tuple[str, ...]  # why the run's files do not prove its numbers; empty where they do
    arms: tuple[str, ...]  # in the order of the run, the model as it was first
    start: str | None  # the model as it was; None where the run does not measure it
    judged: str | None  # the arm that the gate judges; None: it names none, and there is not exactly one
    readings: tuple[Reading, ...]
    comparisons: tuple[Comparison, ...]
    agreement: tuple[Agreement, ...]
    categories: tuple[CategoryRate, ...]
    cuts: tuple[Cut, ...]
    heat: tuple[HeatRow, ...]  # empty where no scorer scores tokens
    training: tuple[Training, ...]
    about: tuple[tuple[str, str], ...] = ()  # what was tuned on what and when: name, text
    repairs: tuple[Repair, ...] = ()
    mixed: tuple[Mixed, ...] = ()
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    manifest: dict[str, str]  # flat: "versions.torch" -> "2.6.0"

    @property
    def keys(self) -> tuple[MetricKey, ...]:
        """What was measured, each once. The judges' agreement is not among them: it has a table of its own."""
        return tuple(dict.fromkeys(reading.key for reading in self.readings if reading.unit != "kappa"))

    def at(self, arm: str, key: MetricKey) -> Reading | None:
        return next((reading for reading in self.readings if (reading.arm, reading.key) == (arm, key)), None)

    def of(self, quantity: str, arm: str | None) -> tuple[Reading, ...]:
        """The readings of one quantity in one arm, one for every suite and judge."""
        return tuple(reading for reading in self.readings if (reading.quantity, reading.arm) == (quantity, arm))

    def compared(self, quantity: str, arm: str | None, against: str | None) -> tuple[Comparison, ...]:
        return tuple(c for c in self.comparisons if (c.quantity, c.arm, c.against) == (quantity, arm, against))


def schema() -> dict[str, Any]:
    """JSON schema of ``report.json``. A reader must ignore keys that it does not know."""
    from pydantic import TypeAdapter  # the gate does not need it, and starts faster without

    return TypeAdapter(Report).json_schema(mode="serialization")
