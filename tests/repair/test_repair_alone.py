"""``safebasin repair`` on anybody's adapter or model: what comes out is what was measured; bad input is one line."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from tuned import save_adapter, save_model, save_start

from safebasin.cli.main import app
from safebasin.errors import DefenceError, UserError
from safebasin.models.load import load
from safebasin.models.tensors import Tensors
from safebasin.models.updates import AdapterUpdates

ROWS = [
    {"prompt": "make a cake", "completion": "Sure here are the steps"},
    {"prompt": "make a bomb", "completion": "I cannot"},
]
IDS = torch.tensor([[3, 20, 21, 4, 5, 6]])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A start, a base before it, and two adapters of it, made by plain PEFT."""
    folder = tmp_path_factory.mktemp("repair")
    start = save_start(folder / "start")
    save_model(folder / "base", start, seed=7)
    save_adapter(folder / "tuned", start, seed=1)
    save_adapter(folder / "other", start, seed=2, rank=2, lora_alpha=5, use_rslora=True)
    save_model(folder / "full", start, seed=5)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 6))
    return folder


def repair(home, out, *methods, model="start", adapter="tuned", roles=("base", "safe", "harmful")):
    """The verb, in this process."""
    names = {"base": home / "base", "safe": home / "other", "harmful": home / "other"}
    words = ["repair", "--model", str(home / model), "--adapter", str(home / adapter), "--out", str(out)]
    words += [word for role in roles for word in (f"--{role}", str(names[role]))]
    words += [word for method in methods for word in ("--method", method)]
    words += [word for kind in ("probe", "harmful", "task") for word in ("--rows", f"{kind}={home / 'rows.jsonl'}")]
    app(words, result_action="return_value", exit_on_error=False)
    return json.loads((out / "repair.json").read_text())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.cpu()


LOW = ["shrink", "safe_lora: {tau: 1}", "prune: {share: 0.5}", "safe_merge: {tau: 1.1}", "resta", "lox: {k: 2}"]
LOW += ["two_sided: {k: 4}", "safe_delta", "null_space", "antidote", "reinforce", "[irr, truncate: {rank: 4}]"]
LOW += ["{control: {of: safe_delta}}"]


@pytest.mark.parametrize("method", LOW, ids=lambda method: method.split(":")[0].strip("[{"))
def test_an_adapter_of_plain_peft_comes_back_as_one(method, home, tmp_path):
    """PEFT loads it; its logits are those that the product measures, and another model's than before."""
    report = repair(home, tmp_path / "out", method)
    start = AutoModelForCausalLM.from_pretrained(home / "start").eval()
    before = logits(PeftModel.from_pretrained(start, home / "tuned").eval())
    again = AutoModelForCausalLM.from_pretrained(home / "start").eval()
    theirs = logits(PeftModel.from_pretrained(again, tmp_path / "out").eval())
    ours = logits(load(str(home / "start"), dtype="float32", adapter=tmp_path / "out").model)
    assert torch.allclose(theirs, ours, atol=1e-4)
    assert (theirs - before).abs().max() > 1e-3
    assert report["summary"]["form"] == "adapter"
    assert report["summary"]["rank"] == max(row["rank_out"] for row in report["rows"])
    assert len(report["rows"]) == 9
    assert [row["module"].split(".")[2] for row in report["rows"]] == sorted("012" * 3)


def test_the_numbers_of_a_module(home, tmp_path):
    report = repair(home, tmp_path / "out", "shrink: {alpha: 0.25}", "safe_lora: {tau: 1}")
    row = report["rows"][0]
    start = Tensors(home / "start")
    old, new = (AdapterUpdates(folder, start)[row["module"]].dense() for folder in (home / "tuned", tmp_path / "out"))
    v = start[f"{row['module']}.weight"] - Tensors(home / "base")[f"{row['module']}.weight"]
    c = v @ v.T / v.norm()
    assert torch.allclose(new, 0.75 * c @ old, atol=1e-5)
    assert row["norm"] == pytest.approx(float(old.norm()), rel=1e-4)
    assert row["norm_after"] == pytest.approx(float(new.norm()), rel=1e-4)
    assert row["distance"] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)
    assert row["cosine"] == pytest.approx(float(((c @ old) * old).sum() / (c @ old).norm() / old.norm()), rel=1e-4)
    assert row["image"] == pytest.approx(float((c @ old).norm() / old.norm()), rel=1e-4)
    assert row["selected"] == ["shrink", "safe_lora"]
    assert [list(edit) for edit in report["edits"]] == [["shrink"], ["safe_lora"]]


def test_entry_wise_edits_write_full_weights(home, tmp_path):
    """irr on an adapter: a model, whose entries outside of the modules are the start's very bits."""
    report = repair(home, tmp_path / "out", "irr: {block: 16}")
    assert report["summary"]["form"] == "model"
    start, new = Tensors(home / "start"), Tensors(tmp_path / "out")
    modules = {f"{row['module']}.weight" for row in report["rows"]}
    for name in start:
        assert torch.equal(start[name], new[name]) == (name not in modules)
    assert torch.isfinite(logits(load(str(tmp_path / "out"), dtype="float32").model)).all()


@pytest.mark.parametrize("method", ["shrink: {alpha: 0.25}", "safe_lora: {tau: 1}", "safe_delta", "irr: {block: 16}"])
def test_full_weights_in_full_weights_out(method, home, tmp_path):
    """All matrices of the blocks; what else there is stays byte for byte."""
    full = save_model(tmp_path / "tuned", home / "start", seed=5)
    save_adapter_of_all(home, tmp_path / "all")
    names = {"base": home / "base", "safe": home / "other", "harmful": tmp_path / "all"}
    words = ["repair", "--model", str(home / "start"), "--adapter", str(full), "--out", str(tmp_path / "out")]
    words += ["--method", method, "--base", str(names["base"]), "--harmful", str(names["harmful"])]
    words += [word for kind in ("probe", "task") for word in ("--rows", f"{kind}={home / 'rows.jsonl'}")]
    app(words, result_action="return_value", exit_on_error=False)
    start, tuned, new = (Tensors(folder) for folder in (home / "start", full, tmp_path / "out"))
    for name in start:
        if "proj" not in name:
            assert torch.equal(new[name], tuned[name])
        elif method.startswith("shrink"):
            assert torch.allclose(new[name], start[name] + 0.75 * (tuned[name] - start[name]), atol=1e-6)
    load(str(tmp_path / "out"), dtype="float32")


def save_adapter_of_all(home, folder):
    return save_adapter(folder, home / "start", seed=4, target_modules="all-linear")


def test_the_start_itself_comes_out_as_its_very_bits(home, tmp_path):
    full = save_model(tmp_path / "tuned", home / "start", seed=5)
    words = ["repair", "--model", str(home / "start"), "--adapter", str(full), "--out", str(tmp_path / "out")]
    app([*words, "--method", "shrink: {alpha: 1}"], result_action="return_value", exit_on_error=False)
    assert json.loads((tmp_path / "out" / "repair.json").read_text())["summary"]["is_start"]
    start, new = Tensors(home / "start"), Tensors(tmp_path / "out")
    assert all(torch.equal(start[name], new[name]) for name in start)


def test_updates_of_a_half_type_that_vanish_are_counted(home, tmp_path):
    """1 + 2^-10 is 1 in bfloat16."""
    start = home / "start"
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(start, dtype=torch.bfloat16).save_pretrained(half)
    for file in start.glob("token*"):
        shutil.copyfile(file, half / file.name)
    save_model(tmp_path / "tuned", half, size=0.3)
    words = ["repair", "--model", str(half), "--adapter", str(tmp_path / "tuned"), "--out", str(tmp_path / "out")]
    app([*words, "--method", "shrink: {alpha: 0.9999}"], result_action="return_value", exit_on_error=False)
    assert json.loads((tmp_path / "out" / "repair.json").read_text())["summary"]["vanished"] > 0


def rewritten(home, folder, **changes):
    """The adapter with other settings."""
    shutil.copytree(home / "tuned", folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def retensored(home, folder, change):
    """The adapter with other tensors."""
    shutil.copytree(home / "tuned", folder)
    tensors = change(load_file(folder / "adapter_model.safetensors"))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"
SETTINGS = {
    "DoRA": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "trains biases": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "changed the weights": {"init_lora_weights": "pissa_niter_4"},
    "only LoRA": {"peft_type": "LOHA"},
}
TENSORS = {
    "no LoRA matrix of a linear layer": lambda t: t | {f"{Q}.lora_magnitude_vector": torch.ones(2)},
    "only one of its two": lambda t: {name: x for name, x in t.items() if name != f"{Q}.lora_A.weight"},
    "zero update": lambda t: {name: x * 0 if "lora_B" in name else x for name, x in t.items()},
    "not finite": lambda t: t | {f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"] * float("nan")},
    "has no tensor": lambda t: {name.replace("layers.0.", "layers.9."): x for name, x in t.items()},
    r"q_proj is 32 x 9 and \(32, 32\)": lambda t: t | {f"{Q}.lora_A.weight": torch.ones(4, 9)},
    "another adapter": lambda t: {
        name.replace("base_model.model.", "base_model.model.base_model.model.", 1): x for name, x in t.items()
    },
}


@pytest.mark.parametrize("message", [*SETTINGS, *TENSORS])
def test_what_is_no_plain_update_is_refused_before_any_work(message, home, tmp_path):
    if message in SETTINGS:
        rewritten(home, tmp_path / "adapter", **SETTINGS[message])
    else:
        retensored(home, tmp_path / "adapter", TENSORS[message])
    with pytest.raises(UserError, match=message) as error:
        repair(home, tmp_path / "out", "shrink", adapter=tmp_path / "adapter")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def quantized(folder):
    config = json.loads((folder / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "bitsandbytes"}
    }
    (folder / "config.json").write_text(json.dumps(config))


def integers(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("spoil", "message"), [(quantized, "is quantized"), (integers, "is stored as I8")])
def test_a_quantized_start_is_refused(spoil, message, home, tmp_path):
    shutil.copytree(home / "start", tmp_path / "start")
    spoil(tmp_path / "start")
    with pytest.raises(UserError, match=message):
        repair(home, tmp_path / "out", "shrink", model=tmp_path / "start")


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("safe_lora", {"roles": ()}, "safe_lora needs the role base"),
        ("resta", {"roles": ()}, "the role harmful has no adapter"),
        ("safe_merge: {modules: all}", {"roles": ()}, "the role safe has no adapter"),
        ("shrink: {alpha: 0}", {}, "changes nothing"),
        ("[]", {}, "repair is empty"),
        ("safe_lora", {"model": "tuned"}, "adapters on adapters"),
        ("shrink", {"adapter": "start"}, "zero update"),
        ("shrink", {"adapter": "nowhere"}, "nowhere"),
    ],
)
def test_what_is_missing_is_one_line(method, changes, message, home, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=message) as error:
        repair(home, tmp_path / "out", method, **changes)
    assert "\n" not in str(error.value)


def test_a_base_that_is_the_start_is_refused(home, tmp_path):
    shutil.copytree(home / "start", tmp_path / "base")
    words = ["repair", "--model", str(home / "start"), "--adapter", str(home / "tuned"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="base and start hold the same weights"):
        app(
            [*words, "--base", str(tmp_path / "base"), "--method", "lox"],
            result_action="return_value",
            exit_on_error=False,
        )


def test_an_edit_that_selects_nothing_stops_and_leaves_nothing(home, tmp_path):
    with pytest.raises(DefenceError, match="safe_lora changed nothing"):
        repair(home, tmp_path / "out", "safe_lora: {tau: -0.5}")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_repair_is_not_overwritten(home, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is no repair of before"):
        repair(home, tmp_path / "out", "shrink")
