"""Constrained SFT against its equation; at the start it is SFT."""

import math

import pytest
import torch
from away import Tilted, adapted, assert_same, gradient
from hypothesis import given
from hypothesis import strategies as st
from tiny import PAD, random_rows

from safebasin.batch import collate
from safebasin.encode import TokenizedRow
from safebasin.models.adapter import reference
from safebasin.train.loss import nll
from safebasin.train.methods.constrained_sft import FLOOR, ConstrainedSft, place_in_answer
from safebasin.train.oracle import Oracle
from safebasin.train.stream import Stream


def oracle(method, far):
    return Oracle(adapted(far), {"task": Stream("task", random_rows(8, 1), 8, 3, 0, PAD)}, seed=0, loss=method.loss)


def test_by_hand():
    """The label went from probability 1/4 to 1/2, so D = log 2 and CE = log 2 = 0.693147.

    t = 1: beta 0.5, sigmoid = sqrt 2 / (1 + sqrt 2) = 0.585786, w = 0.828427.
    t = 2..5: beta 2, sigmoid = 4/5, w = 0.4.      t = 6: beta 0.1, sigmoid(0.0693147) = 0.517322, w = 0.965357.
    """
    losses = ConstrainedSft().loss(Tilted(), collate([TokenizedRow("a", (1,) * 7, (False,) + (True,) * 6)], PAD))
    expected = torch.tensor([[0.828427, 0.4, 0.4, 0.4, 0.4, 0.965357]]) * math.log(2.0)
    assert torch.allclose(losses, expected, atol=1e-6)


def test_at_the_start_it_is_sft():
    """There the model is its reference: w = 2 (1 - sigmoid(0)) = 1."""
    grad = oracle(ConstrainedSft(), far=0.0)
    assert_same(grad.task(), grad(nll, "task"))


@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_the_gradient_is_that_of_equation_3(beta):
    """One beta at all tokens: -(2/beta) log sigmoid(beta D), differentiated as it stands."""
    model = adapted(0.1)
    grad = oracle(ConstrainedSft(first=beta, early=beta, later=beta), far=0.1)
    batch = collate(grad.streams["task"].rows_at(0), PAD)
    with reference(model):
        start = nll(model, batch)
    loss = -2 / beta * torch.nn.functional.logsigmoid(beta * (start - nll(model, batch)))
    assert_same(grad.task(), gradient((loss * batch.mask).sum() / batch.mask.sum(), model))


def test_a_token_that_is_learnt_teaches_no_more_than_the_floor():
    batch = collate([TokenizedRow("a", (1, 1), (False, True))], PAD)
    assert ConstrainedSft(first=200.0).loss(Tilted(), batch).item() == pytest.approx(FLOOR * math.log(2.0), rel=1e-5)


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4))
def test_places_count_anew_in_every_answer(mask):
    truth = []
    for row in mask:
        n, places = 0, []
        for is_answer in row:
            n = n + 1 if is_answer else 0
            places.append(n)
        truth.append(places)
    assert place_in_answer(torch.tensor(mask)).tolist() == truth
