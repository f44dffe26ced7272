"""Rows in: every form, every fault with its line and reason, ids that stay."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safebasin.data.chat import to_conversation
from safebasin.data.example import read_examples, row_id
from safebasin.data.fields import fill
from safebasin.data.keys import RowForm
from safebasin.data.tables import draw, read_table, write_table
from safebasin.errors import UserError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"prompt": "q", "completion": "a"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"instruction": "q", "input": "", "output": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
)
def test_every_form_is_read_to_one(row):
    turns = to_conversation(row).messages
    assert [(turn["role"], turn["content"]) for turn in turns] == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "must be an object"),
        ({"text": "q"}, "no known columns"),
        ({"messages": []}, "empty"),
        ({"messages": [{"role": "wizard", "content": "q"}]}, "wrong role"),
        ({"messages": [CHAT[0], CHAT[0]]}, "must alternate"),
        ({"messages": [*CHAT, {"role": "system", "content": "s"}]}, "system turn must come first"),
        ({"prompt": "q", "completion": "  "}, "the answer is empty"),
        ({"prompt": "q"}, "no answer"),
        ({"prompt": "q", "completion": 3}, "must be text"),
    ],
)
def test_what_is_wrong_is_said(row, reason):
    turns = to_conversation(row)
    assert isinstance(turns, str)
    assert reason in turns


def test_bad_rows_are_listed_with_their_line_and_lose_nobody(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "q", "completion": "a"}\nnot json\n\n{"prompt": "q"}\n{"prompt": "r", "completion": "b"}\n'
    )
    rows = read_examples(path)
    assert [example.line for example in rows.examples] == [1, 5]
    assert [(bad.line, bad.reason.split(":")[0]) for bad in rows.bad] == [(2, "not JSON"), (4, "no answer")]


def test_ids_are_stable_and_tell_twins_apart(tmp_path):
    row = {"prompt": "q", "completion": "a"}
    rows = read_examples([(1, row), (2, dict(reversed(row.items()))), (3, {"prompt": "q", "completion": "b"})]).examples
    assert rows[0].id == row_id(row)
    assert rows[1].id == f"{row_id(row)}-2"
    assert len({example.id for example in rows}) == 3


@given(
    st.lists(
        st.fixed_dictionaries({"prompt": st.text(min_size=1), "completion": st.text(min_size=1)}),
        min_size=1,
        max_size=6,
    )
)
def test_rows_survive_every_format(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("formats")
    for suffix in (".jsonl", ".json", ".parquet", ".jsonl.gz"):
        clean = [{key: text.encode("utf-8", "replace").decode() for key, text in row.items()} for row in rows]
        write_table(folder / f"rows{suffix}", clean)
        assert [row for _, row in read_table(folder / f"rows{suffix}")] == clean


def test_csv_keeps_line_breaks_and_names_long_rows(tmp_path):
    path = tmp_path / "rows.csv"
    write_table(path, [{"prompt": 'a "b",\nc', "completion": "d"}])
    assert read_table(path)[0][1] == {"prompt": 'a "b",\nc', "completion": "d"}
    path.write_text("prompt,completion\na,b,c\n")
    assert read_examples(path).bad[0].reason == "more fields than the header has"


@pytest.mark.parametrize("delimiter", [";;", "\\t", "\n", '"'])
def test_a_delimiter_is_one_character(delimiter):
    with pytest.raises(UserError, match="one character is needed"):
        RowForm(delimiter=delimiter)


def test_an_empty_or_missing_or_unknown_file_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "rows.pkl").write_bytes(b"x")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    for name, reason in [
        ("empty.jsonl", "empty"),
        ("none.jsonl", "no such file"),
        ("rows.pkl", "unknown kind"),
        ("latin.jsonl", "not UTF-8"),
    ]:
        with pytest.raises(UserError, match=reason):
            read_examples(tmp_path / name)


def test_templates_fill_the_first_column_that_there_is():
    assert fill("{a|b}: {c}", {"b": 1, "c": "{a}"}) == "1: {a}"  # what a row holds is not a template
    assert "no column 'x|y'" in to_conversation({"a": "1"}, RowForm(prompt="{x|y}", answer="{a}"))


def test_drawing_keeps_the_order():
    assert draw(list(range(100)), 5, 0) == sorted(draw(list(range(100)), 5, 0))
    assert draw([1, 2], None, 0) == [1, 2]


def test_gzip_is_the_same_bytes_every_time(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_table(tmp_path / name, [{"prompt": "q"}])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert json.loads(gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes())) == {"prompt": "q"}
