"""The files of a run folder as the report reads them. One that is not as a run writes it is a UserError."""

import functools
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from safebasin.console import printable
from safebasin.data.files import cause, read_text, shown
from safebasin.data.records import AnswerRecord, Measurement
from safebasin.data.tables import read_table
from safebasin.errors import UserError
from safebasin.report.manifest import load_json
from safebasin.report.report import Problem

NAME = 60  # characters of a name that came with the data: category, origin, id


def number(value: Any) -> float | None:
    """A finite number, or None: NaN is not a measurement. ValueError where it is something else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number is needed")
    finite = abs(value) <= sys.float_info.max  # false for NaN, and for integers that no float holds
    return float(value) if finite else None


Number = Annotated[float | None, BeforeValidator(number)]
ScoreColumns = tuple[list[str], list[Number]]
Count = Annotated[int, Field(ge=0, lt=2**53, strict=True)]
# What PyYAML's constructors raise beside its own errors, as for "!!int ''" or "!!timestamp x".
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


# The files by their keys. A reader ignores other keys.
class RunFile(TypedDict):
    arms: NotRequired[dict[str, Any] | list[str] | None]
    gate: NotRequired[dict[str, Any] | None]
    data: NotRequired[dict[str, Any] | None]


class RowFile(TypedDict):
    id: str
    origin: NotRequired[str | None]
    category: NotRequired[str | None]


class RemovedFile(TypedDict):
    row_id: str
    line: Count | None
    score: Number
    reason: str


class CutFile(TypedDict):
    scorer: str
    estimator: str
    threshold: Number
    remaining: Annotated[Count, Field(alias="kept")]
    removed: list[RemovedFile]


class HeatFile(TypedDict):
    row_id: str
    line: Count
    scorer: str
    score: Number
    tokens: list[tuple[str, Number]]


class TrainFile(TypedDict):
    steps: NotRequired[Count | None]
    seconds: NotRequired[Number]
    loss: NotRequired[list[tuple[Count, Number]] | None]
    methods: NotRequired[list[str | dict[str, dict[str, Any] | None]] | None]


class RepairRow(TypedDict):
    module: str
    cosine: Number
    norm: Number
    norm_after: Number
    distance: Number
    rank_in: Count | None
    rank_out: Count | None
    selected: list[str]


class RepairSummary(TypedDict):
    distance: Number
    norm_left: Number
    energy: Number
    rank: Count | None


class RepairFile(TypedDict):
    of: NotRequired[str]
    edits: list[dict[str, dict[str, Any] | None]]
    summary: RepairSummary
    rows: list[RepairRow]


class MixFile(TypedDict):
    of: str
    share: float
    guard: str | dict[str, dict[str, Any] | None] | None
    above: float
    requests: dict[str, dict[str, int]]


@functools.cache
def _adapter(shape: Any) -> Any:
    return TypeAdapter(shape)


def _checked(shape: Any, value: Any, where: str) -> Any:
    try:
        return _adapter(shape).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        reason = f"{printable(key, NAME)}: {first['msg']}" if key else first["msg"]
        raise UserError(f"{where} is not as a run writes it ({reason}); run again") from None


def load(path: Path, shape: Any, missing: Any = None) -> Any:
    """What a JSON file holds, checked against a shape; ``missing`` if there is no such file."""
    return _checked(shape, load_json(path), str(path)) if path.exists() else missing


def load_run(path: Path) -> RunFile:
    """The recipe that a run wrote into its folder; empty if there is none.

    Raises:
        UserError: it cannot be read, or is not as a run writes it.
    """
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(read_text(path))
    except _YAML_ERRORS as error:
        raise UserError(f"{shown(path)} is not YAML: {cause(error)}; run again") from None
    return _checked(RunFile, value or {}, str(path))


def load_scores(path: Path, column: str) -> dict[str, float]:
    """Row id -> score of one column of a table of scores; rows without a score are left out.

    Raises:
        UserError: the file cannot be read, or has no such columns of texts and numbers.
    """
    import pyarrow.parquet

    if not path.is_file():
        return {}
    try:
        table = pyarrow.parquet.ParquetFile(path).read(["row_id", column])
        columns = _adapter(ScoreColumns).validate_python([table[name].to_pylist() for name in ("row_id", column)])
    except (pyarrow.ArrowException, OSError, LookupError, ValueError) as error:
        raise UserError(
            f"cannot read {shown(path)}: row ids and numbers in {printable(column, NAME)} are needed ({cause(error)})"
        ) from None
    return {row_id: score for row_id, score in zip(*columns, strict=True) if score is not None}


def measurements_of(run: Path, arm: str) -> list[Measurement] | None:
    """The measurements of an arm; None where it has none.

    Raises:
        UserError: a line is not a measurement, or states a share below 0 or above 1.
    """
    path = run / "arms" / arm / "measurements.jsonl"
    if not path.is_file():
        return None
    taken = []
    for line, row in read_table(path):
        try:
            m = _adapter(Measurement).validate_json(json.dumps(row), strict=True)
        except ValidationError:
            m = None
        counted = m is not None and all(0 <= count < 2**53 for count in (m.n, m.unscored, m.off_task))
        if not counted or (m.unit == "share" and not 0 <= (m.value or 0) <= 1):
            raise UserError(f"{path}, line {line}: not a measurement; delete the file and measure again")
        taken.append(m)
    return taken


Answers = dict[tuple[str, str, str], AnswerRecord]  # arm, suite, prompt id -> record


def answers_of(run: Path, arms: Sequence[str], problems: list[Problem]) -> Answers:
    """The answers of all arms. A line that is no answer, or a second answer to a prompt, becomes a problem."""
    answers: Answers = {}
    for arm in arms:
        path = run / "arms" / arm / "answers.jsonl"
        for line, row in read_table(path) if path.is_file() else []:
            place = f"arm {arm}, answers.jsonl line {line}"
            try:
                answer = AnswerRecord.from_row(row)
            except ValueError:
                problems.append(Problem(place=place, reason="not an answer; it counts in no comparison"))
                continue
            key = arm, safe_name(answer.suite), answer.id
            if key in answers:
                reason = f"a second answer to prompt {safe_name(answer.id)}; the first one counts"
                problems.append(Problem(place=place, reason=reason))
            answers.setdefault(key, answer)
    return answers


def safe_name(value: str | None) -> str:
    """A name that came with the data, printable and cut."""
    return printable(value or "", NAME)


def redact(text: str) -> str:
    """What stands in the place of harmful text: its number of words and a short digest."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=3).hexdigest()
    return f"[redacted, {len(text.split())} words, id {digest}]"
