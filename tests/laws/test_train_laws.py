"""Laws of training, over drawn vectors and streams."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LORA, PAD, random_rows, tiny_model

from safebasin.batch import collate
from safebasin.errors import DefenceError, UserError
from safebasin.models.adapter import fresh_adapter
from safebasin.train import method
from safebasin.train.compose import Composition
from safebasin.train.loss import kl_from_reference, nll
from safebasin.train.methods.safegrad import FLOOR, surgery
from safebasin.train.oracle import SILENT, Oracle
from safebasin.train.stream import Stream
from safebasin.vector import Vector, trainable

vectors = st.lists(st.floats(-100, 100, allow_nan=False, width=32), min_size=4, max_size=4)


def vector(values: list[float]) -> Vector:
    return Vector({"a": torch.tensor(values[:3]), "b": torch.tensor(values[3:])})


@given(vectors, vectors)
def test_surgery_leaves_nothing_that_opposes_alignment(u_values, a_values):
    u, a = vector(u_values), vector(a_values)
    cut = surgery(u, a)
    assert cut @ a >= -1e-4 * max(1.0, u.norm() * a.norm())
    if u @ a >= 0 or a @ a <= FLOOR:
        assert cut is u


def test_surgery_by_hand():
    """u = (1, -1), a = (0, 2): <u, a> = -2, |a|^2 = 4, so u' = u + (1/2) a = (1, 0); with rho = 1, g = (1, 2)."""
    u, a = Vector(w=torch.tensor([1.0, -1.0])), Vector(w=torch.tensor([0.0, 2.0]))
    cut = surgery(u, a)
    assert cut["w"].tolist() == [1.0, 0.0]
    assert (cut + 1.0 * a)["w"].tolist() == [1.0, 2.0]


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(0, 40))
@settings(deadline=None)
def test_a_step_has_the_same_rows_whatever_the_split(count, batch, micro, ranks, step):
    rows = random_rows(count, 3)
    stream = Stream("task", rows, batch, micro, 7, PAD)
    expected = sorted(row.ids.tolist() for row in stream.rows_at(step))
    split = []
    sizes = set()
    for rank in range(ranks):
        mine = stream.at(step, rank, ranks)
        sizes.add(len(mine))
        for piece in mine:
            for ids, seen, mask in zip(piece.input_ids, piece.attention_mask, piece.mask, strict=True):
                if mask.any():
                    split.append(ids[seen.bool()].tolist())
    assert sorted(split) == expected
    assert len(sizes) == 1  # every rank runs as many micro-batches, so that collectives match


def test_an_epoch_shows_every_row_once():
    stream = Stream("task", random_rows(10, 3), 4, 2, 0, PAD)
    shown = [row.id for step in range(3) for row in stream.rows_at(step)]
    assert sorted(shown) == sorted(row.id for row in stream.rows)


def oracle(streams, **changes) -> Oracle:
    return Oracle(fresh_adapter(tiny_model(), LORA, seed=0), streams, seed=0, **changes)


def streams(micro: int = 4) -> dict[str, Stream]:
    return {
        "task": Stream("task", random_rows(8, 1), 8, micro, 0, PAD),
        "align": Stream("align", random_rows(4, 2), 4, micro, 0, PAD),
    }


def test_the_oracle_gives_the_gradient_of_the_mean_over_all_tokens():
    """Two rows with 1 and 3 answer tokens in two micro-batches: the mean over 4 tokens, not the mean of two means."""
    grad = oracle(streams(micro=1))
    actual = grad.task()
    model = fresh_adapter(tiny_model(), LORA, seed=0)
    batch = collate(streams()["task"].rows_at(0), PAD)
    (nll(model, batch).sum() / batch.mask.sum()).backward()
    for name, p in trainable(model).items():
        assert torch.allclose(actual[name], p.grad, atol=1e-6)


def test_streams_never_mix():
    grad = oracle(streams())
    first = grad.task()
    grad(nll, "align")
    assert all(torch.equal(first[name], again) for name, again in grad.task().items())
    assert all(p.grad is None for p in trainable(grad.model).values())


def test_a_perturbed_point_is_restored_bit_for_bit():
    grad = oracle(streams())
    before = {name: p.detach().clone() for name, p in trainable(grad.model).items()}
    there = Vector({name: torch.full_like(p, 0.3) for name, p in before.items()})
    away = grad.task(at=there)
    assert all(torch.equal(before[name], p) for name, p in trainable(grad.model).items())
    with torch.no_grad():
        for p in trainable(grad.model).values():
            p += 0.3
    for name, tensor in grad.task().items():
        assert torch.allclose(away[name], tensor, atol=1e-5)


def test_a_mean_is_refused():
    with pytest.raises(DefenceError, match="leave the mean to the oracle"):
        oracle(streams())(lambda model, batch: nll(model, batch).mean(), "task")


def test_a_loss_that_is_not_a_number_stops_the_run():
    with pytest.raises(DefenceError, match="not finite"):
        oracle(streams())(lambda model, batch: nll(model, batch) * float("inf"), "task")


def test_a_dead_task_stops_the_run():
    with pytest.raises(DefenceError, match="dead"):
        oracle(streams())(lambda model, batch: nll(model, batch) * 0, "task")


def test_a_defence_may_be_silent_at_the_start_but_not_after_the_first_update():
    grad = oracle(streams())
    assert grad(kl_from_reference, "align").norm() < SILENT  # the model is its own reference
    grad.moved = True
    with pytest.raises(DefenceError, match="dead"):
        grad(kl_from_reference, "align")


def test_kl_grows_when_the_adapter_leaves_the_reference():
    grad = oracle(streams())
    with torch.no_grad():
        for name, p in trainable(grad.model).items():
            if "lora_B" in name:
                p += 0.5
    assert grad(kl_from_reference, "align").norm() > 0
    assert grad.losses["align"] > 0


def test_two_methods_of_one_component_are_refused_by_name():
    with pytest.raises(UserError, match="sft and safegrad both define the update direction"):
        Composition.of(["sft", "safegrad"])


def test_a_loss_alone_is_the_task_of_sft():
    """A method without surgery goes where the task's gradient goes."""
    grad = oracle(streams())
    sft = Composition.of(["sft"]).direction(grad)
    assert all(torch.equal(sft[name], tensor) for name, tensor in grad.task().items())


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf")])
@pytest.mark.parametrize("entry", list(method), ids=lambda entry: entry.name)
def test_every_number_of_a_method_is_bounded(entry, bad):
    for field in dataclasses.fields(entry.kind):
        if isinstance(field.default, int | float):
            with pytest.raises(UserError, match=field.name):
                Composition.of([{entry.name: {field.name: bad}}])


@pytest.mark.parametrize("spec", [{"safegrad": {"rhoo": 1}}, {"safegrad": {"rho": "much"}}, "nothing"])
def test_what_is_not_a_method_is_said(spec):
    with pytest.raises(UserError):
        Composition.of([spec])
