"""What a run cannot be made of is said in one line before a step is taken; what needs no model, when its recipe is read."""

import dataclasses

import pytest
import torch
from away import adapted
from tiny import PAD, random_rows

from safebasin.record import UserError
from safebasin.train.compose import Composition
from safebasin.train.host import Host, arguments, check, check_settings
from safebasin.train.stream import Stream
from safebasin.vector import trainable


@pytest.mark.parametrize(
    ("settings", "adapter", "specs", "words"),
    [
        ({"deepspeed": "zero.json"}, {}, ["safegrad"], "DeepSpeed steps inside backward"),
        ({}, {"init_lora_weights": False}, ["star_dss"], "False does not start fresh"),
        ({}, {"init_lora_weights": "pissa"}, ["safegrad"], "'pissa' does not start fresh"),
    ],
)
def test_what_a_recipe_alone_shows(settings, adapter, specs, words):
    with pytest.raises(UserError, match=words) as told:
        check_settings(settings, adapter, Composition.of(specs))
    assert len(str(told.value).splitlines()) == 1


def test_what_a_recipe_may_ask_for():
    check_settings({"deepspeed": "zero.json"}, {"init_lora_weights": "pissa"}, Composition.of(["sft"]))
    check_settings({}, {"init_lora_weights": "gaussian"}, Composition.of(["safegrad"]))


def test_settings_that_do_not_stand(tmp_path):
    for settings, words in (({"fp16": True}, "fp16 is refused"), ({"deepspeed": str(tmp_path / "none.json")}, "train: ")):
        with pytest.raises(UserError, match=words) as told:
            arguments(settings, tmp_path)
        assert len(str(told.value).splitlines()) == 1


def streams(rows):
    return {"task": Stream("task", rows, 4, 4, 0, PAD), "align": Stream("align", random_rows(4, 2), 4, 4, 0, PAD)}


def test_a_column_of_another_length_names_its_row_before_the_first_step(tmp_path):
    rows = random_rows(8, 1, columns=("star",))
    rows[5] = dataclasses.replace(rows[5], columns={"star": [*rows[5].columns["star"], 0.5]})
    with pytest.raises(UserError, match=r"row row5: the column 'star' holds \d+ numbers for \d+ answer tokens"):
        Host(adapted(), arguments({}, tmp_path), Composition.of(["star_dss"]), streams(rows))


def test_an_adapter_that_does_not_start_fresh_has_no_reference(tmp_path):
    args, methods = arguments({}, tmp_path), Composition.of(["safegrad"])
    model = adapted()
    check(model, args, methods, streams(random_rows(8, 1)))
    with torch.no_grad():
        next(p for name, p in trainable(model).items() if "lora_B" in name)[0, 0] = 0.1
    with pytest.raises(UserError, match="does not start fresh"):
        check(model, args, methods, streams(random_rows(8, 1)))
