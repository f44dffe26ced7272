"""Parquet files: every type of Arrow, what Python cannot hold, and columns whose values changed."""

import datetime
import decimal
import math

import pyarrow
import pyarrow.parquet
import pytest

from safebasin.data.example import read_examples
from safebasin.data.json_rows import BadRow
from safebasin.data.keys import RowForm
from safebasin.data.tables import copy_rows, read_table, write_table
from safebasin.errors import UserError

GOOD = {"prompt": "q", "completion": "a"}


def test_a_parquet_file_whose_names_are_no_text_is_refused(tmp_path):
    """In the footer, where pyarrow reads the names of columns; the schema of Arrow beside it is whole."""
    write_table(tmp_path / "x.parquet", [GOOD])
    content = (tmp_path / "x.parquet").read_bytes()
    place = content.index(b"\x06prompt%")
    (tmp_path / "x.parquet").write_bytes(content[:place] + b"\x06pro\x80pt" + content[place + 7 :])
    with pytest.raises(UserError, match=r"cannot read .*x.parquet"):
        read_table(tmp_path / "x.parquet")


def test_parquet_fills_no_keys_in(tmp_path):
    """Arrow gives every object all keys of its column; a map is an object."""
    calls = [[{"city": "Oslo"}], [{"day": 1}]]
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    table = {"calls": calls, "map": pyarrow.array([[("k", "v")], [("k", "v"), ("k", "w")]], kind), "none": [None, None]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    first, second = read_table(tmp_path / "x.parquet")
    assert first == (1, {"calls": [{"city": "Oslo"}], "map": {"k": "v"}, "none": None})
    assert second[1].reason.startswith("a value cannot be read")


TYPES = {  # Arrow type -> values; the second row holds nothing
    "ns": (pyarrow.timestamp("ns"), 1_000_000_000_000_000_007),
    "ns_zone": (pyarrow.timestamp("ns", tz="UTC"), 1),
    "s": (pyarrow.timestamp("ms", tz="Europe/Oslo"), 1_700_000_000_123),
    "duration": (pyarrow.duration("ns"), 3),
    "time": (pyarrow.time64("us"), datetime.time(1, 2, 3, 4)),
    "time_ns": (pyarrow.time64("ns"), 86_399_000_000_007),
    "date": (pyarrow.date32(), datetime.date(2020, 2, 29)),
    "decimal": (pyarrow.decimal128(20, 3), decimal.Decimal("1.100")),
    "binary": (pyarrow.binary(), b"\xff\x00"),
    "null": (pyarrow.null(), None),
    "half": (pyarrow.float16(), 1.5),
    "float32": (pyarrow.float32(), 0.1),
    "nan": (pyarrow.float64(), math.nan),
    "int8": (pyarrow.int8(), -7),
    "uint64": (pyarrow.uint64(), 2**64 - 1),
    "dictionary": (pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), "x"),
    "map": (pyarrow.map_(pyarrow.string(), pyarrow.int32()), [("k", 1)]),
    "large": (pyarrow.large_list(pyarrow.large_string()), ["x"]),
    "fixed": (pyarrow.list_(pyarrow.int8(), 2), [1, 2]),
    "struct": (pyarrow.struct([("a", pyarrow.int16()), ("b", pyarrow.string())]), {"a": 1, "b": "x"}),
}


def test_parquet_of_every_type_is_read_and_written_back(tmp_path):
    """The rows that are left keep their types, their values and so their ids."""
    columns = {"prompt": ["q", "r"], "completion": ["a", "b"]}
    columns |= {name: pyarrow.array([value, None], kind) for name, (kind, value) in TYPES.items()}
    table = pyarrow.table(columns).replace_schema_metadata({"origin": "here"})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    form = RowForm(ignore=("dictionary", "map", "large", "struct"))  # texts that nothing is known of
    rows = read_examples(tmp_path / "in.parquet", form).examples
    assert [e.prompt for e in rows] == ["q", "r"] and rows[0].row["time_ns"] == 86_399_000_000_007
    for left in (rows, rows[:1], rows[1:]):
        copy_rows(tmp_path / "out.parquet", tmp_path / "in.parquet", [e.line for e in left])
        copied = pyarrow.parquet.read_table(tmp_path / "out.parquet")
        source = pyarrow.parquet.read_table(tmp_path / "in.parquet").take([e.line - 1 for e in left])
        assert copied.drop(["nan"]).equals(source.drop(["nan"]))
        schema = pyarrow.parquet.read_schema(tmp_path / "out.parquet")
        assert schema.remove_metadata() == pyarrow.parquet.read_schema(tmp_path / "in.parquet").remove_metadata()
        assert schema.metadata[b"origin"] == b"here"
        assert [e.id for e in read_examples(tmp_path / "out.parquet", form).examples] == [e.id for e in left]
    write_table(tmp_path / "none.parquet", [], like=tmp_path / "in.parquet")
    assert pyarrow.parquet.read_schema(tmp_path / "none.parquet").names == table.schema.names


def test_parquet_values_that_python_cannot_hold_are_bad_rows(tmp_path):
    text = pyarrow.array([b"ok", b"\xff\xfe", b"fine"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text, "completion": ["a"] * 3}), tmp_path / "text.parquet")
    rows = read_examples(tmp_path / "text.parquet")
    assert [e.line for e in rows.examples] == [1, 3]
    assert rows.bad[0].line == 2 and "a value cannot be read" in rows.bad[0].reason
    dates = pyarrow.array([1, 10**15], pyarrow.timestamp("ms"))  # the second is in the year 33658
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["q", "r"], "t": dates}), tmp_path / "dates.parquet")
    assert [type(row) for _, row in read_table(tmp_path / "dates.parquet")] == [dict, BadRow]
    pyarrow.parquet.write_table(pyarrow.table([[1], [2]], names=["a", "a"]), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice.parquet has two columns of one name"):
        read_table(tmp_path / "twice.parquet")


def test_folders_named_as_partitions_add_no_column(tmp_path):
    (tmp_path / "split=train").mkdir()
    write_table(tmp_path / "split=train" / "x.parquet", [GOOD])
    assert read_table(tmp_path / "split=train" / "x.parquet") == [(1, GOOD)]


def test_parquet_columns_whose_values_changed_get_a_type_of_their_own(tmp_path):
    write_table(tmp_path / "in.parquet", [{"label": 1}, {"label": 0}])
    write_table(tmp_path / "out.parquet", [{"label": "World", "new": 1.5}, {"new": None}], like=tmp_path / "in.parquet")
    assert [row for _, row in read_table(tmp_path / "out.parquet")] == [
        {"label": "World", "new": 1.5},
        {"label": None, "new": None},
    ]
    with pytest.raises(UserError, match="column 'x'"):
        write_table(tmp_path / "mixed.parquet", [{"x": 1}, {"x": "text"}])
    assert not list(tmp_path.glob("mixed*"))


def test_a_cut_copies_columns_that_arrow_cannot_take(tmp_path):
    """String views, which Polars writes; runs of rows, in the order that is asked for."""
    table = pyarrow.table({"prompt": pyarrow.array(["q", "r", "s", "t"], pyarrow.string_view())})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    for lines in ([1, 3, 4], [4, 2], []):
        copy_rows(tmp_path / "part.parquet", tmp_path / "rows.parquet", lines)
        part = pyarrow.parquet.read_table(tmp_path / "part.parquet")
        assert part.schema == table.schema
        assert part["prompt"].to_pylist() == ["qrst"[line - 1] for line in lines]
