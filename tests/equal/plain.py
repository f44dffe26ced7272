"""The definition that the host must equal: a plain loop over whole batches. No micro-batch, rank or hook.

A method takes its gradients from ``WholeBatches``, which answers each by one autograd call on one batch. That
``WholeBatches`` itself is the formula is shown in test_trainer by writing two methods out.
"""

import contextlib
import dataclasses

import torch
from tiny import LORA, PAD, random_rows, tiny_model

from safebasin.batch import collate
from safebasin.models.adapter import fresh_adapter
from safebasin.train import method
from safebasin.train.compose import Composition
from safebasin.train.reference import CachedBatch, ReferenceCache
from safebasin.train.stream import Stream
from safebasin.vector import Vector, trainable

BATCH, SMALL, STEPS = 8, 4, 4  # rows a step of the task and of other streams; step 2 has six, step 3 is of epoch 2
LR, CLIP = 0.01, 1.0
# Adam's own 1e-8 makes full steps of the rounding in its smallest numbers: 4e-5 of the update in four steps anywhere.
EPS = 1e-4


# Methods whose phases are longer than the four steps here; all others run at their defaults.
SHORT = {"lisa": {"align_steps": 1, "task_steps": 2}, "alignguard": {"samples": 2}}
# Options that carry something from step to step, in a case of their own: "method option". Of four steps the third
# reuses what the second computed, also where a run is resumed between them.
OPTIONS = {"safegrad every": {"every": 3, "average": 0.5}}
NAMES = [*(entry.name for entry in method if not entry.implements("align_rows")), *OPTIONS]  # which changes rows alone


def composed(case: str, folders: dict[str, str]) -> Composition:
    """A method as in a run; one with the fields ``base`` and ``aligned`` gets the folders of two tiny models."""
    name = case.split()[0]
    fields = {field.name for field in dataclasses.fields(method[name].kind)}
    settings = SHORT.get(name, {}) | OPTIONS.get(case, {})
    return Composition.of([{name: settings | {key: folder for key, folder in folders.items() if key in fields}}])


def rows_of(methods: Composition) -> dict[str, list]:
    """Random rows for the task, with the columns that the methods read, and for every stream that they ask for."""
    rows = {"task": random_rows(22, 1, columns=methods.needs("columns"))}
    return rows | {name: random_rows(7, 2 + i) for i, name in enumerate(methods.needs("streams"))}


class WholeBatches:
    """What a method sees of the oracle, from whole batches."""

    def __init__(self, model, methods, optimizer=None, reference=None):
        self.model, self.methods, self.optimizer = model, methods, optimizer
        self.cache = reference and Second(reference)
        self.step, self.losses, self.state, self.numbers = 0, {}, {}, {}
        rows = rows_of(methods).items()
        self.streams = {
            name: Stream(name, part, BATCH if name == "task" else SMALL, BATCH, 0, PAD) for name, part in rows
        }

    def __call__(self, loss, stream, at=None):
        return self.gradient(lambda: self.mean(loss, stream), at)

    def task(self, at=None):
        penalty = self.methods.penalty or (lambda parameters: 0.0)
        return self.gradient(lambda: self.mean(self.methods.loss, "task") + penalty(trainable(self.model)), at)

    def mean(self, loss, stream):
        batch = CachedBatch(**vars(collate(self.streams[stream].rows_at(self.step), PAD)), cache=self.cache)
        losses = loss(self.model, batch)
        mean = (losses * batch.mask).sum() / batch.mask.sum() if losses.ndim == 2 else losses.mean()
        self.losses[stream] = mean.item()
        return mean

    def gradient(self, value, at):
        point = trainable(self.model)
        with moved(point, at):
            return Vector(zip(point, torch.autograd.grad(value(), list(point.values())), strict=True))

    def point(self):
        return Vector({name: p.detach().clone() for name, p in trainable(self.model).items()})

    def metric(self):
        """1 / (sqrt(v) + eps) of AdamW, v divided by 1 - beta_2^t; ones before the first step."""
        ones, diagonal = self.point().fill(1.0), {}
        for name, p in trainable(self.model).items() if self.step else ():
            diagonal[name] = 1 / ((self.optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**self.step)).sqrt() + EPS)
        return Vector(ones | diagonal)


class Second(ReferenceCache):
    """A second model is the reference, and nothing is cached."""

    def __init__(self, model):
        super().__init__(model)
        self.model, self.head = model, None


@contextlib.contextmanager
def moved(point, at):
    before = {name: p.detach().clone() for name, p in point.items()}
    for name in at or {}:
        point[name].data += at[name]
    yield
    for name in at or {}:
        point[name].data = before[name]


def loop(
    methods: Composition, *, autocast: bool = False, model=None, reference=None, lr: float = LR
) -> dict[str, torch.Tensor]:
    """AdamW on whole batches; ``autocast`` runs the forward in bfloat16. There is no cache of the reference."""
    model = (model or fresh_adapter(tiny_model(), LORA, seed=0)).train()
    if autocast:
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, eps=EPS, weight_decay=0.0)
    grad = WholeBatches(model, methods, optimizer, reference)
    for grad.step in range(STEPS):
        direction = methods.direction(grad)
        for name, p in parameters.items():
            p.grad = direction[name]
        torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        optimizer.step()
    return {name: p.detach().clone() for name, p in parameters.items()}
