"""Progress of a long step: a bar on a terminal, a plain line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


@contextlib.contextmanager
def steps(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """``with steps("train", 60) as advance: advance(done, "loss 1.2")``."""
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
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
