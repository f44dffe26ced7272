"""An adapter is merged if it is one of this model, and refused in one line if it is not."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    RandLoraConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tiny import LORA, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from safebasin.errors import UserError
from safebasin.models.adapter import adapter_settings, attach, fresh_adapter, merged
from safebasin.train.settings import check_adapter

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
        attach(tiny_model() if model is None else model, adapter)
    message = str(refusal.value)
    assert "\n" not in message and len(message) < 500 and str(adapter) in message
    return message


def test_merged_by_hand(adapter):
    """W + (alpha / r) B A, here with alpha / r = 2."""
    name = "model.layers.1.self_attn.v_proj"
    weights, start = load_file(adapter / WEIGHTS), tiny_model().get_parameter(f"{name}.weight").detach()
    a, b = (weights[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    plain = merged(attach(tiny_model(), adapter))
    assert torch.allclose(plain.get_parameter(f"{name}.weight"), start + 2 * b @ a, atol=1e-6)
    assert not adapter_settings(plain) and plain.state_dict().keys() == tiny_model().state_dict().keys()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(1, 13)[None]).logits.float()


KINDS = {
    "lora": LORA,
    "rslora": LORA | {"use_rslora": True},
    "dora": LORA | {"use_dora": True},
    "all-linear": LORA | {"target_modules": "all-linear"},
    "pissa": LORA | {"init_lora_weights": "pissa"},
    "olora": LORA | {"init_lora_weights": "olora"},
    "orthogonal": LORA | {"init_lora_weights": "orthogonal"},
    "embedding of a tied model": LORA | {"target_modules": ["q_proj", "embed_tokens"]},
    "modules to save": LORA | {"modules_to_save": ["lm_head"]},
    "biases": LORA | {"bias": "lora_only"},
    "tokens": LORA | {"trainable_token_indices": [3, 7]},
    "tokens of both ends": LORA | {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [2]}},
    "patterns": LORA | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
}


def tuned(kind: str, dtype: torch.dtype = torch.float32):
    """A tiny model with an adapter that says something, and the model alone."""
    base = tiny_model(dtype=dtype)
    if kind == "embedding of a tied model":
        base.config.tie_word_embeddings = True
        base.tie_weights()
    model = fresh_adapter(copy.deepcopy(base), KINDS[kind], seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return base, model


@pytest.mark.filterwarnings("ignore")  # of PEFT, at an embedding
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_is_what_is_loaded_and_what_is_merged(kind, tmp_path):
    base, model = tuned(kind)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 1e-3
    loaded = attach(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert torch.allclose(logits(merged(loaded)), expected, atol=1e-5)
    assert torch.equal(logits(loaded), expected)  # the copy was merged, not the model
    merged(loaded).save_pretrained(tmp_path / "exported")
    exported = LlamaForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager")
    assert torch.allclose(logits(exported), expected, atol=1e-5)


def test_a_small_update_lives_beside_bfloat16_weights_and_not_inside(tmp_path):
    """Of an update below half a unit in the last place nothing is left by a sum in bfloat16."""
    base, model = tuned("lora", torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter *= 1e-3
    model.save_pretrained(tmp_path)
    beside = attach(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(beside), logits(model))
    name = "model.layers.1.self_attn.v_proj"
    inside = merged(beside).get_parameter(f"{name}.weight").bfloat16()
    change = (merged(beside).get_parameter(f"{name}.weight") - base.get_parameter(f"{name}.weight").float()).norm()
    lost = (merged(beside).get_parameter(f"{name}.weight") - inside.float()).norm()
    assert lost > 0.25 * change > 0


def moved(config, folder: Path):
    """A tiny model with an adapter of any kind that says something, saved."""
    model, generator = get_peft_model(tiny_model(), config), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore")  # of PEFT
@pytest.mark.parametrize(
    "config",
    [
        LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
        LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        LoKrConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        RandLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        TrainableTokensConfig(token_indices=[3, 5], task_type="CAUSAL_LM"),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_other_kinds_of_adapters(config, tmp_path, capfd):
    expected = logits(moved(config, tmp_path))
    capfd.readouterr()
    beside = attach(tiny_model(), tmp_path)
    assert capfd.readouterr().err == ""
    assert torch.equal(logits(beside), expected)
    assert torch.allclose(logits(merged(beside)), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_without_a_place_in_the_weights_is_refused_where_it_is_merged(tmp_path):
    """A bias of B where the layer has none."""
    config = LoraConfig(task_type="CAUSAL_LM", lora_bias=True, **LORA)
    expected = logits(moved(config, tmp_path))
    beside = attach(tiny_model(), tmp_path)
    assert torch.equal(logits(beside), expected)
    with pytest.raises(UserError, match=r"as part of the weights.*no bias"):
        merged(beside)


@pytest.mark.parametrize("own", [{"alora_invocation_tokens": [3, 4]}, {"layer_replication": [[0, 2], [1, 3]]}])
def test_an_adapter_that_is_no_change_of_the_weights_is_refused(own, tmp_path):
    """Without its prompt an aLoRA is switched off: the base would be measured under its name."""
    moved(LoraConfig(task_type="CAUSAL_LM", **LORA, **own), tmp_path)
    assert next(iter(own)) in refused(tmp_path)
    with pytest.raises(UserError, match=next(iter(own))):
        check_adapter(LORA | own)


DAMAGES = {
    "random factors of the weights": (lambda f: settings(f, init_lora_weights="pissa_niter_4"), "takes random factors"),
    "names of another model": (lambda f: renamed(f, "model.layers", "model.language_model.layers"), "of another model"),
    "one tensor of another name": (lambda f: renamed(f, "layers.2", "layers.9", "layers.2.mlp"), "of another model"),
    "one tensor too many": (
        lambda f: save_file(
            load_file(f / WEIGHTS) | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}, f / WEIGHTS
        ),
        "of another model",
    ),
    "stored as integers": (
        lambda f: save_file({k: v.to(torch.int8) for k, v in load_file(f / WEIGHTS).items()}, f / WEIGHTS),
        "stored as I8",
    ),
    "no tensor": (lambda f: save_file({}, f / WEIGHTS), "of another model"),
    "modules of another model": (lambda f: settings(f, target_modules=["c_attn"]), "c_attn"),
    "no scale by a pattern": (lambda f: settings(f, alpha_pattern={".*": 0}), "changes nothing"),
    "no scale": (lambda f: settings(f, lora_alpha=0), "changes nothing"),
    "another rank": (lambda f: settings(f, r=2), "size mismatch"),
    "unknown kind": (lambda f: settings(f, peft_type="IA9"), "IA9"),
    "kind a list": (lambda f: settings(f, peft_type=[1]), "peft_type"),
    "a prompt, not weights": (lambda f: settings(f, peft_type="PROMPT_TUNING", num_virtual_tokens=4), "to a prompt"),
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


def test_what_an_adapter_does_not_do_is_said(adapter, tmp_path, capfd):
    """Keys of a newer PEFT are not read, and an adapter that was never tuned is the model itself."""
    settings(adapter, use_superlora=True, empty=None, off=False)
    attach(tiny_model(), adapter)
    assert "does not read use_superlora of its" in " ".join(capfd.readouterr().err.split())
    fresh_adapter(tiny_model(), LORA, seed=0).save_pretrained(tmp_path / "fresh")
    attach(tiny_model(), tmp_path / "fresh")
    assert "changes nothing: it is not tuned" in " ".join(capfd.readouterr().err.split())


def test_every_target_is_tuned():
    with pytest.raises(UserError, match=r"target_modules: 'v_porj' is no module"):
        fresh_adapter(tiny_model(), LORA | {"target_modules": ["q_proj", "v_porj"]}, seed=0)


def test_a_bias_that_is_not_there_is_missed(tmp_path):
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, attention_bias=True)
    settings = {"r": 2, "target_modules": ["q_proj"], "bias": "lora_only"}
    fresh_adapter(LlamaForCausalLM(config), settings, seed=0).save_pretrained(tmp_path)
    attach(LlamaForCausalLM(config), tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    save_file(
        {k: v for k, v in weights.items() if not k.endswith("base_layer.bias")}, tmp_path / WEIGHTS, {"format": "pt"}
    )
    assert len(load_file(tmp_path / WEIGHTS)) == len(weights) - 1
    assert "of another model" in refused(tmp_path, LlamaForCausalLM(config))


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
