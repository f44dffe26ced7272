"""Columns that training methods read, made from scores: how safe a row is, or an answer up to a token.

    keep = 1 if score <= threshold, else 0                                                                          (1)
    star_t = 1 - s_t,   s_t = P(unsafe | x, y_<=t)                       of a scorer of probabilities                (2)
    star_t = 1 - clip( (s_t - a) / (h - a), 0, 1 ),   s_t = sum_(u<=t) part_u     of a scorer whose parts add up     (3)

In (3) s_t is the score of the answer up to token t, and a and h are the medians of the safe and of the harmful anchor
rows. A scorer that does not prove itself on them (``threshold.prove``) is refused; one of probabilities too, if anchor
rows were scored. A scorer without tokens gives one number a row.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from safebasin.console import printable
from safebasin.data.example import Example
from safebasin.data.files import shown
from safebasin.data.json_rows import BadRow
from safebasin.data.tables import read_table
from safebasin.errors import UserError
from safebasin.scan.cut import cut_rows
from safebasin.scan.scores import Scores
from safebasin.scan.threshold import prove

Column = Mapping[str, float | Sequence[float]]  # row id -> one number, or one an answer token; 0 to 1
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
SHARES: TypeAdapter[float | list[float]] = TypeAdapter(Share | list[Share])


def keep_column(scores: Scores, name: str, examples: Sequence[Example]) -> Column:
    """Equation 1.

    Raises:
        UserError, DefenceError: see ``cut_rows``.
    """
    removed = {row.example.id for row in cut_rows(examples, scores, name).removed}
    return {example.id: float(example.id not in removed) for example in examples}


def star_column(scores: Scores, name: str, scorer: Any, examples: Sequence[Example]) -> Column:
    """Equations 2 and 3 by ``scorer``, the method whose scores stand under ``name``.

    Raises:
        UserError: the scorer needs anchor rows and none were scored.
        DefenceError: it does not prove itself on them.
    """
    tokens = dict(zip(scores.row_ids, scores.tokens.get(name, ()), strict=False))
    anchors, probability = scores.anchors.get(name, {}), scorer.entry.probability
    if all(len(anchors.get(label, ())) for label in ("safe", "harmful")):
        prove(anchors["safe"], anchors["harmful"], name)
        low, high = float(np.median(anchors["safe"])), float(np.median(anchors["harmful"]))
    elif not probability:
        raise UserError(
            f"the column 'star' from {name!r} needs anchor rows: set data.safe and data.harmful, and scan again"
        )
    if probability:
        low, high = 0.0, 1.0
    column: dict[str, float | list[float]] = {}
    for example, score in zip(examples, scores.of(name, examples), strict=True):
        parts = np.asarray(tokens.get(example.id, [score]))
        reached = parts.cumsum() if example.id in tokens and scorer.entry.tokens == "sum" else parts
        safe = (1 - np.clip((reached - low) / (high - low), 0, 1)).tolist()
        column[example.id] = safe if example.id in tokens else safe[0]
    return column


def column_from_file(path: str, name: str, examples: Sequence[Example]) -> Column:
    """A column of the user's: a table with ``row_id`` and the column.

    Raises:
        UserError: the file cannot be read, has no such columns or no value for a row, or a value outside 0 to 1.
    """
    column: dict[str, float | list[float]] = {}
    for line, row in read_table(path):
        if isinstance(row, BadRow):
            raise UserError(f"{shown(path)}, line {line}: {row.reason}")
        if not isinstance(row, Mapping) or not {"row_id", name} <= row.keys():
            raise UserError(f"{shown(path)}, line {line}: a column file has the columns row_id and {name}")
        try:
            column[str(row["row_id"])] = SHARES.validate_python(row[name])
        except ValidationError:
            value = printable(repr(row[name]), 60)
            raise UserError(f"{shown(path)}, line {line}: {name} is not between 0 and 1, found {value}") from None
    missing = next((example for example in examples if example.id not in column), None)
    if missing is not None:
        raise UserError(f"{shown(path)} has no value for row {missing.id} (line {missing.line})")
    return column
