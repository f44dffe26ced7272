"""The figure of the repair table: attack success against task accuracy, a panel a column; shrink is a line.

A repair whose point lies on that line has used nothing of what it was given: a shorter update does the same.
"""

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

GREY = "#7d8a99"
WIDTH, HEIGHT = 520, 340  # of a panel in pixels
KINDS = {
    "no repair": GREY,
    "shrink": "#b0609e",
    "repair": "#4a86cf",
    "training with a defence": "#d0762c",
    "answers mixed": "#4f9d69",
}


def kind(arm: str) -> str:
    """Of an arm, by its name."""
    names = {"start": "no repair", "plain": "no repair", "shrink": "shrink", "mix": "answers mixed"}
    names |= dict.fromkeys(("composition", "buffer_reinforce"), "training with a defence")
    return next((each for start, each in names.items() if arm.startswith(start)), "repair")


def place_labels(points: Sequence[dict[str, Any]], right: float) -> None:
    """Give every point of a panel the place of its label, in data units: beside it, or as near as is free. ``right`` is
    the accuracy at the panel's right edge."""
    taken = [(x, y - 4, x + 8, y + 4) for x, y in (_pixels(point, right) for point in points)]
    for point in sorted(points, key=lambda point: (-point["asr"], point["utility"])):
        (x, y), width = _pixels(point, right), 5.4 * len(point["arm"])
        places = [
            (left, y + step) for step in (0, -11, 11, -22, 22, -33, 33, -44, -55) for left in (x + 7, x - 7 - width)
        ]
        boxes = [(left, middle - 5, left + width, middle + 5) for left, middle in places]
        inside = [box for box in boxes if box[0] > 0 and box[1] > 0 and box[3] < HEIGHT] or boxes
        box = next((box for box in inside if not any(_overlap(box, other) for other in taken)), inside[0])
        taken.append(box)
        point |= {"x": right * box[0] / WIDTH, "y": (1 - (box[1] + 5) / HEIGHT) ** 2}


def _pixels(point: Mapping[str, Any], right: float) -> tuple[float, float]:
    return WIDTH * point["utility"] / right, HEIGHT * (1 - point["asr"] ** 0.5)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def write_curve(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], path: Path) -> None:
    """Draw the records ``asr.ARM.COLUMN`` and ``utility.ARM.COLUMN`` of the arms that most of ``columns`` have."""
    points: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        name, _, rest = row["what"].partition(".")
        if name in ("asr", "utility") and "." in rest and not rest.startswith("worst."):
            arm, _, column = rest.partition(".")
            if column not in columns:
                continue
            point = points.setdefault((arm, column), {"arm": arm, "column": column, "kind": kind(arm)})
            point[name] = row["value"]
    values = [point for point in points.values() if {"asr", "utility"} <= point.keys()]
    columns = [column for column in columns if any(point["column"] == column for point in values)]
    measured = collections.Counter(point["arm"] for point in values)
    values = [point for point in values if 2 * measured[point["arm"]] > len(columns)]
    right = min(1.0, 0.15 + max((point["utility"] for point in values), default=1.0))
    for column in columns:
        place_labels([point for point in values if point["column"] == column], right)
    axis = alt.Axis(format=".0%", tickCount=5)
    across = alt.Scale(domain=[0, right])
    up = alt.Scale(domain=[0, 1], type="sqrt")  # most repairs are below 20 %
    x = alt.X("utility:Q", title="task accuracy", axis=axis, scale=across)
    y = alt.Y("asr:Q", title="attack success (root scale)", axis=axis, scale=up)
    everything = alt.Chart(alt.Data(values=values))
    base = everything.encode(x=x, y=y)
    line = base.transform_filter("datum.kind == 'shrink' || datum.arm == 'plain' || datum.arm == 'start'")
    colours = alt.Scale(domain=list(KINDS), range=list(KINDS.values()))
    colour = alt.Color("kind:N", title=None, scale=colours, legend=alt.Legend(orient="bottom"))
    layers = [
        line.mark_line(color=GREY, strokeDash=[4, 3]).encode(order="asr:Q"),
        base.mark_point(filled=True, size=70, opacity=1).encode(color=colour),
        everything.mark_text(align="left", fontSize=9, color=GREY).encode(x="x:Q", y="y:Q", text="arm:N"),
    ]
    chart = alt.layer(*layers).properties(width=WIDTH, height=HEIGHT)
    panels = [chart.transform_filter(f"datum.column == '{column}'").properties(title=column) for column in columns]
    alt.concat(*panels, columns=2).save(path)
