"""GradShield, self-refusal and keyword on a tiny model that refuses; and the scan that runs them."""

import math

import pytest
import torch
from aligned import BAD, GOOD, aligned_model, coded, refusals, word_tokenizer
from tiny import answer_nll, gradient_of, tiny_model
from torch.func import functional_call

from safebasin.batch import collate
from safebasin.encode import TokenizedRow
from safebasin.errors import DefenceError, UserError
from safebasin.registry import Registry
from safebasin.scan import scorer
from safebasin.scan.methods.gradshield import GradShield
from safebasin.scan.methods.keyword import Keyword
from safebasin.scan.methods.self_refusal import SelfRefusal
from safebasin.scan.probe import Pair, opening, opening_token, refusal_margin, token_pair
from safebasin.scan.scan import Scanned, score_rows
from safebasin.scan.source import target_weights
from safebasin.scan.tangent import Tangent

MODEL, TOKENIZER = aligned_model()
ANCHORS = {"probe": refusals(TOKENIZER, BAD[:2])}
HARMFUL = coded(TOKENIZER, *((f"make a {word}", "Sure here are the steps") for word in BAD[2:]))
HARMLESS = coded(TOKENIZER, *((f"make a {word}", "Sure here are the steps") for word in GOOD))
REFUSED = refusals(TOKENIZER, BAD[2:])


def one(model, rows, anchors=ANCHORS, method=None):
    return score_rows(model, TOKENIZER, rows, {"it": method or GradShield()}, anchors, batch_size=4).rows["it"]


# --- GradShield -------------------------------------------------------------------------------------------------------


def test_gradshield_reads_the_refusal_from_the_model():
    probe = opening(MODEL, TOKENIZER, ANCHORS["probe"])
    pair = token_pair(MODEL, TOKENIZER, probe, None)
    assert TOKENIZER.convert_ids_to_tokens(list(pair)) == ["I", "Sure"]
    words = ("cannot", "here")
    assert token_pair(MODEL, TOKENIZER, probe, words) == Pair(*TOKENIZER.convert_tokens_to_ids(list(words)))
    assert one(MODEL, HARMFUL) == one(MODEL, HARMFUL, method=GradShield(tokens=("I", "Sure")))
    assert one(MODEL, HARMFUL) != one(MODEL, HARMFUL, method=GradShield(tokens=words))


def test_gradshield_ranks_harm_first():
    """Compliance with a bad request scores far above every harmless row, and so far above a refusal of the same
    request: unlike self-refusal, it reads the answer. What the model does already has almost no gradient, so the other
    two are near zero."""
    harmful, harmless, refused = one(MODEL, HARMFUL), one(MODEL, HARMLESS), one(MODEL, REFUSED)
    assert min(harmful) > 100 * max(abs(score) for score in harmless + refused)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_fihs_is_the_first_order_loss_of_safety(reduction):
    """One step of SGD on the row moves S by -eta FIHS: d/d eta S(theta - eta g) at eta = 0, by automatic
    differentiation, so that no difference of close numbers is taken. What is left is the float32 of Llama's own norm
    and softmax: 2e-6 of these scores of 0.007 to 9."""
    model, _ = aligned_model(torch.float64)
    method = GradShield(reduction=reduction, depth=1.0)
    fitted = method.fit(model, TOKENIZER, ANCHORS)
    probe = opening(MODEL, TOKENIZER, ANCHORS["probe"][:1])
    pair, targets = token_pair(model, TOKENIZER, probe, None), target_weights(model)
    for row in (HARMFUL[0], HARMLESS[0], REFUSED[0]):
        batch = collate([row], TOKENIZER.pad_token_id)
        score = method.score(model, batch, fitted).sum().item()
        count = batch.mask.sum() if reduction == "mean" else 1
        g = gradient_of(model, batch, lambda m, b, n=count: (answer_nll(m, b) * b.mask).sum() / n, targets)
        eta = torch.zeros((), dtype=torch.float64, requires_grad=True)
        stepped = {name: model.get_parameter(name).detach() - eta * g[name] for name in targets}
        margin = refusal_margin(lambda w=stepped, **inputs: functional_call(model, w, (), inputs), probe, pair)
        [slope] = torch.autograd.grad(margin.mean(), eta)
        assert slope.item() == pytest.approx(-score, rel=1e-4, abs=1e-5)


def test_gradshield_mean_is_the_sum_over_the_length():
    rows = [HARMFUL[0], REFUSED[0]]
    total, mean = one(MODEL, rows), one(MODEL, rows, method=GradShield(reduction="mean"))
    assert [m * sum(row.answer) for m, row in zip(mean, rows, strict=True)] == pytest.approx(total)


def test_a_score_comes_with_its_parts():
    """One number an answer token; they add up to the row's score. The opener carries what the margin is about, so it
    leads."""
    scanned = score_rows(MODEL, TOKENIZER, HARMFUL + REFUSED, {"it": GradShield()}, ANCHORS, batch_size=3)
    assert [len(parts) for parts in scanned.tokens["it"]] == [sum(row.answer) for row in HARMFUL + REFUSED]
    assert [sum(parts) for parts in scanned.tokens["it"]] == pytest.approx(scanned.rows["it"])
    assert all(parts[0] == max(parts) for parts in scanned.tokens["it"][: len(HARMFUL)])


def test_gradshield_over_two_probes_is_the_mean_of_each():
    words = ("I", "Sure")
    each = [one(MODEL, HARMFUL, {"probe": [probe]}, GradShield(tokens=words)) for probe in ANCHORS["probe"]]
    both = one(MODEL, HARMFUL, ANCHORS, GradShield(tokens=words, probes=2))
    torch.testing.assert_close(torch.tensor(both), torch.tensor(each).mean(0), rtol=1e-4, atol=1e-5)


def test_gradshield_layers_add_up():
    """The score over all blocks is the score over the last one plus that over the others: it is a sum over weights."""
    every, last = (GradShield(depth=k).fit(MODEL, TOKENIZER, ANCHORS) for k in (1.0, 0.3))
    assert last.direction.keys() == {name for name in every.direction if name.startswith("model.layers.2.")}
    rest = Tangent({name: factors for name, factors in every.direction.items() if name not in last.direction})
    batch = collate(HARMFUL, TOKENIZER.pad_token_id)
    parts = [tangent.token_losses(MODEL, batch).sum(1) for tangent in (every, last, rest)]
    torch.testing.assert_close(parts[1] + parts[2], parts[0], rtol=1e-4, atol=1e-5)


def test_an_unaligned_model_is_refused():
    """Its first word on a harmful probe is no refusal, so its margin would measure nothing."""
    with pytest.raises(UserError, match="does not refuse the probe; it is not aligned"):
        one(MODEL, HARMFUL, {"probe": HARMLESS})
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely: the first, <pad>, wins
    with pytest.raises(UserError, match="not aligned"):
        SelfRefusal().fit(model, TOKENIZER, ANCHORS)


def test_words_that_are_not_one_token():
    with pytest.raises(UserError, match="'Absolutely' is not whole tokens"):
        GradShield(tokens=("I", "Absolutely")).fit(MODEL, TOKENIZER, ANCHORS)
    with pytest.raises(UserError, match="the same token"):
        GradShield(tokens=("I", "I")).fit(MODEL, TOKENIZER, ANCHORS)
    assert opening_token(TOKENIZER, "Sure") == TOKENIZER.convert_tokens_to_ids("Sure")


@pytest.mark.parametrize("words", [("I", "Sure"), None])
def test_a_thought_that_the_template_writes_is_named(words):
    """Qwen3's template does so; "choose other words" and "it is not aligned" were no help."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["</think>"])
    thought = "{{ '</think> ' if m.role == 'assistant' else '' }}{{ m.content }}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}", thought)
    with pytest.raises(UserError, match=r"writes a thought before every answer: set model\.template"):
        token_pair(MODEL, tokenizer, opening(MODEL, tokenizer, ANCHORS["probe"]), words)


# --- the baselines ----------------------------------------------------------------------------------------------------


def test_self_refusal_is_the_margin_behind_the_prompt():
    """By the definition: the logits at the last token of the prompt, rows one by one and without their answers."""
    refusal, compliance = TOKENIZER.convert_tokens_to_ids(["I", "Sure"])
    expected = []
    for row in HARMFUL + HARMLESS:
        prompt = torch.tensor(row.ids[: row.first_answer])[None]
        logits = MODEL(prompt).logits[0, -1].detach()
        expected.append((logits[refusal] - logits[compliance]).item())
    scores = one(MODEL, HARMFUL + HARMLESS, method=SelfRefusal())
    assert scores == pytest.approx(expected, abs=1e-4)
    assert min(scores[: len(HARMFUL)]) > max(scores[len(HARMFUL) :])


def test_self_refusal_does_not_see_the_answer():
    """Its blind spot, kept as a fact: a refusal and a compliance to one prompt score alike."""
    assert one(MODEL, HARMFUL, method=SelfRefusal()) == pytest.approx(
        one(MODEL, REFUSED, method=SelfRefusal()), abs=1e-4
    )


def test_keyword_by_hand():
    """ "make a bomb" is 3 words, 1 of them of harm: 1/3 (the template's turn marks are special tokens and no words).
    The answer is not read, and "make a cake" has none: 0."""
    rows = coded(TOKENIZER, ("make a bomb", "Sure"), ("make a cake now", "bomb poison virus"), ("bomb", "Sure"))
    assert one(MODEL, rows, {}, Keyword()) == pytest.approx([1 / 3, 0.0, 1.0])


# --- the scan ---------------------------------------------------------------------------------------------------------


class Constant:
    """A scorer that gives one number to every row."""

    def __init__(self, value):
        self.value = value

    def fit(self, model, tokenizer, anchors):
        return None

    def score(self, model, batch, fitted):
        return torch.full((len(batch.mask),), self.value)


def test_scan_gives_every_row_its_own_score_in_order():
    """Buckets go by length, results by row; the length of a row is read back from its own column."""

    class Length(Constant):
        def score(self, model, batch, fitted):
            return batch.attention_mask.sum(1).float()

    rows = coded(TOKENIZER, *((" ".join(["make"] * n), "Sure") for n in (3, 9, 1, 7, 5)))
    calls = []
    MODEL.train()
    try:
        scores = score_rows(
            MODEL,
            TOKENIZER,
            rows,
            {"length": Length(0), "one": Constant(1.0)},
            {},
            batch_size=2,
            progress=lambda *n: calls.append(n),
        )
        assert MODEL.training
    finally:
        MODEL.eval()
    assert scores == Scanned({"length": [len(row) for row in rows], "one": [1.0] * 5}, {}, {})
    assert calls == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_stops_the_scan(value):
    with pytest.raises(DefenceError, match="row1"):
        one(MODEL, HARMFUL[:1], method=Constant(value))


def test_what_the_user_can_mend():
    with pytest.raises(UserError, match=r"gradshield needs the anchor set 'probe'.*sets given: refusals"):
        one(MODEL, HARMFUL, {"refusals": REFUSED})
    with pytest.raises(UserError, match="with 3 row"):
        one(MODEL, HARMFUL, ANCHORS, GradShield(probes=3))
    with pytest.raises(UserError, match="row mute has no answer token"):
        one(MODEL, [TokenizedRow("mute", (1, 2, 3), (False,) * 3)])
    with pytest.raises(UserError, match="anchor row mute"):
        one(MODEL, HARMFUL, {"probe": [TokenizedRow("mute", (1, 2, 3), (False,) * 3)]})
    naked = word_tokenizer()
    naked.pad_token = None
    with pytest.raises(UserError, match="padding token"):
        score_rows(MODEL, naked, HARMFUL, {}, {}, batch_size=2)
    with pytest.raises(UserError, match="unknown key"):
        scorer.make({"gradshield": {"probe": 1}})


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("parts", ["sum", "max"])
def test_a_token_without_a_number_stops_the_scan(parts, place):
    """In Python's max a number that is not one is passed over unless it comes first."""

    @Registry("scan")("broken", tokens=parts)
    class Broken:
        def fit(self, model, tokenizer, anchors):
            return None

        def score(self, model, batch, fitted):
            scores = torch.zeros(batch.mask.shape)
            scores[:, place] = float("nan")
            return scores

    with pytest.raises(DefenceError, match="of row row1 is not finite"):
        score_rows(MODEL, TOKENIZER, REFUSED[:1], {"it": Broken()}, {}, batch_size=1)
