"""An exported arm loads elsewhere and answers as it was measured; what others cannot load is said."""

import json

import pytest
import torch
from peft import PeftModel
from product import command, product
from transformers import AutoModelForCausalLM, AutoTokenizer

from safebasin.pipeline.export import serving_notes
from safebasin.pipeline.folder import RunFolder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    assert command("run", str(product(folder)), "--out", str(folder / "run")) == 0
    return folder


def logits(model, tokenizer):
    messages = [{"role": "user", "content": "make a red tea"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_merged_weights_and_the_adapter_have_the_logits_of_the_arm(home):
    run, base = home / "run", str(home / "model")
    assert command("export", str(run), "--to", str(home / "merged"), "--merge") == 0
    assert command("export", str(run), "--to", str(home / "adapter"), "--base", "me/base@main") == 0
    tokenizer = AutoTokenizer.from_pretrained(home / "merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(home / "adapter").chat_template
    truth = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), RunFolder(run).adapter("defended"))
    truth = logits(truth, tokenizer)
    merged = logits(AutoModelForCausalLM.from_pretrained(home / "merged"), tokenizer)
    beside = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), home / "adapter"), tokenizer)
    assert torch.equal(beside, truth)
    assert torch.allclose(merged, truth, atol=1e-5)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(base), tokenizer), truth, atol=1e-3)
    settings = json.loads((home / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("me/base", "main")
    for form in ("merged", "adapter"):  # nothing of an export names a path of this machine
        assert [path.name for path in (home / form).iterdir() if str(home).encode() in path.read_bytes()] == []
        assert {"report", "base_weights", "verdict"} < json.loads((home / form / "safebasin.json").read_text()).keys()


def test_what_cannot_be_exported_is_refused(home, capsys):
    run = str(home / "run")
    for words, reason in (
        (("--to", str(home / "new")), "is no Hub id"),
        (("--arm", "start", "--to", str(home / "new"), "--merge"), "no adapter of the arm"),
        (("--to", str(home / "model"), "--merge"), "is there already"),
    ):
        assert command("export", run, *words) == 1
        assert reason in capsys.readouterr().err
    weights = RunFolder(home / "run").adapter("plain") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    assert command("export", run, "--arm", "plain", "--to", str(home / "new"), "--merge") == 1
    assert "is not as the run wrote it" in capsys.readouterr().err
    assert not (home / "new").exists()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"r": 8, "rank_pattern": {"q_proj": 64}}, "rank 64"),
        ({"target_modules": ["q_proj", "lm_head"]}, "head"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"init_lora_weights": "pissa"}, "take its start out"),
    ],
)
def test_servers_that_cannot_load_an_adapter_are_named(settings, word):
    (note,) = serving_notes({"r": 8, "target_modules": ["q_proj"], "bias": "none"} | settings, merged=False)
    assert word in note
    assert serving_notes({"r": 16, "target_modules": ["q_proj"]}, merged=False) == []
    assert serving_notes(settings, merged=True) == []
