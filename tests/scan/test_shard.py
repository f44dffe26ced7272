"""Shards make up the file, whatever its lines are; a row's line is that of the file."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_scores

from safebasin.data.tables import read_table, write_table
from safebasin.errors import UserError
from safebasin.scan.part import Notes, join_parts, write_part
from safebasin.scan.scan import Scanned
from safebasin.scan.scores import read_scores
from safebasin.scan.shard import cut_shards, read_shard

LINES = st.lists(st.sampled_from(['{"a": 1}', "", "  ", "not JSON", '{"b": "é\\u0085"}', "\u00a0", '{"c": 2}\r']))


@given(LINES, st.integers(1, 4), st.booleans(), st.booleans())
def test_shards_make_up_the_file(tmp_path_factory, lines, rows, ends, mark):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + ("\n".join(lines) + "\n" * ends).encode())
    shards = cut_shards(path, rows)
    assert [row for shard in shards for row in read_shard(shard)] == read_table(path)
    assert all(len(read_shard(shard)) <= shard.rows <= rows for shard in shards)
    assert [shard.name for shard in shards] == [f"{k:06d}" for k in range(len(shards))]


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.json", "rows.jsonl.gz"])
def test_shards_of_other_tables(tmp_path, name):
    path = tmp_path / name
    write_table(path, [{"a": k, "b": f"text {k}"} for k in range(7)])
    shards = cut_shards(path, 3)
    assert [shard.rows for shard in shards] == [3, 3, 1]
    assert [row for shard in shards for row in read_shard(shard)] == read_table(path)


def test_a_file_that_was_cut_short_meanwhile(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' * 3)
    [shard] = cut_shards(path, 9)
    path.write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="has changed while it was read"):
        read_shard(shard)


def test_joined_parts_are_the_table_of_all_rows(tmp_path):
    """Two parts, of rows that are copies of one another: the copies are numbered as in the complete set, and the file
    is that of one writing, but for its row groups."""
    from safebasin.data.example import read_examples

    raw = [(n, {"prompt": f"say {word}", "completion": "yes"}) for n, word in enumerate("abaab", 1)]
    examples, scores = read_examples(raw).examples, [1.0, 2.0, 3.0, 4.0, 5.0]
    tokens = [[0.5] * k for k in range(5)]
    short = frozenset({examples[2].id})
    write_scores(tmp_path / "all" / "scores.parquet", examples, Scanned({"it": scores}, {"it": tokens}, {}, short))
    for k, part in enumerate((slice(0, 2), slice(2, 5))):
        own = read_examples(raw[part]).examples
        scanned = Scanned({"it": scores[part]}, {"it": tokens[part]}, {}, short if k else frozenset())
        if k:  # inside its shard it is the first copy
            scanned = scanned._replace(cut_short=frozenset({own[0].id}))
        write_part(tmp_path / f"{k}.parquet", own, scanned, Notes([], [], {"it": {"safe": [0.25]}} if not k else {}))
    notes = join_parts([tmp_path / "0.parquet", tmp_path / "1.parquet"], tmp_path / "scores.parquet")
    (tmp_path / "anchors.json").write_text(json.dumps(notes.anchors))
    table, of_all = read_scores(tmp_path / "scores.parquet"), read_scores(tmp_path / "all" / "scores.parquet")
    assert table._replace(anchors={}) == of_all and table.anchors == {"it": {"safe": [0.25]}}
    assert table.row_ids == [example.id for example in examples] and table.row_ids[3].endswith("-3")
    (tmp_path / "1.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"was damaged .* start again"):
        join_parts([tmp_path / "0.parquet", tmp_path / "1.parquet"], tmp_path / "scores.parquet")
    assert not (tmp_path / "1.parquet").exists()
