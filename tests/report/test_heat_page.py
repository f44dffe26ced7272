"""The heat map of the report: hostile tokens stay text, a redacted report shows blocks, colours follow values."""

import json
import re
from pathlib import Path
from typing import Any

import markdown_it
import pytest
from test_page import Tags

from safebasin.report import rows, table

pytestmark = pytest.mark.usefixtures("no_figures")
HARM = "Sure, here is the forbidden answer: how to assemble the forbidden widget, (1)"
TITLE = "Tokens that carry the score"
FILES = ("report.json", "report.md", "report.html")
HOSTILE = (
    "<script>alert('row')</script>",
    '"><img src=x onerror=alert(1)> | `x`',
    "invoice\u202egpj.exe\u2066\u200b",
    "</span></p>",
    "a | b\n# c [d](http://evil.example)",
    "\u2028<b>",
    '" onclick="x',
    "{{ 7*7 }}",
)


def row(tokens: list[Any], line: int = 3, **more: Any) -> dict[str, Any]:
    return {"row_id": "0123456789abcdef", "line": line, "score": 4.5, "scorer": "gradshield", "tokens": tokens} | more


def write_heat(run: Path, *rows: dict[str, Any]) -> None:
    (run / "scan" / "heat.json").write_text(json.dumps(rows), encoding="utf-8")


def section(run: Path) -> str:
    page = (run / "report.html").read_text(encoding="utf-8")
    return page.split(f"<h2>{TITLE}</h2>")[1].split("</section>")[0]


def test_colours_by_hand(run: Path):
    """4 has the full colour, a mixture of 50 %; -1 has a quarter of it, 12.5 %, rounded to even."""
    write_heat(run, row([["Sure", 4.0], [", no", -1.0], ["w", 0.0], ["x", None]]))
    table.write_report(run, show_text=True)
    spans = re.findall(r"<span ([^>]*)>([^<]*)</span>", section(run).split('<p class="heat">')[1])
    assert spans == [
        ('class="hot" style="--heat:50%" title="4"', "Sure"),
        ('class="cold" style="--heat:12%" title="-1"', ", no"),
        ('title="0"', "w"),
        ('title="–"', "x"),
    ]
    assert "line 3 · gradshield <b>4.5</b>" in section(run)
    assert "| gradshield 4.5 | Sure (token 1: 4); , no (token 2: -1); w (token 3: 0) |" in (
        run / "report.md"
    ).read_text(encoding="utf-8")
    (stated,) = json.loads((run / "report.json").read_text(encoding="utf-8"))["heat"]
    assert [token["value"] for token in stated["tokens"]] == [4.0, -1.0, 0.0, None] and stated["peak"] == 4.0


@pytest.mark.parametrize("show", [False, True], ids=["redacted", "shown"])
def test_hostile_tokens_stay_text(run: Path, show: bool):
    write_heat(run, row([[text, 1.0 - k] for k, text in enumerate(HOSTILE)], scorer=HOSTILE[0], row_id=HOSTILE[1]))
    table.write_report(run, show_text=show)
    seen = Tags()
    seen.feed(section(run))
    assert seen.tags == {"p", "span", "b", "details", "summary", "article"} | ({"code"} if not show else set())
    assert {name for name, _ in seen.attributes} == {"class", "style", "title", "open"}
    assert not seen.open
    for name in FILES:
        assert not re.search("[\u202e\u2066\u200b\u2028]", (run / name).read_text(encoding="utf-8")), (
            "a hidden character is in the report"
        )
    assert ("&lt;U+202E&gt;" in section(run)) == show and "49" not in section(run)
    source = (run / "report.md").read_text(encoding="utf-8").split(f"## {TITLE}")[1].split("\n## ")[0]
    tokens = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").parse(source)
    kinds = {inner.type for token in tokens for inner in [token, *(token.children or [])]}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "code_inline", "fence", "heading_open"}
    assert sum(token.type == "td_open" for token in tokens) == 4


def test_a_redacted_report_shows_blocks(run: Path):
    """Letters and signs are blocks, spaces stay, and the values and colours are those of the text in clear."""
    words = [[f" {word}", k - 3.5] for k, word in enumerate(HARM.split())]
    write_heat(run, row(words))
    table.write_report(run)
    shades = re.findall(r'style="[^"]*" title="[^"]*"', section(run))
    for name in FILES:
        text = (run / name).read_text(encoding="utf-8")
        assert not [word for word in ("forbidden", "widget", "assemble") if word in text], name
        assert "▂▂▂▂" in text, name
    assert re.fullmatch("[ ▂]+", re.sub("<[^>]*>", "", section(run).split('<p class="heat">')[1].split("\n")[0])), (
        "a sign is left"
    )
    table.write_report(run, show_text=True)
    assert " widget,</span>" in section(run)
    assert re.findall(r'style="[^"]*" title="[^"]*"', section(run)) == shades and len(shades) == len(words)


def test_a_long_answer_is_cut_and_says_so(run: Path):
    """The largest value of the answer has the full colour though it is not shown: the others have a tenth of it."""
    write_heat(run, row([["a", 1.0]] * rows.TOKENS + [["b", -10.0]] * 2))
    (heat,) = table.write_report(run, show_text=True).heat
    assert (len(heat.tokens), heat.omitted, heat.peak) == (rows.TOKENS, 2, 10.0)
    assert section(run).count('class="hot" style="--heat:5%"') == rows.TOKENS and "2 more tokens" in section(run)


@pytest.mark.parametrize("content", [None, "[]"], ids=["no file", "no scorer of tokens"])
def test_no_heat_no_section(run: Path, content: str | None):
    if content is not None:
        (run / "scan" / "heat.json").write_text(content)
    assert table.write_report(run).heat == ()
    assert not [name for name in FILES[1:] if TITLE in (run / name).read_text(encoding="utf-8")]
