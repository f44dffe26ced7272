"""SPARD's projection: nothing within the bound, back to it beyond."""

import pytest
import torch
from away import Plane, adapted, assert_same, constant
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import PAD, random_rows

from safebasin.errors import DefenceError
from safebasin.train.loss import nll
from safebasin.train.methods.spard import Spard
from safebasin.train.oracle import Oracle
from safebasin.train.stream import Stream

numbers = st.floats(-5, 5, allow_nan=False, width=32)


def test_by_hand():
    """l_safe = 1.2, tau = 0.2, g = (0, 2): (1.2 - 0.2) / 4 = 0.25 < eta = 1, so (1, 1) + 0.25 (0, 2) = (1, 1.5)."""
    plane = Plane({"task": constant(1.0, 1.0), "align": constant(0.0, 2.0)}, losses={"align": 1.2})
    direction = Spard().direction(plane)
    assert direction["w"].tolist() == pytest.approx([1.0, 1.5])


def test_the_step_back_is_bounded():
    """With g = (0, 0.5) the way back is 1 / 0.25 = 4, more than eta = 1."""
    plane = Plane({"task": constant(1.0, 1.0), "align": constant(0.0, 0.5)}, losses={"align": 1.2})
    direction = Spard().direction(plane)
    assert direction["w"].tolist() == pytest.approx([1.0, 1.5])


@given(st.floats(0, 0.29))
def test_within_the_bound_the_task_is_untouched(loss):
    u = constant(1.0, 1.0)
    assert Spard().direction(Plane({"task": u, "align": constant(3.0, 2.0)}, losses={"align": loss}))["w"].tolist() == [
        1.0,
        1.0,
    ]


@given(numbers, numbers, st.floats(0.5, 9))
def test_for_a_linear_loss_a_step_of_sgd_lands_on_the_bound(x, y, loss):
    """l(w) = loss + <g, w>, u = 0, lr = 1: w = -direction, and l(w) = tau, the projection that the paper writes."""
    assume(x * x + y * y > 0.01)
    d = Spard(eta=1e9).direction(Plane({"task": constant(0.0, 0.0), "align": constant(x, y)}, losses={"align": loss}))
    assert loss - float(torch.tensor([x, y]) @ d["w"]) == pytest.approx(0.2, abs=1e-3)


def test_a_bound_that_nothing_can_reach_stops_the_run():
    with pytest.raises(DefenceError, match="nothing can lower it"):
        Spard().direction(Plane({"task": constant(1.0, 1.0), "align": constant(0.0, 0.0)}, losses={"align": 2.0}))


def test_on_the_oracle_it_reads_the_loss_of_the_whole_step():
    streams = {
        "task": Stream("task", random_rows(8, 1), 8, 3, 0, PAD),
        "align": Stream("align", random_rows(6, 2), 6, 1, 0, PAD),
    }
    grad = Oracle(adapted(0.1), streams, seed=0)
    u, g = grad.task(), grad(nll, "align")
    over = grad.losses["align"] - 0.2
    assert over > 0.1
    assert_same(Spard().direction(grad), u + min(over / (g @ g), 1.0) * g)
