"""Settings of tuning: every name that is allowed exists and has an effect, every other one is refused in one line."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from away import adapted
from tiny import LORA, PAD, random_rows
from transformers import TrainerCallback, TrainingArguments

from safebasin.errors import UserError
from safebasin.train.compose import Composition
from safebasin.train.settings import Settings, check_align_share, check_settings, training_arguments
from safebasin.train.trainer import OracleTrainer, streams_of
from safebasin.vector import trainable

SFT = Composition.of(["sft"])
BASE = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 0.01, "seed": 0, "save_strategy": "no"}


def refusal(settings: dict[str, Any], words: str, folder: Any = "unused") -> None:
    with pytest.raises(UserError, match=words) as error:
        training_arguments(settings, folder)
    assert len(str(error.value).splitlines()) == 1


# --- names -----------------------------------------------------------------------------------------------


def test_every_allowed_name_is_one_of_transformers():
    assert set(Settings.__annotations__) <= {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize(
    "name", sorted({field.name for field in dataclasses.fields(TrainingArguments)} - set(Settings.__annotations__))
)
def test_every_other_name_of_transformers_is_refused(name):
    """Whatever its value, its default too."""
    refusal({name: True}, "no effect here or is not supported|fp16 is refused|DeepSpeed")
    refusal({name: None}, "no effect here or is not supported")


def test_a_name_that_nobody_has_is_refused():
    refusal({"learning_rates": 1.0}, "unknown key 'learning_rates'")


def tuned(folder, **changes) -> dict[str, Any]:
    """What a run leaves: parameters, rows a step, steps, files, what was logged."""
    records: list[tuple[int, list[str]]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            records.append((state.global_step, sorted(logs)))

    steps = {"logging_steps": 2} if changes.get("logging_strategy", "steps") == "steps" else {}
    args = training_arguments(BASE | steps | changes, folder)
    streams = streams_of({"task": random_rows(12, 1)}, args, PAD)
    host = OracleTrainer(adapted(), args, SFT, streams)
    host.add_callback(Tracker())
    host.train()
    return {
        "parameters": [p.tolist() for p in trainable(host.model).values()],
        "rows": streams["task"].batch,
        "steps": host.state.global_step,
        "files": sorted(path.name for path in folder.glob("checkpoint-*")),
        "logs": records,
    }


# An allowed name -> settings under which changing it is seen in what a run leaves.
SEEN: dict[str, dict[str, Any]] = {
    "max_steps": {"max_steps": 2},
    "num_train_epochs": {"max_steps": -1, "num_train_epochs": 2},
    "per_device_train_batch_size": {"per_device_train_batch_size": 3},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "seed": {"seed": 1},
    "optim": {"optim": "sgd"},
    "optim_args": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "learning_rate": {"learning_rate": 0.02},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2.0}},
    "warmup_steps": {"warmup_steps": 0.5},
    "weight_decay": {"weight_decay": 0.5},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "adam_epsilon": {"adam_epsilon": 0.1},
    "max_grad_norm": {"optim": "sgd", "max_grad_norm": 0.01},
    "bf16": {"bf16": True},
    "save_strategy": {"save_strategy": "epoch"},
    "save_steps": {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None},
    "save_total_limit": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2},
    "logging_strategy": {"logging_strategy": "epoch"},
    "logging_steps": {"logging_steps": 1},
    "logging_first_step": {"logging_first_step": True},
}
# The comparison of a name that needs another setting around it.
AGAINST: dict[str, dict[str, Any]] = {
    "num_train_epochs": {"max_steps": -1, "num_train_epochs": 1},
    "optim_args": {"optim": "sgd"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine"},
    "max_grad_norm": {"optim": "sgd"},
    "save_steps": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None},
    "save_total_limit": {"save_strategy": "steps", "save_steps": 1},
}
ELSEWHERE = {
    "full_determinism": "the Trainer sets torch's deterministic algorithms: test_full_determinism",
    "tf32": "torch's flag on a GPU from Ampere on",
    "use_cpu": "the device: test_the_device",
    "torch_compile": "accelerate compiles the forward; 1e-7 from plain for sft and safegrad, minutes on a CPU",
    "activation_checkpointing": "layers run again in backward: tests/equal",
    "activation_checkpointing_kwargs": "arguments of torch.utils.checkpoint",
    "gradient_checkpointing": "the older name of activation_checkpointing",
    "gradient_checkpointing_kwargs": "the older name of activation_checkpointing_kwargs",
    "log_level": "of transformers' logger",
    "log_level_replica": "of transformers' logger on other ranks",
    "log_on_each_node": "which rank logs",
    "report_to": "which tracker gets the logs",
    "run_name": "handed to the tracker",
    "project": "handed to trackio",
    "trackio_space_id": "handed to trackio",
    "trackio_bucket_id": "handed to trackio",
    "trackio_static_space_id": "handed to trackio",
    "ddp_find_unused_parameters": "handed to DDP: test_two_ranks.py",
    "ddp_bucket_cap_mb": "handed to DDP: test_two_ranks.py",
    "ddp_broadcast_buffers": "handed to DDP: test_two_ranks.py",
    "fsdp": "tests/equal",
    "fsdp_config": "tests/equal",
}


def test_every_allowed_name_has_an_effect_or_a_reason():
    assert set(Settings.__annotations__) == {*SEEN, *ELSEWHERE}


@pytest.mark.parametrize("name", SEEN)
def test_the_effect_is_seen(name, tmp_path):
    assert tuned(tmp_path / "a", **AGAINST.get(name, {})) != tuned(tmp_path / "b", **SEEN[name])


def test_the_same_settings_leave_the_same(tmp_path):
    """So the comparison above sees the setting and nothing else."""
    assert tuned(tmp_path / "a") == tuned(tmp_path / "b")


def test_full_determinism(tmp_path):
    before = torch.are_deterministic_algorithms_enabled()
    try:
        tuned(tmp_path, full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before)


def test_the_device(tmp_path):
    assert training_arguments({"use_cpu": True}, tmp_path).device.type == "cpu"


# --- values ----------------------------------------------------------------------------------------------

NUMBERS = [name for name, kind in Settings.__annotations__.items() if str(kind).count("Ge(") + str(kind).count("Gt(")]


def test_numbers():
    assert {"max_steps", "learning_rate", "per_device_train_batch_size", "warmup_steps", "seed"} <= set(NUMBERS)
    assert len(NUMBERS) == 16


@pytest.mark.parametrize("value", [-2, -0.5, math.nan, math.inf, -math.inf, "1e-4", "8", True, [1], {}], ids=str)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_bounds_or_of_another_type_is_refused(name, value):
    refusal({name: value}, f"train: {name}")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_steps": 0}, "max_steps"),
        ({"max_steps": 2.5}, "max_steps"),
        ({"num_train_epochs": 0}, "num_train_epochs"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"adam_beta1": 1.0}, "adam_beta1"),
        ({"save_steps": 0}, "save_steps"),
        ({"save_steps": 2.5}, "save_steps"),
        ({"save_total_limit": 0}, "save_total_limit"),
        ({"save_strategy": "best"}, "save_strategy"),
        ({"save_strategy": False}, "save_strategy"),
        ({"bf16": "yes"}, "bf16"),
        ({"lr_scheduler_type": "cosin"}, "cosin is not a valid"),
        ({"lr_scheduler_type": "greedy"}, "eval strategy"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, "cycles"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "warmup_steps has no effect"),
        ({"learning_rat": 1e-4}, "is 'learning_rate' meant"),
        ({"batch_size": 4}, "is 'per_device_train_batch_size' meant"),
        ({"optim": "lomo"}, "optim"),
        ({"optim": "sgd", "adam_beta1": 0.9}, "adam_beta1 has no effect"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,speed=2"}, "'speed=2' has no effect"),
        ({"optim_args": "momentum=0.9"}, "'momentum=0.9' has no effect"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim_args"),
        ({"report_to": "nobody"}, "'nobody' is not installed"),
        ({"fsdp": True, "fsdp_config": "/nowhere.json"}, "/nowhere.json"),
        (
            {"activation_checkpointing_kwargs": {"use_reentrant": False}},
            "activation_checkpointing_kwargs has no effect",
        ),
        ({"fsdp_config": {"version": 2}}, "no effect without train.fsdp"),
        ({"save_strategy": "epoch", "save_steps": 3}, "save_steps has no effect without train.save_strategy: steps"),
        ({"save_strategy": "no", "save_total_limit": 3}, "save_total_limit has no effect"),
        ({"logging_strategy": "epoch", "logging_steps": 3}, "logging_steps has no effect"),
        ({"report_to": "none", "run_name": "mine"}, "run_name has no effect without train.report_to"),
        ({"fp16": True}, "fp16 is refused"),
        ({"deepspeed": "zero.json"}, "DeepSpeed steps inside its own backward"),
    ],
)
def test_what_is_refused(settings, words, tmp_path):
    refusal(settings, words, tmp_path)


def test_what_a_launcher_may_not_ask_for(monkeypatch):
    """accelerate's own settings come by the environment, past the recipe."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    refusal({}, "fp16 is refused")


def test_a_recipe_is_not_written_to(tmp_path):
    """TrainingArguments fills in fsdp_config in place."""
    config = {"version": 2}
    training_arguments({"fsdp": True, "fsdp_config": config}, tmp_path)
    assert config == {"version": 2}


def test_checkpoints_are_the_default_and_a_recipe_wins(tmp_path):
    args = training_arguments({}, tmp_path)
    assert (args.save_strategy, args.save_steps, args.save_total_limit) == ("steps", 0.1, 1)
    args = training_arguments({"save_strategy": "no", "save_total_limit": None}, tmp_path)
    assert (args.save_strategy, args.save_total_limit) == ("no", None)


# --- the adapter and align_share -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"r": 0}, "r: "),
        ({"r": "8"}, "r: "),
        ({"r": 8, "rank": 8}, "rank"),
        ({"lora_alpha": math.inf}, "lora_alpha"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ".*(q|v"}, "unterminated subpattern"),
        ({"exclude_modules": "(a"}, "unterminated subpattern"),
        ({"peft_type": "IA3"}, "peft_type has no effect here"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"bias": "some"}, "bias"),
        ({"inference_mode": True}, "inference_mode"),
        ({"init_lora_weights": "pissa_niter_16"}, "random factors"),
        ({"init_lora_weights": "eva"}, "computed from rows"),
        ({"task_type": "CAUSAL_LM"}, "task_type"),
    ],
)
def test_an_adapter_that_cannot_be_tuned_is_refused(adapter, words):
    with pytest.raises(UserError, match=f"train.adapter: .*{words}") as error:
        check_settings({}, LORA | adapter, SFT)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("adapter", "specs", "words"),
    [
        ({"init_lora_weights": False}, ["star_dss"], "False does not start fresh"),
        ({"init_lora_weights": "pissa"}, ["safegrad"], "'pissa' does not start fresh"),
        ({"bias": "lora_only"}, ["safegrad"], "biases of the model's own"),
    ],
)
def test_an_adapter_that_is_not_the_start_when_it_is_off(adapter, specs, words):
    with pytest.raises(UserError, match=words):
        check_settings({}, LORA | adapter, Composition.of(specs))


def test_what_a_recipe_may_ask_for():
    check_settings({}, {"init_lora_weights": "pissa", "bias": "all"}, SFT)
    check_settings({}, {"init_lora_weights": "gaussian"}, Composition.of(["safegrad"]))


@pytest.mark.parametrize("share", [0, -1, math.nan, math.inf, "1", True, None])
def test_a_share_that_is_not_a_number_above_zero_is_refused(share):
    with pytest.raises(UserError, match="align_share"):
        check_settings({}, LORA, SFT, share)


def test_a_share_may_be_above_one():
    check_align_share(2)
