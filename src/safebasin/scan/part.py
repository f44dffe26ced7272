"""Parts of a scan: the scores of a shard in a file, and scores.parquet joined from all of them, a row group each.

What else a shard says stands in its part's metadata: the rows that could not be used, its highest rows piece by piece,
and in that of the first shard the scores of the anchor rows.
"""

import collections
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet
from pydantic import TypeAdapter

from safebasin.data.example import Example, content_id, numbered_copies
from safebasin.data.files import atomic_write, cause, shown
from safebasin.data.json_rows import BadRow
from safebasin.errors import UserError
from safebasin.scan.heat import SHOWN, HeatRow
from safebasin.scan.scan import Scanned, score_table
from safebasin.scan.scores import AnchorScores


class Notes(NamedTuple):
    """What a part, or all of them, say beside the scores."""

    problems: list[BadRow]
    heat: list[HeatRow]  # the highest rows of every scorer of tokens
    anchors: AnchorScores


NOTES = TypeAdapter(Notes)


def write_part(path: Path, examples: Sequence[Example], scanned: Scanned, notes: Notes) -> None:
    """UserError: it cannot be written."""
    table = score_table(examples, scanned).replace_schema_metadata({"notes": NOTES.dump_json(notes)})
    with atomic_write(path) as part:
        pyarrow.parquet.write_table(table, part)


def join_parts(paths: Iterable[Path], target: Path) -> Notes:
    """Write ``target`` from parts in their order, one of them in memory at a time. Copies of a row, which a shard
    numbers by itself, are numbered over all of them.

    Raises:
        UserError: a part is damaged; it is removed, so that the next start makes it again. Or no row has a score.
    """
    every, highest, seen = Notes([], [], {}), dict[str, list[HeatRow]](), collections.Counter[str]()
    writer: Any = None
    with atomic_write(target) as joined:
        try:
            for path in paths:
                table, notes = _read(path)
                ids = table["row_id"].to_pylist()
                numbered = dict(zip(ids, numbered_copies(map(content_id, ids), seen), strict=True))
                every.problems.extend(notes.problems)
                every.anchors.update(notes.anchors)
                for row in notes.heat:
                    highest.setdefault(row.scorer, []).append(row._replace(row_id=numbered[row.row_id]))
                for rows in highest.values():
                    rows.sort(key=lambda row: -row.score)
                    del rows[SHOWN:]
                if len(table):  # of a shard without usable rows nobody knows the columns
                    column = pyarrow.array([numbered[row] for row in ids], pyarrow.string())
                    table = table.set_column(0, "row_id", column).replace_schema_metadata(None)
                    writer = writer or pyarrow.parquet.ParquetWriter(joined, table.schema)
                    writer.write_table(table)
        finally:
            if writer:
                writer.close()
        if not writer:
            first = every.problems[0]
            raise UserError(f"no row can be used (line {first.line}: {first.reason})")
    return every._replace(heat=[row for rows in highest.values() for row in rows])


def _read(path: Path) -> tuple[Any, Notes]:
    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        return table, NOTES.validate_json((table.schema.metadata or {})[b"notes"])
    except (pyarrow.ArrowException, OSError, LookupError, ValueError) as error:  # ValueError: no text, or no notes
        path.unlink(missing_ok=True)
        raise UserError(f"{shown(path)} was damaged ({cause(error)}) and is removed; start again to go on") from error
