"""Lisa: whose turn it is, the pull to the last switch, and a run that is broken off and goes on."""

import pytest
import torch
from away import adapted, assert_same
from tiny import PAD, random_rows

from safebasin.errors import UserError
from safebasin.train import method
from safebasin.train.compose import Composition
from safebasin.train.loss import nll
from safebasin.train.methods.lisa import Lisa
from safebasin.train.oracle import Oracle
from safebasin.train.settings import training_arguments
from safebasin.train.stream import Stream
from safebasin.train.trainer import METHOD_STATE, OracleTrainer, streams_of
from safebasin.vector import Vector, trainable


class Walk:
    """A stand-in for the oracle whose point walks: gradients (1, 0) for the task and (0, 1) for alignment."""

    def __init__(self):
        self.step, self.state, self.w, self.losses, self.numbers = 0, {}, torch.zeros(2), {}, {}

    def __call__(self, loss, stream, at=None):
        return Vector(w=torch.tensor({"task": (1.0, 0.0), "align": (0.0, 1.0)}[stream]))

    def task(self, at=None):
        return self(None, "task")

    def point(self):
        return Vector(w=self.w.clone())

    def metric(self):
        return self.point().fill(1.0)


def test_by_hand():
    """SGD with lr 1/2 and rho = 1, K1 = K2 = 2, from (0, 0); the pull is w minus the last switch point.

    align: (0, 1), no pull     -> (0, -0.5);    align: (0, 1) + (0, -0.5) = (0, 0.5)                  -> (0, -0.75)
    task, switch at (0, -0.75): (1, 0), no pull -> (-0.5, -0.75);  task: (1, 0) + (-0.5, 0) = (0.5, 0) -> (-0.75, -0.75)
    align, switch at (-0.75, -0.75): (0, 1), no pull.
    """
    grad, lisa = Walk(), Lisa(rho=1.0, align_steps=2, task_steps=2)
    went = []
    for grad.step in range(5):
        g = lisa.direction(grad)["w"]
        went.append(g.tolist())
        grad.w = grad.w - 0.5 * g
    assert went == [[0.0, 1.0], [0.0, 0.5], [1.0, 0.0], [0.5, 0.0], [0.0, 1.0]]
    assert grad.state["switch"]["w"].tolist() == [-0.75, -0.75]


def oracle(step: int) -> Oracle:
    streams = {name: Stream(name, random_rows(8, seed), 8, 3, 0, PAD) for name, seed in (("task", 1), ("align", 2))}
    return Oracle(adapted(0.1), streams, seed=0).at_step(step)


@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_a_task_step_is_sft_and_the_gradient_of_the_pull(rho):
    """By autograd of (rho / 2) |w - s|^2; with rho = 0 it is sft."""
    grad = oracle(step=3)
    there = grad.state["switch"] = grad.point() - Vector(
        {name: torch.full_like(p, 0.2) for name, p in grad.point().items()}
    )
    point = trainable(grad.model)
    pull = rho / 2 * sum((p - there[name]).square().sum() for name, p in point.items())
    pulled = Vector(zip(point, torch.autograd.grad(pull, list(point.values())), strict=True))
    direction = Lisa(rho=rho, align_steps=2, task_steps=2).direction(grad)
    assert_same(direction, Composition.of(["sft"]).direction(grad) + pulled)
    assert (pulled.norm() > 0.1) == (rho > 0)
    assert grad.losses.keys() == {"task"}  # a task step asks for nothing else


def test_an_align_step_asks_for_alignment_alone():
    grad = oracle(step=0)
    direction = Lisa().direction(grad)
    assert grad.losses.keys() == {"align"}
    assert_same(direction, grad(nll, "align"))  # at the switch there is no pull
    direction["task"] = torch.zeros(1)
    assert "task" not in grad.state["switch"]


def hosted(folder, steps=6, **settings) -> OracleTrainer:
    chosen = {
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "seed": 0,
    }
    args = training_arguments(chosen | settings, folder)
    streams = streams_of({"task": random_rows(12, 1), "align": random_rows(7, 2)}, args, PAD, 0.5)
    return OracleTrainer(adapted(0.1), args, Composition.of([{"lisa": {"align_steps": 2, "task_steps": 3}}]), streams)


def test_a_run_that_goes_on_is_the_run_that_was_not_broken_off(tmp_path):
    """Broken off at step 4, in the task state, whose switch point is of step 2: the checkpoint must carry it."""
    undisturbed = hosted(tmp_path / "whole", save_strategy="steps", save_steps=4, save_total_limit=None)
    undisturbed.train()
    assert [step for step, _ in undisturbed.curve] == [2, 3, 4]  # align steps are no point of the task's curve
    again = hosted(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, p in trainable(undisturbed.model).items():
        assert torch.equal(p, trainable(again.model)[name])

    (tmp_path / "whole" / "checkpoint-4" / METHOD_STATE).unlink()
    with pytest.raises(UserError, match="holds no method_state"):
        hosted(tmp_path / "lost").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


def test_a_state_without_steps_is_refused():
    with pytest.raises(UserError, match="align_steps"):
        method.make({"lisa": {"align_steps": 0}})
