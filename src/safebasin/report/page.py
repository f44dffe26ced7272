"""Values to a page: HTML, offline and without a script, and the same as Markdown. Templates compute no numbers."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from safebasin.console import printable
from safebasin.data.files import atomic_write
from safebasin.report import figure, words
from safebasin.report.rates import QUANTITIES
from safebasin.report.report import Report

HERE = Path(__file__).parent
LIMITS = (  # of a run's report
    "An attack success of zero on these prompts is not zero on all prompts: read the upper end of the interval.",
    "Judges are models or word lists and make mistakes; where two judges disagree (kappa below 0.6), read the answers.",
    "Intervals are over prompts; training with another seed can give other numbers.",
    "An answer off the task (such as a label of the tuned task) is neither a refusal nor harm: it is in no ratio; the "
    "number of such answers is stated beside it.",
)
SHARED: dict[str, Any] = {
    "limits": LIMITS,
    "quantities": QUANTITIES,
    "languages": "Built-in judges read English, keyword and prefix also Spanish, French, German, Italian and "
    "Portuguese; answers in another script than Latin are unscored.",
    "threat": "The defender runs the training; nothing here stops somebody who owns open weights.",
    "css": (HERE / "page.css").read_text(encoding="utf-8"),
}


def facts(report: Report) -> dict[str, Any]:
    """Values of the templates of a run's report. The figures are SVG; Vega has escaped their labels."""
    return {
        "report": report,
        "category_keys": dict.fromkeys((c.suite, c.judge) for c in report.categories),
        "arm_figures": {quantity: figure.arms(report, quantity) for quantity in QUANTITIES},
        "score_figures": {cut.arm: figure.scores(cut) for cut in report.cuts},
        "loss_figure": figure.loss(report),
        "tone": {"pass": "good", "fail": "bad", "inconclusive": "unsure"}[report.verdict.status],
    }


def write(folder: Path, name: str, values: Mapping[str, Any]) -> None:
    """``name.md`` and ``name.html`` from the templates of that name; both are rendered before the first is written."""
    texts = {kind: render(f"{name}.{kind}", values) for kind in ("md", "html")}
    for kind, text in texts.items():
        write_text(folder / f"{name}.{kind}", text)


def write_text(path: Path, text: str) -> None:
    """Write a complete file, or none."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def render(name: str, values: Mapping[str, Any]) -> str:
    """The text of a template, which may also read the values of ``SHARED``."""
    return _templates().get_template(f"{name}.jinja").render({**SHARED, **values})


@functools.cache  # a grid is written after every cell, and compiling a template takes longer than rendering it
def _templates() -> jinja2.Environment:
    """Every string is escaped in HTML, except the style sheet and the figures, which templates mark as ``trusted``."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=lambda name: str(name).endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = (words.share, words.points, words.plain, words.value, words.interval, words.counted)
    templates.filters |= {number.__name__: number for number in numbers}
    templates.filters |= {"p": words.p_value, "md": escape_markdown, "trusted": Markup, "printable": printable}
    return templates


def escape_markdown(text: object) -> str:
    """Text in which no Markdown reader finds markup, a link or HTML."""
    text = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]()#!|~$@])", r"\\\1", text)
    return text.replace("://", "\\://").replace("www.", "www\\.")
