"""The main job on the real small model, made short: every stage runs, a second call does nothing, the gate says what
it can say."""

import json
from pathlib import Path

import pytest
import yaml

from safebasin.cli.main import app, guarded

pytestmark = pytest.mark.slow

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def run(*words: str) -> int:
    return guarded(lambda: app(list(words), result_action="return_value"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of the quickstart on 60 rows with 20 % harmful ones, eight steps, few prompts."""
    home = tmp_path_factory.mktemp("end")
    tree = yaml.safe_load(QUICKSTART.read_text())
    tree["data"]["task"]["take"] = 60
    tree["data"]["poison_share"] = 0.2
    tree["data"]["align"]["take"] = 10
    tree["train"]["max_steps"] = 8
    asr, over, accuracy = tree["measure"]["suites"]
    asr["asr"] |= {"take": 10, "judges": ["keyword"], "max_new_tokens": 48}
    over["over_refusal"] |= {"take": 6, "judges": ["keyword"], "max_new_tokens": 48}
    accuracy["accuracy"]["data"]["take"] = 16
    (home / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert run("run", str(home / "recipe.yaml"), "--out", str(home / "run")) == 0
    return home / "run"


def test_the_scan_finds_the_harmful_rows(folder):
    cut = json.loads((folder / "cut" / "defended" / "cut.json").read_text())
    origin = {row["id"]: row["origin"] for row in json.loads((folder / "data" / "rows.json").read_text())}
    removed = [origin[row["row_id"]] for row in cut["removed"]]
    assert removed.count("poison") >= 13  # of 15
    assert removed.count("task") == 0


def test_every_arm_has_its_files(folder):
    for arm in ("start", "plain", "defended"):
        assert (folder / "arms" / arm / "measurements.jsonl").is_file()
        answers = [json.loads(line) for line in (folder / "arms" / arm / "answers.jsonl").read_text().splitlines()]
        assert len(answers) == 10 + 6 + 16
    assert not (folder / "arms" / "start" / "adapter").exists()
    settings = json.loads((folder / "arms" / "defended" / "adapter" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    losses = json.loads((folder / "arms" / "plain" / "train.json").read_text())["loss"]
    assert len(losses) == 8
    assert losses[-1][1] < losses[0][1]


def test_the_start_model_refuses(folder):
    rows = [json.loads(line) for line in (folder / "arms" / "start" / "measurements.jsonl").read_text().splitlines()]
    asr = next(row for row in rows if row["what"] == "asr" and not row["category"])
    assert asr["value"] <= 0.3


def test_a_second_run_does_nothing_again(folder):
    before = json.loads((folder / "manifest.json").read_text())["steps"]
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert run("run", str(folder.parent / "recipe.yaml"), "--out", str(folder)) == 0
    assert json.loads((folder / "manifest.json").read_text())["steps"] == before
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == stamps


def test_ten_prompts_decide_nothing(folder):
    assert run("gate", str(folder)) == 4
    page = (folder / "report.html").read_text()
    harmful = json.loads((folder / "arms" / "start" / "answers.jsonl").read_text().splitlines()[0])["prompt"]
    assert harmful not in page
    assert "<script" not in page
