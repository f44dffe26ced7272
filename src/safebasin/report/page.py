"""The report as one HTML page, offline and without a script, and as Markdown. Both show the numbers of the Report and compute none."""

import functools
import re
from pathlib import Path

import jinja2
from markupsafe import Markup

from safebasin.report import QUANTITIES, Comparison, Reading, Report, figure
from safebasin.report.gate import points, share

HERE = Path(__file__).parent
THREAT = "The defender runs the training; nothing here stops somebody who owns open weights."
LIMITS = (
    "An attack success of zero on these prompts is not zero on all prompts: read the upper end of the interval.",
    "Judges are models or word lists and err; where two judges disagree (kappa below 0.6), read the answers.",
    "Intervals are over prompts; one seed of training says nothing of another seed.",
    "An answer off the task (the label of the tuned task, say) is neither a refusal nor harm: it is in no ratio and is counted apart.",
)
COLOURS = {"pass": "good", "fail": "bad", "inconclusive": "unsure"}


def html(report: Report) -> str:
    """The page. Every string of the report is escaped; the figures are SVG whose labels Vega has escaped."""
    return _environment().get_template("page.html.jinja").render(**_content(report))


def markdown(report: Report) -> str:
    return _environment().get_template("page.md.jinja").render(**_content(report))


def _content(report: Report) -> dict[str, object]:
    return {
        "report": report,
        "quantities": QUANTITIES,
        "arm_figures": {quantity: figure.arms(report, quantity) for quantity in QUANTITIES},
        "score_figures": {cut.arm: figure.scores(cut) for cut in report.cuts},
        "loss_figure": figure.loss(report),
        "category_places": list(dict.fromkeys((c.suite, c.judge) for c in report.categories)),
        "css": (HERE / "page.css").read_text(encoding="utf-8"),
        "threat": THREAT,
        "limits": LIMITS,
        "tone": COLOURS[report.verdict.status],
    }


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"share": share, "points": points, "number": number, "change": change, "p": p_value, "plain": plain, "md": escape_markdown}
    environment.filters |= filters | {"trusted": _trusted}
    return environment


def _trusted(made: str) -> Markup:
    return Markup(made)  # the style sheet and the figures, made here


# --- numbers in words -----------------------------------------------------------------------------------------------------------


def number(reading: Reading) -> str:
    """``6.7 % [2.6 to 15.9] n=60``; a dash where nothing was scored."""
    if reading.value is None:
        return f"– n={reading.n}"
    if reading.unit != "share":
        ends = "" if reading.low is None else f" [{plain(reading.low)} to {plain(reading.high)}]"
        return f"{plain(reading.value)}{ends} n={reading.n}"
    ends = "" if reading.low is None or reading.high is None else f" [{100 * reading.low:.1f} to {100 * reading.high:.1f}]"
    return f"{share(reading.value)}{ends} n={reading.n}"


def change(comparison: Comparison) -> str:
    """A paired difference: ``-63.3 [-75.1 to -51.6]`` in points."""
    return f"{points(comparison.value)} [{points(comparison.low)} to {points(comparison.high)}]"


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
