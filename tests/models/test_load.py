"""A model that cannot be used is refused in one line; what can be used is loaded in silence."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import save_tiny
from safetensors.torch import load_file, save_file
from tiny import LORA, tiny_model
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from safebasin.errors import UserError
from safebasin.models.adapter import fresh_adapter
from safebasin.models.fingerprint import model_fingerprint
from safebasin.models.load import load, load_tokenizer
from safebasin.models.tensors import Tensors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    return shutil.copytree(tiny, tmp_path / "model")


def settings(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    content = {name: value for name, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps(content))


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def sharded(folder: Path, beside: str = "", both: bool = False) -> None:
    """The weights in two files, the second one at another place; ``both``: the second one holds all tensors."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    heads = {name for name in weights if "head" in name}
    (folder / beside).mkdir(exist_ok=True)
    save_file({name: weights[name] for name in heads}, folder / "a.safetensors", {"format": "pt"})
    rest = {name: 2 * weight for name, weight in weights.items() if both or name not in heads}
    save_file(rest, folder / beside / "b.safetensors", {"format": "pt"})
    places = {name: "a.safetensors" if name in heads else f"{beside}b.safetensors" for name in weights}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def family(folder: Path, kind: Any, config: Any, **sizes: Any) -> None:
    """A model of another architecture in the place of the tiny one."""
    kind(config(vocab_size=64, hidden_size=16, num_hidden_layers=1, intermediate_size=16, **sizes)).save_pretrained(
        folder
    )


def tokenizer_model(folder: Path, **changes: Any) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(state | {"model": state["model"] | changes}))


def refused(name: str | Path) -> str:
    """The message of the refusal: one line that names the model."""
    with pytest.raises(UserError) as refusal:
        load(str(name), dtype="float32")
    message = str(refusal.value)
    assert "\n" not in message and len(message) < 500
    assert str(name)[:50] in message
    return message


WEIGHTS = "model.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config cut off": (lambda f: (f / "config.json").write_text('{"a":'), "config.json, line 1: not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "cannot load"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "not UTF-8"),
    "config missing": (lambda f: (f / "config.json").unlink(), "model_type"),
    "no model_type": (lambda f: settings(f, "config.json", model_type=None), "model_type"),
    "unknown model_type": (lambda f: settings(f, "config.json", model_type="frobnicate"), "frobnicate"),
    "no language model": (lambda f: settings(f, "config.json", model_type="vit"), "cannot load"),
    "heads a text": (lambda f: settings(f, "config.json", num_attention_heads="x"), "num_attention_heads"),
    "heads zero": (lambda f: settings(f, "config.json", num_attention_heads=0), "cannot load"),
    "heads do not divide": (lambda f: settings(f, "config.json", num_attention_heads=3), "not a multiple"),
    "unknown activation": (lambda f: settings(f, "config.json", hidden_act="nope"), "nope"),
    "unknown rope": (lambda f: settings(f, "config.json", rope_parameters={"rope_type": "zzz"}), "zzz"),
    "another width": (lambda f: settings(f, "config.json", hidden_size=64), "config.json is of another model"),
    "more blocks": (lambda f: settings(f, "config.json", num_hidden_layers=5), "layers.3"),
    "fewer blocks": (lambda f: settings(f, "config.json", num_hidden_layers=2), "layers.2"),
    "the name of another family": (
        lambda f: settings(f, "config.json", model_type="mistral"),
        "the model_type of its config.json is of the family mistral, and its architectures are of llama",
    ),
    "architectures of another family": (
        lambda f: settings(f, "config.json", architectures=["Own", "Qwen2Model"]),
        "the family llama, and its architectures are of qwen2",
    ),
    "a family with biases": (
        lambda f: settings(f, "config.json", model_type="qwen2", architectures=None),
        "9 of its tensors are not in its files (model.layers.0.self_attn.k_proj.bias)",
    ),
    "architectures that are no text": (lambda f: settings(f, "config.json", architectures=[["x"]]), "cannot load"),
    "no block": (lambda f: settings(f, "config.json", num_hidden_layers=0), "no block"),
    "own code": (
        lambda f: settings(f, "config.json", model_type="own", auto_map={"AutoConfig": "x.Y"}),
        "code which must be executed",
    ),
    "generation settings": (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json, line 1"),
    "a pointer of git-lfs": (
        lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 1\n"),
        "git lfs pull",
    ),
    "weights cut off": (lambda f: os.truncate(f / WEIGHTS, 5000), "model.safetensors cannot be read"),
    "weights empty": (lambda f: os.truncate(f / WEIGHTS, 0), "model.safetensors cannot be read"),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), "no *.safetensors file"),
    "weights a folder": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), "a folder"),
    "index without its file": (
        lambda f: (
            (f / WEIGHTS).rename(f / "spare.safetensors"),
            (f / f"{WEIGHTS}.index.json").write_text(
                '{"metadata": {}, "weight_map": {"lm_head.weight": "x.safetensors"}}'
            ),
        ),
        "x.safetensors",
    ),
    "index cut off": (lambda f: (f / f"{WEIGHTS}.index.json").write_text("{"), "index.json, line 1: not JSON"),
    "index without a map": (
        lambda f: (f / f"{WEIGHTS}.index.json").write_text('{"metadata": {}}'),
        "names '', which is no",
    ),
    "a shard of another folder": (lambda f: sharded(f, beside="../"), "names '../b.safetensors', which is no file"),
    "a shard in a subfolder": (lambda f: sharded(f, beside="sub/"), "names 'sub/b.safetensors', which is no file"),
    "a shard lost": (lambda f: (sharded(f), (f / "b.safetensors").unlink()), "no such file"),
    "a tensor in two shards": (lambda f: sharded(f, both=True), "b.safetensors holds lm_head.weight, as does a.safet"),
    "two sets of weights": (
        lambda f: (shutil.copy(f / WEIGHTS, f / "c"), sharded(f), (f / "c").rename(f / WEIGHTS)),
        "two sets of weights",
    ),
    "an end that is a text": (lambda f: settings(f, "generation_config.json", eos_token_id="</s>"), "no token id"),
    "a list of lists of ends": (lambda f: settings(f, "generation_config.json", eos_token_id=[[1]]), "no token id"),
    "a window without a size": (lambda f: settings(f, "config.json", layer_types=["sliding_attention"] * 3), "sliding"),
    "a scale of the rotation": (
        lambda f: settings(f, "config.json", rope_parameters={"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4}),
        "logits that are no numbers",
    ),
    "four bits that are floats": (
        lambda f: settings(
            f, "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
        ),
        "cannot load",
    ),
    "a length that is a text": (lambda f: settings(f, "tokenizer_config.json", model_max_length="x"), "cannot load"),
    "a block lost": (lambda f: tensors(f, lambda w: {n: t for n, t in w.items() if "layers.1." not in n}), "layers.1"),
    "a tensor lost": (lambda f: tensors(f, lambda w: {n: t for n, t in w.items() if n != "lm_head.weight"}), "lm_head"),
    "a block renamed": (
        lambda f: tensors(f, lambda w: {n.replace("model.layers.2", "model.layers.7"): t for n, t in w.items()}),
        "layers.2",
    ),
    "a matrix of another size": (
        lambda f: tensors(f, lambda w: w | {"model.layers.1.self_attn.q_proj.weight": torch.ones(3, 3)}),
        "q_proj.weight is (3, 3) and not (32, 32)",
    ),
    "a tensor renamed": (
        lambda f: tensors(f, lambda w: {n.replace("model.norm", "language_model.norm"): t for n, t in w.items()}),
        "model.norm.weight",
    ),
    "a bias without a place": (
        lambda f: tensors(f, lambda w: w | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        "q_proj.bias",
    ),
    "an adapter inside": (
        lambda f: tensors(f, lambda w: w | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}),
        "lora_A",
    ),
    "a second set behind another prefix": (
        lambda f: tensors(f, lambda w: w | {f"language_model.{n}": t + 1 for n, t in w.items()}),
        "language_model.",
    ),
    "scales without settings": (
        lambda f: tensors(f, lambda w: w | {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}),
        "weight_scale",
    ),
    "integers": (
        lambda f: tensors(f, lambda w: w | {"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32).to(torch.int8)}),
        "up_proj.weight is stored as I8",
    ),
    "eight bits": (
        lambda f: tensors(f, lambda w: {n: t.to(torch.float8_e4m3fn) if "mlp" in n else t for n, t in w.items()}),
        "stored as F8_E4M3",
    ),
    "integers of an unknown method": (
        lambda f: (
            settings(f, "config.json", quantization_config={"quant_method": "foo"}),
            tensors(f, lambda w: w | {"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32).to(torch.int8)}),
        ),
        "stored as I8 and its config.json has the method 'foo', which is not read here",
    ),
    "an encoder": (lambda f: family(f, BertForMaskedLM, BertConfig, num_attention_heads=2), "is an encoder"),
    "a recurrence": (lambda f: family(f, MambaForCausalLM, MambaConfig, state_size=4), "no attention modules"),
    "a tokenizer of no files": (
        lambda f: (
            (f / "tokenizer.json").unlink(),
            settings(f, "tokenizer_config.json", tokenizer_class="LlamaTokenizer"),
        ),
        "its tokenizer reads no text",
    ),
    "not a number": (
        lambda f: tensors(f, lambda w: w | {"model.norm.weight": torch.full((32,), torch.nan)}),
        "model.norm.weight",
    ),
    "no tokenizer": (lambda f: [path.unlink() for path in f.glob("tok*")], "tokenizer"),
    "tokenizer without its file": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    "tokenizer cut off": (lambda f: (f / "tokenizer.json").write_text('{"a"'), "tokenizer.json, line 1: not JSON"),
    "tokenizer empty": (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot load"),
    "tokenizer a list": (lambda f: (f / "tokenizer.json").write_text("[]"), "cannot load"),
    "tokenizer of unknown kind": (lambda f: tokenizer_model(f, type="Zzz"), "cannot load"),
    "tokenizer that draws": (
        lambda f: (
            tokenizer_model(f, type="BPE", merges=[], dropout=0.1),
            settings(f, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"),
        ),
        "leaves merges out at random",
    ),
    "tokenizer with wrong ids": (lambda f: tokenizer_model(f, vocab={"a": "x"}), "cannot load"),
    "tokenizer settings": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json, line 1"),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
    "template a pointer": (
        lambda f: (f / "chat_template.jinja").write_text("oid sha256:aa"),
        "leaves out what the user",
    ),
    "template not text": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "cannot load"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(damage, folder, capfd):
    change, words = DAMAGES[damage]
    change(folder)
    capfd.readouterr()  # a bar of what was saved
    if damage == "no template":
        with pytest.raises(UserError, match=words):
            load(str(folder), dtype="float32")
    else:
        assert words in refused(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("names", [["LlamaModel"], ["LlamaForSequenceClassification"], ["Own", "logging"], [], None])
def test_architectures_that_contradict_nothing_are_read(names, folder):
    """The body of a family alone, or another head on it; a class that transformers does not have."""
    settings(folder, "config.json", architectures=names)
    assert type(load(str(folder), dtype="float32").model).__name__ == "LlamaForCausalLM"


def test_a_causal_model_that_does_not_call_itself_a_decoder_is_loaded(folder):
    """GPT-NeoX has ``is_decoder: false`` as encoders have, and sees no token to come."""
    family(folder, GPTNeoXForCausalLM, GPTNeoXConfig, num_attention_heads=2)
    model = load(str(folder), dtype="float32").model
    assert model.config.is_decoder is False
    with torch.no_grad():
        one, other = (model(torch.tensor([[5, 6, last]], device=model.device)).logits[0, :2] for last in (7, 8))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    "name",
    ["nowhere", "./no/such/folder", "no/such/folder", "/no/folder", "org/no-such-model-7b", "a b", "x" * 300, "."],
)
def test_a_name_without_a_model_is_refused_in_one_line(name, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    refused(name)
    assert capfd.readouterr() == ("", "")


def test_a_file_is_no_model_and_a_secret_is_not_shown(folder):
    assert "is a file; name the folder" in refused(folder / "config.json")
    with pytest.raises(UserError) as refusal:
        load("https://me:pa55@host/model?token=abc")
    assert "pa55" not in str(refusal.value) and "abc" not in str(refusal.value)


def test_a_good_folder_is_loaded_in_silence(folder, capfd):
    model, tokenizer = load(str(folder), dtype="float32")
    assert not model.training and tokenizer("abc")["input_ids"]
    assert capfd.readouterr() == ("", "")


def test_a_template_that_begins_twice_is_said(folder, capfd):
    template = folder / "chat_template.jinja"
    for text, words in (("{{ bos_token }}", ""), ("{{ bos_token * 2 }}", "begins a conversation twice (<s>)")):
        settings(folder, "tokenizer_config.json", bos_token="<s>")
        template.write_text(text + "{% for m in messages %}{{ m.content }}{% endfor %}")
        load_tokenizer(str(folder))
        assert words in (line := " ".join(capfd.readouterr().err.split())) and bool(line) == bool(words)


def test_a_template_beside_an_adapter_is_not_used_in_silence(folder, tmp_path, capfd):
    fresh_adapter(tiny_model(), LORA, seed=0).save_pretrained(tmp_path / "adapter")
    for text, shown in (((folder / "chat_template.jinja").read_text(), False), ("{{ messages }}", True)):
        (tmp_path / "adapter" / "chat_template.jinja").write_text(text)
        load(str(folder), dtype="float32", adapter=tmp_path / "adapter")
        assert ("holds a chat template of its own" in " ".join(capfd.readouterr().err.split())) == shown


def test_tensors_of_another_part_are_left_out_by_name(folder, capfd):
    """A checkpoint may hold more than the language model, such as a value head; old ones hold what is computed now."""
    inverse = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    tensors(folder, lambda w: w | inverse | {"value_head.weight": torch.ones(2)})
    load(str(folder), dtype="float32")
    assert "1 tensors beside the language model are left out (value_head)" in " ".join(capfd.readouterr().err.split())


def test_files_that_transformers_does_not_read_are_not_read(folder):
    """A copy beside the weights holds the same names; a repair would take its numbers for the model's."""
    save_file(
        {name: (2 * t).to(torch.float8_e4m3fn) for name, t in load_file(folder / WEIGHTS).items()},
        folder / "model_old.safetensors",
    )
    model, files = load(str(folder), dtype="float32").model, Tensors(folder)
    assert all(torch.equal(files[name], model.get_parameter(name).cpu()) for name in files) and len(files) == 30


def test_an_adapter_that_names_another_model_is_put_on_this_one_and_said(folder, tmp_path, capfd):
    fresh_adapter(tiny_model(), LORA, seed=0).save_pretrained(tmp_path / "adapter")
    for name, shown in (("some/model", False), ("", False), ("some/other-7b", True)):
        settings(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path=name)
        load(str(folder), dtype="float32", adapter=tmp_path / "adapter")
        assert ("names 'some/other-7b' as its model" in " ".join(capfd.readouterr().err.split())) == shown


def test_an_adapter_whose_scale_is_no_number_is_refused(folder, tmp_path):
    """Its weights are numbers, and every logit is not."""
    fresh_adapter(tiny_model(), LORA, seed=0).save_pretrained(tmp_path)
    settings(tmp_path, "adapter_config.json", lora_alpha=float("nan"))
    with pytest.raises(UserError, match=r"with the adapter .* gives logits that are no numbers"):
        load(str(folder), dtype="float32", adapter=tmp_path)


def test_a_tuple_in_the_place_of_an_output(folder):
    """``return_dict: false`` stands in configurations of old models."""
    settings(folder, "config.json", return_dict=False)
    model = load(str(folder), dtype="float32").model
    assert model(torch.tensor([[5]], device=model.device)).logits.shape == (1, 1, 64)


def test_a_tied_head_is_not_missing(folder):
    settings(folder, "config.json", tie_word_embeddings=True)
    tensors(folder, lambda w: {name: t for name, t in w.items() if name != "lm_head.weight"})
    model, _ = load(str(folder), dtype="float32")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def with_tokens(folder: Path, *tokens: str, **special: str) -> Path:
    """The folder, its tokenizer grown to the 64 embeddings of the model and then by ``tokens``."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{i}>" for i in range(64 - len(tokenizer))])
    tokenizer.add_tokens(list(tokens))
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_pad_token_outside_the_embedding_is_replaced_and_no_text_reaches_it(folder):
    model, tokenizer = load(str(with_tokens(folder, pad_token="[PAD]")), dtype="float32")
    assert tokenizer.pad_token == tokenizer.eos_token
    ids = tokenizer("a[PAD]b")["input_ids"]
    assert max(ids) < 64 and len(ids) > 3  # its letters are read as text
    with torch.no_grad():
        model(input_ids=torch.tensor([ids], device=model.device))


def test_other_tokens_outside_the_embedding_are_refused(folder):
    assert "2 tokens beyond the 64" in refused(with_tokens(folder, "<new>", pad_token="[PAD]"))


def test_without_a_pad_token_the_end_token_pads(folder):
    settings(folder, "tokenizer_config.json", pad_token=None)
    assert load(str(folder), dtype="float32").tokenizer.pad_token == "</s>"


def test_no_token_to_pad_with_is_refused(folder):
    settings(folder, "tokenizer_config.json", pad_token=None, eos_token=None, unk_token=None)
    assert "no token to pad with" in refused(folder)


def test_named_templates_need_a_default(folder):
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    named = [{"name": name, "template": template} for name in ("rag", "default")]
    settings(folder, "tokenizer_config.json", chat_template=named)
    assert load_tokenizer(str(folder)).chat_template["default"] == template
    settings(folder, "tokenizer_config.json", chat_template=named[:1])
    with pytest.raises(UserError, match="chat templates rag"):
        load_tokenizer(str(folder))


def test_code_of_a_model_is_not_run_unless_asked(folder, tmp_path):
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise ValueError('ran')\n")
    settings(folder, "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})
    refused(folder)
    assert not (tmp_path / "ran").exists()


def test_a_revision_of_a_hub_id(folder, tmp_path, monkeypatch):
    """Two commits in the cache of the Hub's client; a branch, a tag and a commit name them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    stored = tmp_path / "hub" / "models--org--tiny"
    (stored / "refs").mkdir(parents=True)
    for name, commit, number in (("main", "a" * 40, 1.0), ("v1", "b" * 40, 2.0)):
        tensors(folder, lambda w, x=number: w | {"model.norm.weight": torch.full((32,), x)})
        shutil.copytree(folder, stored / "snapshots" / commit)
        (stored / "refs" / name).write_text(commit)
    for revision, number in ((None, 1.0), ("v1", 2.0), ("a" * 40, 1.0), ("b" * 40, 2.0)):
        model = load("org/tiny", dtype="float32", revision=revision).model
        assert model.model.norm.weight[0] == number
        assert model_fingerprint("org/tiny", revision) == ("a" if number == 1 else "b") * 40
    with pytest.raises(UserError, match="cannot load the model 'org/tiny'"):
        load("org/tiny", revision="v2")
    with pytest.raises(UserError, match="has no revision 'v1'"):
        load(str(folder), revision="v1")
