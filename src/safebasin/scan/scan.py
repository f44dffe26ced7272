"""Score rows: every scorer over every row, in batches of like length; a column of ``scores.parquet`` each. Nothing is deleted."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyarrow
import pyarrow.parquet
from jaxtyping import Float
from torch import Tensor

from safebasin.batch import Batch, Encoded, by_length, collate
from safebasin.record import DefenceError, Example, UserError

PREFIX = "score_"


@runtime_checkable
class Scorer(Protocol):
    """How bad is a row. High = harmful."""

    def fit(self, model: Any, tokenizer: Any, anchors: Mapping[str, Sequence[Encoded]]) -> Any:
        """What is needed of the model once, before any row. UserError if an anchor set that it needs is missing."""

    def score(self, model: Any, batch: Batch, fitted: Any) -> Float[Tensor, " batch"]:
        """One number a row, which depends on that row alone."""


def scan(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Encoded],
    scorers: Mapping[str, Scorer],
    anchors: Mapping[str, Sequence[Encoded]],
    *,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Scores of every row by every scorer, in the order of the rows. ``progress`` is told (rows done, rows in all).

    The model is scored in eval mode and left as it was found.

    Raises:
        UserError: a row without an answer token, or an anchor set that a scorer needs and that is missing.
        DefenceError: a score that is not finite; it names the row.
    """
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no padding token; set tokenizer.pad_token (safebasin.model.load does)")
    silent = next((row.id for row in rows if True not in row.answer[1:]), None)
    if silent is not None:
        raise UserError(f"row {silent} has no answer token, so nothing would be learned from it; leave it out of the set")
    device = next(model.parameters()).device
    scores: dict[str, list[float]] = {name: [math.nan] * len(rows) for name in scorers}
    was_training = model.training
    model.eval()
    try:
        fitted = {name: scorer.fit(model, tokenizer, anchors) for name, scorer in scorers.items()}
        done = 0
        for indices in by_length(rows, batch_size):
            batch = collate([rows[i] for i in indices], tokenizer.pad_token_id).to(device)
            for name, scorer in scorers.items():
                for i, value in zip(indices, scorer.score(model, batch, fitted[name]).tolist(), strict=True):
                    if not math.isfinite(value):
                        raise DefenceError(f"scan.{name}: the score of row {rows[i].id} is {value}; the model is broken")
                    scores[name][i] = value
            done += len(indices)
            if progress is not None:
                progress(done, len(rows))
    finally:
        model.train(was_training)
    return scores


class Scores(NamedTuple):
    """A table of scores as read from disk."""

    row_ids: list[str]
    lines: list[int]
    columns: dict[str, list[float]]  # scorer -> one number a row

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
            raise UserError(f"row {missing.id} (line {missing.line}) has no score; the data changed since the scan: scan again")
        return [by_id[example.id] for example in examples]


def write_scores(path: str | Path, examples: Sequence[Example], scores: Mapping[str, Sequence[float]]) -> None:
    """Parquet with the columns row_id, line, score_<scorer>; a reader never sees half a file."""
    path = Path(path)
    columns: dict[str, Any] = {"row_id": [e.id for e in examples], "line": [e.line for e in examples]}
    for name, values in scores.items():
        if len(values) != len(examples):
            raise UserError(f"{len(values)} scores by {name!r} for {len(examples)} rows")
        columns[PREFIX + name] = pyarrow.array(values, type=pyarrow.float64())
    part = path.with_name(path.name + ".part")
    pyarrow.parquet.write_table(pyarrow.table(columns), part)
    part.replace(path)


def read_scores(path: str | Path) -> Scores:
    """The table that ``write_scores`` wrote.

    Raises:
        UserError: no such file, or not such a table.
    """
    if not Path(path).is_file():
        raise UserError(f"no scores at {path}; run the scan first")
    try:
        table = pyarrow.parquet.read_table(path).to_pydict()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from None
    if "row_id" not in table or "line" not in table:
        raise UserError(f"{path} is not a table of scores; its columns are: {', '.join(table)}")
    columns = {name.removeprefix(PREFIX): values for name, values in table.items() if name.startswith(PREFIX)}
    return Scores(table["row_id"], table["line"], columns)
