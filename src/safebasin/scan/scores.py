"""Scores as they lie on disk, read without torch: scores.parquet, and anchors.json beside it."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet
from pydantic import TypeAdapter, ValidationError

from safebasin.data.example import Example
from safebasin.data.files import cause, read_bytes, shown
from safebasin.data.json_rows import read_json
from safebasin.errors import UserError

SCORE = "score_"  # what the names of columns begin with
TOKENS = "tokens_"
SHORT = "cut_short"
ANCHORS = "anchors.json"
AnchorScores = dict[str, dict[str, list[float]]]  # scorer -> "harmful" and "safe" -> scores of the anchor rows


class Scores(NamedTuple):
    """A table of scores as read from disk. High = harmful; the unit is the scorer's own."""

    row_ids: list[str]
    lines: list[int]
    columns: dict[str, list[float]]  # scorer -> one number a row
    tokens: dict[str, list[list[float]]]  # scorer of tokens -> one number an answer token
    anchors: AnchorScores
    cut_short: frozenset[str] = frozenset()  # ids of rows that were scored on what fits of them

    def of(self, scorer: str, examples: Sequence[Example]) -> list[float]:
        """The scores of these examples, paired by row id.

        Raises:
            UserError: no such scorer, or an example that was not scored.
        """
        if scorer not in self.columns:
            raise UserError(f"no scores by {scorer!r}; the table has: {', '.join(self.columns) or 'none'}")
        by_id = dict(zip(self.row_ids, self.columns[scorer], strict=True))
        missing = next((example for example in examples if example.id not in by_id), None)
        if missing is not None:
            raise UserError(
                f"row {missing.id} (line {missing.line}) has no score; the data changed since the scan: scan again"
            )
        return [by_id[example.id] for example in examples]


@contextlib.contextmanager
def well_formed(path: str | Path) -> Iterator[None]:
    """Inside, what pydantic refuses of a file that a scan wrote is a ``UserError`` with the path."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{shown(path)} is damaged ({where}{': ' * bool(where)}{first['msg']}); scan again") from None


def read_scores(path: str | Path, *, tokens: bool = True) -> Scores:
    """The table ``scan/scores.parquet`` of a run; ``tokens``: with the numbers of answer tokens, most of the file.

    Raises:
        UserError: no such file; or it, or anchors.json beside it, is damaged or of another shape.
    """
    path, anchors = Path(path), Path(path).with_name(ANCHORS)
    if not path.is_file():
        raise UserError(f"no scores at {shown(path)}; run the scan first")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = [name for name in file.schema_arrow.names if tokens or not name.startswith(TOKENS)]
        table = file.read(names).to_pydict()
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise UserError(f"cannot read {shown(path)}: {cause(error)}; scan again") from error
    columns, by_token = (
        {name.removeprefix(kind): values for name, values in table.items() if name.startswith(kind)}
        for kind in (SCORE, TOKENS)
    )
    fields = {"row_ids": table.get("row_id"), "lines": table.get("line"), "columns": columns, "tokens": by_token}
    with well_formed(path):
        scores = TypeAdapter(Scores).validate_python(fields | {"anchors": {}}, strict=True)
    if anchors.is_file():
        with well_formed(anchors):
            scores = scores._replace(anchors=TypeAdapter(AnchorScores).validate_json(read_bytes(anchors), strict=True))
    short = zip(scores.row_ids, table.get(SHORT, ()), strict=False)
    return scores._replace(cut_short=frozenset(row for row, is_short in short if is_short))


def unscored_rows(path: Path) -> dict[str, str]:
    """Why a scan left rows out, by their ids: what its run folder says beside the scores; nothing where they are alone.

    Raises:
        UserError: a file of the folder is damaged.
    """
    listed = path.with_name("problems.json"), path.absolute().parent.parent / "data" / "rows.json"
    if not all(file.is_file() for file in listed):
        return {}
    problems, rows = (read_json(file) for file in listed)
    try:
        reasons = {problem["line"]: problem["reason"] for problem in problems}
        return {row["id"]: reasons[row["line"]] for row in rows if row["line"] in reasons}
    except (LookupError, TypeError) as error:
        raise UserError(f"{shown(listed[0])} and {shown(listed[1])} are not those of a scan: {cause(error)}") from None
