"""The page: offline, without a script, every hostile string escaped; the Markdown likewise."""

import html.parser
import importlib
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import markdown_it  # rich brings it
import pyarrow
import pyarrow.parquet
import pytest
from conftest import WIDE

from safebasin.errors import UserError
from safebasin.report import figure, page, table
from safebasin.report.limits import Gate


class Tags(html.parser.HTMLParser):
    """Every tag and attribute that a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(name, value or "") for name, value in attrs}
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"


@pytest.fixture(params=[False, True], ids=["redacted", "shown"])
def text(run: Path, request: pytest.FixtureRequest) -> str:
    table.write_report(run, show_text=request.param)
    return (run / "report.html").read_text(encoding="utf-8")


def test_no_hostile_markup_comes_alive(text: str):
    seen = Tags()
    seen.feed(text)
    assert not seen.tags & {"script", "img", "link", "iframe", "object", "form", "base", "a"}
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert "<script" not in text.lower()
    assert "&lt;script&gt;" in text, "the hostile row is not shown at all"
    assert not seen.open, f"left open: {seen.open}"


def test_nothing_is_fetched(text: str):
    without_namespaces = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert "evil.example" in text or "redacted" in text
    assert not re.search(
        r"""(src|href|action)\s*=|url\(|@import""", re.sub(r"&lt;.*?&gt;|src=x onerror", "", without_namespaces)
    )
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text
    assert '<meta charset="utf-8">' in text[:200]
    assert 'name="viewport"' in text


def test_the_threat_model_is_stated(text: str):
    assert "nothing here stops somebody who owns open weights" in text


@pytest.mark.parametrize(("limit", "word"), [(0.17, "PASS"), (0.06, "INCONCLUSIVE"), (0.01, "FAIL")])
def test_verdict_on_top(run: Path, limit: float, word: str):
    table.write_report(run, gate=Gate(**{**WIDE, "max_asr": limit}))
    body = (run / "report.html").read_text().split("<body>")[1]
    assert f'<p class="status">{word}</p>' in body[: body.index("<h2>")]


def test_markdown_is_inert(run: Path):
    """A Markdown reader that passes HTML through finds none, no link, and no image; tables keep their columns."""
    table.write_report(run, show_text=True)
    source = (run / "report.md").read_text(encoding="utf-8")
    assert "<script" not in source.lower()
    tokens = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").parse(source)
    kinds = {inner.type for token in tokens for inner in [token, *(token.children or [])]}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "code_inline", "fence", "code_block"}
    rows = [line for line in source.splitlines() if line.startswith("|")]
    assert kinds >= {"table_open", "bullet_list_open", "heading_open"}
    for first, second in itertools.pairwise(rows):
        if set(second) <= set("| -"):
            assert len(re.findall(r"(?<!\\)\|", first)) == len(re.findall(r"(?<!\\)\|", second))
    assert sum(token.type == "table_open" for token in tokens) == 9


@pytest.mark.parametrize("text", ["a|b", "`x`", "<b>", "[a](b)", "![a](b)", "*x*", "http://a.b", "# x", "\\"])
def test_escape_markdown_round_trip(text: str):
    """What was escaped reads as it was written."""
    reader = markdown_it.MarkdownIt("gfm-like", {"linkify": False})
    (token,) = (token for token in reader.parse("x " + page.escape_markdown(text)) if token.type == "inline")
    assert {child.type for child in token.children or []} <= {"text", "text_special"}
    assert "".join(child.content for child in token.children or []) == "x " + text


def test_labels_of_figures_are_escaped(run: Path):
    report = table.collect(run)
    svg = figure.scores(report.cuts[0])
    assert svg is not None
    hostile = run / "data" / "rows.json"
    hostile.write_text(hostile.read_text().replace('"poison"', '"<script>x</script>"'))
    svg = figure.scores(table.collect(run).cuts[0])
    assert svg is not None
    assert "<script" not in svg
    assert "&lt;script&gt;" in svg


def test_figures_take_the_colour_of_the_page(run: Path):
    report = table.collect(run)
    for svg in (figure.arms(report, "asr"), figure.scores(report.cuts[0]), figure.loss(report)):
        assert svg is not None
        assert svg.startswith("<svg")
        assert "currentColor" in svg
        assert not re.search(r'fill="(black|#000|white|#fff)', svg)


def test_extreme_scores_are_drawn(run: Path):
    """Real figures over scores and losses at the ends of what a float holds."""
    rows = [row["id"] for row in json.loads((run / "data" / "rows.json").read_text())]
    for scores in (
        [1e308, -1e308, *[0.0] * 98],
        [5e-324 * i for i in range(100)],
        [0.5] * 100,
        [1e16 + i for i in range(100)],
    ):
        pyarrow.parquet.write_table(
            pyarrow.table({"row_id": rows, "score_gradshield": scores}), run / "scan" / "scores.parquet"
        )
        cut = table.collect(run).cuts[0]
        assert cut.histogram is not None and all(map(math.isfinite, cut.histogram.edges))
        assert sum(sum(series.counts) for series in cut.histogram.series) == 100
        assert (figure.scores(cut) or "").startswith("<svg")
    facts = json.loads((run / "arms" / "plain" / "train.json").read_text())
    (run / "arms" / "plain" / "train.json").write_text(
        json.dumps(facts | {"loss": [[1, 1e308], [2, -1e308], [3, math.nan]]})
    )
    assert (figure.loss(table.collect(run)) or "").startswith("<svg")


def test_no_figure_of_nothing(run: Path):
    assert figure.arms(table.collect(run), "no such quantity") is None


def test_the_report_needs_no_torch():
    """A report is made on a laptop, from files."""
    code = "import sys, safebasin.report.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_gate_starts_without_heavy_libraries():
    """`safebasin gate` runs in pipelines of other people: it must start in a fraction of a second."""
    heavy = ["torch", "altair", "scipy", "numpy", "pyarrow", "jinja2", "huggingface_hub", "pydantic", "yaml"]
    code = f"import sys, safebasin.report.gate; sys.exit(' '.join(sorted(sys.modules.keys() & {heavy})))"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stderr.strip() == "", "loaded"


def test_a_missing_extra_is_an_error(monkeypatch: pytest.MonkeyPatch):
    for name in ("inspect_ai", "inspect_ai.log"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "safebasin.report.inspect", raising=False)
    with pytest.raises(UserError, match="the extra 'inspect'"):
        importlib.import_module("safebasin.report.inspect")
