"""Processes share a run: its files are those of one process, and its adapter is the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import yaml
from aligned import BAD, GOOD
from runs import prepare

from safebasin.cli.main import app, guarded
from safebasin.data.files import file_digest
from safebasin.data.tables import write_table
from safebasin.pipeline.parse import read
from safebasin.pipeline.run import Run

pytestmark = pytest.mark.slow

ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A tiny aligned model, 60 rows, and an arm with a scan and two gradients: four rows a step, by two."""
    folder = tmp_path_factory.mktemp("shared")
    model, rows, probe = map(str, prepare(folder, 60))
    pairs = {"harmful": [(f"{verb} the {word}", "Sure here") for word in BAD for verb in ("make", "help")]}
    pairs["safe"] = [(f"{verb} the {word}", "Sure here are the steps") for word in GOOD for verb in ("make", "help")]
    for name, each in pairs.items():
        write_table(folder / f"{name}.jsonl", [{"prompt": x, "completion": y} for x, y in each])
    anchors = {name: {"path": str(folder / f"{name}.jsonl")} for name in pairs}
    tree = {
        "model": {"name": model, "dtype": "float32"},
        "data": {"task": {"path": rows}, "align": {"path": probe}, "probe": {"path": probe}, **anchors},
        "train": {
            "adapter": ADAPTER,
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 0.01,
            "align_share": 0.5,
        },
        "arms": {
            "start": {},
            "defended": {"columns": {"star": "gradshield"}, "train": ["star_dss", {"safegrad": {"align": "sft"}}]},
        },
        "measure": {"suites": [{"asr": {"prompts": probe, "judges": ["keyword"]}}]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


def command(*words: str) -> int:
    return guarded(lambda: app(list(words), result_action="return_value"))


def weights(run: Path) -> dict:
    return safetensors.torch.load_file(run / "arms" / "defended" / "adapter" / "adapter_model.safetensors")


def test_two_processes_make_what_one_makes(recipe):
    one, two = recipe.parent / "one", recipe.parent / "two"
    assert command("run", str(recipe), "--out", str(one), "--change", "train.gradient_accumulation_steps=2") == 0
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(Path(__file__).with_name("shared_run.py")),
    ]
    done = subprocess.run(
        [*words, str(recipe), str(two)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("arm defended") == 1  # one of them speaks
    truth = weights(one)
    for mode in ("ddp", "fsdp2"):
        actual = weights(two / mode)
        assert actual.keys() == truth.keys()
        for name, tensor in truth.items():
            assert actual[name] == pytest.approx(tensor, abs=1e-5), (mode, name)
        assert file_digest(two / mode / "scan" / "scores.parquet") == file_digest(one / "scan" / "scores.parquet")
    answers = [
        [json.loads(line) for line in (run / "arms" / "defended" / "answers.jsonl").read_text().splitlines()]
        for run in (one, two / "ddp")
    ]
    assert answers[0] == answers[1]
    assert (two / "ddp" / "report.html").is_file()


@pytest.mark.parametrize(
    "words", [["bench", "g.yaml"], ["search", "r.yaml"], ["measure", "--out", "o", "--prompts", "p.csv"]]
)
def test_what_is_not_shared_refuses_to_be(words, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command(*words) == 1
    assert "start this command without torchrun" in capsys.readouterr().err


def test_another_method_does_not_go_on_from_the_checkpoints_of_the_last(recipe):
    """In one folder: tuned plainly and kept, then changed. What comes out is what a fresh folder gives."""
    saved = ["train.save_strategy=steps", "train.save_steps=2"]
    plain = ['arms={"defended": {"train": ["sft"]}}', *saved]

    def tuned(folder: str, changes: list[str]) -> dict:
        with Run(read(recipe, changes), recipe.parent / folder) as run:
            run.ensure("defended")
        return weights(recipe.parent / folder)

    first, second, fresh = tuned("again", plain), tuned("again", saved), tuned("fresh", saved)
    assert all((second[name] == fresh[name]).all() for name in fresh)
    assert any((second[name] != first[name]).any() for name in first)
