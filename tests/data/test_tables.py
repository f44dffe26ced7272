"""Files in and out: a file that cannot be read is one line with its path, a row that cannot be used one bad row."""

import gzip
import json
import math
import os
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safebasin.data.example import read_examples, row_id
from safebasin.data.files import atomic_write, cause, shown, write_json
from safebasin.data.json_rows import BadRow, flaw, read_json
from safebasin.data.tables import copy_rows, endings, read_table, write_table
from safebasin.errors import UserError

GOOD = {"prompt": "q", "completion": "a"}


def save(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: str | Path) -> str:
    with pytest.raises(UserError) as refusal:
        read_table(path)
    message = str(refusal.value)
    assert "\n" not in message and len(message) < 700
    return message


def table_bytes() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["q"] * 50, "completion": ["a"] * 50}), sink)
    return sink.getvalue().to_pybytes()


PACKED, PARQUET = gzip.compress(b'{"prompt": "q"}\n' * 500), table_bytes()
BROKEN = {
    "cut.jsonl.gz": PACKED[:-9],
    "short.jsonl.gz": PACKED[:20],
    "tail.csv.gz": PACKED + b"more",
    "plain.jsonl.gz": b'{"prompt": "q"}\n',
    "header.json.gz": b"\x1f\x8b\x08" + bytes(30),
    "bits.jsonl.gz": PACKED[:15] + bytes([PACKED[15] ^ 255]) + PACKED[16:],
    "empty.parquet": b"",
    "text.parquet": b"prompt,completion\n",
    "cut.parquet": PARQUET[:-20],
    "middle.parquet": PARQUET[:40] + bytes(60) + PARQUET[100:],
    "magic.parquet": b"PAR1",
    "cut.json": '[{"prompt": "q"}',
    "object.json": "{}",
    "number.json": "3",
    "empty.json": "",
    "deep.json": "[" * 100_000,
    "latin.jsonl": b'{"prompt": "\xe9"}',
    "wide.csv": "prompt,completion\nq,a\n".encode("utf-16"),
    "twice.csv": "prompt,prompt\nq,a\n",
    "rows.xlsx": b"PK",
    "rows": b"x",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_with_its_path(name, tmp_path):
    assert name in refused(save(tmp_path / name, BROKEN[name]))


@given(st.binary(max_size=200), st.sampled_from(["jsonl", "json", "csv", "parquet", "jsonl.gz", "json.gz", "csv.gz"]))
def test_any_bytes_are_rows_or_a_refusal(tmp_path_factory, content, kind):
    path = save(
        tmp_path_factory.mktemp("bytes") / f"x.{kind}", gzip.compress(content) if kind[-2:] == "gz" else content
    )
    try:
        read_examples(path)
    except UserError as error:
        assert path.name in str(error) and "\n" not in str(error)


@given(st.data())
def test_a_damaged_container_is_rows_or_a_refusal(tmp_path_factory, data):
    name, content = data.draw(st.sampled_from([("x.jsonl.gz", PACKED), ("x.parquet", PARQUET)]))
    place = data.draw(st.integers(0, len(content) - 1))
    damaged = content[:place] + data.draw(st.binary(max_size=8)) + content[place + data.draw(st.integers(0, 8)) :]
    path = save(tmp_path_factory.mktemp("damaged") / name, damaged)
    try:
        read_examples(path)
    except UserError as error:
        assert name in str(error) and "\n" not in str(error)


def test_what_is_no_file_is_one_line(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "is a folder" in refused(tmp_path / "folder.jsonl")
    assert "no regular file" in refused(tmp_path / "pipe.jsonl")
    for name in ("none.jsonl", "folder.jsonl/none.jsonl"):
        assert refused(tmp_path / name).startswith("no such file")
    assert "no such file" in refused(save(tmp_path / "file", "") / "rows.jsonl")
    assert refused(tmp_path / ("x" * 300)).startswith("cannot read")
    assert "null byte" in refused("a\0b.jsonl")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = save(tmp_path / "rows.jsonl", "")

    def deny(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", deny)
    assert refused(path) == f"cannot read {path}: Permission denied"


DEEP = "[" * 150 + "]" * 150
BAD_LINES = {
    '{"prompt": "\\ud800", "completion": "a"}': "lone surrogate (U+D800)",
    '{"\\udfff": 1}': "lone surrogate (U+DFFF)",
    '{"messages": [{"role": "user", "content": "\\udc80"}]}': "lone surrogate (U+DC80)",
    '{"prompt": NaN}': "not finite",
    '{"prompt": {"x": [-Infinity]}}': "not finite",
    '{"prompt": 1e999}': "not finite",
    '{"prompt": ' + "9" * 5000 + "}": "more than 4300 digits",
    '{"prompt": ' + DEEP + "}": "100 levels deep",
    '{"prompt": ' + "[" * 5000 + "]" * 5000 + "}": "100 levels deep",
    '{"prompt": "q", "prompt": "r"}': "a key twice",
    '{"messages": [{"role": "user", "role": "system"}]}': "a key twice",
}


@pytest.mark.parametrize("line", [pytest.param(line, id=line[:40]) for line in BAD_LINES])
def test_what_is_wrong_in_one_row_is_one_bad_row_in_every_json(line, tmp_path):
    good = json.dumps(GOOD)
    lines, listed = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    rows = read_examples(save(lines, f"{good}\n{line}\n{good}"))
    assert [e.line for e in rows.examples] == [1, 3] and [bad.line for bad in rows.bad] == [2]
    assert BAD_LINES[line] in rows.bad[0].reason and "\n" not in rows.bad[0].reason
    if len(line) < 9000:  # deeper, no reader finds where the row ends
        rows = read_examples(save(listed, f"[{good}, {line}, {good}]"))
        assert [e.line for e in rows.examples] == [1, 3] and BAD_LINES[line] in rows.bad[0].reason


@pytest.mark.parametrize("line", ["[1]", "3", "null", '"text"', "true"])
def test_a_row_that_is_no_object(line, tmp_path):
    assert "must be an object" in read_examples(save(tmp_path / "x.jsonl", line)).bad[0].reason


def test_lines_are_those_of_the_file(tmp_path):
    """A byte order mark, line ends of Windows, empty lines, separators and NUL inside a text: none moves a line."""
    text = '\ufeff{"prompt": "a\u2028b\u0085\\u0000", "completion": "c"}\r\n\r\n{"prompt": "d", "completion": "e"}\r\n'
    rows = read_examples(save(tmp_path / "x.jsonl", text)).examples
    assert [(e.line, e.prompt) for e in rows] == [(1, "a\u2028b\u0085\0"), (3, "d")]
    long = "x" * 5_000_000
    rows = read_examples(save(tmp_path / "long.jsonl", json.dumps({"prompt": long, "completion": "y"}))).examples
    assert len(rows[0].prompt) == 5_000_000


def test_csv(tmp_path):
    rows = read_table(
        save(tmp_path / "x.csv", '\ufeffprompt,completion\r\n"a\r\nb\0",c\r\nd\r\n\r\ne,f,g\r\nh,"i ""j"""\r\n')
    )
    assert rows[0] == (3, {"prompt": "a\r\nb\0", "completion": "c"})
    assert rows[1] == (4, BadRow(4, "fewer fields than the header has"))
    assert rows[2] == (6, BadRow(6, "more fields than the header has"))
    assert rows[3] == (7, {"prompt": "h", "completion": 'i "j"'})
    [(_, row)] = read_table(save(tmp_path / "y.csv", "prompt;completion\nq;a\n"))
    assert row == {"prompt;completion": "q;a"}
    assert read_table(save(tmp_path / "z.csv", "")) == read_table(save(tmp_path / "z.csv", "prompt\n")) == []
    assert len(read_table(save(tmp_path / "empty-names.csv", "prompt,,\nq,,\n"))) == 1


def test_a_quote_that_csv_cannot_hold_is_named(tmp_path):
    """Read leniently, it would change the text in silence, and one that is never closed would take all that follows."""
    rows = read_table(save(tmp_path / "x.csv", 'prompt,completion\nq,"say "hi" now"\nr,b\ns,"c\n'))
    assert rows[1] == (3, {"prompt": "r", "completion": "b"})
    assert [(n, row.reason[:8]) for n, row in (rows[0], rows[2])] == [(2, "not CSV:"), (4, "not CSV:")]
    with pytest.raises(UserError, match=r"x\.csv, line 2: not CSV: .*quotes inside a field are doubled"):
        read_table(save(tmp_path / "x.csv", 'prompt,completion\nq,"never closed\nr,b\ns,c\n'))


def test_nan_in_csv_is_nothing(tmp_path):
    bad = read_examples(save(tmp_path / "x.csv", "prompt,completion\nq,NaN\nnan,a\nq,None\n")).bad
    assert [(row.line, row.reason) for row in bad] == [(2, "no answer"), (3, "no request: column 'prompt' is empty")]


def test_json_under_the_wrong_ending_is_said(tmp_path):
    assert "one JSON list and no JSON lines" in refused(save(tmp_path / "x.jsonl", f" [{json.dumps(GOOD)},\n{{}}]\n"))
    lines = f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n"
    assert "line 2: not JSON: Extra data; JSON lines belong in a .jsonl" in refused(save(tmp_path / "x.json", lines))


class Unnamed:
    pass


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({1: "x"}, "the names of columns must be text, found int"),
        ({"a": {("x",): 1, "b": 2}}, "found tuple"),
        ({"a": 10**6000}, "an integer of about 6000 digits"),
        ({"a": "\ud800"}, "U+D800"),
        ({"a": math.nan}, ""),
        ({"a": b"\xff", "b": Unnamed(), "c": None, "d": (1, [2])}, ""),
    ],
)
def test_rows_of_python(row, reason):
    assert reason in flaw(row) and bool(flaw(row)) == bool(reason)
    rows = read_examples([(1, {**row, **GOOD})])
    assert bool(rows.bad) == bool(reason)


def test_a_row_that_holds_itself():
    row: dict = dict(GOOD)
    row["self"] = row
    assert "100 levels deep" in read_examples([(1, row)]).bad[0].reason


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.sampled_from(["prompt", "completion", "messages", "x"]), JSON_VALUES), max_size=4))
def test_any_json_row_is_an_example_with_its_id_or_a_bad_row(tmp_path_factory, rows):
    path = save(tmp_path_factory.mktemp("any") / "x.jsonl", "\n".join(map(json.dumps, [*rows, GOOD])))
    read = read_examples(path)
    assert len(read.examples) + len(read.bad) == len(rows) + 1
    for example in read.examples:
        write_table(path, [example.row])
        [again] = read_examples(path).examples
        assert row_id(again.row) == row_id(example.row)


def test_json_files(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, "é"]})
    assert read_json(tmp_path / "x.json") == {"a": [1, "é"]}
    for content in (b"", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(UserError, match=r"x\.json[^\n]*$"):
            read_json(save(tmp_path / "x.json", content))


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    path = save(tmp_path / "x.txt", "before")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as part:
        part.write_text("half")
        assert path.read_text() == "before" and part.parent == path.parent
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"] and path.read_text() == "before"
    with atomic_write(path) as part:
        part.write_text("after")
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"] and path.read_text() == "after"
    for wrong in (tmp_path / "none" / "x.txt", path / "x.txt"):
        with pytest.raises(UserError, match=r"^cannot write [^\n]*$"):
            write_table(wrong.with_suffix(".jsonl"), [GOOD])


def test_a_lone_surrogate_is_written_as_its_escape(tmp_path):
    """No file of ours is unreadable for what somebody put into a row."""
    write_table(tmp_path / "x.jsonl", [{"prompt": "a\ud800"}])
    assert json.loads((tmp_path / "x.jsonl").read_text(encoding="utf-8")) == {"prompt": "a\ud800"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pa55@host/rows.jsonl", "https://***@host/rows.jsonl"),
        (Path("https://me:p@55@host/rows.jsonl"), "https:/***@host/rows.jsonl"),
        ("s3://b/x?X-Amz-Signature=ab&part=1#t", "s3://b/x?X-Amz-Signature=***&part=1#t"),
        ("https://h/x?key=ab&access_token=cd;api-key=ef", "https://h/x?key=***&access_token=***;api-key=***"),
        ("hf_" + "a" * 30, "hf_***"),
        ("data/key=3/monkey-bars/tokens.jsonl", "data/key=3/monkey-bars/tokens.jsonl"),
        ("rows\n\x1b[2J.jsonl", "rows ⏎ <U+001B>[2J.jsonl"),
    ],
)
def test_a_message_shows_no_secret_and_no_control(text, expected):
    assert shown(text) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("first\nsecond"), "first"),
        (ValueError("\n  of a field:\n  not a number\n"), "of a field: not a number"),
        (ValueError(), "ValueError"),
        (KeyError("name"), "KeyError: 'name'"),
        (FileNotFoundError(2, "No such file or directory", "/x"), "No such file or directory"),
        (OSError("at https://a:b@h"), "at https://***@h"),
        (zlib.error("x" * 500), "x" * 200 + " … [+300 characters]"),
    ],
)
def test_the_cause_is_one_line(error, expected):
    assert cause(error) == expected


def test_records_are_copied_as_the_bytes_that_came_in(tmp_path):
    text = '\ufeffa;b\r\n"x\r\ny";1\r\n\r\nq;"2"\r\nz;3'
    source = save(tmp_path / "rows.csv", text)
    table = read_table(source, ";")
    assert [(n, row["b"]) for n, row in table] == [(3, "1"), (5, "2"), (6, "3")]
    copy_rows(tmp_path / "out.csv", source, [3, 6], ";")
    assert (tmp_path / "out.csv").read_bytes() == '\ufeffa;b\r\n"x\r\ny";1\r\nz;3\n'.encode()
    with pytest.raises(UserError, match="no row at line 4"):
        copy_rows(tmp_path / "out.csv", source, [4], ";")
    tabs = save(tmp_path / "rows.TSV", "prompt\tcompletion\nq\ta\n")
    assert read_table(tabs) == [(2, {"prompt": "q", "completion": "a"})]


@pytest.mark.parametrize("name", ["ROWS.JSONL", "rows.jsonl.zst", "rows.csv.ZST", "rows.Json.gz"])
def test_capitals_and_zst(tmp_path, name):
    write_table(tmp_path / name, [GOOD, GOOD])
    copy_rows(tmp_path / f"out{endings(name)}", tmp_path / name, [read_table(tmp_path / name)[1][0]])
    assert [row for _, row in read_table(tmp_path / f"out{endings(name)}")] == [GOOD]
