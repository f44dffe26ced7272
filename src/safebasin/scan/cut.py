"""Cut: the rows that stay (score <= threshold), and the rows that go. Thresholds are found in ``threshold``."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from safebasin.data.example import Example, Rows
from safebasin.data.files import make_folder, shown, write_json
from safebasin.data.json_rows import BadRow
from safebasin.data.tables import copy_rows, endings, write_table
from safebasin.errors import UserError
from safebasin.scan.scores import Scores
from safebasin.scan.threshold import Estimator, Numbers, checked_scores, find_threshold

MAX_SHARE = 0.5  # of the rows that a cut may take where the user names no other share


class Removed(NamedTuple):
    """A row that a cut removed."""

    example: Example
    score: float
    reason: str


class Cut(NamedTuple):
    """What a cut leaves and what it removes, in the order of the rows."""

    remaining: list[Example]
    removed: list[Removed]
    threshold: float
    estimator: str  # "given" where the threshold was
    scores: Mapping[str, float] | None = None  # by row, of several scorers together; None: those of the scan


def cut_rows(
    examples: Sequence[Example],
    scores: Scores,
    scorer: str | Sequence[str],
    threshold: float | None = None,
    *,
    estimator: Estimator = "anchors",
    max_share: float = MAX_SHARE,
    unscored: Literal["stop", "leave"] = "stop",
) -> Cut:
    """Keep the rows whose score is at most the threshold, in their order.

    By several scorers a row must pass each. Its score is then the largest of (score - threshold) / (harmful - safe),
    each scorer with its own threshold and its anchors' medians, and the threshold is 0.

    Args:
        examples: the rows.
        scores: of the rows.
        scorer: a column of the scores, or several.
        threshold: in the unit of the scores; None: by the estimator.
        estimator: "anchors" or "paper".
        max_share: the largest share of the scored rows that may go; a cut that takes more is a question, not a result.
        unscored: rows without a score stop the cut, or are left to ``write_cut``, which wants a reason for each.

    Raises:
        UserError: no scores by this scorer, a row without a score, more rows would go than ``max_share`` allows, a
            threshold that is not finite, or one threshold for several scorers.
        DefenceError: see ``find_threshold``.
    """
    names = [scorer] if isinstance(scorer, str) else list(scorer)
    if not names or len(set(names)) < len(names):
        raise UserError(f"a cut needs a scorer, or several that differ; found {names}")
    if threshold is not None and not math.isfinite(threshold):
        raise UserError(f"threshold={threshold}: it must be a finite number")
    if not 0 <= max_share <= 1:
        raise UserError(f"max_share={max_share}: it is a share of the rows, 0 to 1")
    if len(names) > 1 and (threshold is not None or estimator != "anchors"):
        raise UserError(
            f"a cut by several scorers ({', '.join(names)}) finds the threshold of each by its anchors; "
            "leave threshold and estimator out"
        )
    ids = set(scores.row_ids)
    scored = [example for example in examples if unscored == "stop" or example.id in ids]
    if len(names) > 1:
        x, value = np.max([_beyond(name, scores, scored) for name in names], axis=0), 0.0
    else:
        x = checked_scores(scores.of(names[0], scored))
        anchors = scores.anchors.get(names[0])
        value = (
            find_threshold(x, estimator=estimator, anchors=anchors, scorer=names[0]) if threshold is None else threshold
        )
    _check_share(x, value, max_share)
    name = "given" if threshold is not None else estimator
    reason = f"score above the threshold {value:.6g} ({name})"
    by_row = dict(zip([example.id for example in scored], x.tolist(), strict=True))
    return Cut(
        [example for example in scored if by_row[example.id] <= value],
        [Removed(example, by_row[example.id], reason) for example in scored if by_row[example.id] > value],
        value,
        name,
        by_row if len(names) > 1 else None,
    )


def _check_share(x: Numbers, threshold: float, max_share: float) -> None:
    above = int((x > threshold).sum())
    if above > max_share * len(x):
        raise UserError(
            f"the threshold {threshold:g} cuts {above} of {len(x)} rows ({above / len(x):.0%}), and max_share allows "
            f"{max_share:.0%}: either most of these rows are harmful, or the scorer misreads this kind of data; look "
            "at rows of either side, and if they are to go set cut.max_share (--max-share) higher"
        )


def _beyond(name: str, scores: Scores, examples: Sequence[Example]) -> Numbers:
    """How far each score lies beyond its own threshold, in steps from the safe anchors' median to the harmful ones'."""
    x, anchors = checked_scores(scores.of(name, examples)), scores.anchors.get(name)
    threshold = find_threshold(x, estimator="anchors", anchors=anchors, scorer=name)
    low, high = (float(np.median(anchors[label])) for label in ("safe", "harmful"))  # type: ignore[index]
    return (x - threshold) / (high - low)


def write_cut(
    folder: Path,
    source: str | Path,
    rows: Rows,
    result: Cut,
    scorer: str | Sequence[str],
    *,
    unscored: Mapping[str, str] = MappingProxyType({}),
    delimiter: str = "",
) -> Path:
    """Write the rows that stay, as they stand in ``source``, beside cut.json; their path is returned.

    Every row that was read stays, was removed, or was refused with a reason; cut.json lists the last two. The scores of
    several scorers together go to scores.parquet.

    Args:
        folder: for the files.
        source: the file that ``rows`` were read from.
        rows: all rows of it, those that cannot be used among them.
        result: of ``cut_rows``.
        scorer: the column of the scores, or several.
        unscored: why a row has no score, by its id.
        delimiter: of a CSV file.

    Raises:
        UserError: a row of which nothing says why it has no score, or a file that cannot be written.
    """
    decided = {example.id for example in result.remaining} | {row.example.id for row in result.removed}
    rest = [example for example in rows.examples if example.id not in decided]
    if lost := [example for example in rest if example.id not in unscored]:
        raise UserError(
            f"{shown(source)}: line {lost[0].line} has no score ({len(lost)} such rows), so nothing says "
            "whether it may stay; scan these rows as they are now"
        )
    refused = sorted([*rows.bad, *(BadRow(example.line, unscored[example.id]) for example in rest)])
    make_folder(folder)
    path = folder / f"train{endings(source)}"
    copy_rows(path, source, [example.line for example in result.remaining], delimiter)
    removed = [
        {"row_id": r.example.id, "line": r.example.line, "score": r.score, "reason": r.reason} for r in result.removed
    ]
    name = scorer if isinstance(scorer, str) else ", ".join(scorer)
    facts = {"scorer": name, "threshold": result.threshold, "estimator": result.estimator}
    if result.scores is not None:
        table = [{"row_id": row_id, "score": score} for row_id, score in result.scores.items()]
        write_table(folder / "scores.parquet", table)
    counts = {"read": len(rows.examples) + len(rows.bad), "kept": len(result.remaining)}
    lists = {"removed": removed, "refused": [bad._asdict() for bad in refused]}
    write_json(folder / "cut.json", {**facts, **counts, **lists})
    return path
