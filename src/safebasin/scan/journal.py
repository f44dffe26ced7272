"""The journal of a scan: what each batch got, so that a scan goes on after a kill, with any number of processes."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from pydantic import FiniteFloat, NonNegativeInt, TypeAdapter, ValidationError

from safebasin.data.files import atomic_write
from safebasin.encode import TokenizedRow

Value = FiniteFloat | list[FiniteFloat]  # of a row by one scorer: its score, or one number an answer token


class BatchScores(NamedTuple):
    """What the scorers gave to one batch: a line of the journal."""

    rows: list[NonNegativeInt]  # indices
    scores: dict[str, list[Value]]  # scorer -> one value a row

    def fits(self, rows: Sequence[TokenizedRow], scorers: Mapping[str, Any]) -> bool:
        """Whether each of these scorers gave one number to each row, or one to each of its answer tokens."""
        if max(self.rows, default=0) >= len(rows) or self.scores.keys() != scorers.keys():
            return False
        lengths = [int(rows[i].answer[1:].sum()) for i in self.rows]
        return all(
            len(column) == len(lengths)
            and all(isinstance(value, float) or len(value) == n for value, n in zip(column, lengths, strict=True))
            for column in self.scores.values()
        )


BATCH_SCORES = TypeAdapter(BatchScores)


class ScanJournal:
    """What a scan has done so far, a line a batch and a file a process.

    After a kill the scan goes on from there, with any number of processes. ``key`` names rows, scorers and model: a
    journal of another key counts for nothing, and neither does a damaged line.
    """

    def __init__(self, path: Path, key: str, ranks: PartialState | None = None):
        self.ranks, self.key, rank = ranks, key, ranks.process_index if ranks else 0
        self.path = path.with_stem(f"{path.stem}-{rank}") if rank else path
        self._folder, self._names = path.parent, f"{path.stem}*{path.suffix}"

    def read(self) -> Iterator[BatchScores]:
        """The batches in the files of all processes. The own file is written again without what does not count."""
        with atomic_write(self.path) as part:  # a kill in between must not lose what was done
            part.write_bytes(b"".join(line + b"\n" for line in (self.key.encode(), *self._batches(self.path))))
        for path in sorted(self._folder.glob(self._names)):
            yield from self._batches(path).values()

    def _batches(self, path: Path) -> dict[bytes, BatchScores]:
        """The undamaged lines of a file of this key."""
        key, *lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        batches: dict[bytes, BatchScores] = {}
        for line in lines[:-1] if key == self.key.encode() else ():  # the last one was cut by a kill, or is empty
            with contextlib.suppress(ValidationError):
                batches[line] = BATCH_SCORES.validate_json(line, strict=True)
        return batches

    def write(self, batch: BatchScores) -> None:
        """Add what one batch got to the file of this process."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(batch._asdict()) + "\n")

    def clear(self) -> None:
        """Remove the files of all processes."""
        for path in self._folder.glob(f"{self._names}*"):  # with what a kill left of an unfinished write
            path.unlink()
