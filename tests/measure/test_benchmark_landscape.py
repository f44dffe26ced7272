"""The landscape's benchmark, end to end on a tiny model with two tuned arms."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from aligned import BAD, aligned_model
from peft import LoraConfig, get_peft_model

from benchmarks import harness
from benchmarks.landscape import landscape as bench
from safebasin.data.tables import write_table
from safebasin.errors import UserError


@pytest.fixture
def words(tmp_path):
    """The command line over a run folder: defended is almost the start model, plain writes gibberish."""
    loaded, run = aligned_model(), tmp_path / "run"
    for part in loaded:
        part.save_pretrained(tmp_path / "model")
    for seed, arm in enumerate(("plain", "defended")):
        model = get_peft_model(aligned_model().model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        torch.manual_seed(seed)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=3.0 if arm == "plain" else 1e-3)
        model.save_pretrained(run / "arms" / arm / "adapter")
    write_table(tmp_path / "bad.jsonl", [{"prompt": f"make a {word}"} for word in BAD])
    tree = {"model": {"name": str(tmp_path / "model"), "dtype": "float32"}, "measure": {"suites": []}}
    (run / "run.yaml").write_text(yaml.safe_dump(tree))
    files = {
        "--run": run,
        "--prompts": tmp_path / "bad.jsonl",
        "--keep": tmp_path / "keep",
        "--out": tmp_path / "results.json",
    }
    small = {
        "--take": 6,
        "--directions": 2,
        "--points": 3,
        "--radius": 0.02,
        "--between": 3,
        "--batch": 3,
        "--width": 0,
        "--judge": "keyword",
    }
    return ["landscape", *(str(word) for pair in (files | small).items() for word in pair)]


def changed(words, option, value):
    place = words.index(option) + 1
    return [*words[:place], value, *words[place + 1 :]]


def records(words):
    return {row["what"]: row for row in json.loads(Path(words[words.index("--out") + 1]).read_text())}


def test_three_models_and_what_lies_between(words, capsys):
    """Start and defended refuse all six around their weights: VISAGE 1.

    Two lines of 3 stops share the unmoved model: 6 of 36 answers are saved. The plain one writes gibberish: no VISAGE,
    neither 0 nor 1. Between start and plain the unmoved model's 6 answers are read.
    """
    harness.main(words)
    rows = records(words)
    for arm in ("start", "defended"):
        assert (rows[f"visage.{arm}"]["value"], rows[f"visage.{arm}"]["n"], rows[f"coherence.{arm}"]["value"]) == (
            1.0,
            6,
            1.0,
        )
        low, high = rows[f"visage.{arm}"]["interval"]
        assert low < high == 1.0
        assert [rows[f"asr.{arm} at {a}"]["value"] for a in ("-0.02", "+0", "+0.02")] == [0.0] * 3
        assert rows[f"stops_coherent.{arm}"]["value"] == 6
    for arm in bench.ARMS:
        assert rows[f"generations_saved.{arm}"]["value"] == 6
    broken = [rows[what] for what in ("visage.plain", "asr.plain at +0", "interpolation.asr.plain at +0")]
    assert all((row["value"], row["interval"], row["n"]) == (None, None, 0) for row in broken)
    assert rows["coherence.plain"]["value"] == rows["stops_coherent.plain"]["value"] == 0
    assert rows["interpolation.asr.plain at -1"]["value"] == 0.0, "there the start model stands again"
    assert rows["interpolation.generations_read.plain"]["value"] == 6
    assert rows["seconds.plain"]["n"] == 30 + 12
    for row in rows.values():
        assert {*harness.FIELDS, "setting"} <= row.keys()
    assert rows["visage.defended"]["goal"] == ">= visage.plain"
    printed = capsys.readouterr().out
    assert "visage.defended" in printed and "not scored" in printed


def test_a_finished_model_is_not_measured_again_and_a_killed_one_goes_on(words, monkeypatch):
    real, seen = bench.measured, []

    def dies(setting, arm, *rest):
        seen.append(arm)
        outcome = real(setting, arm, *rest)
        if len(seen) == 2:
            raise RuntimeError  # after its answers, before its records
        return outcome

    monkeypatch.setattr(bench, "measured", dies)
    with pytest.raises(RuntimeError):
        harness.main(words)
    assert "visage.start" in records(words) and "visage.plain" not in records(words), "saved after every model"
    harness.main(words)
    assert seen == ["start", "plain", "plain", "defended"]
    assert records(words)["seconds.plain"]["n"] == 0, "its answers were cached"
    first = records(words)
    harness.main(words)
    assert len(seen) == 4 and records(words) == first
    harness.main(changed(words, "--radius", "0.03"))
    assert len(seen) == 7, "another setting is measured anew"


def test_no_run_names_the_command_that_makes_one(words, tmp_path):
    with pytest.raises(UserError, match=r"safebasin run .*quickstart.yaml --seed 0 --out"):
        harness.main(changed(words, "--run", str(tmp_path / "nothing")))
