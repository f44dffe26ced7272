"""What a run cannot be made of is said in one line before a step is taken; what needs no model, when its recipe is read."""

import dataclasses
import types

import pytest
import torch
from away import adapted
from tiny import PAD, random_rows
from transformers import Trainer, TrainingArguments

from safebasin.errors import UserError
from safebasin.train.compose import Composition
from safebasin.train.stream import Stream
from safebasin.train.trainer import OracleTrainer, arguments, check, check_settings, streams_of
from safebasin.vector import trainable


@pytest.mark.parametrize(
    ("settings", "adapter", "specs", "words"),
    [
        ({"deepspeed": "zero.json"}, {}, ["safegrad"], "DeepSpeed steps inside its own backward"),
        ({"deepspeed": "zero.json"}, {}, ["sft"], "DeepSpeed steps inside its own backward"),
        ({}, {"init_lora_weights": False}, ["star_dss"], "False does not start fresh"),
        ({}, {"init_lora_weights": "pissa"}, ["safegrad"], "'pissa' does not start fresh"),
        ({}, {"bias": "lora_only"}, ["safegrad"], "biases of the model's own"),
    ],
)
def test_what_a_recipe_alone_shows(settings, adapter, specs, words):
    with pytest.raises(UserError, match=words) as told:
        check_settings(settings, adapter, Composition.of(specs))
    assert len(str(told.value).splitlines()) == 1


def test_what_a_recipe_may_ask_for():
    check_settings({}, {"init_lora_weights": "pissa", "bias": "all"}, Composition.of(["sft"]))
    check_settings({}, {"init_lora_weights": "gaussian"}, Composition.of(["safegrad"]))


def test_settings_that_do_not_stand(tmp_path):
    for settings, words in (
        ({"fp16": True}, "fp16 is refused"),
        ({"deepspeed": str(tmp_path / "none.json")}, "train: "),
    ):
        with pytest.raises(UserError, match=words) as told:
            arguments(settings, tmp_path)
        assert len(str(told.value).splitlines()) == 1


def test_what_a_launcher_may_not_ask_for(tmp_path, monkeypatch):
    """accelerate's own words come by the environment, past the recipe."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="fp16 is refused"):
        arguments({}, tmp_path)


def deepspeed(trainer):
    trainer.is_deepspeed_enabled = True


def fsdp1(trainer):  # accelerate makes its plugin on an accelerator only
    trainer.is_fsdp_enabled = True
    trainer.accelerator.state.fsdp_plugin = types.SimpleNamespace(fsdp_version=1)


@pytest.mark.parametrize(
    ("set_up", "words"), [(deepspeed, "DeepSpeed steps inside its own backward"), (fsdp1, "FSDP1 hides shards")]
)
def test_what_a_launcher_sets_up_past_the_recipe_is_refused(set_up, words, tmp_path, monkeypatch):
    build = Trainer.create_accelerator_and_postprocess

    def built(self):
        build(self)
        set_up(self)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", built)
    with pytest.raises(UserError, match=words):
        OracleTrainer(adapted(), arguments({}, tmp_path), Composition.of(["sft"]), streams(random_rows(8, 1)))


def test_one_process_drives_one_device(tmp_path, monkeypatch):
    """On a machine of eight GPUs the Trainer would split every batch by nn.DataParallel."""
    whole = TrainingArguments.__post_init__

    def of_eight(self):
        whole(self)
        self._n_gpu = 8

    monkeypatch.setattr(TrainingArguments, "__post_init__", of_eight)
    assert (
        OracleTrainer(
            adapted(), arguments({}, tmp_path), Composition.of(["sft"]), streams(random_rows(8, 1))
        ).args.n_gpu
        == 1
    )


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_a_step_has_as_many_alignment_rows_on_any_number_of_ranks(ranks):
    args = types.SimpleNamespace(
        per_device_train_batch_size=8 // ranks, gradient_accumulation_steps=1, world_size=ranks, seed=0
    )
    made = streams_of({"task": random_rows(16, 1), "align": random_rows(16, 2)}, args, PAD)
    assert (made["task"].batch, made["align"].batch) == (8, 2)
    taken = [row for rank in range(ranks) for batch in made["align"].at(0, rank, ranks) for row in batch.mask.any(-1)]
    assert sum(map(int, taken)) == 2


def streams(rows):
    return {"task": Stream("task", rows, 4, 4, 0, PAD), "align": Stream("align", random_rows(4, 2), 4, 4, 0, PAD)}


def test_a_column_of_another_length_names_its_row_before_the_first_step(tmp_path):
    rows = random_rows(8, 1, columns=("star",))
    rows[5] = dataclasses.replace(rows[5], columns={"star": [*rows[5].columns["star"], 0.5]})
    with pytest.raises(UserError, match=r"row row5: the column 'star' holds \d+ numbers for \d+ answer tokens"):
        OracleTrainer(adapted(), arguments({}, tmp_path), Composition.of(["star_dss"]), streams(rows))


def test_a_column_of_both_kinds_names_a_row_of_each(tmp_path):
    rows = random_rows(8, 1, columns=("star",))
    rows[5] = dataclasses.replace(rows[5], columns={"star": 0.5})
    with pytest.raises(UserError, match="one number for row row5 and several for row0"):
        OracleTrainer(adapted(), arguments({}, tmp_path), Composition.of(["star_dss"]), streams(rows))


def test_biases_that_are_tuned_beside_the_adapter_leave_no_reference(tmp_path):
    model = adapted()
    check(model, arguments({}, tmp_path), Composition.of(["safegrad"]), streams(random_rows(8, 1)))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features))
    with pytest.raises(UserError, match="bias is tuned with the adapter"):
        check(model, arguments({}, tmp_path), Composition.of(["safegrad"]), streams(random_rows(8, 1)))


def test_an_adapter_that_does_not_start_fresh_has_no_reference(tmp_path):
    args, methods = arguments({}, tmp_path), Composition.of(["safegrad"])
    model = adapted()
    check(model, args, methods, streams(random_rows(8, 1)))
    with torch.no_grad():
        next(p for name, p in trainable(model).items() if "lora_B" in name)[0, 0] = 0.1
    with pytest.raises(UserError, match="does not start fresh"):
        check(model, args, methods, streams(random_rows(8, 1)))
