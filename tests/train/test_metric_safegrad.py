"""Surgery in the optimizer's metric: what AdamW applies does not oppose alignment."""

import pytest
import torch
from away import Plane, constant
from hypothesis import given
from hypothesis import strategies as st

from safebasin.train.methods.metric_safegrad import FLOOR, MetricSafeGrad, surgery
from safebasin.train.methods.safegrad import surgery as plain_surgery
from safebasin.vector import Vector

numbers = st.lists(st.floats(-100, 100, allow_nan=False, width=32), min_size=3, max_size=3)
positive = st.lists(st.floats(0.125, 1000, width=32), min_size=3, max_size=3)


def vector(values):
    return Vector(a=torch.tensor(values[:2]), b=torch.tensor(values[2:]))


def test_by_hand():
    """P = (1, 4), u = (1, -1), a = (1, 1). <u, a> = 0: no conflict. But <P u, a> = 1 - 4 = -3, <P a, a> = 5.

    u' = u + (3/5) a = (1.6, -0.4), P u' = (1.6, -1.6), orthogonal to a. With rho = 1: g = (2.6, 0.6).
    """
    actual = MetricSafeGrad().direction(
        Plane({"task": constant(1.0, -1.0), "align": constant(1.0, 1.0)}, metric=(1.0, 4.0))
    )
    assert actual["w"].tolist() == pytest.approx([2.6, 0.6])


@given(numbers, numbers, positive)
def test_the_update_opposes_alignment_no_more(u_values, a_values, p_values):
    u, a, p = vector(u_values), vector(a_values), vector(p_values)
    cut = surgery(u, a, p)

    def applied(v):
        return Vector({name: v[name] * p[name] for name in v})

    if applied(u) @ a >= 0 or a @ a <= FLOOR:
        assert cut is u
    else:
        assert abs(applied(cut) @ a) <= 1e-3 * max(1.0, applied(u).norm() * a.norm())


@given(numbers, numbers, st.floats(0.25, 100))
def test_a_common_factor_of_the_metric_gives_plain_surgery(u_values, a_values, factor):
    u, a = vector(u_values), vector(a_values)
    actual, truth = surgery(u, a, vector([factor] * 3)), plain_surgery(u, a)
    assert (actual - truth).norm() <= 1e-4 * max(1.0, u.norm())


def test_adamw_undoes_plain_surgery_and_not_this_one():
    """AdamW after 50 steps of uneven gradients, without momentum: a step changes a linear loss by -lr <P g, a>."""
    draw = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(200))
    optimizer = torch.optim.AdamW([w], lr=1e-3, betas=(0.0, 0.999), weight_decay=0.0)
    scale = 10 ** torch.linspace(-2, 1, 200)
    for _ in range(50):
        w.grad = scale * torch.randn(200, generator=draw)
        optimizer.step()
    state = optimizer.state[w]
    p = Vector(w=1 / ((state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))).sqrt() + 1e-8))
    a = Vector(w=scale * torch.randn(200, generator=draw))
    u = Vector(w=scale * torch.randn(200, generator=draw)) - 0.5 * a
    before = {"w": w.detach().clone(), "v": state["exp_avg_sq"].clone(), "step": state["step"].clone()}

    def harm(direction):
        """Change of alignment's loss by one step of AdamW, over the most that a step of that length could do."""
        with torch.no_grad():
            w.copy_(before["w"])
            state["exp_avg_sq"].copy_(before["v"])
            state["step"].copy_(before["step"])
        w.grad = direction["w"].clone()
        optimizer.step()
        moved = Vector(w=w.detach() - before["w"])
        return (moved @ a) / (moved.norm() * a.norm())

    assert harm(u) > 0.1
    assert abs(harm(plain_surgery(u, a))) > 5 * abs(harm(surgery(u, a, p)))
    assert abs(harm(surgery(u, a, p))) < 0.01
