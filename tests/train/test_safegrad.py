"""SafeGrad's options: an alignment gradient that is reused for some steps, and one that is a moving average."""

import pytest
import torch
from away import Plane, adapted, constant
from hypothesis import given
from hypothesis import strategies as st
from tiny import PAD, random_rows

from safebasin.train.compose import Composition
from safebasin.train.methods.safegrad import FLOOR, SafeGrad
from safebasin.train.settings import training_arguments
from safebasin.train.trainer import OracleTrainer, streams_of
from safebasin.vector import trainable

STEPS = 6


def directions(method: SafeGrad, align: list[tuple[float, float]]) -> list[list[float]]:
    """What is applied at every step; the task's gradient is zero, so with rho = 1 it is g_a."""
    grad, applied = Plane({"task": constant(0.0, 0.0)}), []
    for grad.step, a in enumerate(align):
        grad.streams["align"] = constant(*a)
        applied.append(method.direction(grad)["w"].tolist())
    return applied


def test_by_hand():
    """Gradients 1, 2, ... along the first axis. every 2: those of steps 0, 2, 4. Halved with the older ones: 1, then
    (1 + 3) / 2 = 2, then (2 + 5) / 2 = 3.5."""
    align = [(i + 1.0, 0.0) for i in range(STEPS)]
    assert [a for a, _ in directions(SafeGrad(), align)] == [1, 2, 3, 4, 5, 6]
    assert [a for a, _ in directions(SafeGrad(every=2), align)] == [1, 1, 3, 3, 5, 5]
    assert [a for a, _ in directions(SafeGrad(every=2, average=0.5), align)] == [1, 1, 2, 2, 3.5, 3.5]
    assert [a for a, _ in directions(SafeGrad(average=0.5), align)] == [1, 1.5, 2.25, 3.125, 4.0625, 5.03125]


def test_no_step_is_left_without_alignment_for_a_gradient_without_direction():
    """A KL is zero until an update is applied (twice where the first learning rate is zero): it is taken again."""
    align = [(0.0, 0.0), (0.0, 0.0), (3.0, 0.0), (4.0, 0.0), (5.0, 0.0), (6.0, 0.0)]
    assert [a for a, _ in directions(SafeGrad(every=4), align)] == [0, 0, 3, 3, 5, 5]


@given(st.integers(1, 5), st.sampled_from([0.0, 0.25, 0.75]), st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_it_is_the_definition(every, average, numbers):
    """Written out from the first step for each step, with no state."""

    def at(step: int) -> float:
        last = at(step - 1) if step else 0.0
        if last**2 <= FLOOR:
            return numbers[step]
        return last if step % every else average * last + (1 - average) * numbers[step]

    applied = directions(SafeGrad(every=every, average=average), [(float(number), 0.0) for number in numbers])
    assert [a for a, _ in applied] == pytest.approx([at(step) for step in range(len(numbers))], abs=1e-5)


def host(folder, **options) -> OracleTrainer:
    settings = {"max_steps": STEPS, "learning_rate": 0.05, "per_device_train_batch_size": 2}
    args = training_arguments({**settings, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}, folder)
    streams = streams_of({"task": random_rows(8, 1), "align": random_rows(4, 2)}, args, PAD)
    return OracleTrainer(adapted(), args, Composition.of([{"safegrad": options}]), streams)


@pytest.mark.parametrize("step", [2, 4])  # of a gradient that is reused at once, and of a new one
def test_a_resumed_run_ends_in_the_same_bytes(step, tmp_path):
    options = {"every": 4, "average": 0.5}
    undisturbed = host(tmp_path, **options)
    undisturbed.train()
    resumed = host(tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    for name, p in trainable(undisturbed.model).items():
        assert torch.equal(p, trainable(resumed.model)[name])
    assert resumed.numbers == undisturbed.numbers and resumed.curve == undisturbed.curve


def test_what_is_carried_is_in_the_checkpoint_only_where_an_option_asks_for_it(tmp_path):
    plain, every = host(tmp_path / "plain"), host(tmp_path / "every", every=3)
    for each in (plain, every):
        each.train()
    assert not plain.method_state
    assert list(every.method_state) == ["safegrad.align"]
    assert [step for step, _ in every.numbers["safegrad.ratio"]] == list(range(STEPS))
