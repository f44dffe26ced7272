"""Patch: the alignment gradient and nothing of the task."""

from away import Plane, constant

from safebasin.train import method


def test_by_hand():
    """Task (1, -1), alignment (0, 2): the direction is (0, 2), and the task is not asked for."""
    grad = Plane({"task": None, "align": constant(0.0, 2.0)})
    assert method.make("patch").direction(grad)["w"].tolist() == [0.0, 2.0]
