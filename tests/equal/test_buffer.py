"""A frozen adapter that is on while another is tuned, and the average of an update, against their equations."""

import pytest
import torch
from away import adapted
from plain import loop, rows_of
from tiny import LORA, tiny_model
from worker import hosted

from safebasin.batch import collate
from safebasin.layer import Update
from safebasin.models.adapter import fresh_adapter, reference
from safebasin.models.updates import PREFIX, switched_on
from safebasin.train.compose import Composition
from safebasin.train.ema import Ema, UpdateAverage
from safebasin.train.loss import nll
from safebasin.vector import trainable

BUFFER = Composition.of(["buffer_reinforce"])


def modules() -> dict[str, torch.Size]:
    return {
        name.removesuffix(".weight"): p.shape
        for name, p in tiny_model().named_parameters()
        if "q_proj" in name or "gate" in name
    }


def harmful(size: float) -> dict[str, Update]:
    """A frozen adapter, also on modules that the user's is not on."""
    draw = torch.Generator().manual_seed(3)
    return {
        name: Update(size * torch.randn(out, 2, generator=draw), torch.randn(2, into, generator=draw))
        for name, (out, into) in modules().items()
    }


def test_the_gradient_is_that_at_the_start_plus_the_buffer():
    """Equation 1: hooks on the model, against its weights with the buffer merged into them."""
    rows = rows_of(BUFFER)["task"]
    batch = collate(rows[:6], 0)
    merged = tiny_model()
    with torch.no_grad():
        for name, update in harmful(0.1).items():
            merged.get_parameter(f"{name}.weight").add_(update.dense())
    truth = fresh_adapter(merged, LORA, seed=0)
    nll(truth, batch).sum().backward()
    ours = fresh_adapter(tiny_model(), LORA, seed=0)
    with switched_on(ours, harmful(0.1), PREFIX):
        nll(ours, batch).sum().backward()
    size = sum(float(p.grad.square().sum()) for p in trainable(truth).values())
    off = sum(
        float((p.grad - q.grad).square().sum())
        for p, q in zip(trainable(ours).values(), trainable(truth).values(), strict=True)
    )
    assert off < 1e-10 * size


def test_the_reference_is_the_start_without_the_buffer():
    model, batch = adapted(0.1), collate(rows_of(BUFFER)["task"][:3], 0)
    with torch.no_grad():
        start = tiny_model()(**batch.inputs).logits
        with switched_on(model, harmful(0.3), PREFIX):
            on = model(**batch.inputs).logits
            with reference(model):
                off = model(**batch.inputs).logits
    assert torch.equal(off, start)
    assert (on - start).abs().max() > 0.1


@pytest.mark.slow
def test_a_buffer_of_zero_is_sft_bit_for_bit(tmp_path):
    plain, buffered = hosted(Composition.of(["sft"]), tmp_path / "a"), hosted(BUFFER, tmp_path / "b")
    plain.train()
    with switched_on(buffered.model, harmful(0.0), PREFIX):
        buffered.train()
    ours, theirs = trainable(buffered.model), trainable(plain.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_in_the_host_it_is_the_plain_loop_on_merged_weights(tmp_path, monkeypatch):
    host = hosted(BUFFER, tmp_path, micro=4, accumulation=2)
    with switched_on(host.model, harmful(0.1), PREFIX):
        host.train()

    def merged(seed: int = 0):
        model = tiny_model(seed)
        with torch.no_grad():
            for name, update in harmful(0.1).items():
                model.get_parameter(f"{name}.weight").add_(update.dense())
        return model

    monkeypatch.setattr("plain.tiny_model", merged)
    truth, start = loop(BUFFER), trainable(fresh_adapter(tiny_model(), LORA, seed=0))
    off = sum(float((p.detach() - truth[name]).square().sum()) for name, p in trainable(host.model).items())
    way = sum(float((truth[name] - p.detach()).square().sum()) for name, p in start.items())
    assert off**0.5 < 1e-5 * way**0.5


def points(count: int = 5):
    """Factors of one module over some steps."""
    draw = torch.Generator().manual_seed(0)
    names = ("base_model.model.m.lora_A.default.weight", "base_model.model.m.lora_B.default.weight")
    for _ in range(count):
        yield dict(zip(names, (torch.randn(2, 6, generator=draw), torch.randn(9, 2, generator=draw)), strict=True))


def test_ema_is_the_average_of_products():
    """beta = 0.9 over five steps, at full rank; the average of factors is far from it."""
    average, truth, factors = UpdateAverage(Ema(decay=0.9, rank=6)), torch.zeros(9, 6), None
    for point in points():
        a, b = point.values()
        average.update(point)
        truth = 0.9 * truth + 0.1 * b @ a
        factors = (a, b) if factors is None else (0.9 * factors[0] + 0.1 * a, 0.9 * factors[1] + 0.1 * b)
    ours = average.updates()["m"]
    assert torch.allclose(ours.dense(), truth, atol=1e-5)
    assert average.lost < 1e-5
    assert (factors[1] @ factors[0] - truth).norm() > 0.5 * truth.norm()


def test_ema_by_hand():
    """dW = 4 twice, beta = 1/2 from 0: 2, then 3."""
    average = UpdateAverage(Ema(decay=0.5))
    name = "m.lora_{}.default.weight"
    for expected in (2.0, 3.0):
        average.update({name.format("A"): torch.ones(1, 1), name.format("B"): 4 * torch.ones(1, 1)})
        assert average.updates()["m"].dense().item() == pytest.approx(expected)


def test_ema_at_a_lower_rank_is_the_best_one_and_states_its_loss():
    full, low = UpdateAverage(Ema(decay=0.9, rank=6)), UpdateAverage(Ema(decay=0.9, rank=3))
    for point in points(2):
        full.update(point)
        low.update(point)
    truth = full.updates()["m"]
    s = torch.linalg.svdvals(truth.dense())
    assert low.updates()["m"].rank == 3
    assert (low.updates()["m"] - truth).norm() == pytest.approx(float(s[3]), rel=1e-3)
    assert low.lost == pytest.approx(float(s[3] ** 2 / (s**2).sum()), rel=1e-3)


@pytest.mark.slow
def test_ema_goes_on_from_a_checkpoint(tmp_path):
    undisturbed = hosted(Composition.of(["sft"]), tmp_path, save_strategy="steps", save_steps=2, save_total_limit=None)
    undisturbed.average = UpdateAverage(Ema(decay=0.5))
    undisturbed.train()
    host = hosted(Composition.of(["sft"]), tmp_path / "again")
    host.average = UpdateAverage(Ema(decay=0.5))
    host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ours, theirs = host.average.updates(), undisturbed.average.updates()
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).norm() < 1e-4 * theirs[name].norm() for name in theirs)
