"""Columns that training methods read, made of scores: how far a row, or an answer up to a token, is safe.

    keep = 1 if score <= threshold, else 0                                                                                     (1)
    star_t = 1 - s_t,   s_t = P(unsafe | x, y_<=t)                               of a scorer that tells probabilities             (2)
    star_t = 1 - clip( (s_t - a) / (h - a), 0, 1 ),   s_t = sum_(u<=t) part_u     of a scorer whose parts add up                  (3)

In (3) s_t is the score of the answer up to token t, and a and h are the medians of rows known to be safe and known to be harmful. A
scorer with a >= h is refused; one of probabilities too, if such rows were scored. A scorer that tells no tokens gives one number a row.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safebasin.data.example import Example
from safebasin.data.tables import read_table
from safebasin.errors import UserError
from safebasin.scan.cut import find_threshold
from safebasin.scan.scan import Scores

Column = Mapping[str, float | Sequence[float]]  # row id -> one number, or one an answer token; 0 to 1


def keep(scores: Scores, name: str, examples: Sequence[Example]) -> Column:
    """Equation 1, by the threshold that ``cut`` would take."""
    x = scores.of(name, examples)
    threshold = find_threshold(x, estimator="anchors", anchors=scores.anchors.get(name))
    return {example.id: float(score <= threshold) for example, score in zip(examples, x, strict=True)}


def star(scores: Scores, name: str, scorer: Any, examples: Sequence[Example]) -> Column:
    """Equations 2 and 3."""
    told = dict(zip(scores.row_ids, scores.tokens.get(name, ()), strict=False))
    whole = dict(zip([e.id for e in examples], scores.of(name, examples), strict=True))
    known, probability = scores.anchors.get(name, {}), scorer.entry.probability
    if all(len(known.get(which, ())) for which in ("safe", "harmful")):
        low, high = float(np.median(known["safe"])), float(np.median(known["harmful"]))
        if not low < high:
            raise UserError(
                f"{name!r} scores known harmful rows ({high:g}) no higher than safe ones ({low:g}): it cannot weigh tokens"
            )
    elif not probability:
        raise UserError(
            f"the column 'star' from {name!r} needs anchor rows: set data.safe and data.harmful, and scan again"
        )
    if probability:
        low, high = 0.0, 1.0
    column: dict[str, float | list[float]] = {}
    for row, score in whole.items():
        parts = np.asarray(told.get(row, [score]))
        reached = parts.cumsum() if row in told and scorer.entry.tokens == "sum" else parts
        safe = (1 - np.clip((reached - low) / (high - low), 0, 1)).tolist()
        column[row] = safe if row in told else safe[0]
    return column


def from_file(path: str, name: str, examples: Sequence[Example]) -> Column:
    """A column of the user's: a table with ``row_id`` and the column.

    Raises:
        UserError: no such columns, a row without a value, or a value outside 0 to 1.
    """
    found = {}
    for line, row in read_table(Path(path)):
        if not isinstance(row, Mapping) or not {"row_id", name} <= row.keys():
            raise UserError(f"{path}, line {line}: a column file has the columns row_id and {name}")
        found[str(row["row_id"])] = row[name] if isinstance(row[name], list) else float(row[name])
    missing = next((e for e in examples if e.id not in found), None)
    if missing is not None:
        raise UserError(f"{path} has no value for row {missing.id} (line {missing.line})")
    wrong = next((row for row, value in found.items() if not all(0 <= x <= 1 for x in np.atleast_1d(value))), None)
    if wrong is not None:
        raise UserError(f"{path}: {name} of row {wrong} is not between 0 and 1: {found[wrong]!r}")
    return found
