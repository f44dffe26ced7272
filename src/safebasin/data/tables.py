"""Tables in files: JSONL, JSON, CSV and Parquet, read with line numbers and written whole or not at all."""

import csv
import gzip
import hashlib
import io
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safebasin.errors import UserError


class BadRow(NamedTuple):
    line: int
    reason: str


KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")  # and .gz of all but the last


def read_table(path: str | Path) -> list[tuple[int, Any]]:
    """Rows of a file with their line numbers; a line that does not parse comes as a ``BadRow``.

    Raises:
        UserError: the file is missing or its kind is unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    kind = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if kind == ".parquet":
        import pyarrow.parquet

        return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    if kind == ".csv":
        csv.field_size_limit(1 << 30)
        reader = csv.DictReader(io.StringIO(text, newline=""))
        return [
            (reader.line_num, BadRow(reader.line_num, "more fields than the header has") if None in row else row)
            for row in reader
        ]
    if kind == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
        if not isinstance(rows, list):
            raise UserError(
                f"{path} holds a JSON {type(rows).__name__}; a list of rows is needed (or JSON lines in a .jsonl)"
            )
        return list(enumerate(rows, 1))
    if kind in (".jsonl", ".ndjson"):
        return [(n, _json_line(n, line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    raise UserError(f"{path}: unknown kind {kind!r}; use .jsonl, .json, .csv or .parquet")


def _json_line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow(number, f"not JSON: {error.msg} at column {error.colno}")


def write_table(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows in the format that the name asks for; a reader never sees half a file."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    kind = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), part)
    else:
        out = io.StringIO(newline="")
        if kind == ".csv":
            names = list(dict.fromkeys(name for row in rows for name in row))
            writer = csv.DictWriter(out, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        elif kind == ".json":
            json.dump(list(rows), out, ensure_ascii=False, indent=1, default=str)
        else:
            out.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        raw = out.getvalue().encode("utf-8", "surrogatepass")
        part.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
    part.replace(path)


def draw(rows: Sequence[Any], take: int | None, seed: int) -> list[Any]:
    """``take`` rows drawn without replacement, put back in their order; all rows if ``take`` is None."""
    if take is None or take >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), take))]


def write_json(path: Path, value: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    part.replace(path)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
