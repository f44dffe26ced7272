"""Cut: from a column of scores to a threshold, and from a threshold to the rows that stay (score <= threshold).

Two estimators of the threshold:

``paper``    GradShield's T_guess (arXiv:2605.14194, algorithm A1): one Gaussian against two; the top of the lower
             cluster, or mu + 2 sd. On benign, normally distributed scores it cuts 2.3 % of the rows, and more where
             tails are heavy.
``anchors``  in the widest gap of the scores between safe and harmful anchor rows, which are scored along. The clusters
             are labelled, so it holds at any share of harmful rows, and cuts little where there are none.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from safebasin.data.example import Example, Rows
from safebasin.data.tables import BadRow, copy_rows, endings, shown, write_json, write_table
from safebasin.errors import DefenceError, UserError
from safebasin.scan.scores import Scores

Estimator = Literal["anchors", "paper"]
Numbers = NDArray[np.float64]
Values = Sequence[float] | Numbers
Anchors = Mapping[str, Values]  # scores of the anchor rows: "safe" and "harmful"

VARIANCE_FLOOR = 1e-4  # of a component, as a share of the variance of all scores: keeps EM off single points
NO_HIGHER = "harmful anchor rows score no higher than safe ones: this scorer cannot tell them apart here"
TAIL = 0.05  # the share of each anchor set that may lie beyond the quantile that stands for its edge


class Mixture(NamedTuple):
    """Two Gaussians over one axis, the lower mean first."""

    weights: Numbers
    means: Numbers
    sds: Numbers
    log_likelihood: float
    upper: NDArray[np.bool_]  # hard label of every score


# --- mixtures ---------------------------------------------------------------------------------------------------------


def _log_normal(x: Numbers, mean: Numbers | float, variance: Numbers | float) -> Numbers:
    return -0.5 * (np.log(2 * np.pi * variance) + (x - mean) ** 2 / variance)


def _em(x: Numbers, upper: NDArray[np.bool_]) -> Mixture:
    """Expectation maximisation from a hard split; x is standardised."""
    shares = np.stack([~upper, upper]).astype(np.float64)  # responsibilities [2, rows]
    last = -math.inf
    for _ in range(500):
        mass = np.maximum(shares.sum(1), 1e-12)
        weights, means = mass / len(x), shares @ x / mass
        variances = np.maximum((shares * (x - means[:, None]) ** 2).sum(1) / mass, VARIANCE_FLOOR)
        logs = np.log(weights)[:, None] + _log_normal(x[None, :], means[:, None], variances[:, None])
        each = np.logaddexp(logs[0], logs[1])
        total = float(each.sum())
        shares = np.exp(logs - each)
        if total - last < 1e-9 * len(x):
            break
        last = total
    low, high = np.argsort(means, kind="stable")
    return Mixture(
        weights[[low, high]], means[[low, high]], np.sqrt(variances[[low, high]]), total, logs[high] > logs[low]
    )


def two_gaussians(x: Numbers) -> Mixture:
    """The likeliest of several fits, each started from the rows below and above a quantile: it is deterministic."""
    ranks = np.argsort(np.argsort(x, kind="stable"), kind="stable")
    splits = {max(1, min(len(x) - 1, round(share * len(x)))) for share in (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)}
    return max((_em(x, ranks >= split) for split in sorted(splits)), key=lambda fit: fit.log_likelihood)


# --- estimators -------------------------------------------------------------------------------------------------------


def t_guess(scores: Values, a: float = 10.0) -> float:
    """GradShield's algorithm A1; ``a`` is the gain in log-likelihood that a second Gaussian must bring (not given)."""
    x = _checked(scores)
    mean, sd = float(x.mean()), float(x.std())
    if len(x) < 2 or sd == 0:
        return float(x.max())
    z = (x - mean) / sd  # both likelihoods shift alike, so their difference does not depend on the unit
    one = float(_log_normal(z, 0.0, 1.0).sum())
    two = two_gaussians(z)
    if two.log_likelihood - one > a and two.upper.any() and not two.upper.all():
        return float(min(x[~two.upper].max(), x[two.upper].max()))
    return mean + 2 * sd


def between_anchors(scores: Values, safe: Values, harmful: Values) -> float:
    """In the widest gap between the scores of the anchor sets.

    That is the middle of the widest gap of ``scores`` between the upper edge of the safe anchors and the lower edge of
    the harmful ones, or that lower edge where no score reaches it. If the edges overlap: where balanced accuracy over
    the anchors is highest (of equals, the highest threshold).

    Raises:
        DefenceError: the scores do not separate the two sets.
    """
    x, s, h = _checked(scores), _checked(safe), _checked(harmful)
    top, bottom = float(np.quantile(s, 1 - TAIL)), float(np.quantile(h, TAIL))
    if top < bottom:
        if x.max() < bottom:
            return bottom  # nothing here is of the harmful kind, and what lies between is no reason to cut
        marks = np.unique(np.concatenate([[top], x[(x > top) & (x < bottom)], [bottom]]))
        widest = int(np.argmax(np.diff(marks)))
        return float((marks[widest] + marks[widest + 1]) / 2)
    values = np.unique(np.concatenate([s, h]))
    if len(values) == 1:
        raise DefenceError("every anchor row has the same score: this scorer cannot tell harmful from safe")
    candidates = (values[:-1] + values[1:]) / 2
    safe_pass, harmful_pass = (np.searchsorted(np.sort(each), candidates, side="right") / len(each) for each in (s, h))
    accuracy = (safe_pass + 1 - harmful_pass) / 2
    best = float(accuracy.max())
    if best <= 0.5:
        raise DefenceError(NO_HIGHER)
    return float(candidates[np.flatnonzero(accuracy >= best - 1e-12)[-1]])


def _checked(scores: Values) -> Numbers:
    x = np.asarray(scores, dtype=np.float64)
    if len(x) == 0:
        raise UserError("no scores: there is nothing to cut")
    if not np.isfinite(x).all():
        raise DefenceError(
            f"score number {int(np.flatnonzero(~np.isfinite(x))[0]) + 1} is not a finite number; scan again"
        )
    return x


def find_threshold(scores: Values, *, estimator: Estimator, anchors: Anchors | None = None) -> float:
    """The threshold by one of the estimators, in the unit of the scores.

    Raises:
        UserError: no scores, no such estimator, or the estimator ``anchors`` without anchors.
        DefenceError: a score that is not finite, or anchors that the scores do not separate.
    """
    if estimator not in get_args(Estimator):
        raise UserError(f"no estimator {estimator!r}; there are: {', '.join(get_args(Estimator))}")
    if estimator == "paper":
        return t_guess(scores)
    if not anchors or not all(len(anchors.get(name, ())) for name in ("safe", "harmful")):
        raise UserError(
            "the estimator 'anchors' needs scores of safe and of harmful anchor rows; "
            "scan again, or use paper or a threshold"
        )
    return between_anchors(scores, anchors["safe"], anchors["harmful"])


# --- cutting ----------------------------------------------------------------------------------------------------------


class Removed(NamedTuple):
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
) -> Cut:
    """Keep the scored rows whose score is at most the threshold, in their order.

    By several scorers a row must pass each. Its score is then the largest of (score - threshold) / (harmful - safe),
    each scorer with its own threshold and its anchors' medians, and the threshold is 0.

    Args:
        examples: the rows; those that were not scored are left out.
        scores: of the rows.
        scorer: a column of the scores, or several.
        threshold: in the unit of the scores; None: by the estimator.
        estimator: "anchors" or "paper".

    Raises:
        UserError: no scores by this scorer, no row would be left, a threshold that is not finite, or one threshold for
            several scorers.
        DefenceError: see ``find_threshold``.
    """
    names = [scorer] if isinstance(scorer, str) else list(scorer)
    if not names or len(set(names)) < len(names):
        raise UserError(f"a cut needs a scorer, or several that differ; found {names}")
    if threshold is not None and not math.isfinite(threshold):
        raise UserError(f"threshold={threshold}: it must be a finite number")
    if len(names) > 1 and (threshold is not None or estimator != "anchors"):
        raise UserError(
            f"a cut by several scorers ({', '.join(names)}) finds the threshold of each by its anchors; "
            "leave threshold and estimator out"
        )
    scored = set(scores.row_ids)
    examples = [example for example in examples if example.id in scored]
    if len(names) > 1:
        x, value = np.max([_beyond(scores.of(name, examples), scores.anchors.get(name)) for name in names], axis=0), 0.0
    else:
        x = _checked(scores.of(names[0], examples))
        anchors = scores.anchors.get(names[0])
        value = find_threshold(x, estimator=estimator, anchors=anchors) if threshold is None else threshold
    if x.min() > value:
        raise UserError(f"the threshold {value:g} cuts all {len(x)} rows (lowest score {x.min():g}); raise it")
    pairs = list(zip(examples, x.tolist(), strict=True))
    name = "given" if threshold is not None else estimator
    reason = f"score above the threshold {value:.6g} ({name})"
    return Cut(
        [example for example, score in pairs if score <= value],
        [Removed(example, score, reason) for example, score in pairs if score > value],
        value,
        name,
        {example.id: score for example, score in pairs} if len(names) > 1 else None,
    )


def _beyond(scores: Values, anchors: Anchors | None) -> Numbers:
    """How far scores lie beyond their threshold, in units of the distance from the safe anchors' median to the harmful
    ones'."""
    threshold = find_threshold(scores, estimator="anchors", anchors=anchors)
    low, high = (float(np.median(anchors[name])) for name in ("safe", "harmful"))  # type: ignore[index]
    if not low < high:
        raise DefenceError(NO_HIGHER)
    return (_checked(scores) - threshold) / (high - low)


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
    folder.mkdir(parents=True, exist_ok=True)
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
