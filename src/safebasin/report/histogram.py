"""The histogram of the scores that a cut went by."""

import math
from collections.abc import Mapping
from pathlib import Path

from safebasin.report.files import CutFile, load_scores, safe_name
from safebasin.report.report import Histogram, Series

BINS = 40
HEAVY = 20.0  # the axis is symlog if the largest distance from 0 is more than this times the 90th percentile
LARGEST = 1e100  # of a score in the histogram: beyond it the axis overflows


def histogram_of(run: Path, arm: str, cut: CutFile, origins: Mapping[str, str]) -> Histogram | None:
    """Scores in bins, one of which ends at the threshold. A cut by several scorers has scores of its own."""
    import numpy as np

    joined, single = run / "cut" / arm / "scores.parquet", run / "scan" / "scores.parquet"
    scores = load_scores(joined, "score") if joined.is_file() else load_scores(single, f"score_{cut['scorer']}")
    if not scores:
        return None
    values = np.clip(list(scores.values()), -LARGEST, LARGEST)
    far = float(np.quantile(np.abs(values), 0.9))
    heavy = far > 0 and float(np.abs(values).max()) / far > HEAVY
    # The axis is linear within the bulk of the scores and logarithmic beyond it.
    constant = max(float(np.median(np.abs(values[values != 0]))), 1 / LARGEST) if heavy else None
    to_axis = (lambda x: np.sign(x) * np.log1p(np.abs(x) / constant)) if constant else np.asarray
    from_axis = (lambda x: np.sign(x) * np.expm1(np.abs(x)) * constant) if constant else np.asarray
    on_axis, threshold = to_axis(values), cut["threshold"]
    start = float(on_axis.min() if threshold is None else to_axis(np.clip(threshold, -LARGEST, LARGEST)))
    low, high = min(start, float(on_axis.min())), max(start, float(on_axis.max()))
    width = (high - low) / BINS or 1.0
    below, above = math.ceil((start - low) / width - 1e-9), math.ceil((high - start) / width - 1e-9)
    edges = start + width * np.arange(-below, max(above, 1 - below) + 1)
    # A row whose score is at the threshold stays: it is in the bin below.
    bins = np.clip(np.searchsorted(edges, on_axis) - 1, 0, len(edges) - 2)
    removed = {row["row_id"] for row in cut["removed"]}
    fates = [(origins.get(key), key in removed) for key in scores]
    series = []
    for fate in sorted(set(fates), key=lambda fate: (fate[0] != "task", fate[0] or "", fate[1])):
        counts = np.bincount(bins[[other == fate for other in fates]], minlength=len(edges) - 1)
        series.append(Series(origin=fate[0], removed=fate[1], counts=tuple(counts.tolist())))
    return Histogram(
        scorer=safe_name(cut["scorer"]),
        threshold=threshold,
        symlog=constant,
        edges=tuple(from_axis(edges).tolist()),
        series=tuple(series),
    )
