"""How tokens join to the score of a turn: by hand, and against a plain loop over drawn turns."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safebasin.scan.directional import by_turn


def test_two_turns_by_hand():
    """Openings of two tokens, a token counts 1.5 times. The first turn: 1.5 x 2 = 3 and its opening 2 + 2 = 4, behind
    it 1.5 x 5; the token 9 ends it and counts 0. The second: 1.5 x -1 is below -1 + 6 = 5, and 1.5 x 6 = 9 above."""
    slopes = torch.tensor([[7.0, 2, 2, 5, 9, 7, -1, 6, 8]])
    mask = torch.tensor([[False, True, True, True, True, False, True, True, True]])
    expected = torch.tensor([[0, 4, 4, 7.5, 0, 0, 5, 9, 0]])
    torch.testing.assert_close(by_turn(slopes, mask, 2, 1.5), expected)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=6), max_size=3), min_size=1, max_size=3),
    st.integers(1, 5),
    st.sampled_from([0.5, 1.0, 1.5]),
)
def test_it_is_a_loop_over_turns(rows, opening, weight):
    """Rows of turns, one token that is not learned before each; shorter rows are padded on the left."""
    flat, expected = [], []
    for turns in rows:
        values = [[0.0]]
        for turn in turns:
            learned = [*turn[:-1], 0]  # the last one ends the turn
            total = sum(learned[:opening])
            values += [
                [max(weight * x, total) if k < opening else weight * x for k, x in enumerate(learned[:-1])],
                [0, 0],
            ]
        expected.append(list(itertools.chain(*values)))
        flat.append([None, *(x for turn in turns for x in (*turn, None))])
    width = max(map(len, flat))
    flat, expected = (
        [[fill] * (width - len(row)) + row for row in each] for fill, each in ((None, flat), (0, expected))
    )
    slopes, mask = (
        torch.tensor([[x or 0.0 for x in row] for row in flat]),
        torch.tensor([[x is not None for x in row] for row in flat]),
    )
    actual = by_turn(slopes, mask, opening, weight)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype))


def test_weak_tokens_add_up_in_an_opening_alone():
    """Four tokens of 1 that open a turn make 4; behind the opening they stay 1 each."""
    slopes, mask = torch.ones(2, 8), torch.ones(2, 8, dtype=torch.bool)
    slopes[1, :4] = -1
    assert by_turn(slopes, mask, 4, 1.0).amax(1).tolist() == [4, 1]
