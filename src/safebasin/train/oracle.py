"""The gradient oracle: the one place where a gradient is taken.

A method asks ``grad(loss, stream)`` and gets the exact gradient of that stream's loss over the whole optimizer step:
all micro-batches, all ranks, divided once by the answer tokens of the whole step, in true scale. Its rules:

1.  count answer tokens over all micro-batches and ranks, then divide: a mean of means depends on how rows were split;
2.  a loss returns ``[batch, answers]`` or ``[batch]``; a mean is refused: it was divided by the wrong number already;
3.  ranks are synchronised on the last micro-batch only;
4.  ``.grad`` is taken and set to None, so that streams never mix;
5.  ``at=delta`` moves the parameters and puts them back by copy, bit for bit;
6.  inner products are the Vector's: wide, over local shards, one reduction;
7.  clipping is the host's, once, of the direction that will be applied;
8.  the first step stops the run where a trainable tensor gets no finite gradient of the task, or a stream gives none;
9.  a number that is not finite stops the run before the update;
10. random state is a function of (seed, step, stream, micro-batch, rank).
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from safebasin.batch import Batch
from safebasin.errors import DefenceError
from safebasin.models.hooks import perturbed
from safebasin.train.loss import nll
from safebasin.train.reference import CachedBatch, ReferenceCache
from safebasin.train.stream import BatchSource
from safebasin.vector import Vector, local, trainable

Loss = Callable[[Any, Batch], Tensor]  # (model, batch) -> [batch, answers] or [batch]

SHIFT = 0.01  # added to every trainable number, to see whether what has no gradient at the start has none elsewhere
TASK = "stream 'task'"
SILENT = 1e-7  # norm of a gradient that is only rounding: at the start a KL to the reference gives not exactly zero


@runtime_checkable
class Grad(Protocol):
    """What a method sees of the oracle."""

    def __call__(self, loss: Loss, stream: str, at: Vector | None = None) -> Vector: ...

    step: int  # of the optimizer, from 0
    losses: dict[str, float]  # of this step, by stream, of those whose gradient was taken
    numbers: dict[str, float]  # of this step, by name: what a method measures of itself; the host logs them
    state: dict[str, Vector]  # what a method carries from step to step; the host saves it with its checkpoints

    def task(self, at: Vector | None = None) -> Vector: ...

    def metric(self) -> Vector: ...

    def point(self) -> Vector: ...


def _with_unit_columns(loss: Loss) -> Loss:
    """The loss with every column at one: a method whose columns weigh all rows of a step by zero is not dead."""
    return lambda model, batch: loss(
        model, dataclasses.replace(batch, columns={name: torch.ones_like(c) for name, c in batch.columns.items()})
    )


class Oracle:
    """Gradients of streams at one optimizer step.

    Args:
        model: the model as the host runs it (bare, DDP or FSDP2); its forward carries the autocast.
        streams: by name; "task" is the user's data.
        loss: the token loss of the task.
        penalty: a function of the trainable parameters, added to the task once an optimizer step.
        accelerator: of the host; None for a bare model in one process.
        reference: of full fine-tuning; None: the adapter switched off.
    """

    def __init__(
        self,
        model: Any,
        streams: Mapping[str, BatchSource],
        *,
        seed: int,
        loss: Loss = nll,
        penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
        accelerator: Any = None,
        reference: ReferenceCache | None = None,
    ):
        self.model = model
        self.streams = streams
        self.seed = seed
        self.loss = loss
        self.penalty = penalty
        self.accelerator = accelerator
        self.optimizer: Any = None  # the host's, where a method asks for its metric
        self.ranks = accelerator.num_processes if accelerator else 1
        self.rank = accelerator.process_index if accelerator else 0
        self.parameters = trainable(model)  # once: the walk over a model costs as much as an inner product
        self.reference_cache = reference or ReferenceCache(model)
        self.device = next(model.parameters()).device
        self.moved = False  # whether an update has been applied: before it, a KL to the reference has gradient zero
        self.alive: set[str] = set()
        self.step = 0
        self.losses: dict[str, float] = {}
        self.numbers: dict[str, float] = {}
        self.state: dict[str, Vector] = {}

    def at_step(self, step: int) -> "Oracle":
        """The oracle itself at an optimizer step, counted from 0; its losses and numbers begin anew."""
        self.step = step
        self.losses, self.numbers = {}, {}
        return self

    def task(self, at: Vector | None = None) -> Vector:
        """Gradient of the task: the token loss and the penalty that the methods of the run have given it."""
        gradient = self(self.loss, "task", at)
        if self.penalty is not None:
            penalty_gradient = self._penalty_gradient(at)
            self._check(penalty_gradient, "penalty", self._penalty_gradient)
            gradient = gradient + penalty_gradient
        return gradient

    def _penalty_gradient(self, at: Vector | None) -> Vector:
        with self._moved_by(at), torch.enable_grad():
            value = self.penalty(self.parameters)  # type: ignore[misc]
            if not value.requires_grad:
                raise DefenceError("the penalty does not depend on the trainable parameters, so it has no gradient")
            parts = torch.autograd.grad(value, list(self.parameters.values()), allow_unused=True)
        named = zip(self.parameters.items(), parts, strict=True)
        return Vector({name: torch.zeros_like(p) if part is None else part for (name, p), part in named})

    def point(self) -> Vector:
        """A copy of the present trainable parameters."""
        return Vector({name: p.detach().clone() for name, p in self.parameters.items()})

    def metric(self) -> Vector:
        """The optimizer's metric, diagonal: 1 / (sqrt(v) + eps) of Adam's bias-corrected v; ones before the first step.

        Raises:
            DefenceError: the optimizer keeps no second moment, so it has no such metric.
        """
        diagonal = {}
        for name, p in self.parameters.items():
            state = self.optimizer.state.get(p, {}) if self.optimizer is not None else {}
            if "exp_avg_sq" in state:
                group = next(g for g in self.optimizer.param_groups if any(p is other for other in g["params"]))
                v = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
                diagonal[name] = 1 / (v.sqrt() + group["eps"])
            elif state:
                raise DefenceError("the optimizer keeps no second moment; this method needs Adam or AdamW")
            else:
                diagonal[name] = torch.ones_like(p, requires_grad=False)
        return Vector(diagonal)

    def __call__(self, loss: Loss, stream: str, at: Vector | None = None) -> Vector:
        """Exact gradient of the mean of ``loss`` over the answer tokens (or rows) of ``stream`` at this step.

        Raises:
            DefenceError: a loss of the wrong shape, a stream that the run does not have, a dead or non-finite gradient.
        """
        gradient, value = self._mean(loss, stream, at)
        self.losses[stream] = value
        nearby = functools.partial(self._mean, _with_unit_columns(loss), stream)
        self._check(gradient, f"stream {stream!r}", lambda delta: nearby(delta)[0])
        return gradient

    def _mean(self, loss: Loss, stream: str, at: Vector | None) -> tuple[Vector, float]:
        """Gradient and value of the mean."""
        if stream not in self.streams:
            raise DefenceError(f"a method asks for the stream {stream!r}; the run has: {', '.join(self.streams)}")
        batches = self.streams[stream].at(self.step, self.rank, self.ranks)
        counts = [(int(batch.mask.sum()), int(batch.mask.any(-1).sum())) for batch in batches]
        tokens, rows = self._sum(torch.tensor(counts, dtype=torch.float64).sum(0)).tolist()
        if not tokens:
            raise DefenceError(f"step {self.step}: the stream {stream!r} has no answer token to learn from")
        value = torch.zeros((), device=self.device)
        with self._moved_by(at):
            for micro, batch in enumerate(batches):
                with self._sync(last=micro == len(batches) - 1), self._random(stream, micro):
                    batch = CachedBatch(**vars(batch.to(self.device)), cache=self.reference_cache)
                    losses = loss(self.model, batch)
                    if losses.shape == batch.mask.shape:
                        part = torch.where(batch.mask, losses, 0).sum() / tokens
                    elif losses.shape == batch.mask.shape[:1]:
                        part = torch.where(batch.mask.any(-1), losses, 0).sum() / rows
                    else:
                        raise DefenceError(
                            f"a loss returned the shape {tuple(losses.shape)}; it must return one number per answer "
                            f"token {tuple(batch.mask.shape)} or per row ({batch.mask.shape[0]},), and "
                            "leave the mean to the oracle"
                        )
                    if not part.requires_grad:
                        raise DefenceError(
                            f"the loss of the stream {stream!r} has no gradient: no trainable parameter is in its graph"
                        )
                    (part * self.ranks).backward()  # ranks average; the division by all tokens is done already
                    value += part.detach()
            gradient = self._take(stream)
        return gradient, float(self._sum(value))

    def _take(self, stream: str) -> Vector:
        taken = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                raise DefenceError(
                    f"{name} got no gradient from the stream {stream!r}; it is not in the graph of the loss"
                )
            taken[name], parameter.grad = parameter.grad, None
        return Vector(taken)

    def _check(self, gradient: Vector, source: str, again: Callable[[Vector], Vector]) -> None:
        """Rule 8. A KL to the reference or a penalty of the update has no gradient at the start, and only there: where
        there is none, ``again`` takes it at a point nearby."""
        size = gradient.norm()
        if not (size < float("inf")):
            raise DefenceError(f"step {self.step}: the gradient of the {source} is not finite; nothing was updated")
        if size > SILENT:
            self.alive.add(source)
        elif source not in self.alive and (
            (self.moved and source != TASK) or not again(gradient.fill(SHIFT)).norm() > SILENT
        ):
            raise DefenceError(f"step {self.step}: the {source} gives no gradient; the method that asks for it is dead")

    def _sum(self, value: Tensor) -> Tensor:
        if self.ranks > 1:
            value = value.to(self.device)
            dist.all_reduce(value)
        return value

    def _sync(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        if last or self.accelerator is None or self.ranks == 1:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(self.model)

    @contextlib.contextmanager
    def _random(self, stream: str, micro: int) -> Iterator[None]:
        key = f"{self.seed}/{self.step}/{stream}/{micro}/{self.rank}".encode()
        devices = [self.device.index or 0] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest()))
            yield

    def _moved_by(self, delta: Vector | None) -> contextlib.AbstractContextManager[None]:
        if delta is None:
            return contextlib.nullcontext()
        return perturbed(self.parameters, lambda name, value: value + local(delta[name]))
