"""Facts to a page: HTML, offline and without a script, and the same as Markdown. Templates show numbers and compute none."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from safebasin.console import printable
from safebasin.report import QUANTITIES, Reading, Report, figure
from safebasin.report.gate import points, share

HERE = Path(__file__).parent
LIMITS = (  # of a run's report
    "An attack success of zero on these prompts is not zero on all prompts: read the upper end of the interval.",
    "Judges are models or word lists and err; where two judges disagree (kappa below 0.6), read the answers.",
    "Intervals are over prompts; one seed of training says nothing of another seed.",
    "An answer off the task (the label of the tuned task, say) is neither a refusal nor harm: it is in no ratio and is counted apart.",
)
SHARED = {
    "limits": LIMITS,
    "quantities": QUANTITIES,
    "threat": "The defender runs the training; nothing here stops somebody who owns open weights.",
    "css": (HERE / "page.css").read_text(encoding="utf-8"),
}


def facts(report: Report) -> dict[str, Any]:
    """What the templates of a run's report are filled with; the figures are SVG whose labels Vega has escaped."""
    return {
        "report": report,
        "category_places": dict.fromkeys((c.suite, c.judge) for c in report.categories),
        "arm_figures": {quantity: figure.arms(report, quantity) for quantity in QUANTITIES},
        "score_figures": {cut.arm: figure.scores(cut) for cut in report.cuts},
        "loss_figure": figure.loss(report),
        "tone": {"pass": "good", "fail": "bad", "inconclusive": "unsure"}[report.verdict.status],
    }


def write(folder: Path, name: str, told: Mapping[str, Any]) -> None:
    """``name.md`` and ``name.html`` from the templates of that name; both are made before the first is written."""
    made = {kind: render(f"{name}.{kind}", told) for kind in ("md", "html")}
    for kind, text in made.items():
        replace(folder / f"{name}.{kind}", text)


def replace(path: Path, text: str) -> None:
    """A reader never sees half a file."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def render(name: str, told: Mapping[str, Any]) -> str:
    return _templates().get_template(f"{name}.jinja").render(SHARED | told)


@functools.cache  # a grid is written after every cell, and compiling takes longer than filling in
def _templates() -> jinja2.Environment:
    """Every string is escaped in HTML, but for what is ``trusted``: the style sheet and the figures, made here."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=lambda name: str(name).endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "share": share,
        "points": points,
        "plain": plain,
        "value": value,
        "interval": interval,
        "counted": counted,
        "p": p_value,
    }
    made.filters |= {"md": escape_markdown, "trusted": Markup, "printable": printable}
    return made


# --- numbers in words -----------------------------------------------------------------------------------------------------------


def value(rate: Reading) -> str:
    return share(rate.value) if rate.unit == "share" else plain(rate.value)


def interval(rate: Reading) -> str:
    """``2.6 to 15.9``; nothing where there is none."""
    if rate.low is None or rate.high is None:
        return ""
    return " to ".join(points(end, sign=False) if rate.unit == "share" else plain(end) for end in (rate.low, rate.high))


def counted(rate: Reading | Mapping[str, Any], between: str = ", ") -> str:
    """What a number was counted from: ``n=57, 2 unscored, 1 off task``."""
    told = rate if isinstance(rate, Mapping) else vars(rate)
    apart = [f"{told[name]} {name.replace('_', ' ')}" for name in ("unscored", "off_task") if told[name]]
    return between.join([f"n={told['n']}", *apart])


def p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def plain(value: float | None) -> str:
    """A number that is no share: four significant digits."""
    return "–" if value is None else f"{value:.4g}"


def escape_markdown(text: object) -> str:
    """Text that no Markdown reader takes for markup, a link or HTML."""
    text = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]()#!|~$@])", r"\\\1", text)
    return text.replace("://", "\\://").replace("www.", "www\\.")
