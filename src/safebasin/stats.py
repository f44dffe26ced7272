"""Intervals, paired tests and agreement of judges. scipy is imported where it is used: it takes a second to load."""

import math
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple


class Interval(NamedTuple):
    low: float
    high: float


class Difference(NamedTuple):
    """x minus y on the same prompts, with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def wilson(hits: int, n: int) -> Interval:
    """Wilson's 95 % score interval of a share (Wilson 1927). Unlike the normal interval it has a width at 0 and at 1.

    Raises:
        ValueError: n is 0: the share is undefined.
    """
    from scipy.stats import binomtest

    if n <= 0:
        raise ValueError("the share of nothing is undefined: n is 0")
    low, high = binomtest(hits, n).proportion_ci(method="wilson")
    return Interval(float(low), float(high))


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p of McNemar's test; b and c count the prompts on which the two arms differ, each way."""
    from scipy.stats import binomtest

    return 1.0 if b + c == 0 else float(binomtest(b, b + c).pvalue)


def paired_difference(x: Sequence[bool], y: Sequence[bool]) -> Difference:
    """Difference of two shares on the same prompts with Newcombe's square-and-add interval (Newcombe 1998, method 10).

    Raises:
        ValueError: no pairs, or sequences of different length.
    """
    if len(x) != len(y) or not len(x):
        raise ValueError(f"pairs are needed: {len(x)} against {len(y)}")
    n = len(x)
    both = sum(1 for a, b in zip(x, y, strict=True) if a and b)
    only_x, only_y = sum(map(bool, x)) - both, sum(map(bool, y)) - both
    neither = n - both - only_x - only_y
    p, q = (both + only_x) / n, (both + only_y) / n
    (l1, u1), (l2, u2) = wilson(both + only_x, n), wilson(both + only_y, n)
    margins = (both + only_x) * (only_y + neither) * (both + only_y) * (only_x + neither)
    top = both * neither - only_x * only_y
    phi = 0.0 if margins == 0 else (max(top - n / 2, 0) if top > 0 else top) / math.sqrt(margins)
    low = math.sqrt(max(0.0, (p - l1) ** 2 - 2 * phi * (p - l1) * (u2 - q) + (u2 - q) ** 2))
    high = math.sqrt(max(0.0, (q - l2) ** 2 - 2 * phi * (q - l2) * (u1 - p) + (u1 - p) ** 2))
    return Difference(p - q, p - q - low, p - q + high, n)


def non_inferior(difference: Difference, margin: float) -> Literal["yes", "no", "unclear"]:
    """Whether x is worse than y by less than the margin: the whole interval decides."""
    if difference.low > -margin:
        return "yes"
    return "no" if difference.high < -margin else "unclear"


def kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float | None:
    """Cohen's kappa of two raters. None where both gave one label to everything: chance explains all agreement.

    Raises:
        ValueError: no pairs, or sequences of different length.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"pairs are needed: {len(a)} against {len(b)}")
    n = len(a)
    agreed = sum(x == y for x, y in zip(a, b, strict=True)) / n
    chance = sum((list(a).count(label) / n) * (list(b).count(label) / n) for label in set(a) | set(b))
    return None if chance == 1 else (agreed - chance) / (1 - chance)


def mean(values: Sequence[float]) -> tuple[float, Interval]:
    """Mean over seeds with its 95 % t-interval.

    Raises:
        ValueError: fewer than two seeds: one value has no variance.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs two of them, found {len(values)}")
    import numpy as np
    from scipy.stats import t

    x = np.asarray(values, dtype=float)
    middle, half = float(x.mean()), float(t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return middle, Interval(middle - half, middle + half)
