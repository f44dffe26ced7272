"""Parquet files: rows with their numbers, and rows written in the types of their columns."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safebasin.console import printable
from safebasin.data.files import cause, shown
from safebasin.data.json_rows import BadRow, checked
from safebasin.errors import UserError


def arrow_table(path: Path) -> Any:
    """The Arrow table of a file.

    Raises:
        UserError: it cannot be read, or has two columns of one name.
    """
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {shown(path)}: {cause(error)}") from error
    if len(set(table.column_names)) < len(table.column_names):
        raise UserError(f"{shown(path)} has two columns of one name")
    return table


def parquet_rows(path: Path) -> list[tuple[int, Any]]:
    """The rows of a file with their numbers; a row that Python cannot hold is a ``BadRow``."""
    import pyarrow

    table = arrow_table(path)
    for i, field in enumerate(table.schema):
        if field.type == pyarrow.time64("ns"):  # Python's times end at microseconds: nanoseconds as a number
            try:
                table[i].cast(pyarrow.time64("us"))
            except pyarrow.ArrowInvalid:
                table = table.set_column(i, field.name, table[i].cast(pyarrow.int64()))
    # text that is not UTF-8, a date after the year 9999, a map that has a key twice
    unreadable = (pyarrow.ArrowException, ValueError, OverflowError, KeyError)
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
    return list(table.to_pylist(maps_as_pydicts="strict"))


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


def write_parquet(part: Path, path: Path, rows: Sequence[Mapping[str, Any]], like: str | Path | None) -> None:
    """Write rows to ``part``, which becomes ``path``. ``like``: a table whose column types are kept.

    Raises:
        UserError: a column holds values of several types.
    """
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
