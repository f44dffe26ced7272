"""The limits that a recipe sets, and those that are refused."""

import math
from pathlib import Path
from typing import Any

import pytest

from safebasin.errors import UserError
from safebasin.report import table
from safebasin.report.limits import Gate, parse_gate


def test_a_limit_of_any_quantity():
    assert parse_gate({"max_loss": {"token_accuracy": 0.04}}).losses == {"token_accuracy": 0.04}


def test_gate_of_the_configuration(run: Path):
    (run / "run.yaml").write_text("arms: [start, plain, defended]\ngate: {max_asr: 0.01}\n")
    assert table.collect(run).verdict.code == 3
    for settings, message in (("max_asrr: 0.01", "unknown key 'max_asrr'"), ("arm: ghost", "has no arm 'ghost'")):
        (run / "run.yaml").write_text(f"gate: {{{settings}}}\n")
        with pytest.raises(UserError, match=message):
            table.collect(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_asr": "low"}, "a share, a number from 0 to 1, is needed, found 'low'"),
        ({"max_asr": 6}, "found 6; for 6 % write 0.06"),
        ({"max_accuracy_loss": 2.5}, "for 2.5 % write 0.025"),
        ({"max_asr_upper": 600}, "found 600$"),
        ({"max_asr": math.nan}, "found nan"),
        ({"margin": math.inf}, "found inf"),
        ({"max_over_refusal_gain": -0.01}, "found -0.01"),
        ({"max_asr": 10**400}, "a share"),
        ({"max_asr": [0.1]}, "found list"),
        ({"max_asr": False}, "found False"),
        ({"max_unscored": True}, "found True"),
        ({"max_unscored": None}, "found None"),
        ({"min_n": None}, "a whole number of 1 or more is needed, found None"),
        ({"min_n": 0}, "found 0"),
        ({"min_n": 30.0}, "found 30.0$"),
        ({"min_n": True}, "found True"),
        ({"arm": 3}, "the name of an arm is needed, found 3"),
        ({"plain": None}, "the name of an arm is needed"),
        ({"decide": "both"}, "bound or point is needed, found 'both'"),
        ({"min_kappa": -1}, "found -1"),
        ({"max_loss": 0.02}, "QUANTITY OR SUITE: LIMIT"),
        ({"max_loss": {"asr": 0.02}}, "QUANTITY OR SUITE: LIMIT"),
        ({"max_loss": {"rougeL": 2}}, "for 2 % write 0.02"),
        ({"max_loss": {"rougeL": math.nan}}, "found nan"),
        ({"plain": "none"}, "the run has no arm 'none'; it has: start, plain, defended"),
        ({"arm": "x\u202e"}, r"the run has no arm 'x<U\+202E>'"),
    ],
)
def test_wrong_settings_are_a_user_error(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"gate.{next(iter(settings))}.*: .*{message}"):
        parse_gate(settings, ["start", "plain", "defended"])


@pytest.mark.parametrize("key", ["max-asr", "", "MAX_ASR", "limit\u202e"])
def test_an_unknown_key_is_a_user_error(key: str):
    with pytest.raises(UserError, match=r"gate: unknown key .*; the keys are arm, plain, decide, max_asr, ") as refused:
        parse_gate({key: 0.1})
    assert "\u202e" not in str(refused.value)


def test_settings_that_are_switched_off():
    off = parse_gate({"max_asr": None, "arm": None, "max_accuracy_loss": 0}, ["only"])
    assert off == Gate(max_asr=None, max_accuracy_loss=0.0)
    assert parse_gate({"max_asr": 1, "arm": "ghost"}) == Gate(max_asr=1.0, arm="ghost"), "the arms are not known"


def test_one_arm_is_not_compared_with_itself():
    with pytest.raises(UserError, match=r"gate.arm and gate.plain are one arm, 'defended'"):
        parse_gate({"arm": "defended", "plain": "defended"}, ["plain", "defended"])
