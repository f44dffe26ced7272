"""The harness of the benchmarks, its registry and its pages; and the benchmark of training steps on a tiny model."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from aligned import aligned_model
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

from benchmarks import harness
from benchmarks.grid.grid import grid_of
from benchmarks.harness import Bench, read_results
from benchmarks.peers import peers
from benchmarks.repair import repair
from benchmarks.repair.curve import write_curve
from benchmarks.train import train as bench
from safebasin.batch import Batch
from safebasin.errors import UserError

ROOT = Path(__file__).parents[1]
NAMES = {"train", "scan", "truth", "hidden_text", "kill", "search", "guard", "dsa", "landscape", "mechanics", "rubric"}
NAMES |= {"quickstart", "forms", "grid", "methods", "repair", "repair_table"}
NAMES |= {"coverage", "intervals", "judges", "trajectory", "service", "service_end", "scale", "peers", "arithmetic"}
NAMES |= {"gpu"}


def results(path):
    return {row["what"]: row for row in json.loads(path.read_text())}


# --- the harness --------------------------------------------------------------------------------------------


def test_every_experiment_declares_itself(capsys):
    harness.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == NAMES == set(harness.EXPERIMENTS)
    assert all(len(line.split()) > 3 for line in lines), "a name and its question"
    for name, entry in harness.EXPERIMENTS.items():
        options = entry.function.__kwdefaults__ or {}
        assert entry.quick.keys() <= options.keys(), f"{name}: --quick names options that it has"
        assert (ROOT / "benchmarks" / entry.results).is_dir(), name


@pytest.mark.slow
def test_there_is_one_entry_point():
    mains = [
        p
        for p in (ROOT / "benchmarks").rglob("*.py")
        if "ArgumentParser" in (text := p.read_text()) or "__name__ ==" in text
    ]
    assert not mains
    words = [sys.executable, "-m", "benchmarks", "mechanics", "--seeds", "1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 1 and done.stderr.splitlines()[-1] == "benchmarks: an interval over seeds needs two or more"
    )


def test_quick_never_writes_over_history(tmp_path):
    """Its records go to the folder of its parts; naming the file of measured numbers is refused."""
    history = ROOT / "benchmarks" / "scan" / "results.json"
    before = history.read_bytes()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "Say it", "input": "", "output": "It is said."}) + "\n")
    words = ["hidden_text", "--files", str(rows), "--quick", "--keep", str(tmp_path / "keep")]
    harness.main(words)
    assert results(tmp_path / "keep" / "results.json")["hidden_text.miss"]["value"] == 0
    with pytest.raises(UserError, match="holds measured numbers"):
        harness.main([*words, "--out", str(history)])
    assert history.read_bytes() == before


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks").glob("*/results.json")), ids=lambda path: path.parent.name
)
def test_history_can_be_read(path):
    """Early records lack a field or two; they are read as None, and every record that was measured has its number."""
    rows = harness.read_results(path)
    assert len(rows) == len(json.loads(path.read_text())) > 0
    for row in rows:
        assert set(harness.FIELDS) <= row.keys() and row["what"] and row["date"]
        assert row["value"] is None or isinstance(row["value"], int | float)
        assert harness.line(row).startswith(row["what"])


def test_a_record_takes_the_place_of_its_like(tmp_path):
    """By the fields that the experiment names; a file of an experiment that names none is written anew."""
    path = tmp_path / "results.json"
    for threads, value in ((1, 2.0), (2, 3.0), (1, 1.23456789)):
        session = Bench(path, tmp_path, replaces=("what", "threads"), goals={"x": "<= 9"})
        session.facts["threads"] = threads
        session.record("x", value, (1.0, np.float64(2.5)), n=4, unit="s", more="one")
    rows = json.loads(path.read_text())
    assert [(row["threads"], row["value"]) for row in rows] == [(2, 3.0), (1, 1.23457)]
    assert rows[1]["interval"] == [1.0, 2.5] and (rows[1]["goal"], rows[1]["more"]) == ("<= 9", "one")
    assert {*harness.FIELDS, "torch"} <= rows[1].keys()
    assert re.fullmatch(r"\w+, .+, \d+ cores, .+", rows[1]["machine"])
    fresh = Bench(path, tmp_path)
    fresh.record("y", None, n=0, unit="share")
    assert [row["what"] for row in json.loads(path.read_text())] == ["y"]
    assert "not scored" in harness.line(fresh.records[0])


def test_a_finished_part_is_not_done_again(tmp_path):
    """The same inputs: read. Other inputs: done, and the first outcome stays."""
    calls = []

    def part(inputs):
        return Bench(tmp_path / "r.json", tmp_path / "keep").once(
            "part", inputs, lambda: calls.append(inputs) or {"n": len(calls)}
        )

    assert [part([1, "a"]), part([1, "a"]), part([2, "a"]), part([1, "a"])] == [{"n": 1}, {"n": 1}, {"n": 2}, {"n": 1}]
    assert calls == [[1, "a"], [2, "a"]]


def test_ways_take_turns():
    """One round that does not count, then three; every second round in reverse."""
    order, clock = [], iter(range(100))
    ways = {name: lambda name=name: order.append(name) or float(next(clock)) for name in "ba"}
    values = harness.take_turns(ways, 3)
    assert "".join(order) == "abbaabba"
    assert values == {"a": [3.0, 4.0, 7.0], "b": [2.0, 5.0, 6.0]}
    assert harness.ratios(values, "a", "b") == [3 / 2, 4 / 5, 7 / 6]


def test_medians_by_hand():
    """Six values: P(all six on one side of the median) = 2 / 64 < 5 %, so their ends.

    Three: a resampled median is the least of them in 7 of 27 draws, more than 2.5 %, so their ends. Twenty:
    2 P(Bin(20, 1/2) < 6) = 4.1 %, so the 6th and the 15th.
    """
    assert harness.median([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (3.5, (1.0, 6.0))
    assert harness.median([2.0, 1.0, 9.0]) == (2.0, (1.0, 9.0))
    assert harness.median(range(1, 21)) == (10.5, (6.0, 15.0))
    with pytest.raises(UserError, match="two values"):
        harness.median([1.0])


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12))
def test_a_median_lies_in_its_interval(values):
    value, (low, high) = harness.median(values)
    assert min(values) <= low <= value <= high <= max(values)


@pytest.mark.parametrize("name", ["grid", "methods"])
def test_pages_are_those_of_the_records(name, tmp_path):
    """The tables in the repository, and pages that are not in it, come from results.json alone."""
    harness.main([name, "--pages", str(tmp_path)])
    tables = sorted((ROOT / "benchmarks" / name).glob("*.md"))
    assert {path.stem for path in tables} == {path.stem for path in tmp_path.glob("*.html")}
    for path in tables:
        assert (tmp_path / path.name).read_text() == path.read_text(), (
            f"write it again: python -m benchmarks {name} --pages"
        )
        assert path.read_text().split("|")[1] and "<table" in (tmp_path / f"{path.stem}.html").read_text()
    tracked = subprocess.run(["git", "ls-files", "benchmarks"], cwd=ROOT, capture_output=True, text=True).stdout
    assert ".html" not in tracked


def test_a_cell_that_is_measured_again_takes_the_place_of_all_its_records(tmp_path):
    """It could not run, and then it did; other cells and other grids in the file stay."""

    def row(what, grid="grid", attack="explicit", value=0.5):
        facts = {"grid": grid, "attack": attack, "defence": "cut", "interval": None, "goal": None, "n": 4, "unit": ""}
        return facts | {"what": what, "value": value}

    file, replaces = tmp_path / "results.json", harness.EXPERIMENTS["grid"].replaces
    rows = [row("cut.could_not_run", value=None), row("benign.cut.asr", attack="benign"), row("cut.asr", grid="older")]
    Bench(file, tmp_path, replaces=replaces).add(rows)
    Bench(file, tmp_path, replaces=replaces).add([row("cut.asr.keyword"), row("cut.asr.classifier")])
    assert sorted((r["grid"], r["what"]) for r in read_results(file)) == [
        ("grid", "benign.cut.asr"),
        ("grid", "cut.asr.classifier"),
        ("grid", "cut.asr.keyword"),
        ("older", "cut.asr"),
    ]


def test_the_repair_table_by_method(tmp_path):
    """The worse judge counts; the rank of two seeds is the larger, their distance the mean; the best arm is that of the
    lowest upper end. The machine is that of the cells, whoever adds them up."""

    def cell(arm, quantity, value, judge=""):
        facts = {"interval": [0, 1], "n": 40, "unit": "share", "goal": None, "grid": "repair", "seeds": {"0": value}}
        facts |= {"upper": value + 0.1, "machine": "another", "date": "2026-01-02"}
        what = f"poison_10.{arm}.{quantity}.{judge}"
        return facts | {"what": what, "value": value, "defence": arm, "attack": "poison_10", "quantity": quantity}

    rows = [cell("irr", "asr", 0.2, "keyword"), cell("irr", "asr", 0.3, "classifier"), cell("irr", "accuracy", 0.4)]
    rows += [cell("plain", "asr", 0.9, "keyword"), cell("plain", "accuracy", 0.5)]
    for seed, rank, distance in ((0, 16, 0.5), (1, 64, 0.7)):
        folder = tmp_path / "runs" / f"poison_10-{seed}" / "arms" / "irr"
        folder.mkdir(parents=True)
        (folder / "repair.json").write_text(json.dumps({"summary": {"rank": rank, "distance": distance}}))
    file = tmp_path / "results.json"
    mine = Bench(file, tmp_path, replaces=("what",))
    mine.add(rows)
    repair.by_method(mine, [tmp_path / "runs"])
    by_what = results(file)
    assert (by_what["asr.irr.poison_10"]["value"], by_what["utility.irr.poison_10"]["value"]) == (0.3, 0.4)
    assert (by_what["rank.out.irr"]["value"], by_what["distance.irr.poison_10"]["value"]) == (64, 0.6)
    assert {row["machine"] for row in by_what.values()} == {"another"}
    assert (by_what["asr_upper.worst.best_arm"]["value"], by_what["asr_upper.worst.best_arm"]["arm"]) == (0.4, "irr")
    mine.add([cell("plain", "asr", 0.9, "keyword") | {"what": "benign.plain", "attack": "benign"}])
    repair.by_method(mine, [tmp_path / "runs"])
    best = results(file)["asr_upper.worst.best_arm"]
    assert (best["value"], best["arm"], best["columns"]) == (1.0, "plain", ["benign", "poison_10"]), "irr is not known"
    write_curve(list(by_what.values()), ["poison_10"], tmp_path / "curve.svg")
    figure = (tmp_path / "curve.svg").read_text()
    assert all(name in figure for name in ("irr", "plain", "poison_10"))


def test_the_sums_of_the_repair_table_are_those_of_its_cells(tmp_path):
    """Run over the cells of the repository, the command writes the records that are there."""
    file = ROOT / "benchmarks" / "repair" / "results.json"
    mine = tmp_path / "results.json"
    shutil.copyfile(file, mine)
    harness.main(["repair_table", "--pages", str(tmp_path / "pages"), "--out", str(mine), "--keep", str(tmp_path)])
    before, after = ({repr(sorted(row.items(), key=str)) for row in read_results(each)} for each in (file, mine))
    assert before == after, "write it again: python -m benchmarks repair_table --pages"
    for table in file.parent.glob("*.md"):
        assert (tmp_path / "pages" / table.name).read_text() == table.read_text(), "write it again"


def test_a_part_of_the_repairs_tunes_the_roles_that_it_reads():
    """None for shrink; buffer_reinforce reads the harmful adapter and the one that was tuned on top of it."""
    assert repair.roles_of_grid(grid_of("repair", ("plain", "shrink_50"))) == []
    assert repair.roles_of_grid(grid_of("repair", ("plain", "safe_merge_50"))) == ["safe"]
    assert repair.roles_of_grid(grid_of("repair", ("buffer_reinforce",))) == ["harmful", "reinforce"]
    assert repair.LAST_OF_FIRST in grid_of("repair")["defences"] and set(repair.FIRST["only"]) <= set(
        grid_of("repair")["attacks"]
    )


# --- training steps -----------------------------------------------------------------------------------------


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
    ids, seen = torch.zeros(rows, width).long(), torch.ones(rows, width).long()
    return Batch(ids, seen, torch.ones(rows, tail, dtype=torch.bool))


def test_floors_by_hand():
    """Layers 100, head 50, 320 numbers of AsFT's penalty by 2 columns.

    The task, 4 rows of 10 tokens and 1 answer: F = 4 (10 * 100 + 2 * 50) = 4400. Alignment, 1 row of 18 tokens and 7
    answers: 1800 + 8 * 50 = 2200 = F / 2, so w = 1/2. AsFT's penalty: 2 * 320 = 640. The head at answer tokens: 4 * 50
    = 200 of the task, 7 * 50 = 350 of alignment. safegrad 1.5 + 350 / 8800, first 1 + 3/2 * 1/2 = 1.75; spard 1.5;
    star_dss 1 + 200 / 8800, first 1.5; asft 1 + 640 / 8800; composition 1.5 + (200 + 350 + 640) / 8800, first 2.25 +
    640 / 8800.
    """
    work, chosen = bench.Work(100, 50, 320, 2), bench.methods("base", "aligned")
    chosen = {name: way._replace(padded=True) for name, way in chosen.items()}
    task, align = [shape(4, 10, 1)], [shape(1, 18, 7)]
    floors = {name: work.floor(way, task, align, chosen["sft"]) for name, way in chosen.items()}
    assert floors.pop("padded") == 1
    expected = {"sft": 1, "lisa": 1, "safegrad_sft": 1.5, "spard": 1.5, "safe_instr": 1.5}
    expected |= {"safegrad_first": 1.75, "star_dss_first": 1.5, "safegrad_every4": 1 + (2 * 2200 + 350) / 4 / 8800}
    expected |= dict.fromkeys(("safegrad", "metric_safegrad"), 1.5 + 350 / 8800)
    expected |= dict.fromkeys(("star_dss", "constrained_sft"), 1 + 200 / 8800)
    expected |= {"asft": 1 + 640 / 8800, "composition": 1.5 + 1190 / 8800, "composition_first": 2.25 + 640 / 8800}
    assert floors == pytest.approx(expected)


def test_a_packed_floor_by_hand():
    """Four rows of the same ten tokens are one: 10 * 100 + 4 * 50 = 1200 of 4400, and so is a method on packed rows."""
    work, ways = bench.Work(100, 50, 320, 2), bench.methods("base", "aligned")
    assert work.floor(ways["sft"], [shape(4, 10, 1)], [shape(1, 18, 7)], ways["padded"]) == pytest.approx(1200 / 4400)


def test_work_and_ratios_by_hand(folders, monkeypatch, tmp_path):
    """Tiny: 3 layers of q, o 32 x 32, k, v 32 x 16, gate, up, down 32 x 48, all adapted; the head 64 x 32.

    AsFT's penalty: 2 * 32^2 + 2 * 16^2 of q, o, k, v, 2 (2 * 48 * 32 + 32^2) of gate and up, 32^2 of down, three times.
    3 / 2, 6 / 4 and 5 / 2 seconds: the median is 1.5, the ratio of the medians would be 2.5.
    """
    anchor = 3 * (2 * 32 * 32 + 2 * 16 * 16 + 2 * (2 * 48 * 32 + 32 * 32) + 32 * 32)
    layers, shared = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), bench.setting(folders["aligned"])
    assert bench.Work.of(shared.model) == (layers, 64 * 32, anchor, 8)
    monkeypatch.setattr(bench, "turns", lambda *_: {})
    monkeypatch.setattr(bench, "run", lambda *_: {"sft": [1, 2, 1], "padded": [2, 4, 2], "spard": [3, 6, 5]})
    chosen = {name: way for name, way in bench.methods("", "").items() if name in ("sft", "padded", "spard")}
    session = Bench(tmp_path / "results.json", tmp_path)
    bench.step_ratios(session, chosen, shared, 3)
    records = {record["what"]: record for record in session.records}
    assert {name: record["value"] for name, record in records.items()} == {
        "sft.seconds": 1,
        "padded.seconds": 2,
        "packed.step_ratio": 0.5,
        "spard.step_ratio": 1.5,
        "spard.packed_ratio": 3,
    }
    assert (records["spard.step_ratio"]["n"], records["spard.step_ratio"]["interval"]) == (3, [1.5, 2.5])


def test_methods_that_share_a_model_do_not_touch_one_another(folders):
    """Four steps of safegrad by itself and between others, from its adapter to its optimizer: the same to the bit."""
    chosen, points = bench.methods(folders["base"], folders["aligned"]), []
    for names in (("safegrad",), ("composition", "safegrad", "sft")):
        hosts = bench.turns({name: chosen[name] for name in names}, bench.setting(folders["aligned"]))
        bench.run(hosts, 4)
        points.append(hosts["safegrad"].point)
        assert any(p.any() for name, p in points[-1].items() if "lora_B" in name)
    assert all(torch.equal(p, points[1][name]) for name, p in points[0].items())


def test_records_of_three_steps(folders, tmp_path, capsys):
    out = tmp_path / "results.json"
    words = ["train", "--model", folders["aligned"], "--base", folders["base"], "--steps", "3", "--repetitions", "0"]
    words += ["--keep", str(tmp_path / "keep"), "--out", str(out)]
    harness.main(words)
    records = results(out)
    others = bench.methods("", "").keys() - {"sft", "padded", "safegrad_every4"}  # which takes eight steps
    ratios = {f"{name}.{kind}_ratio" for name in others for kind in ("step", "packed")}
    assert set(records) == {"sft.seconds", "padded.seconds", "packed.step_ratio"} | ratios
    for record in records.values():
        assert set(harness.FIELDS) <= record.keys()
        assert record["n"] == 3
        assert record["interval"][0] <= record["value"] <= record["interval"][1]
    lines = [line for line in capsys.readouterr().out.splitlines() if "_ratio" in line]
    pattern = r"floor \d\.\d+( and <= \d\.\d+)? \([+-]\d+%\) +x$"
    assert len(lines) == len(records) - 2 and all(re.search(pattern, line) for line in lines)
    harness.main([*words, "--accumulation", "2", "--only", "spard"])
    again = json.loads(out.read_text())
    assert again[: len(records)] == list(records.values())  # of other batches, so they stay
    assert [(record["what"], record["rows"]) for record in again[len(records) :]] == [
        (what, 2 * record["rows"])
        for what, record in records.items()
        if what in ("sft.seconds", "padded.seconds", "packed.step_ratio") or what.startswith("spard.")
    ]


def test_four_steps_on_end_are_one_value():
    """Five steps of 4, 1, 1, 1, 4 seconds beside 1, 2, 2, 2, 1: the four are 7 / 7, and the fifth begins another four.

    A median over single steps would be 0.5, and would never see the one in four that is dear.
    """
    values = {"every": [4, 1, 1, 1, 4], "sft": [1, 2, 2, 2, 1]}
    assert harness.ratios({name: bench.in_cycles(column, 4) for name, column in values.items()}, "every", "sft") == [1]
    assert bench.in_cycles(values["sft"], 1) == values["sft"]
    with pytest.raises(UserError, match="two cycles: set --steps to 8"):
        harness.main(["train", "--steps", "7", "--repetitions", "0", "--only", "safegrad_every4"])


# --- peers --------------------------------------------------------------------------------------------------


def test_a_module_of_a_checkout_is_imported_without_what_its_packages_import(tmp_path, monkeypatch):
    """A package whose ``__init__`` needs what is not installed; the module imports a neighbour by its full name."""
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "inner").mkdir()
    for package in (tmp_path, tmp_path / "inner"):
        (package / "__init__.py").write_text("import nothing_of_this_name")
    (tmp_path / "inner" / "step.py").write_text("from peer_of_a_test.inner.size import SIZE\ntwice = 2 * SIZE\n")
    (tmp_path / "inner" / "size.py").write_text("SIZE = 3\n")
    assert peers.imported("peer_of_a_test.inner.step", tmp_path).twice == 6
    with pytest.raises(UserError, match="give a checkout"):
        peers.imported("peer_of_a_test.inner.step", tmp_path / "none")


def test_rows_as_a_peer_has_them():
    """Two rows of four tokens; the answers are the last two of the first and the last of the second."""
    ids = torch.tensor([[5, 6, 7, 8], [0, 6, 7, 9]])
    mask, star = torch.tensor([[True, True], [False, True]]), torch.tensor([[0.5, 0.25], [0.0, 1.0]])
    batch = Batch(ids, (ids > 0).long(), mask, {"star": star})
    assert peers.padded(batch)["labels"].tolist() == [[-100, -100, 7, 8], [-100, -100, -100, 9]]
    assert peers.padded(batch, weights=True)["safety_weights"].tolist() == [[1, 1, 0.5, 0.25], [1, 1, 0, 1]]


def test_a_peer_without_its_folder_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(peers, "setting", lambda _: None)
    monkeypatch.setattr(peers, "trainers", lambda *_: {"hf.plain": None})
    with pytest.raises(UserError, match=r"trl\.plain: without its folder"):
        harness.main(["peers", "--quick", "--only", "trl.plain"])


@pytest.mark.slow
def test_memory_is_of_a_process_of_its_own(folders, monkeypatch, tmp_path):
    assert bench.peak("star_dss", folders["aligned"], folders["base"], 1) > 100  # torch alone takes more
    sizes = {"sft": iter([100, 200]), "safegrad": iter([150, 260]), "star_dss": iter([110, 200])}
    monkeypatch.setattr(bench, "peak", lambda name, *_: next(sizes[name]))
    session = Bench(tmp_path / "results.json", tmp_path)
    bench.memory_ratios(session, bench.peaks("", "", 1, 2))
    records = {record["what"]: record for record in session.records}
    assert records["safegrad.memory_ratio"]["value"] == 1.4  # between 150 / 100 and 260 / 200
    assert records["star_dss.memory_ratio"]["value"] == 1.05  # between 110 / 100 and 200 / 200
