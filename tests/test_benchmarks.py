"""The benchmark of training steps, on a tiny model: its floors, its turns on one model, its records."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from aligned import aligned_model
from tiny import tiny_model

from safebasin.batch import Batch

FILE = Path(__file__).parents[1] / "benchmarks" / "train" / "run.py"
spec = importlib.util.spec_from_file_location("benchmark_train", FILE)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The aligned tiny model and another, on disk, in a folder that is the cache too."""
    folder = tmp_path_factory.mktemp("bench")
    loaded = aligned_model()
    for name, model in (("aligned", loaded.model), ("base", tiny_model(5))):
        model.save_pretrained(folder / name)
        loaded.tokenizer.save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEBASIN_CACHE", str(folder / "cache"))
        yield {name: str(folder / name) for name in ("base", "aligned")}


def shape(rows: int, width: int, tail: int) -> Batch:
    return Batch(
        torch.zeros(rows, width).long(), torch.ones(rows, width).long(), torch.ones(rows, tail, dtype=torch.bool)
    )


def test_floors_by_hand():
    """Layers 100, head 50, 320 numbers of AsFT's penalty by 2 columns. The task, 4 rows of 10 tokens and 1 answer: F = 4 (10 * 100 + 2 * 50) = 4400.

    Alignment, 1 row of 18 tokens and 7 answers: 1800 + 8 * 50 = 2200 = F / 2, so w = 1/2. AsFT's penalty: 2 * 320 = 640.
    The head at answer tokens: 4 * 50 = 200 of the task, 7 * 50 = 350 of alignment. safegrad 1.5 + 350 / 8800, first 1 + 3/2 * 1/2 = 1.75;
    spard 1.5; star_dss 1 + 200 / 8800, first 1.5; asft 1 + 640 / 8800; composition 1.5 + (200 + 350 + 640) / 8800, first 2.25 + 640 / 8800.
    """
    work, chosen = bench.Work(100, 50, 320, 2), bench.ways("base", "aligned")
    floors = {name: work.floor(way, [shape(4, 10, 1)], [shape(1, 18, 7)]) for name, way in chosen.items()}
    expected = {
        "sft": 1,
        "lisa": 1,
        "safegrad_sft": 1.5,
        "spard": 1.5,
        "safe_instr": 1.5,
        "safegrad_first": 1.75,
        "star_dss_first": 1.5,
    }
    expected |= dict.fromkeys(("safegrad", "metric_safegrad"), 1.5 + 350 / 8800) | dict.fromkeys(
        ("star_dss", "constrained_sft"), 1 + 200 / 8800
    )
    expected |= {"asft": 1 + 640 / 8800, "composition": 1.5 + 1190 / 8800, "composition_first": 2.25 + 640 / 8800}
    assert floors == pytest.approx(expected)


def test_work_and_ratios_by_hand(folders, monkeypatch):
    """Tiny: 3 layers of q, o 32 x 32, k, v 32 x 16, gate, up, down 32 x 48, all adapted; the head 64 x 32.

    AsFT's penalty: 2 * 32^2 + 2 * 16^2 of q, o, k, v, 2 (2 * 48 * 32 + 32^2) of gate and up, 32^2 of down, three times. Two steps of warm-up are left out; then 3 / 2, 6 / 4 and 5 / 2 seconds: the median is 1.5, the ratio of the medians would be 2.5.
    """
    anchor = 3 * (2 * 32 * 32 + 2 * 16 * 16 + 2 * (2 * 48 * 32 + 32 * 32) + 32 * 32)
    layers, shared = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), bench.setting(folders["aligned"])
    assert bench.Work.of(shared.model) == (layers, 64 * 32, anchor, 8)
    monkeypatch.setattr(bench, "turns", lambda *_: {})
    monkeypatch.setattr(bench, "run", lambda *_: {"sft": [9, 1, 2, 4, 2], "spard": [99, 99, 3, 6, 5]})
    chosen = {name: way for name, way in bench.ways("", "").items() if name in ("sft", "spard")}
    seconds, plain, spard = bench.step_ratios(chosen, shared, 3)
    assert (seconds["value"], plain["value"], spard["value"], spard["n"]) == (2, 1, 1.5, 3)
    assert spard["interval"] == [1.5, 2.5]


def test_methods_that_share_a_model_do_not_touch_one_another(folders):
    """Four steps of safegrad by itself and between others, from its adapter to its optimizer: the same to the bit."""
    chosen, found = bench.ways(folders["base"], folders["aligned"]), []
    for names in (("safegrad",), ("composition", "safegrad", "sft")):
        shared = bench.setting(folders["aligned"])
        made = bench.turns({name: chosen[name] for name in names}, shared)
        bench.run(made, shared.model, 4)
        found.append(made["safegrad"].point)
        assert any(p.any() for name, p in made["safegrad"].point.items() if "lora_B" in name)
    assert all(torch.equal(p, found[1][name]) for name, p in found[0].items())


def test_records_of_three_steps(folders, tmp_path, capsys):
    out = tmp_path / "results.json"
    words = [
        "--model",
        folders["aligned"],
        "--base",
        folders["base"],
        "--steps",
        "3",
        "--repetitions",
        "0",
        "--out",
        str(out),
    ]
    bench.main(words)
    records = {record["what"]: record for record in json.loads(out.read_text())}
    assert set(records) == {"sft.seconds"} | {f"{name}.step_ratio" for name in bench.ways("", "")}
    for record in records.values():
        assert {"value", "interval", "n", "goal", "unit", "machine", "date"} <= record.keys()
        assert record["n"] == 3
        assert record["interval"][0] <= record["value"] <= record["interval"][1]
    assert records["sft.step_ratio"]["value"] == 1
    assert len(capsys.readouterr().out.splitlines()[-16:]) == 16  # a line a method under two of heading
    bench.main([*words, "--accumulation", "2", "--only", "spard"])
    again = json.loads(out.read_text())
    assert again[: len(records)] == list(records.values())  # of other batches, and kept
    assert [(record["what"], record["rows"]) for record in again[len(records) :]] == [
        (what, 2 * record["rows"]) for what in ("sft.seconds", "sft.step_ratio", "spard.step_ratio")
    ]


def test_memory_is_of_a_process_of_its_own(folders, monkeypatch):
    asked = argparse.Namespace(model=folders["aligned"], base=folders["base"], repetitions=2, accumulation=1)
    assert bench.peak("star_dss", asked) > 100  # torch alone takes more
    sizes = iter([100, 150, 110, 200, 260, 200])
    monkeypatch.setattr(bench, "peak", lambda name, asked: next(sizes))
    records = {record["what"]: record for record in bench.memory_ratios(asked)}
    assert records["safegrad.memory_ratio"]["value"] == 1.4  # between 150 / 100 and 260 / 200
    assert records["star_dss.memory_ratio"]["value"] == 1.05  # between 110 / 100 and 200 / 200
