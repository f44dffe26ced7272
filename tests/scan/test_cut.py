"""Thresholds on scores whose truth is known, and the rows that a cut writes."""

import gzip
import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from safebasin.data.example import Example, Rows, read_examples
from safebasin.data.tables import read_table, write_table
from safebasin.errors import DefenceError, UserError
from safebasin.scan.cut import between_anchors, cut_rows, find_threshold, t_guess, two_gaussians, write_cut
from safebasin.scan.scores import Scores

NONE = np.array([])
MIXED = {  # 85 % harmless, 15 % harmful
    "six deviations apart": lambda r, n, k: (r.normal(size=n), r.normal(6, 1, k)),
    "heavy tails": lambda r, n, k: (r.standard_t(3, n), 10 + r.standard_t(3, k)),
    "lognormal harm": lambda r, n, k: (r.standard_t(3, n), r.lognormal(3.4, 0.5, k)),
    "as in the paper's figure A3, 0 to 20000": lambda r, n, k: (r.normal(200, 300, n), r.gamma(4, 2000, k)),
}


def examples(tmp_path, count, name="rows.jsonl"):
    write_table(tmp_path / name, [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(count)])
    return tmp_path / name, read_examples(tmp_path / name).examples


# --- the paper's rule -------------------------------------------------------------------------------------------------


def test_paper_by_hand():
    """Two tight clusters, 0 to 0.09 and 50 to 50.09: the top of the lower one is 0.09."""
    x = [i / 100 for i in range(10)] + [50 + i / 100 for i in range(10)]
    assert t_guess(x) == pytest.approx(0.09)
    # With a = infinity the second Gaussian is never worth it: mu + 2 sd. The mean is 25.045; the variance is 25^2 of
    # the two centres and 0.000825 within (the variance of 0 to 9 is 8.25, in hundredths).
    assert t_guess(x, a=math.inf) == pytest.approx(25.045 + 2 * math.sqrt(625 + 0.000825))


def test_paper_on_one_gaussian_cuts_what_lies_beyond_two_deviations():
    """2.3 % of a normal sample: why this rule alone cannot promise that a benign set loses less than 1 %."""
    x = np.random.default_rng(0).normal(size=4000)
    threshold = t_guess(x)
    assert threshold == pytest.approx(x.mean() + 2 * x.std())
    assert np.mean(x > threshold) == pytest.approx(0.0228, abs=0.005)


def test_paper_takes_a_heavy_tail_for_a_cluster():
    """A negative result, kept: on benign lognormal scores the second Gaussian pays, and a fifth of the rows goes.
    Anchors are the remedy."""
    x = np.random.default_rng(0).lognormal(0, 1, 1000)
    assert np.mean(x > t_guess(x)) > 0.1
    anchors = {"safe": x, "harmful": 100 + x}
    assert find_threshold(x, estimator="anchors", anchors=anchors) >= x.max()


@pytest.mark.parametrize("shape", MIXED)
def test_paper_finds_the_poison(shape):
    stayed = []
    for seed in range(5):
        harmless, harmful = MIXED[shape](np.random.default_rng(seed), 850, 150)
        stayed.append(np.mean(harmful <= t_guess(np.concatenate([harmless, harmful]))))
    assert np.mean(stayed) < 0.03


def test_the_mixture_is_the_one_that_was_drawn():
    """70 % N(0, 1) and 30 % N(6, 0.5)."""
    random = np.random.default_rng(0)
    x = np.concatenate([random.normal(0, 1, 1400), random.normal(6, 0.5, 600)])
    fit = two_gaussians(x)
    assert fit.weights == pytest.approx([0.7, 0.3], abs=0.01)
    assert fit.means == pytest.approx([0, 6], abs=0.1)
    assert fit.sds == pytest.approx([1, 0.5], abs=0.05)
    assert fit.upper.sum() == pytest.approx(600, abs=5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), harm=st.integers(0, 40), scale=st.floats(1e-3, 1e4), shift=st.floats(-1e3, 1e3))
def test_the_unit_of_the_score_does_not_matter(seed, harm, scale, shift):
    """The same rows go when every score is scaled and shifted."""
    random = np.random.default_rng(seed)
    x = np.concatenate([random.normal(size=80), random.normal(8, 1, harm)])
    plain, moved = (t_guess(y) for y in (x, x * scale + shift))
    margin = np.abs(x - plain).min()  # a row on the threshold may fall to either side of a rounding
    assume(margin > 1e-9 or plain in x)
    stays = x <= plain + 1e-9
    assert (stays == (x * scale + shift <= moved + 1e-9 * scale)).all()


@pytest.mark.parametrize("x", [[3.0] * 50, [1.0, 2.0], [7.0]])
def test_nothing_is_cut_where_nothing_stands_out(x):
    """All equal, two rows, one row: every row stays."""
    assert max(x) <= t_guess(x)


# --- anchors ----------------------------------------------------------------------------------------------------------


def test_separate_anchors_by_hand():
    """Safe 0..20: the 95 % quantile is 19. Harmful 100..120: the 5 % quantile is 101. Midway: 60. With rows at 20, 50,
    95 and 110 the widest gap within (19, 101) is 50 to 95: 72.5. Where no row reaches 101 nothing is of the harmful
    kind: 101."""
    assert between_anchors([1.0, 130.0], np.arange(21.0), np.arange(100.0, 121.0)) == 60
    assert between_anchors([1.0, 90.0], np.arange(21.0), np.arange(100.0, 121.0)) == 101
    assert between_anchors([20.0, 50.0, 95.0, 110.0], np.arange(21.0), np.arange(100.0, 121.0)) == 72.5


def test_anchors_that_overlap_by_hand():
    """Safe 0 1 2 5, harmful 4 6 7 8. Between 2 and 4: (3/4 + 4/4) / 2 = 7/8. Between 5 and 6: (4/4 + 3/4) / 2 = 7/8,
    and the higher of equals is taken: 5.5."""
    assert between_anchors([3.0], [0.0, 1.0, 2.0, 5.0], [4.0, 6.0, 7.0, 8.0]) == 5.5


def test_anchors_that_tell_nothing():
    with pytest.raises(DefenceError, match="score no higher than safe ones"):
        between_anchors([3.0], [5.0, 6.0, 7.0], [1.0, 2.0, 3.0])
    with pytest.raises(DefenceError, match="same score"):
        between_anchors([3.0], [1.0, 1.0], [1.0])
    with pytest.raises(UserError, match="needs scores of safe and of harmful anchor rows"):
        find_threshold([1.0, 2.0, 3.0], estimator="anchors")
    with pytest.raises(UserError, match="needs scores of safe and of harmful anchor rows"):
        find_threshold([1.0, 2.0, 3.0], estimator="anchors", anchors={"safe": [1.0], "harmful": []})


@settings(max_examples=25, deadline=None)
@given(
    safe=st.lists(st.integers(0, 20).map(float), min_size=1, max_size=15),
    harmful=st.lists(st.integers(0, 20).map(float), min_size=1, max_size=15),
)
def test_overlapping_anchors_take_the_best_balanced_accuracy(safe, harmful):
    """Against every threshold there is, one by one."""
    assume(np.quantile(safe, 0.95) >= np.quantile(harmful, 0.05))

    def accuracy(t):
        return (np.mean(np.array(safe) <= t) + np.mean(np.array(harmful) > t)) / 2

    best = max(accuracy(t + 0.5) for t in range(-1, 21))
    if best <= 0.5:
        with pytest.raises(DefenceError):
            between_anchors([3.0], safe, harmful)
    else:
        assert accuracy(between_anchors([3.0], safe, harmful)) == pytest.approx(best)


# --- cutting ----------------------------------------------------------------------------------------------------------


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
    result = cut_by(
        rows, [0.0, 10.0, 110.0, 1.0], anchors={"safe": np.arange(21.0), "harmful": np.arange(100.0, 121.0)}
    )
    assert result.threshold == 60 and [r.example for r in result.removed] == [rows[2]]


@given(st.lists(st.tuples(st.integers(-9, 40), st.integers(-9, 40)), min_size=1, max_size=9))
def test_a_cut_by_several_scorers_keeps_what_passes_each(pairs):
    rows = [Example(str(i), (), {}, i) for i in range(len(pairs))]
    anchors = {"one": {"safe": [0.0, 2.0], "harmful": [20.0, 22.0]}, "two": {"safe": [0.0], "harmful": [30.0]}}
    columns = {name: [float(pair[k]) for pair in pairs] for k, name in enumerate(anchors)}
    table = Scores([row.id for row in rows], [row.line for row in rows], columns, {}, anchors)
    passed = {
        name: x <= find_threshold(x, estimator="anchors", anchors=anchors[name])
        for name, x in columns.items()
        for x in [np.array(x)]
    }
    both = passed["one"] & passed["two"]
    if not both.any():
        with pytest.raises(UserError, match="cuts all"):
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
    """One: threshold 10 (between 0 and 20, a row at each), 20 from safe to harmful: a row at 20 is (20 - 10) / 20 = 0.5
    beyond. Two: the threshold 60 in the gap 20..100, (100 - 60) / 100 = 0.4 beyond."""
    anchors = {"one": {"safe": [0.0], "harmful": [20.0]}, "two": {"safe": [0.0], "harmful": [100.0]}}
    rows = [Example(str(i), (), {}, i) for i in range(2)]
    table = Scores(["0", "1"], [0, 1], {"one": [0.0, 20.0], "two": [20.0, 100.0]}, {}, anchors)
    (gone,) = cut_rows(rows, table, ["one", "two"]).removed
    assert gone.example.id == "1" and gone.score == pytest.approx(0.5)


def test_only_the_score_of_several_scorers_is_written(tmp_path):
    file, rows = examples(tmp_path, 3)
    anchors = {"one": {"safe": [0.0], "harmful": [20.0]}, "two": {"safe": [0.0], "harmful": [100.0]}}
    table = Scores(
        [r.id for r in rows], [r.line for r in rows], {"one": [0.0, 20.0, 0.0], "two": [20.0, 100.0, 0.0]}, {}, anchors
    )
    for scorer, there in (("one", False), (["one", "two"], True)):
        folder = tmp_path / str(there)
        write_cut(folder, file, Rows(rows, []), cut_rows(rows, table, scorer), scorer)
        assert (folder / "scores.parquet").is_file() == there
    written = {row["row_id"]: row["score"] for _, row in read_table(folder / "scores.parquet")}
    assert written == {rows[0].id: pytest.approx(-0.4), rows[1].id: pytest.approx(0.5), rows[2].id: pytest.approx(-0.5)}


def test_what_the_user_can_mend(tmp_path):
    _, rows = examples(tmp_path, 3)
    with pytest.raises(UserError, match="cuts all 3 rows"):
        cut_by(rows, [1.0, 2.0, 3.0], 0.5)
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
    with pytest.raises(DefenceError, match="score number 1 is not a finite number"):
        find_threshold([1.0, 2.0], estimator="anchors", anchors={"safe": [math.nan], "harmful": [1.0]})
    with pytest.raises(DefenceError, match="score number 2 is not a finite number"):
        cut_by(rows, [1.0, math.nan, 2.0], 1.5)
