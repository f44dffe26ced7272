"""Progress of a long step: a bar on a terminal, a plain line now and then elsewhere."""

import contextlib
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


@contextlib.contextmanager
def steps(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """``with steps("train", 60) as advance: advance(done, "loss 1.2")``."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda done, note: bar.update(task, completed=done, note=note)
        return
    start, last, ended = time.monotonic(), time.monotonic(), False

    def line(done: int, note: str) -> None:
        nonlocal last, ended
        if time.monotonic() - last > 15 or (done == total and not ended):
            last, ended = time.monotonic(), done == total
            took = last - start
            left = f", {took / done * (total - done):.0f} s left" if 0 < done < total else ""
            console.print(f"  {title}: {done} of {total}, {took:.0f} s{left} {note}".rstrip())

    yield line


# Characters that are seen as nothing or as something else: controls, bidi and zero-width formats, tags, lone surrogates, private
# use, separators of lines; letters that are drawn empty; variation selectors, but for U+FE0F, which stands in plain emoji.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_EMPTY = {
    *"\u115f\u1160\u3164\uffa0\u2800\u034f\u17b4\u17b5",
    *map(chr, range(0xFE00, 0xFE0F)),
    *map(chr, range(0xE0100, 0xE01F0)),
}
_SPACES = {"\n": " ⏎ ", "\r": " ", "\t": " "}


def printable(text: str, limit: int = 300) -> str:
    """Hostile text as one line that shows what it holds: hidden characters as ``<U+202E>``, the rest cut at ``limit`` characters.

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
