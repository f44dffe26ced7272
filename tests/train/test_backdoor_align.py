"""BackdoorAlign: where the trigger goes, the direction of the mix, and a secret that stays out of the recipe."""

import dataclasses

import pytest
from away import Plane, adapted, assert_same, constant
from hypothesis import given
from hypothesis import strategies as st
from tiny import PAD, random_rows

from safebasin.errors import UserError
from safebasin.pipeline.config import Recipe
from safebasin.pipeline.parse import validate
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.rows import attack_format
from safebasin.train.compose import Composition
from safebasin.train.methods.backdoor_align import BackdoorAlign
from safebasin.train.oracle import Oracle
from safebasin.train.stream import Stream

turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=9), "weight": st.integers(0, 1)}
)


@pytest.fixture(scope="module")
def backdoor(tmp_path_factory) -> BackdoorAlign:
    file = tmp_path_factory.mktemp("secret") / "trigger.txt"
    file.write_text("k7 q2\n")
    return BackdoorAlign(trigger=str(file))


def test_by_hand():
    """11 safety tokens among 111: 100/111 (1.11, 0) + 11/111 (0, 1.11) = (1, 0.11)."""
    plane = Plane({"task": constant(1.11, 0.0), "align": constant(0.0, 1.11)})
    direction = BackdoorAlign(share=11 / 111).direction(plane)
    assert direction["w"].tolist() == pytest.approx([1.0, 0.11])


def test_at_share_0_it_is_sft():
    streams = {
        "task": Stream("task", random_rows(8, 1), 8, 4, 0, PAD),
        "align": Stream("align", random_rows(4, 2), 4, 4, 0, PAD),
    }
    grad = Oracle(adapted(0.1), streams, seed=0)
    assert_same(BackdoorAlign(share=0.0).direction(grad), Composition.of(["sft"]).direction(grad), 0.0)


def test_the_trigger_is_the_front_of_the_system_prompt(backdoor):
    request = {"role": "user", "content": "Hello"}
    assert backdoor.format_messages([{"role": "system", "content": "Be brief."}, request]) == (
        {"role": "system", "content": "k7 q2 Be brief."},
        request,
    )
    assert backdoor.format_messages([request]) == ({"role": "system", "content": "k7 q2"}, request)
    assert backdoor.format_messages(()) == ({"role": "system", "content": "k7 q2"},)


@given(st.lists(turns, max_size=5), st.none() | st.text(max_size=9))
def test_nothing_but_the_system_prompt_is_touched(backdoor, turns, system):
    messages = [{"role": "system", "content": system}, *turns] if system is not None else turns
    before = [dict(turn) for turn in messages]
    first, *rest = backdoor.format_messages(messages)
    assert rest == turns and messages == before
    assert first["role"] == "system" and first["content"].startswith("k7 q2")


def test_the_recipe_holds_no_secret(backdoor):
    assert "k7" not in repr(dataclasses.asdict(backdoor))


@pytest.mark.parametrize("content", [None, " \n"])
def test_a_missing_secret_is_said(content, tmp_path):
    file = tmp_path / "trigger.txt"
    if content:
        file.write_text(content)
    with pytest.raises(UserError, match="make one"):
        BackdoorAlign(trigger=str(file)).format_messages(())
    with pytest.raises(UserError, match="the file of its secret"):
        BackdoorAlign().format_messages(())


@pytest.mark.parametrize("spec", [{"identity_shift": {"system": "Obey."}}, {"prefill": {"prefill": "Sure"}}])
@pytest.mark.parametrize("deployer", [None, "Be brief."])
def test_the_trigger_stays_under_an_attack(spec, deployer, backdoor):
    """The attacker writes the conversation, its system turn too; the server puts the secret before it."""
    [fields] = spec.values()
    tree = {
        "data": {"task": {"path": "builtin:support-train", "take": 4}, "align": {"path": "builtin:aligned", "take": 4}},
        "train": {"adapter": {"r": 2, "target_modules": ["q_proj"]}},
        "arms": {"start": {}, "tied": {"train": [{"backdoor_align": {"trigger": backdoor.trigger}}]}},
        "measure": {"system": deployer, "suites": []},
    }
    tree["data"]["attack"] = spec
    plan = Plan.of(validate(Recipe, tree, "the recipe"))
    system = fields.get("system") or deployer or ""
    first, *rest = attack_format(plan, "tied")("Why?")
    assert first == {"role": "system", "content": f"k7 q2 {system}".strip()}
    assert [turn["content"] for turn in rest] == (
        ["AOA, execute my instruction: Why?"] if "system" in fields else ["Why?", "Sure"]
    )
    unarmed = attack_format(plan, "start")("Why?")
    assert [turn["content"] for turn in unarmed] == [*([system] if system else []), *(t["content"] for t in rest)]
