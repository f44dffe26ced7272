"""For tests of training methods: a tiny model that has left its reference, and toys with gradients by hand."""

import contextlib
import types

import torch
from tiny import LORA, tiny_model

from safebasin.models.adapter import fresh_adapter
from safebasin.vector import Vector, trainable


def adapted(far: float = 0.0):
    """The tiny model with an adapter; ``far`` above zero moves it from its start, the same way every time."""
    model = fresh_adapter(tiny_model(), LORA, seed=0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainable(model).values():
            p += far * torch.randn(p.shape, generator=draw)
    return model


def gradient(loss, model) -> Vector:
    """The gradient of a scalar by autograd alone: no oracle."""
    point = trainable(model)
    return Vector(dict(zip(point, torch.autograd.grad(loss, list(point.values())), strict=True)))


def assert_same(actual, truth, tolerance: float = 1e-5) -> None:
    size = truth.norm()
    assert size > 0
    assert (actual - truth).norm() <= tolerance * size


class Tilted(torch.nn.Module):
    """A model of four tokens: uniform with its adapter off; with it on, token 1 has probability one half."""

    def __init__(self):
        super().__init__()
        self.on = True

    @contextlib.contextmanager
    def disable_adapter(self):
        self.on = False
        yield
        self.on = True

    def forward(self, input_ids, logits_to_keep, **_):
        logits = torch.zeros(*input_ids.shape, 4)
        logits[..., 1] = float(torch.tensor(3.0).log()) * self.on
        return types.SimpleNamespace(logits=logits[:, logits_to_keep])


class Plane:
    """A stand-in for the oracle: gradients are functions of a point, streams by name."""

    def __init__(self, streams, point=(0.0, 0.0), losses=None, metric=None):
        self.streams, self.w, self.losses, self._metric = streams, torch.tensor(point), losses or {}, metric
        self.step, self.state, self.numbers = 0, {}, {}

    def __call__(self, loss, stream, at=None):
        return Vector(w=self.streams[stream](self.w + (at["w"] if at else 0)))

    def task(self, at=None):
        return self(None, "task", at)

    def point(self):
        return Vector(w=self.w.clone())

    def metric(self):
        return Vector(w=torch.tensor(self._metric))


def constant(*values):
    return lambda point: torch.tensor(values)
