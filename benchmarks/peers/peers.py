"""What peers cost beside safebasin: seconds of theirs over seconds of ours, step by step in one run.

Nothing of a peer's code is copied. What is installed is called (`transformers.Trainer`); what is a formula in a script
and no function is written from the formula, as that code computes it.

    hf.plain             a step of transformers.Trainer on padded rows / our plain step on the same rows
    asft.official.4096   |(I - d d^T / |d|) B A|_F^2 and its gradient for one matrix of 4096 x 4096, with I, B A and the
                         product formed as PKU-YuanGroup/AsFT forms them, d d^T / |d| given / ours

Floors: of `hf.plain` 1 (the same products); of `asft.official.4096`, counting multiply-adds at rank 8, three products
of 4096^3 over two passes over d: 3 * 4096 / (2 * 8) = 768, less what memory costs.
"""

import copy
from collections.abc import Callable
from typing import Annotated, Any

import torch
from cyclopts import Parameter
from transformers import Trainer

from benchmarks import recipe
from benchmarks.harness import Bench, experiment, ratios, seconds, take_turns
from benchmarks.train.train import WARM_UP, Setting, Turn, methods, setting
from safebasin.batch import Batch
from safebasin.errors import UserError
from safebasin.train.anchor_projector import AnchorProjector, Departure
from safebasin.vector import trainable

GOALS = {"hf.plain": ">= 1.5", "asft.official.4096": ">= 20"}
RANK = 8


class HostedPlain:
    """A step of ``transformers.Trainer`` on the shared model, with an adapter and an optimizer of its own."""

    def __init__(self, shared: Setting):
        self.shared, self.steps = shared, 0
        self.trainer = Trainer(model=shared.model, args=copy.deepcopy(shared.args))
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.create_optimizer()
        self.point = {name: p.detach().clone() for name, p in trainable(shared.model).items()}

    def step(self) -> float:
        """Seconds of one optimizer step; copying the adapter is not timed."""
        trainer, parameters = self.trainer, trainable(self.shared.model)
        batches = [padded(batch) for batch in self.shared.streams["task"].at(self.steps)]
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(self.point[name])

        def update() -> None:
            for inputs in batches:
                trainer.training_step(trainer.model, inputs)
            trainer.accelerator.clip_grad_norm_(parameters.values(), trainer.args.max_grad_norm)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        duration = seconds(update)
        self.steps += 1
        for name, p in parameters.items():
            self.point[name].copy_(p.detach())
        return duration


def padded(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch as trainers have it: prompts and padding are labelled -100."""
    labels = torch.full_like(batch.input_ids, -100)
    tail = labels[:, -batch.mask.shape[1] :]
    tail[batch.mask] = batch.labels[batch.mask]
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


def penalties(size: int) -> dict[str, Callable[[], float]]:
    """Seconds of AsFT's penalty and its gradient at B and A, as the official code computes it and as ours does."""
    torch.manual_seed(0)
    d = torch.randn(size, size) / size**0.5
    b = torch.randn(size, RANK).div_(size).requires_grad_()
    a = torch.randn(RANK, size).requires_grad_()
    given, ours = d @ d.T / d.norm(), AnchorProjector.of(d, "official", 1)

    def official() -> torch.Tensor:
        departure = (torch.eye(size) - given) @ (b @ a)
        return departure.norm().square()

    def low_rank() -> torch.Tensor:
        return Departure.apply([ours], b, a)

    def gradient(penalty: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        return list(torch.autograd.grad(penalty(), (b, a)))

    pairs: Any = zip(gradient(official), gradient(low_rank), strict=True)
    if not all(torch.allclose(theirs, own, rtol=1e-3, atol=1e-4 * float(own.abs().max())) for theirs, own in pairs):
        raise UserError("the two penalties have other gradients, so their seconds cannot be compared")
    return {"theirs": lambda: seconds(lambda: gradient(official)), "ours": lambda: seconds(lambda: gradient(low_rank))}


@experiment("peers", replaces=("what",), goals=GOALS, quick={"steps": 2, "size": 256})
def peers(
    *,
    bench: Bench,
    only: Annotated[str, Parameter(help="hf or asft; default both")] = "",
    steps: Annotated[int, Parameter(help="of each, side by side; two or more")] = 6,
    size: Annotated[int, Parameter(help="of the matrix of asft.official")] = 4096,
) -> None:
    """What do a Trainer's plain step and the official AsFT penalty cost beside ours?"""
    if only in ("", "asft"):
        values = take_turns(penalties(size), steps)
        bench.timing(f"asft.official.{size}", ratios(values, "theirs", "ours"), rank=RANK)
    if only in ("", "hf"):
        shared = setting(recipe.MODEL)
        own, theirs = Turn(methods("", recipe.MODEL)["sft"], shared), HostedPlain(shared)
        own.host.accelerator.prepare_model(shared.model)
        values = take_turns({"theirs": theirs.step, "ours": own.step}, steps, warm_up=WARM_UP)
        bench.timing("hf.plain", ratios(values, "theirs", "ours"), model=recipe.MODEL)
