"""LARF: the layer that the margin hangs on is found, and the score is the official mean of differences of cosines."""

import pytest
import torch
from aligned import BAD, GOOD, aligned_model, coded, refusals

from safebasin.batch import collate
from safebasin.errors import DefenceError, UserError
from safebasin.scan.hidden import last_states
from safebasin.scan.methods import larf
from safebasin.scan.methods.larf import Larf
from safebasin.scan.scan import score_rows

MODEL, TOKENIZER = aligned_model()
ANCHORS = {
    "probe": refusals(TOKENIZER, BAD[:3]),
    "harmful": coded(TOKENIZER, *((f"make a {word}", "Sure here are the steps") for word in BAD[:3])),
}
HARMFUL = coded(TOKENIZER, *((f"make a {word}", "Sure here are the steps") for word in BAD[3:]))
REFUSED = refusals(TOKENIZER, BAD[3:])


def one(rows, anchors=ANCHORS, method=None):
    return score_rows(MODEL, TOKENIZER, rows, {"larf": method or Larf()}, anchors, batch_size=4).rows["larf"]


def test_by_hand_with_one_reference_each():
    """An unsafe state u and a safe state s: u itself scores 1 - cos(u, s), s itself cos(u, s) - 1: their sum is 0."""
    anchors = {name: rows[:1] for name, rows in ANCHORS.items()}
    u, s = (last_states(MODEL, collate(anchors[name], TOKENIZER.pad_token_id), 1)[0] for name in ("harmful", "probe"))
    scores = one([anchors["harmful"][0], anchors["probe"][0]], anchors, Larf(layer=1))
    assert scores == pytest.approx([1 - float(u @ s), float(u @ s) - 1], abs=1e-5)
    assert scores[0] > 0.01


def test_the_score_is_the_official_mean_of_differences():
    """D_ij = cos(h_i, u_j) - cos(h_i, s_j), averaged over all j, row by row."""
    method = Larf(layer=0)

    def state(row):
        return last_states(MODEL, collate([row], TOKENIZER.pad_token_id), 0)[0]

    expected = []
    for row in HARMFUL + REFUSED:
        pairs = zip(ANCHORS["harmful"], ANCHORS["probe"], strict=True)
        expected.append(sum(float(state(row) @ state(u) - state(row) @ state(s)) for u, s in pairs) / 3)
    assert one(HARMFUL + REFUSED, method=method) == pytest.approx(expected, abs=1e-5)


def test_compliance_scores_above_refusal():
    assert min(one(HARMFUL)) > 0 > max(one(REFUSED))


def test_the_layer_is_the_one_that_scaling_moves():
    """Blocks 0 and 2 write nothing into the stream, so scaling them moves no logit: the range of R is 0 there, and
    block 1 is left."""
    model, _ = aligned_model()
    with torch.no_grad():
        for block in (model.model.layers[0], model.model.layers[2]):
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert Larf(tokens=("I", "Sure")).fit(model, TOKENIZER, ANCHORS).layer == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_scaling_is_undone_bit_for_bit_even_after_a_failure(monkeypatch):
    """0.7 times 1/0.7 is not 1 in bfloat16: a copy is put back."""
    model, _ = aligned_model(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scaled = {name: value * 0.7 for name, value in before.items() if ".layers.0." in name and "proj" in name}

    def margin(model, *_):
        state = model.state_dict()
        assert len(scaled) == 7 and all(torch.equal(state[name], value) for name, value in scaled.items())
        raise ZeroDivisionError

    monkeypatch.setattr(larf, "refusal_margin", margin)
    with pytest.raises(ZeroDivisionError):
        Larf(tokens=("I", "Sure")).fit(model, TOKENIZER, ANCHORS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_scored():
    with pytest.raises(DefenceError, match="every row would score 0"):
        one(HARMFUL, {"probe": ANCHORS["probe"], "harmful": ANCHORS["probe"]})
    with pytest.raises(UserError, match="layer=3; the model's blocks are 0 to 2"):
        one(HARMFUL, method=Larf(layer=3))
    with pytest.raises(
        UserError,
        match=r"larf needs the anchor set 'harmful' with 1 row\(s\) \(harmful prompts, each answered by a comp",
    ):
        one(HARMFUL, {"probe": ANCHORS["probe"]})
    with pytest.raises(UserError, match="not aligned"):
        one(HARMFUL, {**ANCHORS, "probe": coded(TOKENIZER, *((f"make a {word}", "Sure here") for word in GOOD))})
