"""Full fine-tuning in a run: the arm is a folder of all weights, tuned, measured, repaired, exported and continued."""

import json

import pytest
import torch
import yaml
from product import command, product
from transformers import AutoModelForCausalLM, AutoTokenizer

from safebasin.errors import UserError
from safebasin.models.load import load
from safebasin.pipeline.folder import RunFolder
from safebasin.pipeline.parse import parse, read
from safebasin.pipeline.plan import Plan
from safebasin.pipeline.run import Run

TRAIN = {"adapter": None, "per_device_train_batch_size": 4, "max_steps": 3, "save_steps": 1, "learning_rate": 0.003}
ARMS = {
    "start": {},
    "plain": {"train": ["sft"]},
    "defended": {"columns": {"star": "gradshield"}, "train": ["star_dss", "safegrad"]},
    "half": {"of": "plain", "repair": [{"shrink": {"alpha": 0.5}}]},
    "longer": {"of": "plain", "train": ["safegrad"], "settings": {"max_steps": 1}},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    recipe = product(folder, train=TRAIN, arms=ARMS, gate={"max_asr": 0.5, "min_n": 2, "arm": "defended"})
    assert command("run", str(recipe), "--out", str(folder / "run")) == 0
    return folder


def weights(home, arm=None):
    model = load(str(RunFolder(home / "run").result(arm, full=True) if arm else home / "model"), dtype="float32").model
    return {name: p.detach() for name, p in model.named_parameters()}


def test_every_weight_was_tuned_and_what_is_measured_is_that_folder(home):
    start, plain = weights(home), weights(home, "plain")
    assert start.keys() == plain.keys() and not any(torch.equal(start[name], plain[name]) for name in start)
    folder = RunFolder(home / "run").result("plain", full=True)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {p.name for p in folder.iterdir()}
    assert not (home / "run" / "arms" / "plain" / "adapter").exists()
    assert "library_name: transformers" in (card := (folder / "README.md").read_text()) and "All weights of" in card
    steps = json.loads((home / "run" / "manifest.json").read_text())["steps"]
    assert f"arms/plain/model/{'model.safetensors'}" in steps["train.plain"]["outputs"]
    assert not list((home / "run").rglob("checkpoint*")) and not list((home / "run").rglob("states-*"))


def test_a_repair_and_a_longer_tuning_start_from_the_arm(home):
    """Half of the update, by hand; and a step more, whose reference is the start and not the arm."""
    start, plain, half, longer = (weights(home, arm) for arm in (None, "plain", "half", "longer"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(half[name], (start[name] + plain[name]) / 2, atol=1e-7)
    distance = {arm: (w[name] - start[name]).norm() for arm, w in (("plain", plain), ("longer", longer))}
    assert (longer[name] - plain[name]).norm() < distance["plain"] and distance["longer"] > 0


def test_a_finished_run_is_not_done_again(home, capsys):
    before = (home / "run" / "manifest.json").read_text()
    assert command("run", str(home / "recipe.yaml"), "--out", str(home / "run")) == 0
    assert json.loads((home / "run" / "manifest.json").read_text())["steps"] == json.loads(before)["steps"]


def test_an_export_has_the_logits_of_the_arm(home):
    assert command("export", str(home / "run"), "--to", str(home / "out")) == 0
    origin = json.loads((home / "out" / "safebasin.json").read_text())
    assert origin["form"] == "model" and "All weights of a model that is not on the Hub" in (
        home / "out" / "README.md"
    ).read_text().replace("\n", " ")
    tokenizer = AutoTokenizer.from_pretrained(home / "out")
    inputs = tokenizer.apply_chat_template([{"role": "user", "content": "make a tea"}], return_tensors="pt")
    exported = AutoModelForCausalLM.from_pretrained(home / "out", dtype="auto")
    arm = load(str(RunFolder(home / "run").result("defended", full=True)), dtype="float32").model
    with torch.no_grad():
        assert torch.allclose(exported.eval()(**inputs).logits, arm(**inputs.to(arm.device)).logits.cpu(), atol=1e-5)


def test_a_run_that_was_stopped_goes_on_with_the_same_reference(home, monkeypatch):
    """Stopped after two of three steps: the states of the start are read, not run again, and the weights are the same
    bits."""
    from safebasin.train import reference
    from safebasin.train.trainer import OracleTrainer

    class Stopped(Exception):
        pass

    original = OracleTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise Stopped
        return original(self, *args, **kwargs)

    recipe = read(home / "recipe.yaml")
    with monkeypatch.context() as patch, Run(recipe, home / "again") as run, pytest.raises(Stopped):
        patch.setattr(OracleTrainer, "training_step", stop)
        run.ensure("defended")
    assert list((home / "again").rglob("states-0-*.safetensors"))
    monkeypatch.setattr(reference, "collate", None)  # nothing is run again
    with Run(recipe, home / "again") as run:
        run.ensure("defended")
    file = "arms/defended/model/model.safetensors"
    assert (home / "again" / file).read_bytes() == (home / "run" / file).read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"max_steps": 1}}, "adapter is missing"),
        ({"train": TRAIN | {"reference": "file"}}, "neither stored nor copy"),
        ({"train": TRAIN | {"adapter": {"r": 2, "target_modules": ["q_proj"]}, "reference": "copy"}}, "of full"),
        ({"train": TRAIN | {"ema": {}}}, "factors of LoRA"),
        ({"arms": {"a": {"train": ["buffer_reinforce"]}}}, "factors of adapters"),
        ({"model": {"name": "m", "quantization": "nf4"}}, "four bits cannot be tuned"),
    ],
)
def test_what_full_fine_tuning_cannot_do_is_refused_before_anything(home, change, words):
    tree = yaml.safe_load((home / "recipe.yaml").read_text()) | {"gate": {}} | change
    with pytest.raises(UserError, match=words):
        Plan.of(parse(yaml.safe_dump(tree)))


def test_the_default_learning_rate_is_that_of_full_fine_tuning(home):
    tree = yaml.safe_load((home / "recipe.yaml").read_text()) | {"train": {"adapter": None}}
    assert parse(yaml.safe_dump(tree)).arguments["learning_rate"] == 2e-5
