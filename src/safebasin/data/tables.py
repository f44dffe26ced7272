"""Tables in files: JSONL, JSON, CSV and Parquet, read with line numbers and written again.

A file that cannot be read is a ``UserError`` with its path. What is wrong inside one row is a ``BadRow``, which can be
left out.
"""

import contextlib
import csv
import gzip
import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safebasin.console import printable
from safebasin.data.files import atomic_write, cause, read_bytes, read_text, regular_file, shown
from safebasin.data.json_rows import JSON, BadRow, checked, json_line, read_json
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
    if kind_of(path) == ".parquet":
        return _parquet_rows(path)
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


def _parquet(path: Path) -> Any:
    """The Arrow table of a file."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {shown(path)}: {cause(error)}") from error
    if len(set(table.column_names)) < len(table.column_names):
        raise UserError(f"{shown(path)} has two columns of one name")
    return table


def _parquet_rows(path: Path) -> list[tuple[int, Any]]:
    import pyarrow

    table = _parquet(path)
    for i, field in enumerate(table.schema):
        if field.type == pyarrow.time64("ns"):  # Python's times end at microseconds: nanoseconds as a number
            try:
                table[i].cast(pyarrow.time64("us"))
            except pyarrow.ArrowInvalid:
                table = table.set_column(i, field.name, table[i].cast(pyarrow.int64()))
    unreadable = (
        pyarrow.ArrowException,
        ValueError,
        OverflowError,
        KeyError,  # a map has a key twice
    )  # text that is not UTF-8, a date after the year 9999
    try:
        return [(n, checked(n, without_nothing(row))) for n, row in enumerate(_pylist(table), 1)]
    except unreadable:
        rows: list[tuple[int, Any]] = []
        for n in range(1, len(table) + 1):
            try:
                rows.append((n, checked(n, without_nothing(_pylist(table.slice(n - 1, 1))[0]))))
            except unreadable as error:
                rows.append((n, BadRow(n, f"a value cannot be read: {cause(error)}")))
        return rows


def _pylist(table: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.to_pylist(maps_as_pydicts="strict")
    return rows


def without_nothing(row: Any) -> Any:
    """The row without the keys of inner objects that hold nothing.

    Arrow gives every object of a column all the keys that one of them has: a tool call would get arguments that it does
    not have, and a template would write them.

    >>> without_nothing({"calls": [{"city": "Oslo", "day": None}], "note": None})
    {'calls': [{'city': 'Oslo'}], 'note': None}
    """
    return {name: _without_nothing(value) if isinstance(value, list | dict) else value for name, value in row.items()}


def _without_nothing(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nothing(inner) for name, inner in value.items() if inner is not None}
    return [_without_nothing(inner) for inner in value] if isinstance(value, list) else value


def write_table(path: str | Path, rows: Sequence[Mapping[str, Any]], like: str | Path | None = None) -> None:
    """Write rows in the format that the name asks for. ``like``: a table whose column types a Parquet file keeps.

    Raises:
        UserError: the file cannot be written, or a column holds values of several types, which Parquet cannot.
    """
    path = Path(path)
    kind = kind_of(path)
    with atomic_write(path) as part:
        if kind == ".parquet":
            _write_parquet(part, path, rows, like)
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
        raw = out.getvalue().encode(
            "utf-8", "backslashreplace"
        )  # a lone surrogate becomes the escape that JSON has for it
        part.write_bytes(_packed(path, raw))


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
    records: Mapping[int, str | None] = {}
    if kind == ".parquet":
        table = _parquet(source)
        records = dict.fromkeys(range(1, len(table) + 1))
    elif kind == ".json":
        values = dict(enumerate(_json_list(source), 1))
        records = dict.fromkeys(values)
    else:
        head, parsed = _records(source, delimiter)
        records = {
            n: text if text.endswith("\n") or (kind == ".csv" and text.endswith("\r")) else f"{text}\n"
            for n, text, _ in parsed
        }
    if missing := [line for line in lines if line not in records]:
        raise UserError(f"{shown(source)} has no row at line {missing[0]}: it is not the file that was read")
    with atomic_write(path) as part:
        if kind == ".parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(table.take([line - 1 for line in lines]), part)
        elif kind == ".json":
            write = [values[line] for line in lines]
            part.write_bytes(
                _packed(path, json.dumps(write, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace"))
            )
        else:
            mark = "\ufeff" if read_bytes(source).startswith(b"\xef\xbb\xbf") else ""
            part.write_bytes(_packed(path, (mark + head + "".join(records[line] or "" for line in lines)).encode()))


def _write_parquet(part: Path, path: Path, rows: Sequence[Mapping[str, Any]], like: str | Path | None) -> None:
    import pyarrow.parquet

    schema = pyarrow.schema([])
    if like is not None and Path(like).suffix == ".parquet" and Path(like).is_file():
        schema = pyarrow.parquet.read_schema(like)
    columns = {}
    for name in dict.fromkeys([*schema.names, *(name for row in rows for name in row)]):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values, schema.field(name).type if name in schema.names else None)
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError):
            try:
                columns[name] = pyarrow.array(values)  # the column's numbers were replaced by their names
            except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
                raise UserError(
                    f"cannot write {shown(path)}: column {printable(name, 60)!r}: {cause(error)}"
                ) from error
    pyarrow.parquet.write_table(pyarrow.table(columns).replace_schema_metadata(schema.metadata), part)


def draw(rows: Sequence[Any], take: int | None, seed: int) -> list[Any]:
    """``take`` rows drawn without replacement, put back in their order; all rows if ``take`` is None."""
    if take is None or take >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), take))]
