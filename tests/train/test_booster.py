"""Booster against its equation."""

import pytest
from away import Plane, adapted, assert_same, constant, gradient
from tiny import PAD, random_rows

from safebasin.batch import collate
from safebasin.errors import DefenceError
from safebasin.train.compose import Composition
from safebasin.train.loss import nll
from safebasin.train.methods.booster import Booster
from safebasin.train.oracle import Oracle
from safebasin.train.stream import Stream
from safebasin.vector import trainable


def test_by_hand():
    """h = |w|^2 / 2 at w = (3, 4): grad h = (3, 4), a step of 0.1 against it leads to (2.94, 3.92).

    The bracket is (0.06, 0.08).
    With lambda = 5 and grad f = (1, 0): g = (1.3, 0.4).
    """
    direction = Booster().direction(Plane({"task": constant(1.0, 0.0), "harmful": lambda w: w}, point=(3.0, 4.0)))
    assert direction["w"].tolist() == pytest.approx([1.3, 0.4], abs=1e-5)


def test_a_harmful_loss_without_curvature_changes_nothing():
    direction = Booster().direction(Plane({"task": constant(1.0, 2.0), "harmful": constant(5.0, -1.0)}))
    assert direction["w"].tolist() == [1.0, 2.0]


def test_a_dead_harmful_stream_stops_the_run():
    with pytest.raises(DefenceError, match="harmful"):
        Booster().direction(Plane({"task": constant(1.0, 2.0), "harmful": constant(0.0, 0.0)}))


def test_on_a_model_it_is_the_formula():
    """Three gradients by autograd on whole batches, the model moved by hand in between, against three micro-batches."""
    sizes = {"task": (8, 3), "harmful": (6, 2)}
    streams = {name: Stream(name, random_rows(n, n), n, micro, 0, PAD) for name, (n, micro) in sizes.items()}
    model = adapted(0.1)

    def plain(stream):
        batch = collate(streams[stream].rows_at(0), PAD)
        return gradient((nll(model, batch) * batch.mask).sum() / batch.mask.sum(), model)

    f, h = plain("task"), plain("harmful")
    step = h * (-2.0 / h.norm())
    for name, p in trainable(model).items():
        p.data += step[name]
    truth = f + 5.0 * (h - plain("harmful"))
    direction = Composition.of([{"booster": {"alpha": 2.0}}]).direction(Oracle(adapted(0.1), streams, seed=0))
    assert_same(direction, truth, 1e-4)
    assert (truth - f).norm() > 0.1 * f.norm()  # the bracket is not rounding
