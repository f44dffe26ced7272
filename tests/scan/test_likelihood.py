"""Refusal loss and opening margin: against finite differences of what they claim to predict, and by hand."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from aligned import BAD, GOOD, aligned_model, coded, refusals
from tiny import answer_nll, gradient_of
from torch import nn

from safebasin.batch import collate
from safebasin.encode import TokenizedRow
from safebasin.errors import UserError
from safebasin.scan.methods.gradshield import GradShield
from safebasin.scan.methods.opening_margin import OpeningMargin
from safebasin.scan.methods.refusal_loss import RefusalLoss
from safebasin.scan.probe import answered, log_likelihood, opening_ids, opening_margin
from safebasin.scan.scan import score_rows
from safebasin.scan.source import MODULES, target_weights

MODEL, TOKENIZER = aligned_model()
ANCHORS = {"probe": refusals(TOKENIZER)}
OPENER = "Sure here are"
METHODS = {
    "refusal_loss": RefusalLoss(depth=1.0),
    "opening_margin": OpeningMargin(depth=1.0, compliance=OPENER, tokens=3, probes=2),
}
HARMFUL = coded(TOKENIZER, *((f"make a {word}", "Sure here are the steps") for word in BAD[4:]))
HARMLESS = coded(TOKENIZER, *((f"make a {word}", "Sure here are the steps") for word in GOOD))
REFUSED = refusals(TOKENIZER, BAD[4:])
each_method = pytest.mark.parametrize("name", METHODS)


class OneLayer(nn.Module):
    """One-hot tokens through one linear layer: behind token 0 the logits are (a, 0), behind token 1 they are (0, 0)."""

    def __init__(self, a=0.0):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(2, 2, bias=False)})])
        with torch.no_grad():
            self.layers[0]["q_proj"].weight.copy_(torch.tensor([[a, 0.0], [0.0, 0.0]]))

    def forward(self, input_ids, logits_to_keep, **_):
        logits = self.layers[0]["q_proj"](nn.functional.one_hot(input_ids, 2).float())
        return SimpleNamespace(logits=logits[:, logits_to_keep])


def tokenized(*ids, prompt=1):
    return TokenizedRow("row", ids, (False,) * prompt + (True,) * (len(ids) - prompt))


def plain_log_p(model, row):
    """log P(answer | prompt) of one row, a token at a time, on the bare model."""
    logs = model(torch.tensor(row.ids)[None]).logits[0].double().log_softmax(-1)
    return sum(
        logs[t - 1, token] for t, (token, learned) in enumerate(zip(row.ids, row.answer, strict=True)) if learned
    )


def plain_s(name, model):
    """S by its definition."""
    if name == "gradshield":
        row = ANCHORS["probe"][0]
        logits = model(torch.tensor(row.ids[: row.first_answer])[None]).logits[0, -1]
        refusal, compliance = TOKENIZER.convert_tokens_to_ids(["I", "Sure"])
        return logits[refusal] - logits[compliance]
    if name == "refusal_loss":
        rows = ANCHORS["probe"][:4]
        return sum(plain_log_p(model, row) for row in rows) / sum(sum(row.answer) for row in rows)
    opener = TOKENIZER(OPENER, add_special_tokens=False)["input_ids"]
    margins = []
    for row in ANCHORS["probe"][:2]:
        first = row.first_answer
        ways = [(*row.ids[:first], *opening) for opening in (row.ids[first : first + 3], opener)]
        refusal, compliance = (TokenizedRow("", ids, (False,) * first + (True,) * 3) for ids in ways)
        margins.append(plain_log_p(model, refusal) - plain_log_p(model, compliance))
    return sum(margins) / 2


@pytest.mark.parametrize("depth", [1.0, 0.3])
@pytest.mark.parametrize("name", ["gradshield", *METHODS])
def test_every_token_is_the_product_of_two_plain_gradients(name, depth):
    """score_t = <grad CE_t, grad S>, both by one ordinary backward on the bare model, over the weights that ``depth``
    names."""
    method = dataclasses.replace(METHODS.get(name, GradShield()), depth=depth)
    fitted, targets = method.fit(MODEL, TOKENIZER, ANCHORS), target_weights(MODEL, depth=depth)
    v = gradient_of(MODEL, None, lambda m, _: plain_s(name, m), targets)
    rows = [HARMFUL[0], HARMLESS[0], REFUSED[0]]
    batch = collate(rows, TOKENIZER.pad_token_id)
    scores, expected = method.score(MODEL, batch, fitted), torch.zeros(batch.mask.shape)
    for i, row in enumerate(rows):
        one = collate([row], TOKENIZER.pad_token_id)
        for k, place in enumerate(batch.mask[i].nonzero()[:, 0].tolist()):
            g = gradient_of(MODEL, one, lambda m, b, k=k: answer_nll(m, b)[b.mask][k], targets)
            expected[i, place] = g @ v
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_their_fields_and_defaults():
    """One body, three objectives: each has the body's fields and its own."""
    body = {"depth": 0.25, "modules": MODULES}
    own = {"reduction": "sum", "lora_rank": None, "seed": 0, "tokens": None}
    assert dataclasses.asdict(GradShield()) == body | {"probes": 1} | own
    assert dataclasses.asdict(OpeningMargin()) == body | {"probes": 4, "tokens": 4, "compliance": "Sure, here is"}
    assert dataclasses.asdict(RefusalLoss()) == body | {"probes": 4}


@each_method
def test_the_score_is_the_first_order_loss_of_s(name):
    """S(theta - eta grad L) = S(theta) - eta score + O(eta^2), by a central difference, in float64 but for Llama's
    norms, which round to float32: so the error of the slope is about 1e-8 / eta, and 7e-8 / eta on some processors."""
    model, _ = aligned_model(torch.float64)
    method = METHODS[name]
    fitted, targets = method.fit(model, TOKENIZER, ANCHORS), target_weights(model)
    for row, eta in ((HARMFUL[0], 3e-5), (HARMLESS[0], 1e-3), (REFUSED[0], 1e-3)):
        batch = collate([row], TOKENIZER.pad_token_id)
        score = method.score(model, batch, fitted).sum().item()
        step, moved = gradient_of(model, batch, lambda m, b: answer_nll(m, b).sum(), targets), []
        with torch.no_grad():
            for sign in (-1, 1, 1, -1):  # to -eta, back, to +eta, back
                for weight, direction in step.items():
                    model.get_parameter(weight).add_(sign * eta * direction)
                moved.append(plain_s(name, model).item())
        assert (moved[0] - moved[2]) / (2 * eta) == pytest.approx(-score, rel=1e-3, abs=1e-7 / eta)


@each_method
def test_harm_comes_first_and_the_tokens_add_up(name):
    scanned = score_rows(MODEL, TOKENIZER, HARMFUL + HARMLESS + REFUSED, {"it": METHODS[name]}, ANCHORS, batch_size=4)
    scores, parts = scanned.rows["it"], scanned.tokens["it"]
    assert min(scores[: len(HARMFUL)]) > 50 * max(abs(score) for score in scores[len(HARMFUL) :])
    assert [len(part) for part in parts] == [sum(row.answer) for row in HARMFUL + HARMLESS + REFUSED]
    assert [math.fsum(part) for part in parts] == pytest.approx(scores)


def test_refusal_loss_by_hand():
    """W = 0, so every next token has p = 1/2. The refusal 0, 0 behind the prompt 0: both tokens have X = e_0 and the
    mean of their log P has grad S = (e_0 - p) e_0^T = [[1/2, 0], [-1/2, 0]]. The row 0 -> 1 has grad L = (p - e_1)
    e_0^T, the same matrix, so it scores 1/4 + 1/4 = 1/2, and the row 0 -> 0 scores -1/2. A sum over the refusal's
    tokens would give 1."""
    method, model = RefusalLoss(probes=1), OneLayer()
    fitted = method.fit(model, SimpleNamespace(pad_token_id=0), {"probe": [tokenized(0, 0, 0)]})
    assert method.score(model, collate([tokenized(0, 1), tokenized(0, 0)], 0), fitted).tolist() == [[0.5], [-0.5]]


def test_opening_margin_by_hand():
    """Behind 0 the logits are (2, 0), so log P(0) - log P(1) = 2. Of two tokens each: log P(0, 0) = 2 log s(2), log
    P(1, 0) = log s(-2) + log 1/2, with s the logistic function: -0.2539 + 2.1269 + 0.6931 = 2.5662."""
    model = OneLayer(2.0)
    assert opening_margin(model, collate([tokenized(0, 0), tokenized(0, 1)], 0)).item() == pytest.approx(2.0)
    assert opening_margin(model, collate([tokenized(0, 0, 0), tokenized(0, 1, 0)], 0)).item() == pytest.approx(
        2.5662, abs=1e-4
    )


def test_log_likelihood_is_one_number_a_row():
    """Rows of unlike length in one batch, and an answer in two parts."""
    rows = [*HARMFUL, TokenizedRow("two", (1, 5, 6, 7, 8, 9), (False, True, False, False, True, True))]
    logs = log_likelihood(MODEL, collate(rows, TOKENIZER.pad_token_id))
    torch.testing.assert_close(
        logs.double(), torch.stack([plain_log_p(MODEL, row) for row in rows]), rtol=1e-4, atol=1e-4
    )


def test_another_answer_in_its_place():
    row = TokenizedRow("r", (1, 2, 3, 4, 5, 6, 7), (False, False, True, True, False, False, True))
    assert answered(row, 1) == TokenizedRow("r", (1, 2, 3), (False, False, True))
    assert answered(row, 9) == TokenizedRow(
        "r", (1, 2, 3, 4), (False, False, True, True)
    )  # its first answer, and no further
    assert answered(row, (8, 9, 8)) == TokenizedRow("r", (1, 2, 8, 9, 8), (False, False, True, True, True))
    assert opening_ids(TOKENIZER, OPENER) == tuple(TOKENIZER.convert_tokens_to_ids(OPENER.split()))


def test_what_the_user_can_mend():
    with pytest.raises(UserError, match="does not refuse the probe; it is not aligned"):
        OpeningMargin(compliance="I cannot help").fit(MODEL, TOKENIZER, {"probe": HARMFUL * 2})
    with pytest.raises(UserError, match="'Sure, here is' is not whole tokens where an answer starts"):
        OpeningMargin().fit(MODEL, TOKENIZER, ANCHORS)
    for method in METHODS.values():
        with pytest.raises(UserError, match="needs the anchor set 'probe'"):
            method.fit(MODEL, TOKENIZER, {})
        with pytest.raises(UserError, match="anchor row mute has no answer token"):
            method.fit(MODEL, TOKENIZER, {"probe": [TokenizedRow("mute", (1, 2, 3), (False,) * 3)] * 4})
