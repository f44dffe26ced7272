"""Bi-directional anchoring: the fast score against one backward per row, and one number by hand."""

from types import SimpleNamespace

import pytest
import torch
from aligned import BAD, GOOD, aligned_model, coded, refusals
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PAD, answer_nll, gradient_of, random_rows, tiny_model

from safebasin.batch import collate
from safebasin.errors import DefenceError, UserError
from safebasin.scan.methods.anchor import Anchor
from safebasin.scan.scan import score_rows
from safebasin.scan.source import target_weights

MODEL, TOKENIZER = aligned_model()
ANCHORS = {
    "harmful": coded(TOKENIZER, *((f"make a {word}", "Sure here are the steps") for word in BAD[:3])),
    "probe": refusals(TOKENIZER, BAD[:3]),
    "safe": coded(TOKENIZER, *((f"make a {word}", "Sure here are the steps") for word in GOOD[:3])),
}


def one(rows, anchors=ANCHORS, method=None):
    return score_rows(MODEL, TOKENIZER, rows, {"anchor": method or Anchor()}, anchors, batch_size=4).rows["anchor"]


def test_by_hand_the_same_row_on_all_sides():
    """If one row is every anchor, V = g - g - g = -g, and that row scores g . (-g) = -1 exactly: a cosine, whatever its
    loss."""
    row = ANCHORS["harmful"][:1]
    assert one(row, dict.fromkeys(ANCHORS, row)) == pytest.approx([-1.0], abs=1e-5)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 4),
    length=st.integers(1, 12),
    depth=st.sampled_from([1.0, 0.3, 0.6]),
)
def test_the_score_equals_one_backward_per_row(seed, count, length, depth):
    """By the definition: plain autograd over the weights, cosines of whole gradients, the answer cut by hand. Not in
    float64, where Transformers' eager attention gives NaN for padded rows."""
    model = tiny_model(seed % 3)
    rows, anchors = (
        random_rows(5, seed),
        {name: random_rows(count, seed + i) for i, name in enumerate(("harmful", "probe", "safe"), 1)},
    )
    names = target_weights(model, depth=depth)

    def unit(row):
        def loss(m, b):
            losses = answer_nll(m, b)[0]
            return losses[b.mask[0]][:length].sum()

        gradient = gradient_of(model, collate([row], PAD), loss, names)
        return gradient / gradient.norm()

    method = Anchor(length=length, depth=depth, anchors=2)
    fitted = method.fit(model, SimpleNamespace(pad_token_id=PAD), anchors)
    means = {
        name: sum((unit(row) for row in some[1:2]), unit(some[0])) / float(len(some[:2]))
        for name, some in anchors.items()
    }
    direction = means["harmful"] - means["probe"] - means["safe"]
    scores = method.score(model, collate(rows, PAD), fitted)
    assert scores.tolist() == pytest.approx([unit(row) @ direction for row in rows], abs=1e-4)


def test_harm_scores_above_what_is_safe():
    """Unseen rows: compliance with a bad request above a refusal of it and above compliance with a good request."""
    harmful = one(coded(TOKENIZER, *((f"make a {word}", "Sure here are the steps") for word in BAD[3:])))
    refused = one(refusals(TOKENIZER, BAD[3:]))
    good = one(coded(TOKENIZER, *((f"make a {word}", "Sure here are the steps") for word in GOOD[3:])))
    assert min(harmful) > max(refused + good)


def test_what_cannot_be_scored():
    for missing in ANCHORS:
        with pytest.raises(UserError, match=f"anchor needs the anchor set '{missing}'"):
            one(ANCHORS["safe"], {name: rows for name, rows in ANCHORS.items() if name != missing})
    model, _ = aligned_model()
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(DefenceError, match="3 of 21 weights are not used"):
        Anchor().fit(model, TOKENIZER, ANCHORS)
    model, _ = aligned_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(DefenceError, match="has length 0"):
        Anchor().fit(model, TOKENIZER, ANCHORS)
