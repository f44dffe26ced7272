"""Tables in files: JSONL, JSON, CSV and Parquet, read with line numbers and written again.

A file that cannot be read is a ``UserError`` with its path. What is wrong inside one row is a ``BadRow``, which can be
left out.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safebasin.console import printable
from safebasin.data.files import atomic_write, cause, read_bytes, read_text, regular_file, shown
from safebasin.data.json_rows import JSON, BadRow, checked, json_line, read_json
from safebasin.data.parquet import arrow_table, parquet_rows, write_parquet
from safebasin.errors import UserError

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")  # and PACKED of all but the last
PACKED = (".gz", ".zst")
MISSING = ("nan", "NaN")  # in a field of a CSV file: pandas writes so where nothing stood


def endings(path: str | Path) -> str:
    """What the name of a table ends in, in small letters: ``.jsonl``, ``.csv.gz``.

    >>> endings("my.rows.JSONL.gz")
    '.jsonl.gz'
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return "".join(suffixes[-2:] if suffixes and suffixes[-1] in PACKED else suffixes[-1:])


def kind_of(path: str | Path) -> str:
    """The kind of a table by its name, packed or not: one of ``KINDS``, or something else."""
    ending = endings(path)
    return next((ending.removesuffix(packed) for packed in PACKED if ending.endswith(packed)), ending)


def row_file(path: str | Path) -> Path:
    """The path, where it is a file of a kind that can hold rows; nothing of it is read.

    Raises:
        UserError: it is not.
    """
    path = regular_file(path)
    if (kind := kind_of(path)) not in KINDS:
        raise UserError(f"{shown(path)}: unknown kind {kind!r}; use .jsonl, .json, .csv or .parquet")
    return path


def read_table(path: str | Path, delimiter: str = "") -> list[tuple[int, Any]]:
    """Rows of a file with their line numbers (.json, .parquet: row numbers); a row that cannot be read is a ``BadRow``.

    ``delimiter`` of a CSV file: a comma, in a .tsv file a tab, unless another is given.

    Raises:
        UserError: the file cannot be read, or its kind is unknown.
    """
    path = row_file(path)
    if delimiter and kind_of(path) not in (".csv", ".tsv"):
        raise UserError(f"delimiter: {shown(path)} is no CSV file; leave it out")
    if kind_of(path) == ".parquet":
        return parquet_rows(path)
    if kind_of(path) == ".json":
        return [(n, checked(n, row, finite=True)) for n, row in enumerate(_json_list(path), 1)]
    return [(n, row) for n, _, row in _records(path, delimiter)[1]]


def _json_list(path: Path) -> list[Any]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(
            f"{shown(path)} holds a JSON {type(rows).__name__}; a list of rows is needed (or JSON lines in a .jsonl)"
        )
    return rows


def _records(path: Path, delimiter: str) -> tuple[str, list[tuple[int, str, Any]]]:
    """The head of a text file, and its records: line number, text as it stands in the file, row."""
    text = read_text(path)
    if kind_of(path) not in (".csv", ".tsv"):
        if text.lstrip().startswith("[") and _is_list(text):
            raise UserError(f"{shown(path)} holds one JSON list and no JSON lines; name it .json")
        return "", [(n, line, json_line(n, line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return _csv_records(path, text, delimiter or ("\t" if kind_of(path) == ".tsv" else ","))


def _is_list(text: str) -> bool:
    """Whether a text is a JSON list of rows; a line of it alone may be one."""
    with contextlib.suppress(json.JSONDecodeError, RecursionError):
        return any(isinstance(row, Mapping) for row in JSON.decode(text))
    return False


def _csv_records(path: Path, text: str, delimiter: str) -> tuple[str, list[tuple[int, str, Any]]]:
    csv.field_size_limit(1 << 30)
    lines: list[str] = []  # what the reader has taken of the file

    def taken(start: int) -> str:
        return "".join(lines[start:])

    def tee() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            lines.append(line)
            yield line

    reader = csv.reader(tee(), delimiter=delimiter, strict=True)
    records: list[tuple[int, str, Any]] = []
    try:
        header = next((row for row in reader if row), [])
        head, names = taken(0), [name for name in header if name]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{shown(path)}: the header names the column {printable(twice, 60)!r} twice")
    except csv.Error as error:
        raise UserError(f"{shown(path)}, line {len(lines)}: not CSV: {cause(error)}") from error
    while True:
        start = len(lines)
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:  # a quote inside a field that is not doubled, or one that is never closed
            if len(lines) > start + 1:
                where = f"{shown(path)}, line {start + 1}"
                raise UserError(f"{where}: not CSV: {cause(error)}; quotes inside a field are doubled") from error
            records.append((len(lines), taken(start), BadRow(len(lines), f"not CSV: {cause(error)}")))
            continue
        row: Any = {name: None if text in MISSING else text for name, text in zip(header, fields, strict=False)}
        if len(fields) != len(header):
            reason = f"{'more' if len(fields) > len(header) else 'fewer'} fields than the header has"
            row = BadRow(len(lines), reason)
        if fields:
            records.append((len(lines), taken(start), row))
    return head, records


def write_table(path: str | Path, rows: Sequence[Mapping[str, Any]], like: str | Path | None = None) -> None:
    """Write rows in the format that the name asks for. ``like``: a table whose column types a Parquet file keeps.

    Raises:
        UserError: the file cannot be written, or a column holds values of several types, which Parquet cannot.
    """
    path = Path(path)
    kind = kind_of(path)
    with atomic_write(path) as part:
        if kind == ".parquet":
            write_parquet(part, path, rows, like)
            return
        out = io.StringIO(newline="")
        if kind in (".csv", ".tsv"):
            names = list(dict.fromkeys(name for row in rows for name in row))
            writer = csv.DictWriter(out, names, lineterminator="\n", delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
        elif kind == ".json":
            json.dump(list(rows), out, ensure_ascii=False, indent=1, default=str)
        else:
            out.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        # a lone surrogate becomes the escape that JSON has for it
        part.write_bytes(_packed(path, out.getvalue().encode("utf-8", "backslashreplace")))


def _packed(path: Path, raw: bytes) -> bytes:
    """Bytes as the name of a file asks for."""
    if path.suffix.lower() == ".zst":
        import pyarrow

        return pyarrow.compress(raw, codec="zstd", asbytes=True)
    return gzip.compress(raw, mtime=0) if path.suffix.lower() == ".gz" else raw


def copy_rows(path: str | Path, source: str | Path, lines: Sequence[int], delimiter: str = "") -> None:
    """Write some rows of a table as they stand in it, to a file of its kind.

    JSON lines and CSV records go out as the bytes that came in, Parquet rows with the types and the metadata of their
    columns.

    Args:
        path: the new file.
        source: the table; both names end alike.
        lines: of the rows, as ``read_table`` numbers them.
        delimiter: of a CSV file, as for ``read_table``.

    Raises:
        UserError: a file cannot be read or written, or has no row at one of these lines.
    """
    path, source = Path(path), row_file(source)
    kind = kind_of(source)
    if kind == ".parquet":
        table = arrow_table(source)
        records: Mapping[int, str | None] = dict.fromkeys(range(1, len(table) + 1))
    elif kind == ".json":
        records = values = dict(enumerate(_json_list(source), 1))
    else:
        head, parsed = _records(source, delimiter)
        records = {
            n: text if text.endswith("\n") or (kind in (".csv", ".tsv") and text.endswith("\r")) else f"{text}\n"
            for n, text, _ in parsed
        }
    if missing := [line for line in lines if line not in records]:
        raise UserError(f"{shown(source)} has no row at line {missing[0]}: it is not the file that was read")
    with atomic_write(path) as part:
        if kind == ".parquet":
            import pyarrow.parquet

            # slices, as a table with a column of string views (Polars) has no `take`
            runs = (list(run) for _, run in itertools.groupby(enumerate(lines), lambda pair: pair[1] - pair[0]))
            parts = [table.slice(0, 0), *(table.slice(run[0][1] - 1, len(run)) for run in runs)]
            pyarrow.parquet.write_table(pyarrow.concat_tables(parts), part)
        elif kind == ".json":
            text = json.dumps([values[line] for line in lines], ensure_ascii=False, indent=1)
            part.write_bytes(_packed(path, text.encode("utf-8", "backslashreplace")))
        else:
            mark = "\ufeff" if read_bytes(source).startswith(b"\xef\xbb\xbf") else ""
            part.write_bytes(_packed(path, (mark + head + "".join(records[line] or "" for line in lines)).encode()))


def draw(rows: Sequence[Any], take: int | None, seed: int) -> list[Any]:
    """``take`` rows drawn without replacement, put back in their order; all rows if ``take`` is None."""
    if take is None or take >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), take))]
