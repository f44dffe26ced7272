"""Figures as SVG text, drawn when the report is written: the page has no script. Ink takes the page's text colour.

Every figure is 340 px wide, so that a phone shows it at full size; a wider page sets them side by side.
"""

import io
from typing import Any

import altair as alt

from safebasin.report.rates import Reading
from safebasin.report.report import Cut, Report

WIDTH = 340
# Mid-tones with a contrast above 3 on white and on near-black, which colour-blind readers can distinguish.
COLOURS = ["#4a86cf", "#d0762c", "#2f9a86", "#b0609e"]
STAYED, REMOVED, MISSED, WASTED = "#7d8a99", "#d0762c", "#d2455e", "#4a86cf"


def arms(report: Report, quantity: str) -> str | None:
    """One quantity: a row for every arm, a point and an interval for every suite and judge. None if not measured."""
    rows = list(report.arms)
    values = [vars(r) | {"series": _series(r)} for arm in rows for r in report.of(quantity, arm) if r.value is not None]
    if not values:
        return None
    names = list(dict.fromkeys(value["series"] for value in values))
    legend = alt.Legend(
        orient="bottom", title=None, columns=2, labelLimit=150, symbolType="circle", symbolOpacity=1, columnPadding=14
    )
    base = _chart(values).encode(
        y=alt.Y(
            "arm:N", title=None, scale=alt.Scale(domain=rows), axis=alt.Axis(domain=False, ticks=False, labelPadding=8)
        ),
        yOffset=alt.YOffset("series:N", scale=alt.Scale(domain=names, paddingOuter=0.6)),
        color=alt.Color(
            "series:N", scale=alt.Scale(domain=names, range=COLOURS), legend=legend if len(names) > 1 else None
        ),
    )
    axis = alt.Axis(format=".0%", labelFlush=False, values=[0, 0.25, 0.5, 0.75, 1])
    x = alt.X("low:Q", title=None, scale=alt.Scale(domain=[0, 1]), axis=axis)
    interval = base.mark_rule(strokeWidth=2.5, opacity=0.45, strokeCap="round").encode(x=x, x2="high:Q")
    point = base.mark_point(filled=True, size=75, opacity=1).encode(x="value:Q")
    limit = report.gate.max_asr if quantity == "asr" else None
    layers = [interval, point] if limit is None else [_dashed(limit, 0.7), interval, point]
    return _svg(_fit(alt.layer(*layers)).properties(height=44 * len(rows) + 6 * len(names)))


def scores(cut: Cut) -> str | None:
    """The scores that an arm was cut by. Each strip (an origin, removed or not) has its own scale: rare rows matter."""
    histogram = cut.histogram
    if histogram is None:
        return None
    domain = [histogram.edges[0], histogram.edges[-1]]
    if histogram.symlog is None:
        scale, axis = alt.Scale(nice=False, domain=domain), alt.Axis(tickCount=5, format=".6~g")
    else:
        scale = alt.Scale(type="symlog", constant=histogram.symlog, nice=False, domain=domain)
        axis = alt.Axis(values=_decades(domain[0], domain[1], histogram.symlog), format=".6~g")
    last = histogram.series[-1]
    strips = []
    for series in histogram.series:
        bins = zip(histogram.edges, histogram.edges[1:], series.counts, strict=False)
        bars = _chart([{"low": low, "high": high, "count": count, "floor": 0} for low, high, count in bins if count])
        title = f"score ({histogram.scorer}), high = harmful" if series is last else None
        strip: Any = bars.mark_bar(color=_colour(series.origin, series.removed), stroke=None).encode(
            x=alt.X("low:Q", scale=scale, title=title, axis=axis if series is last else None),
            x2="high:Q",
            y=alt.Y("count:Q", axis=None, scale=alt.Scale(zero=True)),
            y2="floor:Q",
        )
        if histogram.threshold is not None:
            strip = alt.layer(strip, _dashed(histogram.threshold, 0.8, scale=scale))
        title = f"{series.origin or 'rows'}, {'removed' if series.removed else 'not removed'}: {sum(series.counts):,}"
        heading = alt.Title(title, anchor="start", fontSize=12, fontWeight="normal", color="currentColor", offset=2)
        strips.append(strip.properties(width=WIDTH - 30, height=40, title=heading))
    return _svg(alt.vconcat(*strips, spacing=6))


def loss(report: Report) -> str | None:
    """Training loss of every tuned arm."""
    names = [training.arm for training in report.training if training.loss]
    values = [
        {"arm": curve.arm, "step": step, "loss": value} for curve in report.training for step, value in curve.loss
    ]
    if not values:
        return None
    chart = _chart(values).mark_line(strokeWidth=1.8, opacity=0.85, point=len(values) <= 2 * len(names))
    chart = chart.encode(
        x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(tickCount=5, tickMinStep=1)),
        y=alt.Y("loss:Q", title="loss", axis=alt.Axis(tickCount=4)),
        color=alt.Color(
            "arm:N",
            scale=alt.Scale(domain=names, range=COLOURS[1:] + COLOURS[:1]),
            legend=alt.Legend(orient="bottom", title=None, symbolType="stroke"),
        ),
    )
    return _svg(_fit(chart).properties(height=150))


def _series(reading: Reading) -> str:
    """The judge alone where the suite is named as the quantity, which is the figure's title."""
    return reading.judge if reading.suite == reading.quantity and reading.judge else reading.key.name


def _colour(origin: str | None, removed: bool) -> str:
    """A row of another origin than the task that was not removed is a miss; a removed row of the task is a waste."""
    if origin is None or (origin == "task") != removed:
        return REMOVED if removed else STAYED
    return WASTED if removed else MISSED


def _decades(low: float, high: float, constant: float) -> list[float]:
    """Ticks of a symlog axis: zero and powers of ten outside the linear part, thinned to about seven."""
    powers = [10.0**k for k in range(-12, 13) if 10.0**k >= constant]
    inside = [tick for tick in sorted([0.0, *powers, *(-power for power in powers)]) if low <= tick <= high]
    every = -(-len(inside) // 7) or 1
    middle = inside.index(0.0) if 0.0 in inside else 0
    return inside[middle % every :: every]


def _chart(values: list[dict[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.Data(values=values))


def _dashed(at: float, opacity: float, **x: Any) -> alt.Chart:
    return (
        _chart([{"at": at}])
        .mark_rule(strokeDash=[3, 3], color="currentColor", opacity=opacity)
        .encode(x=alt.X("at:Q", **x))
    )


def _fit(chart: Any) -> Any:
    return chart.properties(width=WIDTH - 30, autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))


def _svg(chart: Any) -> str:
    ink = dict.fromkeys(("labelColor", "titleColor", "tickColor", "domainColor", "gridColor"), "currentColor")
    faint = {"gridOpacity": 0.12, "domainOpacity": 0.35, "tickOpacity": 0.35}
    chart = (
        chart.configure(
            background="transparent",
            font="sans-serif",
            padding={"left": 14, "right": 16, "top": 4, "bottom": 4},
            aria=False,
        )
        .configure_view(stroke=None)
        .configure_axis(**ink, **faint, labelFontSize=11, titleFontSize=11, titleFontWeight="normal", labelLimit=110)
        .configure_legend(labelColor="currentColor", labelFontSize=11)
    )
    file = io.StringIO()
    chart.save(file, format="svg")
    return file.getvalue()
