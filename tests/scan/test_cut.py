"""The rows that a cut keeps, removes and writes."""

import gzip
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safebasin.data.example import Example, Rows, read_examples
from safebasin.data.tables import read_table, write_table
from safebasin.errors import DefenceError, UserError
from safebasin.scan.cut import cut_rows, write_cut
from safebasin.scan.scores import Scores
from safebasin.scan.threshold import find_threshold


def examples(tmp_path, count, name="rows.jsonl"):
    write_table(tmp_path / name, [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(count)])
    return tmp_path / name, read_examples(tmp_path / name).examples


# --- cutting ----------------------------------------------------------------------------------------------------------


# the 95 % quantile is 19, the 5 % quantile is 101: 60 between
SAFE, HARMFUL = [float(x) for x in range(21)], [float(x) for x in range(100, 121)]
TWO = {
    "one": {"safe": SAFE, "harmful": HARMFUL},
    "two": {"safe": [x / 10 for x in SAFE], "harmful": [x / 10 for x in HARMFUL]},
}


def cut_by(rows, scores, threshold=None, anchors=None, **fields):
    table = Scores(
        [row.id for row in rows], [row.line for row in rows], {"it": scores}, {}, {"it": anchors} if anchors else {}
    )
    return cut_rows(rows, table, "it", threshold, **fields)


def test_cut_keeps_order_and_the_threshold_itself(tmp_path):
    _, rows = examples(tmp_path, 5)
    result = cut_by(rows, [3.0, 1.0, 2.0, 5.0, 2.0], 2.0)
    assert result.remaining == [rows[1], rows[2], rows[4]]
    assert [(r.example, r.score) for r in result.removed] == [(rows[0], 3.0), (rows[3], 5.0)]
    assert result.estimator == "given" and "above the threshold 2" in result.removed[0].reason


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json", "rows.parquet", "rows.jsonl.gz"])
def test_rows_that_stay_are_written_as_they_came(tmp_path, name):
    source, rows = examples(tmp_path, 60, name)
    scores = [100.0 + i if 20 <= i < 40 else i / 100 for i in range(60)]
    result = cut_by(rows, scores, threshold=50.0)
    path = write_cut(tmp_path / "cut" / "arm", source, Rows(rows, []), result, "gradshield")
    assert path.name == name.replace("rows", "train")
    expected = [row for i, (_, row) in enumerate(read_table(source)) if not 20 <= i < 40]
    assert [row for _, row in read_table(path)] == expected
    facts = json.loads((path.parent / "cut.json").read_text())
    assert facts["kept"] == 40 and facts["scorer"] == "gradshield" and facts["estimator"] == "given"
    assert [item["row_id"] for item in facts["removed"]] == [row.id for row in rows[20:40]]
    assert facts["removed"][0].keys() == {"row_id", "line", "score", "reason"} and facts["removed"][0]["score"] == 120.0
    assert sorted(file.name for file in path.parent.iterdir()) == sorted(["cut.json", path.name])
    if name.endswith(".gz"):
        assert gzip.decompress(path.read_bytes()).count(b"\n") == 40


def test_every_row_stays_goes_or_is_refused(tmp_path):
    """Line 2 cannot be read, line 4 was left out of the scan; the lines that stay are the bytes that came in."""
    lines = [
        '{"prompt":"q","completion":"a"}',
        "{",
        '{"prompt": "r",  "completion": "b"}\r',
        '{"prompt":"s","answer":"c"}',
    ]
    source = tmp_path / "rows.jsonl"
    source.write_bytes("\n".join(lines).encode())
    rows = read_examples(source)
    result = cut_by(rows.examples[:2], [0.0, 1.0], threshold=5.0)
    with pytest.raises(UserError, match="line 4 has no score"):
        write_cut(tmp_path / "cut", source, rows, result, "it")
    assert not (tmp_path / "cut").exists()
    path = write_cut(tmp_path / "cut", source, rows, result, "it", unscored={rows.examples[2].id: "over-long"})
    assert path.read_bytes() == f"{lines[0]}\n{lines[2]}\n".encode()
    facts = json.loads((path.parent / "cut.json").read_text())
    assert facts["read"] == 4 == facts["kept"] + len(facts["removed"]) + len(facts["refused"])
    assert [row["line"] for row in facts["refused"]] == [2, 4] and facts["refused"][1]["reason"] == "over-long"


def test_cut_with_anchors(tmp_path):
    _, rows = examples(tmp_path, 4)
    result = cut_by(rows, [0.0, 10.0, 110.0, 1.0], anchors=TWO["one"])
    assert result.threshold == 60 and [r.example for r in result.removed] == [rows[2]]


@given(st.lists(st.tuples(st.integers(-9, 140), st.integers(-1, 14)), min_size=1, max_size=9))
def test_a_cut_by_several_scorers_keeps_what_passes_each(pairs):
    rows = [Example(str(i), (), {}, i) for i in range(len(pairs))]
    columns = {name: [float(pair[k]) for pair in pairs] for k, name in enumerate(TWO)}
    table = Scores([row.id for row in rows], [row.line for row in rows], columns, {}, TWO)
    passed = {
        name: x <= find_threshold(x, estimator="anchors", anchors=TWO[name])
        for name, x in columns.items()
        for x in [np.array(x)]
    }
    both = passed["one"] & passed["two"]
    if both.mean() < 0.5:
        with pytest.raises(UserError, match="max_share allows 50%"):
            cut_rows(rows, table, ["one", "two"])
        return
    result = cut_rows(rows, table, ["one", "two"])
    assert result.remaining == [row for row, passes in zip(rows, both, strict=True) if passes] and result.threshold == 0
    assert (
        list(result.scores) == [row.id for row in rows]
        and {r.example.id: r.score for r in result.removed}.items() <= result.scores.items()
    )
    with pytest.raises(UserError, match="several scorers"):
        cut_rows(rows, table, ["one", "two"], 1.0)


def test_the_score_of_a_cut_by_several_is_the_worst_in_steps_from_safe_to_harmful():
    """One: threshold 60, and 100 from the median 10 to the median 110: a row at 120 is (120 - 60) / 100 = 0.6 beyond.
    Two: a tenth of it all, a row at 10 is (10 - 6) / 10 = 0.4 beyond."""
    rows = [Example(str(i), (), {}, i) for i in range(2)]
    table = Scores(["0", "1"], [0, 1], {"one": [0.0, 120.0], "two": [2.0, 10.0]}, {}, TWO)
    (gone,) = cut_rows(rows, table, ["one", "two"]).removed
    assert gone.example.id == "1" and gone.score == pytest.approx(0.6)


def test_only_the_score_of_several_scorers_is_written(tmp_path):
    file, rows = examples(tmp_path, 3)
    columns = {"one": [0.0, 120.0, 0.0], "two": [0.0, 10.0, 0.0]}
    table = Scores([r.id for r in rows], [r.line for r in rows], columns, {}, TWO)
    for scorer, there in (("one", False), (["one", "two"], True)):
        folder = tmp_path / str(there)
        write_cut(folder, file, Rows(rows, []), cut_rows(rows, table, scorer), scorer)
        assert (folder / "scores.parquet").is_file() == there
    written = {row["row_id"]: row["score"] for _, row in read_table(folder / "scores.parquet")}
    assert written == {rows[0].id: pytest.approx(-0.6), rows[1].id: pytest.approx(0.6), rows[2].id: pytest.approx(-0.6)}


def test_what_the_user_can_mend(tmp_path):
    _, rows = examples(tmp_path, 3)
    with pytest.raises(UserError, match=r"cuts 3 of 3 rows \(100%\), and max_share allows 50%.*cut.max_share"):
        cut_by(rows, [1.0, 2.0, 3.0], 0.5)
    with pytest.raises(UserError, match=r"max_share=1\.5: it is a share"):
        cut_by(rows, [1.0, 2.0, 3.0], 0.5, max_share=1.5)
    with pytest.raises(UserError, match="no scores by 'it'"):
        cut_rows(rows, Scores([row.id for row in rows], [1, 2, 3], {}, {}, {}), "it")
    with pytest.raises(UserError, match="anchors' needs scores"):
        cut_by(rows, [1.0, 2.0, 3.0])
    with pytest.raises(UserError, match="no scores"):
        cut_by([], [])
    for threshold in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match=f"threshold={threshold}: it must be a finite number"):
            cut_by(rows, [1.0, 2.0, 3.0], threshold)
    table = Scores([row.id for row in rows], [1, 2, 3], {"it": [1.0, 2.0, 3.0]}, {}, {})
    for names in ([], ["it", "it"]):
        with pytest.raises(UserError, match="a cut needs a scorer, or several that differ"):
            cut_rows(rows, table, names)
    with pytest.raises(DefenceError, match="score number 2 is not a finite number"):
        cut_by(rows, [1.0, math.nan, 2.0], 1.5)


def test_more_than_a_share_goes_only_where_it_was_allowed(tmp_path):
    """Three of five: 60 %. By a given threshold and by the anchors alike."""
    _, rows = examples(tmp_path, 5)
    scores = [0.0, 1.0, 130.0, 131.0, 132.0]
    for fields in ({"threshold": 60.0}, {"anchors": TWO["one"]}):
        with pytest.raises(UserError, match=r"cuts 3 of 5 rows \(60%\)"):
            cut_by(rows, scores, **fields)
        assert len(cut_by(rows, scores, **fields, max_share=0.6).removed) == 3


def test_a_row_without_a_score_is_never_lost(tmp_path):
    """It stops the cut, or it is left to ``write_cut``, which asks for its reason."""
    _, rows = examples(tmp_path, 4)
    table = Scores([r.id for r in rows if r is not rows[1]], [1, 3, 4], {"it": [1.0, 9.0, 2.0]}, {}, {})
    with pytest.raises(UserError, match=rf"row {rows[1].id} \(line 2\) has no score"):
        cut_rows(rows, table, "it", 5.0)
    result = cut_rows(rows, table, "it", 5.0, unscored="leave")
    assert result.remaining == [rows[0], rows[3]]
    assert [(r.example, r.score) for r in result.removed] == [(rows[2], 9.0)]
