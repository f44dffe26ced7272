"""The records that the stages leave in files: what one line of each holds."""

import dataclasses
from collections.abc import Mapping
from types import NoneType
from typing import Any


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A number with what one needs to trust it. ``value`` is None where nothing could be scored: never a zero."""

    suite: str
    what: str
    value: float | None
    low: float | None  # 95 % interval
    high: float | None
    n: int  # scored prompts
    unscored: int = 0
    off_task: int = 0
    unit: str = "share"
    judge: str = ""
    category: str = ""
    evidence: str = ""  # the file of answers that it was counted from


@dataclasses.dataclass(frozen=True)
class AnswerRecord:
    """One prompt of one suite with the model's answer and what was made of it: a line of ``answers.jsonl``."""

    suite: str
    id: str  # of the prompt within its suite
    category: str
    prompt: str
    answer: str
    expected: str | None = None  # the right answer, in suites that have one
    verdicts: Mapping[str, str] = dataclasses.field(default_factory=dict)  # judge -> a judging.Verdict
    # of a judge or metric; absent: unscored
    scores: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    correct: bool | None = None  # None: unscored, or a suite that judges
    finished: bool = True  # the model ended its answer by itself
    thought: str = ""  # what it thought before, judged by itself

    @classmethod
    def from_row(cls, row: Any) -> "AnswerRecord":
        """The record of a line that was read back; keys that it does not know are left out.

        Raises:
            ValueError: the line is no object, lacks a field, or holds one of another type.
        """
        if not isinstance(row, Mapping):
            raise ValueError(f"an answer is an object, found {type(row).__name__}")
        values = {name: row[name] for name in _TYPES if name in row}
        missing = [name for name in ("suite", "id", "prompt", "answer", "verdicts") if name not in values]
        if missing:
            raise ValueError(f"an answer without {', '.join(missing)}")
        for name, value in values.items():
            inner = value.values() if isinstance(value, Mapping) else ()
            if not isinstance(value, _TYPES[name]) or not all(isinstance(part, _INNER[name]) for part in inner):
                raise ValueError(f"an answer whose {name!r} is of the wrong type: {type(value).__name__}")
        return cls(**{"category": "", **values})


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("suite", "id", "category", "prompt", "answer", "thought"), (str,)),
    "expected": (str, NoneType),
    "verdicts": (Mapping,),
    "scores": (Mapping,),
    "correct": (bool, NoneType),
    "finished": (bool,),
}
_INNER: dict[str, tuple[type, ...]] = {"verdicts": (str,), "scores": (int, float)}
