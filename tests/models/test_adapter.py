"""An adapter is merged if it is one of this model, and refused in one line if it is not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import LORA, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from safebasin.errors import UserError
from safebasin.models.adapter import fresh_adapter, merge

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A LoRA adapter of the tiny model whose B is not zero."""
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **LORA)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def adapter(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "adapter")


def settings(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def renamed(folder: Path, old: str, new: str, only: str = "") -> None:
    weights = load_file(folder / WEIGHTS)
    save_file(
        {k.replace(old, new) if only in k else k: v for k, v in weights.items()}, folder / WEIGHTS, {"format": "pt"}
    )


def refused(adapter: str | Path, model=None) -> str:
    with pytest.raises(UserError) as refusal:
        merge(tiny_model() if model is None else model, adapter)
    message = str(refusal.value)
    assert "\n" not in message and len(message) < 500 and str(adapter) in message
    return message


def test_merged_by_hand(adapter):
    """W + (alpha / r) B A, here with alpha / r = 2."""
    name = "model.layers.1.self_attn.v_proj"
    weights, start = load_file(adapter / WEIGHTS), tiny_model().get_parameter(f"{name}.weight").detach()
    a, b = (weights[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    merged = merge(tiny_model(), adapter).get_parameter(f"{name}.weight")
    assert torch.allclose(merged, start + 2 * b @ a, atol=1e-6)
    assert not torch.equal(merged, start)


DAMAGES = {
    "names of another model": (lambda f: renamed(f, "model.layers", "model.language_model.layers"), "of another model"),
    "one tensor of another name": (lambda f: renamed(f, "layers.2", "layers.9", "layers.2.mlp"), "of another model"),
    "no tensor": (lambda f: save_file({}, f / WEIGHTS), "of another model"),
    "modules of another model": (lambda f: settings(f, target_modules=["c_attn"]), "c_attn"),
    "another rank": (lambda f: settings(f, r=2), "size mismatch"),
    "unknown kind": (lambda f: settings(f, peft_type="IA9"), "IA9"),
    "kind a list": (lambda f: settings(f, peft_type=[1]), "peft_type"),
    "a prompt, not weights": (lambda f: settings(f, peft_type="PROMPT_TUNING", num_virtual_tokens=4), "cannot load"),
    "settings cut off": (
        lambda f: (f / "adapter_config.json").write_text("{"),
        "adapter_config.json, line 1: not JSON",
    ),
    "settings a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "peft_type"),
    "no settings": (lambda f: (f / "adapter_config.json").unlink(), "not an adapter folder"),
    "weights cut off": (lambda f: os.truncate(f / WEIGHTS, 2000), "cannot be read"),
    "a pointer of git-lfs": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com"), "git lfs pull"),
    "pickled": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "can run code"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_in_one_line(damage, adapter, capfd):
    change, words = DAMAGES[damage]
    change(adapter)
    assert words in refused(adapter)
    assert capfd.readouterr() == ("", "")


def test_an_adapter_of_another_model_is_refused(adapter):
    wide = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=3))
    assert "size mismatch" in refused(adapter, wide)
    deep = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    assert "layers.3" in refused(adapter, LlamaForCausalLM(deep))
    assert "cannot load" in refused(adapter, GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)))


@pytest.mark.parametrize("name", ["org/no-such-adapter", "./no/such/folder", "no adapter"])
def test_a_name_without_an_adapter_is_refused(name, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(name)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "wrong", [{"r": 0}, {"r": "x"}, {"target_modules": ["nope"]}, {"target_modules": "("}, {"zzz": 1}]
)
def test_settings_that_peft_refuses(wrong):
    with pytest.raises(UserError, match=r"^train\.adapter: [^\n]*$"):
        fresh_adapter(tiny_model(), LORA | wrong, seed=0)


def test_a_fresh_adapter_is_a_function_of_its_seed():
    first, again, other = (dict(fresh_adapter(tiny_model(), LORA, seed).named_parameters()) for seed in (0, 0, 1))
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
