"""The engine without an engine: items one after another in this process."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from safebasin.spread import Facts, Worker


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Here:
    """A loop. The worker is built for the first item, so that nothing is loaded where nothing is to do."""

    def work(
        self, items: Sequence[Any], make: Callable[[], Worker[Any]], parts: Callable[[str], Path]
    ) -> Iterator[Facts]:
        worker: Worker[Any] | None = None
        for item in items:
            worker = worker or make()
            yield worker(item, parts(item.name))
