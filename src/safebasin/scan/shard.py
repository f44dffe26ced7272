"""Shards: a file of rows in pieces that are scored one by one, by whichever process is free.

JSON lines are cut by one pass over their bytes, and a process reads the bytes of its shard alone. Other files are read
as a complete table by every process, and their rows shared. Batches do not cross shards, so that scores are the same
for one process and for a thousand.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safebasin.data.files import regular_file, shown
from safebasin.data.json_rows import json_line
from safebasin.data.tables import endings, read_table
from safebasin.errors import UserError

LARGEST = 16 << 20  # bytes of a shard of more than one row
JSON_LINES = (".jsonl", ".ndjson")  # endings of files that are cut by their lines


class Shard(NamedTuple):
    """Rows that stand together in a file."""

    name: str  # of its part
    path: str
    start: int  # the number of its first line; of a table without ``span``, of the rows before it
    rows: int
    span: tuple[int, int] | None  # the first byte and the number of bytes


def cut_shards(path: Path, rows: int, delimiter: str = "") -> list[Shard]:
    """All shards of a file, each of at most ``rows`` rows.

    Raises:
        UserError: the file cannot be read.
    """
    file, shards = str(path.absolute()), list[Shard]()
    if endings(path) in JSON_LINES:
        for k, (line, count, first, size) in enumerate(_spans(regular_file(path), rows)):
            shards.append(Shard(f"{k:06d}", file, line, count, (first, size)))
    else:
        total = len(_table(file, delimiter))
        for k, first in enumerate(range(0, total, rows)):
            shards.append(Shard(f"{k:06d}", file, first, min(rows, total - first), None))
    return shards


def _spans(path: Path, rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Of every shard of JSON lines: the number of its first line, its rows, its first byte, its bytes."""
    line, count, first, size = 1, 0, 0, 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            full = bool(raw.strip())
            if full and count and (count == rows or size + len(raw) > LARGEST):
                yield line, count, first, size
                line, count, first, size = number, 0, first + size, 0
            count, size = count + full, size + len(raw)
    if count:
        yield line, count, first, size


def read_shard(shard: Shard, delimiter: str = "") -> list[tuple[int, Any]]:
    """The rows of a shard with their line numbers in the file, as ``read_table`` gives them.

    Raises:
        UserError: the file cannot be read, or has changed.
    """
    if shard.span is None:
        return _table(shard.path, delimiter)[shard.start :][: shard.rows]
    first, size = shard.span
    with regular_file(shard.path).open("rb") as file:
        file.seek(first)
        raw = file.read(size)
    try:
        text = raw.decode("utf-8-sig" if first == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{shown(shard.path)} is not UTF-8 text (byte {first + error.start}); convert it first"
        ) from None
    lines = enumerate(text.removesuffix("\n").split("\n"), shard.start)
    rows = [(n, json_line(n, line)) for n, line in lines if line.strip()]
    if len(raw) < size:
        raise UserError(f"{shown(shard.path)} has changed while it was read; start again")
    return rows


@functools.lru_cache(maxsize=1)
def _table(path: str, delimiter: str) -> list[tuple[int, Any]]:
    return read_table(path, delimiter)
