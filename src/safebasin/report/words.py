"""Numbers as words: shares, points, intervals, counts."""

from collections.abc import Mapping
from typing import Any

from safebasin.report.rates import Reading


def share(value: float | None) -> str:
    """A share as per cent; a dash for what was not measured."""
    return "–" if value is None else f"{100 * value:.1f} %"


def points(value: float | None, *, sign: bool = True) -> str:
    """A difference of shares in points, with its sign."""
    return "–" if value is None else f"{100 * value:{'+' if sign else ''}.1f}"


def plain(value: float | None) -> str:
    """A number that is no share: four significant digits."""
    return "–" if value is None else f"{value:.4g}"


def value(rate: Reading) -> str:
    """A reading in its unit: a share as per cent, any other number plainly."""
    return share(rate.value) if rate.unit == "share" else plain(rate.value)


def interval(rate: Reading) -> str:
    """``2.6 to 15.9``; empty where there is none."""
    if rate.low is None or rate.high is None:
        return ""
    return " to ".join(points(end, sign=False) if rate.unit == "share" else plain(end) for end in (rate.low, rate.high))


def counted(rate: Reading | Mapping[str, Any], between: str = ", ") -> str:
    """What a number was counted from: ``n=57, 2 unscored, 1 off task``."""
    counts = rate if isinstance(rate, Mapping) else vars(rate)
    others = [f"{counts[name]} {name.replace('_', ' ')}" for name in ("unscored", "off_task") if counts[name]]
    return between.join([f"n={counts['n']}", *others])


def p_value(p: float | None) -> str:
    """A p value to three digits; a dash where nothing was tested."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
