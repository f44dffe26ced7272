"""The figure of the repair table: attack success against task accuracy, a panel a column; shrink is a line.

A repair whose point lies on that line has used nothing of what it was given: a shorter update does the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

GREY, BLUE, ORANGE, PURPLE = "#7d8a99", "#4a86cf", "#d0762c", "#b0609e"
KINDS = ("no repair", "shrink", "repair", "training with a defence")


def kind(arm: str) -> str:
    if arm in ("start", "plain"):
        return KINDS[0]
    if arm.startswith(("composition", "buffer_reinforce")):
        return KINDS[3]
    return KINDS[1] if arm.startswith("shrink") else KINDS[2]


def write_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the records ``asr.ARM.COLUMN`` and ``utility.ARM.COLUMN``."""
    points: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        name, _, rest = row["what"].partition(".")
        if name in ("asr", "utility") and "." in rest and not rest.startswith("worst."):
            arm, _, column = rest.partition(".")
            point = points.setdefault((arm, column), {"arm": arm, "column": column, "kind": kind(arm)})
            point[name] = row["value"]
    values = [point for point in points.values() if {"asr", "utility"} <= point.keys()]
    axis = alt.Axis(format=".0%", tickCount=5)
    x = alt.X("utility:Q", title="task accuracy", axis=axis, scale=alt.Scale(domain=[0, 0.65]))
    y = alt.Y("asr:Q", title="attack success", axis=axis, scale=alt.Scale(domain=[0, 1]))
    base = alt.Chart(alt.Data(values=values)).encode(x=x, y=y)
    line = base.transform_filter("datum.kind == 'shrink' || datum.arm == 'plain' || datum.arm == 'start'")
    colours = alt.Scale(domain=KINDS, range=[GREY, PURPLE, BLUE, ORANGE])
    colour = alt.Color("kind:N", title=None, scale=colours, legend=alt.Legend(orient="bottom"))
    layers = [
        line.mark_line(color=GREY, strokeDash=[4, 3]).encode(order="asr:Q"),
        base.mark_point(filled=True, size=70, opacity=1).encode(color=colour),
        base.mark_text(align="left", dx=7, dy=-4, fontSize=9, color=GREY).encode(text="arm:N"),
    ]
    columns = list(dict.fromkeys(point["column"] for point in values))
    chart = alt.layer(*layers).properties(width=420, height=300)
    panels = [chart.transform_filter(f"datum.column == '{column}'").properties(title=column) for column in columns]
    alt.vconcat(*panels).save(path)
