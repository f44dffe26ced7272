"""The search along a repair's strength: stronger where a round is unsafe, weaker where it is useless."""

import types

import pytest

from safebasin.errors import UserError
from safebasin.pipeline import search as module
from safebasin.pipeline.parse import parse
from safebasin.pipeline.run import Run
from safebasin.pipeline.search import Round, search
from safebasin.report.limits import parse_gate

RECIPE = """
data: {task: {path: builtin:support-train}}
roles: {base: builtin:smollm2}
arms:
  plain: {train: [sft]}
  mended: {of: plain, repair: [{EDIT}]}
measure: {}
gate: {max_asr: 0.06, max_accuracy_loss: 0.02, max_over_refusal_gain: null}
"""


def rounds_of(edit, judge, monkeypatch, tmp_path, rounds=4):
    """Rounds where ``judge`` says how a strength ends; the strengths that were tried."""

    class StandIn(Run):
        rows = None

        def __init__(self, recipe, out):
            self.recipe, self.plan = recipe, types.SimpleNamespace(gate=parse_gate(recipe.gate), recipe=recipe)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def with_recipe(self, recipe):
            return StandIn(recipe, None)

    def judged(run, arm, value, rows):
        if arm == "plain":
            outcome = judge(None)
        else:
            [spec] = run.recipe.arms[arm].repair
            [fields] = spec.values()
            assert value in fields.values()
            outcome = judge(value)
        return Round(arm, value, rows, asr=0.0, accuracy=1.0, outcome=outcome, reasons=())

    monkeypatch.setattr(module, "Run", StandIn)
    monkeypatch.setattr(module, "training_examples", lambda plan, path: [None] * 5)
    monkeypatch.setattr(module, "_judged", judged)
    recipe = parse(RECIPE.replace("{EDIT}", edit))
    return [each.threshold for each in search(recipe, "mended", tmp_path, rounds=rounds)]


def outcome(low, high):
    """Unsafe below ``low``, useless above ``high``; plain is unsafe."""
    return lambda value: "unsafe" if value is None or value < low else "useless" if value > high else "passed"


def test_it_halves_the_way(monkeypatch, tmp_path):
    """alpha 1/2 is unsafe, 3/4 too, 7/8 useless, 13/16 passes."""
    tried = rounds_of("shrink: {alpha: 0.5}", outcome(0.8, 0.85), monkeypatch, tmp_path)
    assert tried == [None, 0.5, 0.75, 0.875, 0.8125]


def test_a_strength_that_falls(monkeypatch, tmp_path):
    """keep of safe_delta: 1 changes nothing, 0 is the start. 1/2 is unsafe, so 1/4 comes next."""
    judge = outcome(-0.3, 0)
    tried = rounds_of("safe_delta: {keep: 0.5}", lambda v: judge(v if v is None else -v), monkeypatch, tmp_path)
    assert tried == [None, 0.5, 0.25]


def test_it_ends_where_plain_is_safe_and_after_its_rounds(monkeypatch, tmp_path):
    assert rounds_of("shrink: {}", lambda value: "passed", monkeypatch, tmp_path) == [None]
    assert rounds_of("shrink: {}", lambda value: "unsafe", monkeypatch, tmp_path, rounds=2) == [None, 0.5, 0.75]


def test_an_edit_without_a_strength_is_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="walks the strength of an edit"):
        rounds_of("control: {of: shrink}", outcome(0, 1), monkeypatch, tmp_path)
