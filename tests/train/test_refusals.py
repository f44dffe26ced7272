"""What a run cannot work with is refused in one line before its first step."""

import dataclasses
import types

import pytest
import torch
from away import adapted
from tiny import PAD, random_rows
from transformers import Trainer, TrainingArguments

from safebasin.errors import UserError
from safebasin.train.check import check
from safebasin.train.compose import Composition
from safebasin.train.settings import training_arguments
from safebasin.train.stream import Stream
from safebasin.train.trainer import OracleTrainer, streams_of
from safebasin.vector import trainable


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
        OracleTrainer(adapted(), training_arguments({}, tmp_path), Composition.of(["sft"]), streams(random_rows(8, 1)))


def test_one_process_drives_one_device(tmp_path, monkeypatch):
    """On a machine of eight GPUs the Trainer would split every batch by nn.DataParallel."""
    post_init = TrainingArguments.__post_init__

    def of_eight(self):
        post_init(self)
        self._n_gpu = 8

    monkeypatch.setattr(TrainingArguments, "__post_init__", of_eight)
    assert (
        OracleTrainer(
            adapted(), training_arguments({}, tmp_path), Composition.of(["sft"]), streams(random_rows(8, 1))
        ).args.n_gpu
        == 1
    )


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_a_step_has_as_many_alignment_rows_on_any_number_of_ranks(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", ranks)
    args = training_arguments({"per_device_train_batch_size": 8 // ranks}, tmp_path)
    by_name = streams_of({"task": random_rows(16, 1), "align": random_rows(16, 2)}, args, PAD)
    assert (by_name["task"].batch, by_name["align"].batch) == (8, 2)
    rows = [row for rank in range(ranks) for batch in by_name["align"].at(0, rank, ranks) for row in batch.mask.any(-1)]
    assert sum(map(int, rows)) == 2


def streams(rows):
    return {"task": Stream("task", rows, 4, 4, 0, PAD), "align": Stream("align", random_rows(4, 2), 4, 4, 0, PAD)}


def test_a_column_of_another_length_names_its_row_before_the_first_step(tmp_path):
    rows = random_rows(8, 1, columns=("star",))
    rows[5] = dataclasses.replace(rows[5], columns={"star": [*rows[5].columns["star"], 0.5]})
    with pytest.raises(UserError, match=r"row row5: the column 'star' holds \d+ numbers for \d+ answer tokens"):
        OracleTrainer(adapted(), training_arguments({}, tmp_path), Composition.of(["star_dss"]), streams(rows))


def test_a_column_of_both_kinds_names_a_row_of_each(tmp_path):
    rows = random_rows(8, 1, columns=("star",))
    rows[5] = dataclasses.replace(rows[5], columns={"star": 0.5})
    with pytest.raises(UserError, match="one number for row row5 and several for row0"):
        OracleTrainer(adapted(), training_arguments({}, tmp_path), Composition.of(["star_dss"]), streams(rows))


def test_biases_that_are_tuned_beside_the_adapter_leave_no_reference(tmp_path):
    model = adapted()
    check(model, training_arguments({}, tmp_path), Composition.of(["safegrad"]), streams(random_rows(8, 1)))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features))
    with pytest.raises(UserError, match="bias is tuned with the adapter"):
        check(model, training_arguments({}, tmp_path), Composition.of(["safegrad"]), streams(random_rows(8, 1)))


def test_an_adapter_that_does_not_start_fresh_has_no_reference(tmp_path):
    args, methods = training_arguments({}, tmp_path), Composition.of(["safegrad"])
    model = adapted()
    check(model, args, methods, streams(random_rows(8, 1)))
    with torch.no_grad():
        next(p for name, p in trainable(model).items() if "lora_B" in name)[0, 0] = 0.1
    with pytest.raises(UserError, match="does not start fresh"):
        check(model, args, methods, streams(random_rows(8, 1)))


def test_a_model_with_nothing_to_tune_is_refused(tmp_path):
    model = adapted().requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        check(model, training_arguments({}, tmp_path), Composition.of(["sft"]), streams(random_rows(8, 1)))
