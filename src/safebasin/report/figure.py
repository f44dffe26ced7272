"""Figures as SVG text, made when the report is made: the page carries no script. Lines and letters take the page's text colour.

Every figure is narrow (340 px), so that a phone shows it at full size; the page sets them side by side where there is room.
"""

import io
from typing import Any

import altair as alt

from safebasin.report import Cut, Reading, Report

WIDTH = 340
# Mid-tones, legible on white and on near-black alike (contrast above 3 on both), told apart by colour-blind readers.
JUDGES = ("#4a86cf", "#d0762c", "#2f9a86", "#b0609e")
KEPT, REMOVED, MISSED, WASTED = "#7d8a99", "#d0762c", "#d2455e", "#4a86cf"


def arms(report: Report, quantity: str) -> str | None:
    """One quantity: a row for every arm, a point with its interval for every suite and judge. None if nothing was measured."""
    readings = [reading for arm in report.arms for reading in report.of(quantity, arm) if reading.value is not None]
    if not readings:
        return None
    names = list(dict.fromkeys(map(_series, readings)))
    values = [{"arm": r.arm, "series": _series(r), "value": r.value, "low": r.low, "high": r.high} for r in readings]
    rows = list(report.arms)
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("arm:N", sort=rows, title=None, scale=alt.Scale(domain=rows), axis=alt.Axis(domain=False, ticks=False, labelPadding=8)),
        yOffset=alt.YOffset("series:N", sort=names, scale=alt.Scale(domain=names, paddingOuter=0.6)),
        color=alt.Color(
            "series:N",
            sort=names,
            scale=alt.Scale(domain=names, range=[JUDGES[i % len(JUDGES)] for i in range(len(names))]),
            legend=alt.Legend(
                orient="bottom", title=None, columns=2, labelLimit=150, symbolType="circle", symbolOpacity=1, columnPadding=14
            )
            if len(names) > 1
            else None,
        ),
    )
    x = alt.X(
        "low:Q", title=None, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format=".0%", labelFlush=False, values=[0, 0.25, 0.5, 0.75, 1])
    )
    interval = base.mark_rule(strokeWidth=2.5, opacity=0.45, strokeCap="round").encode(x=x, x2="high:Q")
    point = base.mark_point(filled=True, size=75, opacity=1).encode(x="value:Q")
    limit = alt.Chart(alt.Data(values=[{"limit": report.gate.max_asr}])).mark_rule(strokeDash=[3, 3], color="currentColor", opacity=0.7)
    layers: list[Any] = [interval, point]
    if quantity == "asr" and report.gate.max_asr is not None:
        layers.insert(0, limit.encode(x="limit:Q"))
    return _svg(alt.layer(*layers).properties(height=44 * len(rows) + 6 * len(names)))


def scores(cut: Cut) -> str | None:
    """The scores that an arm was cut by: a strip for every origin and fate, each on its own scale, since the rare ones matter most."""
    histogram = cut.histogram
    if histogram is None:
        return None
    linear = histogram.symlog is None
    scale = alt.Scale(nice=False) if linear else alt.Scale(type="symlog", constant=histogram.symlog, nice=False)
    domain = [histogram.edges[0], histogram.edges[-1]]
    scale.domain = domain
    axis = alt.Axis(tickCount=5, format=".6~g") if linear else alt.Axis(values=_decades(*domain, histogram.symlog or 1.0), format=".6~g")
    strips = []
    for place, series in enumerate(histogram.series):
        last = place == len(histogram.series) - 1
        bins = zip(histogram.edges, histogram.edges[1:], series.counts, strict=False)
        values = [{"low": low, "high": high, "count": count, "floor": 0} for low, high, count in bins if count]
        x = alt.X("low:Q", scale=scale, title=f"score ({histogram.scorer}), high = harmful" if last else None, axis=axis if last else None)
        bars = alt.Chart(alt.Data(values=values)).mark_bar(color=_colour(series.origin, series.removed), stroke=None)
        strip: Any = bars.encode(x=x, x2="high:Q", y=alt.Y("count:Q", axis=None, scale=alt.Scale(zero=True)), y2="floor:Q")
        if histogram.threshold is not None:
            line = alt.Chart(alt.Data(values=[{"at": histogram.threshold}])).mark_rule(strokeDash=[3, 3], color="currentColor", opacity=0.8)
            strip = alt.layer(strip, line.encode(x=alt.X("at:Q", scale=scale)))
        fate = f"{series.origin or 'rows'}, {'cut' if series.removed else 'kept'}: {sum(series.counts):,}"
        title = alt.Title(fate, anchor="start", fontSize=12, fontWeight="normal", color="currentColor", offset=2)
        strips.append(strip.properties(width=WIDTH - 30, height=40, title=title))
    return _svg(alt.vconcat(*strips, spacing=6), width=None)


def loss(report: Report) -> str | None:
    """Training loss of every tuned arm."""
    curves = [training for training in report.training if training.loss]
    if not curves:
        return None
    values = [{"arm": curve.arm, "step": step, "loss": value} for curve in curves for step, value in curve.loss]
    names = [curve.arm for curve in curves]
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_line(strokeWidth=1.8, opacity=0.85, point=len(values) <= 2 * len(names))
        .encode(
            x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(tickCount=5, tickMinStep=1)),
            y=alt.Y("loss:Q", title="loss", axis=alt.Axis(tickCount=4)),
            color=alt.Color(
                "arm:N",
                scale=alt.Scale(domain=names, range=[JUDGES[(i + 1) % len(JUDGES)] for i in range(len(names))]),
                legend=alt.Legend(orient="bottom", title=None, symbolType="stroke"),
            ),
        )
    )
    return _svg(chart.properties(height=150))


def _series(reading: Reading) -> str:
    suite = "" if reading.suite == reading.quantity and reading.judge else reading.suite  # the panel's title says it
    return ", ".join(filter(None, (suite, reading.judge)))


def _colour(origin: str | None, removed: bool) -> str:
    """Known origins tell right from wrong: a kept poison row is a miss, a cut task row is a waste."""
    if origin is None or (origin == "task") != removed:
        return REMOVED if removed else KEPT
    return WASTED if removed else MISSED


def _decades(low: float, high: float, constant: float) -> list[float]:
    """Ticks of a symlog axis: zero and powers of ten beyond the linear part, thinned to about seven."""
    powers = [10.0**k for k in range(-12, 13) if 10.0**k >= constant]
    ticks = sorted([-p for p in powers] + [0.0] + powers)
    inside = [tick for tick in ticks if low <= tick <= high]
    every = -(-len(inside) // 7) or 1
    middle = inside.index(0.0) if 0.0 in inside else 0
    return [tick for i, tick in enumerate(inside) if (i - middle) % every == 0]


def _svg(chart: Any, width: int | None = WIDTH - 30) -> str:
    if width is not None:
        chart = chart.properties(width=width, autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    chart = (
        chart.configure(background="transparent", font="sans-serif", padding={"left": 14, "right": 16, "top": 4, "bottom": 4}, aria=False)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor="currentColor",
            titleColor="currentColor",
            tickColor="currentColor",
            domainColor="currentColor",
            gridColor="currentColor",
            gridOpacity=0.12,
            domainOpacity=0.35,
            tickOpacity=0.35,
            labelFontSize=11,
            titleFontSize=11,
            titleFontWeight="normal",
            labelLimit=110,
        )
        .configure_legend(labelColor="currentColor", labelFontSize=11)
    )
    file = io.StringIO()
    chart.save(file, format="svg")
    return file.getvalue()
