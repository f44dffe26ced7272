"""STAR-DSS against its equation, and its two ends: V = 1 is SFT, V = 0 is lambda KL."""

import dataclasses
import math

import pytest
import torch
from away import adapted, assert_same, gradient
from hypothesis import given
from hypothesis import strategies as st
from tiny import PAD, kl_to_reference, random_rows

from safebasin.batch import collate
from safebasin.train.compose import Composition
from safebasin.train.loss import nll
from safebasin.train.methods import star_dss
from safebasin.train.methods.star_dss import StarDss
from safebasin.train.oracle import Oracle
from safebasin.train.stream import Stream


def oracle(v, *, far=0.1, micro=3, rows=8, **fields):
    """``v``: a number for every row, or a function of the token's place in the answer."""
    scored = []
    for row in random_rows(rows, 1):
        star = v if isinstance(v, float) else [v(k) for k in range(sum(row.answer))]
        scored.append(dataclasses.replace(row, columns={"star": star}))
    return Oracle(
        adapted(far), {"task": Stream("task", scored, rows, micro, 0, PAD)}, seed=0, loss=StarDss(**fields).loss
    )


def test_by_hand():
    """Two words. Model (1/2, 1/2), reference (3/4, 1/4), label 0, V = 1/4, lambda = 1/2.

    CE = log 2 = 0.693147. KL = (1/2) log(2/3) + (1/2) log 2 = (1/2) log(4/3) = 0.143841.
    L = 0.25 * 0.693147 + 0.75 * 0.5 * 0.143841 = 0.173287 + 0.053940 = 0.227227.
    k2 = (1/2) (log(1/2) - log(3/4))^2 = (1/2) * 0.405465^2 = 0.082201, so L = 0.173287 + 0.375 * 0.082201 = 0.204112.
    """
    logits, reference = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    label, v = torch.tensor([0]), torch.tensor([0.25])
    for estimator, expected in (("full", 0.227227), ("k2", 0.204112)):
        loss = StarDss(kl=0.5, estimator=estimator).shaped(logits, reference, label, v)
        assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["full", "k2"])
def test_where_every_answer_is_safe_it_is_sft(estimator):
    grad = oracle(1.0, estimator=estimator)
    assert_same(Composition.of(["star_dss"]).direction(grad), grad(nll, "task"))


@given(st.floats(0.1, 4.0))
def test_where_no_answer_is_safe_it_is_the_pull_to_the_reference(kl):
    grad = oracle(0.0, kl=kl)
    assert_same(grad.task(), kl * grad(kl_to_reference, "task"))


def test_a_weight_a_row_is_the_same_weight_at_every_token():
    assert_same(oracle(0.3).task(), oracle(lambda k: 0.3).task(), 1e-7)


def test_between_the_ends_it_is_equation_3(monkeypatch):
    """Scores that fall along the answer, chunks of three tokens: the slow way weighs both losses over one batch."""
    monkeypatch.setattr(star_dss, "CHUNK", 3)
    grad = oracle(lambda k: 1 / (1 + k), kl=0.7)
    batch = collate(grad.streams["task"].rows_at(0), PAD)
    model = adapted(0.1)
    v = batch.columns["star"]
    loss = v * nll(model, batch) + (1 - v) * 0.7 * kl_to_reference(model, batch)
    assert_same(grad.task(), gradient((loss * batch.mask).sum() / batch.mask.sum(), model))


def test_at_the_reference_nothing_is_learnt_from_what_is_all_unsafe():
    """Nor is it a fault: the next rows may be safe. A run of only such rows is refused (``test_static.py``)."""
    assert oracle(0.0, far=0.0).task().norm() == pytest.approx(0, abs=1e-6)
