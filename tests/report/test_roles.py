"""Which arm is which, in any order of the arms."""

from pathlib import Path
from typing import Any

import pytest
from conftest import WIDE

from safebasin.errors import UserError
from safebasin.report import roles, table
from safebasin.report.limits import Gate

SFT, CUT = {"train": ["sft"]}, {"train": ["sft"], "cut": {"scorer": "gradshield"}}


@pytest.mark.parametrize(
    ("arms", "settings", "expected"),
    [
        ({"defended": CUT, "plain": SFT, "start": {}}, {}, ("start", "plain", "defended")),
        ({"a": {"train": None}, "b": CUT, "c": {"train": [{"sft": None}]}}, {}, ("a", "c", "b")),
        ({"z": CUT, "y": {"train": ["safegrad"]}, "start": {}}, {}, ("start", None, None)),
        ({"z": CUT, "y": {"train": ["safegrad"]}, "start": {}}, {"arm": "y"}, ("start", None, "y")),
        ({"mine": SFT, "start": {}}, {}, ("start", "mine", "mine")),
        ({"plain": {}, "aligned": SFT}, {}, ("plain", "plain", "aligned")),
        ({"start": {}}, {}, ("start", None, "start")),
        (dict.fromkeys(["defended", "plain", "start"]), {}, ("start", "plain", "defended")),
        (dict.fromkeys(["one", "two"]), {}, (None, None, None)),
    ],
)
def test_roles_go_by_name_and_tuning_never_by_place(
    arms: dict[str, Any], settings: dict[str, str], expected: tuple[Any, ...]
):
    for order in (list(arms), sorted(arms), sorted(arms, reverse=True)):
        assert roles.roles_of({name: arms[name] for name in order}, Gate(**settings))[:3] == expected


def test_a_sorted_recipe_is_judged_as_the_unsorted(run: Path):
    (run / "run.yaml").write_text(
        "arms: {defended: {train: [safegrad]}, plain: {train: [sft]}, start: {train: null}}\n"
    )
    report = table.collect(run, gate=Gate(**WIDE))
    assert (report.judged, report.start, report.arms[0], report.verdict.code) == ("defended", "start", "start", 0)


def test_several_defended_arms_need_a_name(run: Path):
    (run / "run.yaml").write_text("arms: [start, plain, defended, other]\n")
    result = table.collect(run, gate=Gate(**WIDE))
    assert (result.judged, result.verdict.code) == (None, 4)
    assert "set gate.arm to one of defended, other" in result.verdict.reasons[0]
    assert table.collect(run, gate=Gate(**WIDE, arm="defended")).verdict.code == 0


@pytest.mark.parametrize(
    ("gate", "refused"),
    [
        (
            "arm: plain, max_accuracy_loss: 0.05",
            "gate.max_accuracy_loss: it compares the judged arm with 'plain', which",
        ),
        ("arm: plain, max_accuracy_loss: 0", "gate.max_accuracy_loss"),
        ("arm: plain, max_loss: {tokens: 0.05}", "gate.max_loss"),
        ("arm: defended, plain: mine, max_accuracy_loss: 0.05", ""),
        ("arm: mine, plain: mine", "gate.arm and gate.plain are one arm"),
        (
            "arm: start, max_over_refusal_gain: 0.1",
            "gate.max_over_refusal_gain: it compares the judged arm with 'start'",
        ),
        ("arm: start, max_accuracy_loss: 0.05, max_over_refusal_gain: null", ""),
        ("arm: plain, max_asr: 1, max_accuracy_loss: null, max_loss: {}", ""),
        ("arm: plain, max_asr: 1", ""),
    ],
)
def test_a_limit_that_compares_an_arm_with_itself_is_refused(run: Path, gate: str, refused: str):
    """Attack success of that arm is judged all the same: 90 % of the answers of plain tuning comply."""
    arms = "start: {}, plain: {train: [sft]}, mine: {train: [sft], cut: {}}, defended: {train: [safegrad]}"
    (run / "run.yaml").write_text(f"arms: {{{arms}}}\ngate: {{{gate}}}\n")
    if refused:
        with pytest.raises(UserError, match=refused):
            table.collect(run)
        return
    report = table.collect(run)
    assert any("Attack success of" in reason for reason in report.verdict.reasons)


def test_the_only_tuned_arm_is_compared_with_nothing():
    gate = {"max_accuracy_loss": 0.05}
    with pytest.raises(UserError, match=r"gate.max_accuracy_loss: .* judge another arm \(gate.arm\), or leave"):
        roles.check_limits(gate, roles.roles_of({"start": {}, "mine": SFT}, Gate()))
    roles.check_limits(gate, roles.roles_of({"start": {}, "mine": SFT, "defended": CUT}, Gate()))
    roles.check_limits(gate, roles.roles_of({"start": {}, "b": CUT, "c": CUT}, Gate()))
