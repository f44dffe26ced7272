"""Progress of a long step, and printing of hostile text: no markup in it is interpreted, hidden characters show."""

import contextlib
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.text import Text

from safebasin import events

console = Console(stderr=True, highlight=False)


def line(text: str) -> None:
    """Print ``text``, which may be hostile, as one line on standard error."""
    console.print(Text(printable(text)), soft_wrap=True)


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A bar on a terminal; elsewhere a line every 15 seconds and one at the end.

    ``with progress("train", 60) as advance: advance(done, "loss 1.2")``
    """
    title = printable(title, 60)
    start = last = sent = time.monotonic()
    ended = False

    def emit(done: int) -> None:
        nonlocal sent
        if time.monotonic() - sent > events.SECONDS or done == total:
            sent = time.monotonic()
            events.emit("progress", title=title, done=done, total=total)

    if sys.stderr.isatty():
        from rich import progress as rich

        name, note = (rich.TextColumn(f"{{task.{part}}}", markup=False) for part in ("description", "fields[note]"))
        times = rich.TimeElapsedColumn(), rich.TimeRemainingColumn()
        with rich.Progress(name, rich.BarColumn(), rich.MofNCompleteColumn(), *times, note, console=console) as bar:
            task = bar.add_task(title, total=total, note="")

            def update(done: int, note: str) -> None:
                emit(done)
                bar.update(task, completed=done, note=printable(note, 60))

            yield update
        return

    def advance(done: int, note: str) -> None:
        nonlocal last, ended
        emit(done)
        if time.monotonic() - last > 15 or (done == total and not ended):
            last, ended = time.monotonic(), done == total
            took = last - start
            left = f", {took / done * (total - done):.0f} s left" if 0 < done < total else ""
            line(f"  {title}: {done} of {total}, {took:.0f} s{left} {note}".rstrip())

    yield advance


# Characters that a reader does not see, or sees as something else: controls, bidi and zero-width formats, tags, lone
# surrogates, private use, line separators; letters drawn empty; variation selectors except U+FE0F, which emoji hold.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_EMPTY = {
    *"\u115f\u1160\u3164\uffa0\u2800\u034f\u17b4\u17b5",
    *map(chr, range(0xFE00, 0xFE0F)),
    *map(chr, range(0xE0100, 0xE01F0)),
}
_SPACES = {"\n": " ⏎ ", "\r": " ", "\t": " "}


def printable(text: str, limit: int = 300) -> str:
    """Hostile text as one line of about ``limit`` characters at most; hidden characters show as ``<U+202E>``.

    >>> printable("a\\u202eb")
    'a<U+202E>b'
    """
    shown = ""
    for seen, character in enumerate(text):
        if len(shown) >= limit:
            return f"{shown} … [+{len(text) - seen} characters]"
        hidden = character in _EMPTY or unicodedata.category(character) in _HIDDEN
        shown += _SPACES.get(character) or (f"<U+{ord(character):04X}>" if hidden else character)
    return shown
