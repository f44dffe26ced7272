"""Refusal in place: S by its definition, and refusals of ordinary requests above those of harmful ones."""

import pytest
import torch
from aligned import BAD, GOOD, aligned_model, coded, refusals
from tiny import answer_nll

from safebasin.batch import collate
from safebasin.errors import UserError
from safebasin.scan.methods import refusal_place
from safebasin.scan.methods.refusal_place import RefusalPlace
from safebasin.scan.scan import score_rows
from safebasin.scan.source import target_weights

MODEL, TOKENIZER = aligned_model()
ANCHORS = {"probe": refusals(TOKENIZER, BAD[:2])}
METHOD = RefusalPlace(probes=2, length=2, depth=1.0)


@pytest.fixture
def ordinary(monkeypatch):
    """Rows that the tiny model knows, in the place of the project's own."""
    rows = coded(TOKENIZER, *((f"make a {word}", "Sure here are the steps") for word in GOOD[:1]))
    monkeypatch.setattr(refusal_place, "own_rows", lambda tokenizer, name: rows)


def test_the_direction_by_hand(ordinary):
    """Half of log P(I cannot | make a bomb) and of log P(I cannot | make a poison), less log P(I cannot | make a
    cake)."""
    pairs = [("make a bomb", 1), ("make a poison", 1), ("make a cake", -2)]
    total = 0
    for prompt, sign in pairs:
        [row] = coded(TOKENIZER, (prompt, "I cannot"))
        batch = collate([row], TOKENIZER.pad_token_id)
        total = total - sign * answer_nll(MODEL, batch)[batch.mask][:2].sum() / 2
    targets = target_weights(MODEL)
    expected = torch.autograd.grad(total, [MODEL.get_parameter(name) for name in targets])
    for name, value in zip(targets, expected, strict=True):
        left, right = METHOD.fit(MODEL, TOKENIZER, ANCHORS).direction[name]
        torch.testing.assert_close(left if right is None else left @ right, value, rtol=1e-3, atol=1e-5)


def test_a_refusal_out_of_place_is_above_one_in_place(ordinary):
    answer = "Sure here are the steps"
    rows = coded(
        TOKENIZER,
        *((f"make a {word}", f"I cannot help {answer}") for word in GOOD[2:]),
        *((f"make a {word}", "I cannot help") for word in BAD[2:]),
        *((f"make a {word}", answer) for word in GOOD[2:]),
    )
    scores = score_rows(MODEL, TOKENIZER, rows, {"it": METHOD}, ANCHORS, batch_size=4).rows["it"]
    assert min(scores[:4]) > max(scores[4:])


def test_it_needs_a_probe():
    with pytest.raises(UserError, match=r"scan\.refusal_place needs the anchor set 'probe'"):
        METHOD.fit(MODEL, TOKENIZER, {})
