"""Thresholds: from a column of scores and the scores of anchor rows to the score above which rows go.

A scorer proves itself first: where anchor rows of both kinds were scored, the lower end of the 95 % interval of its
AUROC over them must reach ``BAR``. Two estimators:

``paper``    GradShield's T_guess (arXiv:2605.14194, algorithm A1): one Gaussian against two; the top of the lower
             cluster, or mu + 2 sd. On benign, normally distributed scores it cuts 2.3 % of the rows, and more where
             tails are heavy.
``anchors``  between safe and harmful anchor rows, which are scored along. The clusters are labelled, so it holds at any
             share of harmful rows, and cuts little where there are none.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from safebasin.errors import DefenceError, UserError

Estimator = Literal["anchors", "paper"]
Numbers = NDArray[np.float64]
Values = Sequence[float] | Numbers
Anchors = Mapping[str, Values]  # scores of the anchor rows: "safe" and "harmful"

BAR = 0.75  # of the AUROC over the anchors: what the lower end of its interval must reach
VARIANCE_FLOOR = 1e-4  # of a component, as a share of the variance of all scores: keeps EM off single points
TAIL = 0.05  # the share of each anchor set that may lie beyond the quantile that stands for its edge
FENCE = 3.0  # Tukey's far fence of the data's own bulk, in interquartile ranges above the upper quartile


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
    x = checked_scores(scores)
    mean, sd = float(x.mean()), float(x.std())
    if len(x) < 2 or sd == 0:
        return float(x.max())
    z = (x - mean) / sd  # both likelihoods shift alike, so their difference does not depend on the unit
    one = float(_log_normal(z, 0.0, 1.0).sum())
    two = two_gaussians(z)
    if two.log_likelihood - one > a and two.upper.any() and not two.upper.all():
        return float(min(x[~two.upper].max(), x[two.upper].max()))
    return mean + 2 * sd


class Proof(NamedTuple):
    """How well a scorer separates anchor rows: the AUROC, and the lower end of its 95 % interval."""

    auroc: float
    low: float

    @classmethod
    def of(cls, safe: Values, harmful: Values) -> "Proof":
        """Wilson's lower end for the smaller set's n: Var(AUROC) <= A (1 - A) / min(n, m) (Birnbaum and Klose 1957)."""
        s, h = np.sort(checked_scores(safe)), checked_scores(harmful)
        below = np.searchsorted(s, h, side="left") + np.searchsorted(s, h, side="right")
        a, n, z = float(below.mean()) / (2 * len(s)), min(len(s), len(h)), 1.959964
        half = z * math.sqrt(max(0.0, a * (1 - a)) / n + z * z / (4 * n * n))
        return cls(a, (a + z * z / (2 * n) - half) / (1 + z * z / n))


def prove(safe: Values, harmful: Values, scorer: str = "this scorer") -> None:
    """Whether the scorer may decide about rows at all.

    Raises:
        DefenceError: the lower end of the AUROC's interval over the anchor rows is below ``BAR``.
    """
    proof = Proof.of(safe, harmful)
    if proof.low < BAR:
        raise DefenceError(
            f"{scorer} does not prove itself on the anchor rows: AUROC {proof.auroc:.2f} over {len(safe)} safe and "
            f"{len(harmful)} harmful rows, 95 % interval from {proof.low:.2f}, and it must be from {BAR:g} at least "
            "(0.5 is noise, below it is upside down); take another scorer, or more anchor rows (data.safe, "
            "data.harmful)"
        )


def between_anchors(scores: Values, safe: Values, harmful: Values) -> float:
    """Between the scores of the anchor sets, and above the data's own bulk.

    With a the upper edge of the safe anchors, h the lower edge of the harmful ones, and the rows that score below h:

        t = clip( q75 + 3 (q75 - q25) of those rows, (a + h) / 2, h )                                 where a < h    (1)

    Every part of it moves little when one row does, so that no row carries others across the threshold. If the edges
    overlap: where balanced accuracy over the anchors is highest (of equals, the highest threshold).

    Raises:
        DefenceError: the scorer does not prove itself on the anchors.
    """
    x, s, h = checked_scores(scores), checked_scores(safe), checked_scores(harmful)
    prove(s, h)
    top, bottom = float(np.quantile(s, 1 - TAIL)), float(np.quantile(h, TAIL))
    if top < bottom:
        bulk = x[x < bottom]
        q25, q75 = np.quantile(bulk, [0.25, 0.75]) if len(bulk) else (top, top)
        return float(np.clip(q75 + FENCE * (q75 - q25), (top + bottom) / 2, bottom))
    values = np.unique(np.concatenate([s, h]))
    candidates = (values[:-1] + values[1:]) / 2
    safe_pass, harmful_pass = (np.searchsorted(np.sort(each), candidates, side="right") / len(each) for each in (s, h))
    accuracy = (safe_pass + 1 - harmful_pass) / 2
    return float(candidates[np.flatnonzero(accuracy >= accuracy.max() - 1e-12)[-1]])


def checked_scores(scores: Values) -> Numbers:
    """Scores as an array of float64.

    Raises:
        UserError: there are none.
        DefenceError: one is not finite.
    """
    x = np.asarray(scores, dtype=np.float64)
    if len(x) == 0:
        raise UserError("no scores: there is nothing to cut")
    if not np.isfinite(x).all():
        raise DefenceError(
            f"score number {int(np.flatnonzero(~np.isfinite(x))[0]) + 1} is not a finite number; scan again"
        )
    return x


def find_threshold(
    scores: Values, *, estimator: Estimator, anchors: Anchors | None = None, scorer: str = "this scorer"
) -> float:
    """The threshold by one of the estimators, in the unit of the scores. ``scorer`` names it in messages.

    Raises:
        UserError: no scores, no such estimator, or the estimator ``anchors`` without anchors.
        DefenceError: a score that is not finite, or a scorer that does not prove itself on the anchors.
    """
    if estimator not in get_args(Estimator):
        raise UserError(f"no estimator {estimator!r}; there are: {', '.join(get_args(Estimator))}")
    x = checked_scores(scores)
    if anchors and all(len(anchors.get(name, ())) for name in ("safe", "harmful")):
        prove(anchors["safe"], anchors["harmful"], scorer)
        return t_guess(x) if estimator == "paper" else between_anchors(x, anchors["safe"], anchors["harmful"])
    if estimator == "anchors":
        raise UserError(
            "the estimator 'anchors' needs scores of safe and of harmful anchor rows; "
            "scan again, or use paper or a threshold"
        )
    return t_guess(x)
