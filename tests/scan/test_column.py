"""Columns made of scores: what a training method is told of a row and of a token."""

import pytest
from aligned import example

from safebasin.data.tables import write_table
from safebasin.errors import DefenceError, UserError
from safebasin.scan.column import column_from_file, keep_column, star_column
from safebasin.scan.methods.dsa import Dsa
from safebasin.scan.methods.gradshield import GradShield
from safebasin.scan.scores import Scores

ROWS = [example("one", "a", 1), example("two", "b", 2), example("three", "c", 3)]
IDS = [row.id for row in ROWS]
ANCHORS = {"it": {"safe": [-1.0, 0.0, 1.0] * 5, "harmful": [9.0, 10.0, 11.0] * 5}}


def test_star_by_hand():
    """Medians: safe 0, harmful 10. Parts 2, 3, 5 reach 2, 5 and 10: 1 - 0.2, 1 - 0.5, 1 - 1. A fall below 0 is as safe
    as can be, and a score above 10 no worse than 0. A row without tokens has one number."""
    scores = Scores(IDS, [1, 2, 3], {"it": [10.0, -4.0, 15.0]}, {"it": [[2.0, 3.0, 5.0], [-4.0, 0.0], [15.0]]}, ANCHORS)
    column = star_column(scores, "it", GradShield(), ROWS)
    assert (
        column[IDS[0]] == pytest.approx([0.8, 0.5, 0.0])
        and column[IDS[1:][0]] == [1.0, 1.0]
        and column[IDS[2]] == [0.0]
    )
    assert star_column(scores._replace(tokens={}), "it", GradShield(), ROWS[:1])[IDS[0]] == 0.0


def test_star_of_a_probability_is_its_complement():
    """A guard speaks of the prefix, so nothing is summed and no anchor is needed."""
    scores = Scores(IDS[:1], [1], {"it": [0.75]}, {"it": [[0.25, 0.75, 0.5]]}, {})
    assert star_column(scores, "it", Dsa(), ROWS[:1]) == {IDS[0]: [0.75, 0.25, 0.5]}


def test_star_of_a_probability_that_does_not_separate_the_anchors_is_refused():
    """Anchor rows decide whether the scorer is refused, where they were scored; their medians stretch nothing."""
    scores = Scores(
        IDS[:1],
        [1],
        {"it": [0.75]},
        {"it": [[0.25, 0.75, 0.5]]},
        {"it": {"safe": [0.2, 0.3, 0.4] * 5, "harmful": [0.5, 0.6] * 8}},
    )
    assert star_column(scores, "it", Dsa(), ROWS[:1]) == {IDS[0]: [0.75, 0.25, 0.5]}
    for harmful in ([0.1, 0.2, 0.9] * 5, [0.3] * 15, [0.5, 0.6]):
        anchors = {"it": {"safe": [0.2, 0.3, 0.4] * 5, "harmful": harmful}}
        with pytest.raises(DefenceError, match="it does not prove itself on the anchor rows"):
            star_column(scores._replace(anchors=anchors), "it", Dsa(), ROWS[:1])


def test_keep_is_what_cut_keeps():
    scores = Scores(IDS, [1, 2, 3], {"it": [0.0, 12.0, 3.0]}, {}, ANCHORS)
    assert keep_column(scores, "it", ROWS) == dict(zip(IDS, [1.0, 0.0, 1.0], strict=True))
    with pytest.raises(UserError, match="cuts 2 of 3 rows"):
        keep_column(scores._replace(columns={"it": [0.0, 12.0, 13.0]}), "it", ROWS)
    upside_down = {"it": {"safe": ANCHORS["it"]["harmful"], "harmful": ANCHORS["it"]["safe"]}}
    with pytest.raises(DefenceError, match="it does not prove itself on the anchor rows"):
        keep_column(scores._replace(anchors=upside_down), "it", ROWS)


def test_what_the_user_can_mend(tmp_path):
    path = tmp_path / "own.jsonl"
    write_table(path, [{"row_id": row, "star": [0.5, 1.0]} for row in IDS])
    assert column_from_file(str(path), "star", ROWS) == {row: [0.5, 1.0] for row in IDS}
    with pytest.raises(UserError, match="has the columns row_id and keep"):
        column_from_file(str(path), "keep", ROWS)
    with pytest.raises(UserError, match="no value for row new"):
        column_from_file(str(path), "star", [*ROWS, ROWS[0].__class__("new", ROWS[0].messages, {}, 4)])
    write_table(path, [{"row_id": row, "star": [0.5, 1.5]} for row in IDS])
    with pytest.raises(UserError, match="not between 0 and 1"):
        column_from_file(str(path), "star", ROWS)
    for value in (float("inf"), "high", None, {"x": 1}, [0.5, None], ["a"], [[0.5]], -0.1):
        write_table(path, [{"row_id": row, "star": value} for row in IDS])
        with pytest.raises(UserError, match=r"own\.jsonl, line 1: ") as caught:
            column_from_file(str(path), "star", ROWS)
        assert "\n" not in str(caught.value)
    for text in ("not JSON\n", '{"row_id": "one"\n', "[]\n", "17\n"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"own\.jsonl, line 1: "):
            column_from_file(str(path), "star", ROWS)
    path.write_bytes(b'{"row_id": "one", "star": "\xff"}')
    with pytest.raises(UserError, match=r"own\.jsonl is not UTF-8"):
        column_from_file(str(path), "star", ROWS)
    (tmp_path / "own.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(UserError, match=r"cannot read .*own\.parquet"):
        column_from_file(str(tmp_path / "own.parquet"), "star", ROWS)
    with pytest.raises(UserError, match="no such file"):
        column_from_file(str(tmp_path / "none.jsonl"), "star", ROWS)
    write_table(path, [{"row_id": row, "star": float("nan")} for row in IDS])
    with pytest.raises(UserError, match="line 1: "):
        column_from_file(str(path), "star", ROWS)
    scores = Scores(IDS, [1, 2, 3], {"it": [1.0, 2.0, 3.0]}, {}, {})
    with pytest.raises(UserError, match="needs anchor rows"):
        star_column(scores, "it", GradShield(), ROWS)
