"""Similarity to the alignment rows: the mean of the K largest cosines."""

import pytest
import torch
from aligned import BAD, GOOD, aligned_model, coded, refusals
from torch.nn import functional

from safebasin.errors import UserError
from safebasin.scan.methods.similarity import Similarity
from safebasin.scan.scan import score_rows

MODEL, TOKENIZER = aligned_model()
ANCHORS = {"probe": refusals(TOKENIZER, BAD[:4])}
ROWS = coded(TOKENIZER, *((f"make a {word}", "Sure here are the steps") for word in BAD + GOOD))


def one(rows, method, anchors=ANCHORS):
    return score_rows(MODEL, TOKENIZER, rows, {"it": method}, anchors, batch_size=5).rows["it"]


def test_by_hand_an_alignment_row_has_itself_beside_it():
    """With K = 1 the nearest alignment row of an alignment row is itself: 1. With one alignment row only, K = 10 is
    that one: 1."""
    assert one(ANCHORS["probe"], Similarity(top=1)) == pytest.approx([1.0] * 4, abs=1e-5)
    assert one(ANCHORS["probe"][:1], Similarity(), {"probe": ANCHORS["probe"][:1]}) == pytest.approx([1.0], abs=1e-5)


@pytest.mark.parametrize("top", [1, 3, 10])
def test_the_mean_of_the_largest_cosines(top):
    """From transformers' own last hidden state, rows one by one."""

    def f(row):
        last = max(k for k, learned in enumerate(row.answer) if learned)
        return MODEL.model(torch.tensor(row.ids)[None]).last_hidden_state[0, last].detach()

    expected = []
    for row in ROWS:
        cosines = sorted(
            (functional.cosine_similarity(f(row), f(z), dim=0).item() for z in ANCHORS["probe"]), reverse=True
        )
        expected.append(sum(cosines[:top]) / len(cosines[:top]))
    assert one(ROWS, Similarity(top=top)) == pytest.approx(expected, abs=1e-5)


def test_the_sign_and_its_limit():
    """High = like the alignment data = harmful, by the paper. So a good refusal scores above a harmful row: kept as a
    fact."""
    harmful = one(ROWS[:6], Similarity())
    refused = one(refusals(TOKENIZER, BAD[4:]), Similarity())
    assert min(refused) > max(harmful)


def test_the_alignment_rows_of_the_run_come_before_the_probes():
    """Of a row that is among the alignment rows the nearest one is itself; probes are of no account beside them."""
    align = refusals(TOKENIZER, BAD[4:])
    assert one(align, Similarity(top=1), ANCHORS | {"align": align}) == pytest.approx([1.0] * 2, abs=1e-5)
    assert one(ANCHORS["probe"], Similarity(top=1), ANCHORS | {"align": align}) == one(
        ANCHORS["probe"], Similarity(top=1), {"align": align}
    )


def test_without_alignment_rows():
    with pytest.raises(UserError, match="similarity needs the anchor set 'probe'"):
        one(ROWS, Similarity(), {"safe": ROWS})
