"""AlignGuard: the split, the penalties' gradient against autograd, and the Fisher axes."""

import pytest
import torch
from away import adapted, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PAD, random_rows

from safebasin.train.compose import Composition
from safebasin.train.loss import nll
from safebasin.train.methods.alignguard import AlignGuard, orthogonal
from safebasin.train.oracle import Oracle
from safebasin.train.stream import Stream
from safebasin.vector import Vector, trainable

shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))


def drawn(count: int, rows: int, columns: int, seed: int) -> list[Vector]:
    draw = torch.Generator().manual_seed(seed)
    return [
        Vector(a=torch.randn(rows, columns, generator=draw), b=torch.randn(columns, generator=draw))
        for _ in range(count)
    ]


def flat(vector: Vector) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in vector.values()]).double()


def test_by_hand():
    """One axis (2, 0): F = diag(4, 0), lambda = 4, b = (1, 0). D = (3, 5): D_A = (3, 0), D_T = (0, 5).

    grad L_A = 2 * 1/4 * 4 * 3 (1, 0) = (6, 0). h = (4, 0), so L_T = 0 here: all that h weighs is the sensitive part.
    D_A D_T = 0, so sign(x) = 0 and C_rm gives nothing. For h to pull on the other axis, the top must leave an axis out.
    """
    axis, update = Vector(w=torch.tensor([2.0, 0.0])), Vector(w=torch.tensor([3.0, 5.0]))
    gradient = AlignGuard().penalty_gradient(update, [axis])
    assert gradient["w"].tolist() == pytest.approx([6.0, 0.0])


def test_the_rest_is_held_by_the_axes_that_the_top_leaves_out():
    """Axes (2, 0) and (0, 1): F = 1/2 diag(4, 1). Three quarters of the trace are explained by the first alone.

    grad L_A = 2 * 1/4 * 2 * 3 (1, 0) = (3, 0).
    h = (2, 1/2), D_T = (0, 5): grad L_T = 2 * 1/2 * 1/2 * 5 (0, 1) = (0, 2.5).
    """
    axes = [Vector(w=torch.tensor([2.0, 0.0])), Vector(w=torch.tensor([0.0, 1.0]))]
    gradient = AlignGuard(explained=0.75).penalty_gradient(Vector(w=torch.tensor([3.0, 5.0])), axes)
    assert gradient["w"].tolist() == pytest.approx([3.0, 2.5])


@given(shapes)
@settings(max_examples=40)
def test_the_gradient_is_that_of_the_loss(shape):
    """Equations 3-5 on flat vectors with dense matrices and eigh of F, by autograd. No geodesic overlap."""
    gradients, [update] = drawn(*shape), drawn(1, *shape[1:3], seed=100 + shape[3])
    method = AlignGuard(lam_nc=2.0, tau=0.1, explained=0.7)
    g = torch.stack([flat(v) for v in gradients])
    m, n = g.shape
    fisher = g.T @ g / m
    values, vectors = torch.linalg.eigh(fisher)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    rank = int((values.cumsum(0) - values < 0.7 * values.sum()).sum())
    values, vectors = values[:rank], vectors[:, :rank]
    d = flat(update).requires_grad_()
    in_a = vectors @ (vectors.T @ d)
    in_t = d - in_a
    l_a = method.lam_a * (values * (vectors.T @ d) ** 2).sum()
    l_t = method.lam_t * (fisher.diag() * in_t**2).sum()
    overlap = ((1 + method.beta * torch.sigmoid(d.abs() - method.tau)) * (in_a * in_t).abs()).mean()
    [truth] = torch.autograd.grad(l_a + l_t + method.lam_nc * overlap, d)
    gradient = flat(method.penalty_gradient(update, orthogonal(gradients)))
    if (
        in_a.detach() * in_t.detach()
    ).abs().min() > 1e-5:  # away from the corners of |x|, where the two roundings may differ in sign
        assert torch.allclose(gradient, truth, rtol=1e-3, atol=1e-4)
    assert abs(float(in_a.detach() @ in_t.detach())) < 1e-9 * (1 + n)


@given(shapes)
def test_the_axes_are_orthogonal_and_have_the_same_fisher(shape):
    gradients = drawn(*shape)
    axes = orthogonal(gradients)
    g, s = (torch.stack([flat(v) for v in vectors]) for vectors in (gradients, axes))
    assert torch.allclose(g.T @ g, s.T @ s, atol=1e-4)
    gram = s @ s.T
    assert torch.allclose(gram, torch.diag(gram.diag()), atol=1e-4)


def oracle(**sizes: int) -> Oracle:
    streams = {
        name: Stream(name, random_rows(8, seed), sizes.get(name, 8), 3, 0, PAD)
        for name, seed in (("task", 1), ("align", 2))
    }
    return Oracle(adapted(0.1), streams, seed=0)


def test_without_a_step_it_is_sft():
    """At the start D = 0, and every penalty with it."""
    grad = oracle()
    assert_same(AlignGuard().direction(grad), Composition.of(["sft"]).direction(grad), 1e-6)


def test_the_fisher_is_of_the_start_and_of_each_row():
    """Two steps with one align row each; the parameters move in between, the gradients do not."""
    grad, method = oracle(align=1), AlignGuard(samples=2, lam_a=7.0)
    truth = [grad.at_step(step)(nll, "align") for step in range(2)]
    method.direction(grad.at_step(0))
    with torch.no_grad():
        for p in trainable(grad.model).values():
            p += 0.05
    gradient = method.direction(grad.at_step(1))
    axes = [grad.state["fisher0"], grad.state["fisher1"]]
    for v in truth:
        assert sum((v @ axis) ** 2 for axis in axes) == pytest.approx(sum((v @ g) ** 2 for g in truth), rel=1e-3)
    update = grad.point() - grad.state["start"]
    assert_same(gradient, grad.task() + method.penalty_gradient(update, axes))
    assert (gradient - grad.task()).norm() > 0.01 * gradient.norm()
    grad.at_step(2)
    method.direction(grad)
    assert grad.losses.keys() == {"task"}  # enough was seen: alignment costs nothing more
