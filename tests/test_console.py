"""What is printed: one line, no markup, hidden characters shown."""

import io
import sys

import pytest
import rich.console
import rich.progress

from safebasin import console

HOSTILE = "[bold]x[/bold] \x1b[31m\u202e" + "w" * 400


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    file = io.StringIO()
    monkeypatch.setattr(console, "console", rich.console.Console(file=file, width=100, highlight=False))
    return file


def test_a_line_is_printable_and_its_markup_is_text(printed: io.StringIO):
    console.line(HOSTILE)
    [line] = printed.getvalue().splitlines()
    assert line.startswith("[bold]x[/bold] <U+001B>[31m<U+202E>www") and line.endswith("characters]")


def test_progress_without_a_terminal_ends_with_one_line(printed: io.StringIO, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with console.progress("[red]a[/red]\u202e", 3) as advance:
        for done in (1, 2, 3, 3):
            advance(done, "[x]\x1b")
    assert printed.getvalue() == "  [red]a[/red]<U+202E>: 3 of 3, 0 s [x]<U+001B>\n"


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch):
    file = io.StringIO()
    monkeypatch.setattr(console, "console", rich.console.Console(file=file, width=100, force_terminal=True))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with console.progress("[red]a[/red]\u202e", 3) as advance:
        advance(3, "[x]\u202e")
    assert "[red]a[/red]<U+202E>" in file.getvalue() and "3/3" in file.getvalue() and "[x]<U+202E>" in file.getvalue()
