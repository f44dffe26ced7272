"""A run on weights in four bits: scanned, tuned, repaired, measured, exported; what needs exact weights is refused."""

import json

import pytest
import torch
import yaml
from product import command, product
from transformers import AutoModelForCausalLM

from safebasin.errors import UserError
from safebasin.models.adapter import attach, merged
from safebasin.models.load import load
from safebasin.models.quantized import quantized_layers
from safebasin.pipeline.folder import RunFolder
from safebasin.pipeline.parse import parse
from safebasin.pipeline.plan import Plan


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nf4")
    model = {"name": str(folder / "model"), "dtype": "float32", "quantization": "nf4"}
    arms = {
        "start": {},
        "plain": {"train": ["sft"]},
        "defended": {"cut": {"scorer": "gradshield", "threshold": 1e9}, "train": [{"safegrad": {}}]},
        "half": {"of": "plain", "repair": [{"shrink": {"alpha": 0.5}}]},
    }
    gate = {"max_asr": 0.5, "min_n": 2, "arm": "defended"}
    assert command("run", str(product(folder, model=model, arms=arms, gate=gate)), "--out", str(folder / "run")) == 0
    return folder


def test_merged_weights_are_those_that_were_measured(home):
    """Into the numbers that four bits stand for, not into the weights before."""
    assert command("export", str(home / "run"), "--to", str(home / "out"), "--merge") == 0
    arm = load(
        str(home / "model"),
        dtype="float32",
        quantization="nf4",
        adapter=RunFolder(home / "run").result("defended", full=False),
    ).model
    assert quantized_layers(arm)
    exported = AutoModelForCausalLM.from_pretrained(home / "out")
    before = merged(
        attach(load(str(home / "model"), dtype="float32").model, RunFolder(home / "run").adapter("defended"))
    )
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        truth, out, other = (model.eval()(ids).logits for model in (arm, exported, before))
    assert torch.allclose(out, truth, atol=1e-4)
    assert (other - truth).abs().max() > 1e-3


def test_an_adapter_says_what_it_was_measured_beside(home, capsys):
    words = ("export", str(home / "run"), "--to", str(home / "adapter"), "--base", "me/base")
    assert command(*words) == 0
    assert "measured beside weights in nf4" in capsys.readouterr().out


def test_another_type_is_another_run(home):
    steps = json.loads((home / "run" / "manifest.json").read_text())["steps"]
    tree = yaml.safe_load((home / "recipe.yaml").read_text())
    plain = tree | {"model": tree["model"] | {"quantization": None}}
    (home / "plain.yaml").write_text(yaml.safe_dump(plain))
    assert command("run", str(home / "plain.yaml"), "--out", str(home / "plain")) == 0
    other = json.loads((home / "plain" / "manifest.json").read_text())["steps"]
    assert steps["scan"]["digest"] != other["scan"]["digest"] and steps["data"]["digest"] == other["data"]["digest"]


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ({"train": [{"asft": {"base": "{home}/model", "aligned": "{home}/model"}}]}, "asft reads the weights"),
        ({"of": "plain", "repair": [{"safe_lora": {"tau": 0.5}}]}, "safe_lora reads the weights"),
    ],
)
def test_what_needs_exact_weights_is_refused_by_name(home, arm, words):
    tree = yaml.safe_load((home / "recipe.yaml").read_text())
    tree["arms"] |= {"more": json.loads(json.dumps(arm).replace("{home}", str(home)))}
    tree["roles"] = {"base": str(home / "model")}
    with pytest.raises(UserError, match=words):
        Plan.of(parse(yaml.safe_dump(tree)))


def test_without_bitsandbytes_it_says_what_to_install(home, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"safebasin\[nf4\]"):
        Plan.of(parse((home / "recipe.yaml").read_text()))
