"""A row longer than the context is scored on what fits: a window that holds answer tokens, and as much of the beginning
as it can."""

import pytest
from aligned import BAD, aligned_model, coded, refusals
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_scores

from safebasin.data.example import Example
from safebasin.encode import TokenizedRow, shorten
from safebasin.scan import scorer
from safebasin.scan.scan import score_rows
from safebasin.scan.scores import read_scores


def row(prompt: int, answer: int, more: int = 0) -> TokenizedRow:
    """Tokens 0, 1, 2, ...; the answer behind the prompt, and behind it so many tokens of another turn."""
    size = prompt + answer + more
    return TokenizedRow("r", tuple(range(size)), tuple(prompt <= k < prompt + answer for k in range(size)))


@pytest.mark.parametrize(
    ("full", "length", "start", "answer"),
    [
        (row(4, 6), 10, None, 6),  # it fits
        (row(4, 6), 7, 0, 3),  # the beginning, with three answer tokens
        (row(4, 6), 5, 0, 1),
        (row(4, 6), 4, 2, 2),  # none fits behind the prompt: two tokens of its end, two of the answer
        (row(9, 1), 4, 6, 1),  # a short answer leaves room for more of the prompt
        (row(9, 1, more=20), 4, 7, 1),  # where a further turn follows, half each
    ],
)
def test_what_fits_by_hand(full, length, start, answer):
    short = shorten(full, length)
    assert (short.start, sum(short.answer), len(short)) == (start, answer, min(length, len(full)))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 9), st.integers(2, 40))
def test_it_is_a_window_with_an_answer_token_that_something_predicts(prompt, answer, more, length):
    full = row(prompt, answer, more)
    short = shorten(full, length)
    begin = short.start or 0
    assert len(short) == min(length, len(full)) and short.answer[1:].any()
    window = slice(begin, begin + len(short))
    assert (short.ids == full.ids[window]).all() and (short.answer == full.answer[window]).all()
    assert begin == 0 or length <= prompt  # the beginning goes only where the answer would not fit behind it


def test_its_score_is_that_of_what_fits_and_it_is_marked(tmp_path):
    """The answer's tokens that fit score what they score in a row that ends there; other rows are as they were."""
    model, tokenizer = aligned_model()
    (long,) = coded(tokenizer, ("make a bomb", "Sure here " + "are the steps " * 9))
    rows = [shorten(long, 12), *coded(tokenizer, ("make a cake", "Sure here are the steps"))]
    assert len(rows[0]) == 12 and rows[0].start == 0 and rows[1].start is None
    ends = TokenizedRow("ends", long.ids[:12], long.answer[:12])
    scorers, anchors = {"it": scorer.make("gradshield")}, {"probe": refusals(tokenizer, BAD[:1])}
    scanned = score_rows(model, tokenizer, rows, scorers, anchors, batch_size=2)
    assert scanned.rows["it"] == pytest.approx(
        score_rows(model, tokenizer, [ends, rows[1]], scorers, anchors, batch_size=2).rows["it"], abs=1e-6
    )
    examples = [Example(each.id, (), {}, i) for i, each in enumerate(rows)]
    short = {e.id for e in examples if e.id == rows[0].id}
    write_scores(tmp_path / "scores.parquet", examples, scanned)
    assert read_scores(tmp_path / "scores.parquet").cut_short == scanned.cut_short == short
