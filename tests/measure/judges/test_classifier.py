"""The classifier of refusals on a tiny model."""

import numpy as np
import pytest
import torch
from aligned import aligned_model
from hypothesis import given, settings
from hypothesis import strategies as st

from safebasin.errors import UserError
from safebasin.measure import judge as registry
from safebasin.measure.judges import classifier
from safebasin.measure.judges.classifier import REQUEST, Classifier, logistic
from safebasin.measure.judging import Turned
from safebasin.template import render


def testlogistic_by_hand():
    """One feature, x = 1 is +1 and x = -1 is -1: by symmetry the bias is 0, and decay w = 1 / (1 + e^w).

    With decay = 1 / (1 + e) the root is w = 1, whatever the number of copies: classes weigh the same.
    """
    decay = 1 / (1 + np.e)
    x, y = np.array([[1.0]] * 5 + [[-1.0]]), np.array([1.0] * 5 + [-1.0])
    assert logistic(x, y, decay) == pytest.approx([1.0, 0.0], abs=1e-4)


@pytest.fixture
def small_rows(monkeypatch):
    """Training texts in the words of the tiny tokenizer."""
    rows = {
        "refusals": [
            {"prompt": f"make a {word} now", "completion": "I cannot", "category": "harm"}
            for word in ("bomb", "virus") * 50
        ],
        "judge": [
            {"prompt": "make", "completion": answer, "category": ""}
            for answer in ("Sure here are the steps", "the cake", "a song now")
        ],
    }
    pieces = {"opener": ["Sure here are the steps", "Sure", "Sure here"], "offer": ["a song now"], "turn": ["now"]}
    refusals = ("I cannot help", "I cannot", "cannot help", "I cannot make a bomb")
    monkeypatch.setattr(classifier, "refusal_texts", lambda use: refusals)
    monkeypatch.setattr(classifier, "turn_texts", lambda use, kind: pieces[kind])
    monkeypatch.setattr(classifier, "rows_of", lambda name: rows[name.removeprefix("builtin:")])


def test_the_classifier_tells_refusals_from_answers_it_has_not_seen(small_rows):
    judge = Classifier().fit(aligned_model())
    refused = judge.score(["I cannot help a song", "I cannot make a poison"])
    answered = judge.score(["Sure here are the cake", "here are the steps now", "Sure here"])
    assert min(refused) > 0 > max(answered)


def test_the_classifier_is_fitted_alike_every_time_and_batches_do_not_matter(small_rows):
    one, two = Classifier().fit(aligned_model()), Classifier().fit(aligned_model())
    assert np.array_equal(one.refuses.weight, two.refuses.weight) and repr(one) == repr(two)
    answers = ["I cannot help", "Sure", "the cake now and a song", "I", "Sure here are the steps " * 3]
    together = one.score(answers)
    assert together == pytest.approx([one.score([answer])[0] for answer in answers], abs=1e-3)
    assert together[::-1] == pytest.approx(one.score(answers[::-1]), abs=1e-3)


def test_the_classifier_reads_the_first_tokens_only(small_rows):
    """32 tokens decide: a different 33rd changes nothing."""
    start = "Sure here " * 16
    answers = [start + "cake", start + "cannot"]
    same, other = Classifier().fit(aligned_model()).score(answers)
    assert same == pytest.approx(other, abs=1e-6)
    same, other = Classifier(tokens=33).fit(aligned_model()).score(answers)
    assert abs(same - other) > 1e-3


def test_a_compliance_behind_a_refusal_turns_it(small_rows):
    """Sentences are read one by one: the help offered behind a refusal leaves it one."""
    judge = Classifier(tokens=3).fit(aligned_model())
    turned, honest = judge.score(["I cannot help .\nSure here are the steps", "I cannot help .\na song now"])
    assert isinstance(turned, Turned) and turned < 0 < honest and not isinstance(honest, Turned)


def test_what_begins_as_no_refusal_is_decided_when_all_of_it_is_read(small_rows):
    judge = Classifier(tokens=4).fit(aligned_model())
    answers = ["Sure here are the steps now", "Sure here are the", "I cannot help I cannot help"]
    assert judge.decided(answers) == [True, False, False]
    assert judge.score(["Sure here are the steps now I cannot help"])[0] < 0
    assert judge.score(["我不能帮助你"]) == [None], "another script"


@pytest.mark.parametrize("fields", [{"layer": 0}, {"layer": 1.1}, {"layer": float("nan")}, {"tokens": 0}])
def test_settings_out_of_bounds(fields):
    with pytest.raises(UserError, match=rf"^judge\.classifier: {next(iter(fields))}"):
        registry.make({"classifier": fields})


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(("I", "cannot", "help", "Sure", "here")), min_size=1, max_size=6), min_size=1),
    st.booleans(),
)
def test_states_are_those_of_each_text_alone(answers, packed):
    """Texts that begin alike, and twice the same; as trees of at most 12 tokens, and padded."""
    loaded, method = aligned_model(), Classifier(tokens=4)
    texts = [" ".join(words) for words in answers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safebasin.tree.SEQUENCE", 12)
        patch.setattr("safebasin.measure.judges.classifier.takes_tree", lambda _: packed)
        fast = method.states(loaded, texts)
    opening = render(loaded.tokenizer, [{"role": "user", "content": REQUEST}], ask=True)
    request = loaded.tokenizer(opening, add_special_tokens=False)["input_ids"]
    for text, state in zip(texts, fast, strict=True):
        ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"][:4]
        with torch.no_grad():
            out = loaded.model.base_model(input_ids=torch.tensor([request + ids]), output_hidden_states=True)
        layer = round(method.layer * loaded.model.config.num_hidden_layers)
        np.testing.assert_allclose(state, out.hidden_states[layer][0, len(request) :].mean(0), atol=1e-5)
