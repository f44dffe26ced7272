"""Intervals, paired tests and agreement of judges. scipy is imported where it is used: it takes a second to load."""

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

Z = 1.959963984540054  # of 95 %
DRAWS = 1000  # of the bootstrap
Outcomes = Mapping[Any, int | float] | Sequence[int | float]  # of one seed, by prompt; a sequence: by place


class Interval(NamedTuple):
    """The ends of a 95 % interval."""

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
        ValueError: the share is undefined: n is 0, or the hits are more than n or below 0.
    """
    return _wilson(_share(hits, n), n)


def exact(hits: int, n: int) -> Interval:
    """The exact 95 % interval of a share (Clopper and Pearson 1934): each end errs in at most 2.5 % of draws.

    Raises:
        ValueError: the share is undefined: n is 0, or the hits are more than n or below 0.
    """
    from scipy.special import betaincinv

    share = _share(hits, n)
    return Interval(
        float(betaincinv(hits, n - hits + 1, 0.025)) if share > 0 else 0.0,
        float(betaincinv(hits + 1, n - hits, 0.975)) if share < 1 else 1.0,
    )


def _share(hits: int, n: int) -> float:
    if n <= 0 or not 0 <= hits <= n:
        raise ValueError(f"{hits} of {n}: such a share is undefined")
    return hits / n


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


def two_level(seeds: Sequence[Outcomes]) -> tuple[float, Interval]:
    """Mean of shares or scores from 0 to 1, with its 95 % interval over seeds and prompts.

    ``value`` is the mean of all outcomes. The interval is the hull of two:

    - the two-level bootstrap: seeds and prompts are drawn anew, a prompt that several seeds share with all of them;
    - Wilson's interval at the effective number of prompts, which does not collapse where all outcomes are alike:
      n_e = p (1 - p) / V * (z / t)^2 with V = s^2 / S + p (1 - p) / n over S seeds whose means vary by s^2 and n
      different prompts, and Student's t at Satterthwaite's degrees of freedom. n_e is at most n.

    One seed has Wilson's interval over its prompts: it says nothing of other seeds. How often the intervals hold the
    truth is in docs/decisions/0018.

    Raises:
        ValueError: no outcomes, or two seeds: they do not say how much seeds vary.
    """
    value, means, table = _table(seeds)
    low, high = two_level_counts(means, table.shape[1], value)[1]
    drawn = _bootstrap(table) if len(means) > 1 else Interval(low, high)
    return value, Interval(min(low, drawn.low), max(high, drawn.high))


def two_level_counts(shares: Sequence[int | float], n: int, value: float | None = None) -> tuple[float, Interval]:
    """``two_level`` where only every seed's share and the number of different prompts are left: no bootstrap.

    Raises:
        ValueError: two seeds.
    """
    value = sum(shares) / len(shares) if value is None else value
    variance, t = _variance(shares, value * (1 - value) / n, n)
    effective = min(float(n), value * (1 - value) / variance * (Z / t) ** 2) if 0 < value < 1 else float(n)
    return value, _wilson(value, effective)


def two_level_difference(seeds: Sequence[Outcomes]) -> tuple[float, Interval]:
    """Mean of differences from -1 to 1 on the same prompts, over seeds and prompts, with its 95 % interval.

    The hull of the two-level bootstrap and of  value +- t sqrt(V),  V = s^2 / S + v / n + 1 / n^2  with v the mean
    variance over the prompts of a seed. The last term is that of two more prompts, one that differs each way (Agresti
    and Min 2005): without it an interval of no differences has no width.

    Raises:
        ValueError: no outcomes, or two seeds.
    """
    import numpy as np

    value, means, table = _table(seeds)
    n = table.shape[1]
    variance, t = _variance(means, float(np.nanvar(table, axis=1).mean()) / n + 1 / n**2, n)
    half = t * math.sqrt(variance)
    drawn = _bootstrap(table)
    return value, Interval(max(-1.0, min(value - half, drawn.low)), min(1.0, max(value + half, drawn.high)))


def _table(seeds: Sequence[Outcomes]) -> tuple[float, list[float], Any]:
    """Mean, means by seed, and outcomes [seeds, prompts] with NaN where a seed has no outcome of a prompt."""
    import numpy as np

    rows: list[Mapping[Any, int | float]]
    rows = [row if isinstance(row, Mapping) else dict(enumerate(row)) for row in seeds if len(row)]
    if not rows:
        raise ValueError("the mean of nothing is undefined: no outcomes")
    prompts = dict.fromkeys(prompt for row in rows for prompt in row)
    table = np.array([[float(row.get(prompt, math.nan)) for prompt in prompts] for row in rows])
    return float(np.nanmean(table)), np.nanmean(table, axis=1).tolist(), table


def _variance(means: Sequence[float], prompts: float, n: int) -> tuple[float, float]:
    """Of a mean over seeds and prompts, and Student's t at its degrees of freedom (Satterthwaite 1946).

    ``prompts`` is the part of the variance that comes from the prompts, as if every seed had the same ones.
    """
    from scipy.stats import t

    s = len(means)
    if s == 2:
        raise ValueError("an interval over seeds needs three of them, found 2")
    middle = sum(means) / s
    seeds = sum((each - middle) ** 2 for each in means) / (s - 1) / s if s > 1 else 0.0
    if not seeds:
        return prompts, Z
    freedom = (seeds + prompts) ** 2 / (seeds**2 / (s - 1) + prompts**2 / max(n - 1, 1))
    return seeds + prompts, float(t.ppf(0.975, freedom))


def _wilson(share: float, n: int | float) -> Interval:
    """Wilson's interval of a share of ``n`` prompts, which need be no whole number."""
    middle, scale = (share + Z * Z / (2 * n)) / (1 + Z * Z / n), Z / (1 + Z * Z / n)
    half = scale * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Interval(0.0 if share == 0 else low, 1.0 if share == 1 else high)


@functools.lru_cache(maxsize=64)
def _draws(size: int) -> Any:
    """How often each of ``size`` things is drawn, [draws, size]."""
    import numpy as np

    return np.random.default_rng(size).multinomial(size, [1 / size] * size, DRAWS)


def _bootstrap(table: Any) -> Interval:
    """The 95 % percentile interval of the mean of a table [seeds, prompts] whose rows and columns are drawn anew."""
    import numpy as np

    present = ~np.isnan(table)
    seeds, prompts = _draws(table.shape[0]), _draws(table.shape[1])
    sums = ((seeds @ np.where(present, table, 0.0)) * prompts).sum(1)
    with np.errstate(invalid="ignore"):
        means = sums / ((seeds @ present) * prompts).sum(1)
    low, high = np.nanquantile(means, (0.025, 0.975)).tolist()
    return Interval(low, high)


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
