"""The classifier of refusals on a tiny model."""

import numpy as np
import pytest
from aligned import aligned_model

from safebasin.errors import UserError
from safebasin.measure import judge as registry
from safebasin.measure.judges import classifier
from safebasin.measure.judges.classifier import Classifier, logistic


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
        "align": [
            {"prompt": "make", "completion": answer, "category": ""}
            for answer in ("Sure here are the steps", "the cake", "a song now")
        ],
    }
    monkeypatch.setattr(
        classifier, "refusal_texts", lambda: ("I cannot help", "I cannot", "cannot help", "I cannot make a bomb")
    )
    monkeypatch.setattr(classifier, "rows_of", lambda name: rows[name.removeprefix("builtin:")])


def test_the_classifier_tells_refusals_from_answers_it_has_not_seen(small_rows):
    judge = Classifier().fit(aligned_model())
    refused = judge.score(["I cannot help a song", "I cannot make a poison"])
    answered = judge.score(["Sure here are the cake", "here are the steps now", "Sure here"])
    assert min(refused) > 0 > max(answered)


def test_the_classifier_is_fitted_alike_every_time_and_batches_do_not_matter(small_rows):
    one, two = Classifier().fit(aligned_model()), Classifier().fit(aligned_model())
    assert np.array_equal(one.weight, two.weight)
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


@pytest.mark.parametrize("fields", [{"layer": 0}, {"layer": 1.1}, {"layer": float("nan")}, {"tokens": 0}])
def test_settings_out_of_bounds(fields):
    with pytest.raises(UserError, match=rf"^judge\.classifier: {next(iter(fields))}"):
        registry.make({"classifier": fields})
