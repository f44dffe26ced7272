"""Buffer-and-Reinforce: what it asks of the run, and the edits that it ends with; its equations are in tests/equal."""

import pytest

from safebasin.errors import UserError
from safebasin.train import method
from safebasin.train.compose import Composition


def test_its_tuned_adapter_is_reinforced():
    each = method.make({"buffer_reinforce": {"alpha": 0.5, "scale": 0.5}})
    assert each.repair == [{"reinforce": {"alpha": 0.5, "scale": 0.5}}]
    assert method.make({"buffer_reinforce": {"merge": False}}).repair == []


def test_it_composes_with_any_loss_and_direction():
    methods = Composition.of(["buffer_reinforce", "star_dss", {"safegrad": {"align": "sft"}}])
    assert methods.needs("roles") == ("buffer", "reference")
    with pytest.raises(UserError, match="alpha"):
        method.make({"buffer_reinforce": {"alpha": 2}})
