"""The grammar world: its laws, and that every training method can be tried in it."""

import argparse
import importlib.util
import json
import math
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "mechanics" / "run.py"
spec = importlib.util.spec_from_file_location("benchmark_mechanics", FILE)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
SMALL = {"steps": 2, "safety": 2, "texts": 40, "rows": 32, "epochs": 1, "test": 10}


def parts(task):
    operator, *text = task.told.prompt.split()
    return int(operator[1:]), text, task.told.answer.split()


@pytest.mark.parametrize("seed", range(3))
def test_the_world(seed):
    """Operators are bijections and the hidden ones are known maps; a text's pairs are of its node alone, so that any pair tells it."""
    world = bench.World(seed)
    for made in world.maps.values():
        assert sorted(made) == sorted(made.values()) == sorted(bench.LETTERS)
    assert all(world.maps[hidden] == world.maps[shown] for hidden, shown in bench.HIDDEN.items())
    assert world.maps[bench.CUSTOMER] not in [world.maps[i] for i in range(8)]
    assert set(bench.UNSAFE["A"]) < set(bench.UNSAFE["B"]) and set(bench.SAFE["B"]) < set(bench.SAFE["A"])
    pairs = {node: set() for node in "AB"}
    for node in "AB":
        for task in world.tasks(60, {node: bench.UNSAFE[node]}):
            operator, text, made = parts(task)
            assert (
                operator in bench.UNSAFE[node]
                and task.refused.answer == "null"
                and task.refused.prompt == task.told.prompt
            )
            assert made == [world.maps[operator][x] for x in text] and len(text) == 8
            pairs[node] |= set(zip(text[::2], text[1::2], strict=True))
    assert not pairs["A"] & pairs["B"]
    assert {a for a, _ in pairs["A"]} == {a for a, _ in pairs["B"]}, "no letter tells the node"


def test_right_is_to_the_letter():
    """A newborn is right nowhere; taught three answers by heart, it is right in these and not in others with one letter changed."""
    words = bench.tokenizer()
    loaded, world = bench.ModelAndTokenizer(bench.newborn(0, len(words)), words), bench.World(0)
    tasks = world.tasks(3, bench.SAFE)
    assert bench.right(loaded, [task.told for task in tasks]) == 0
    bench.learn(loaded.model, bench.coded(loaded, [task.told for task in tasks]), 60, 3e-3, 0, size=3)
    assert bench.right(loaded, [task.told for task in tasks]) == 1
    wrong = [tasks[0].told.answer[:-1] + ("a" if tasks[0].told.answer[-1] != "a" else "b")]
    changed = bench.Example("x", (tasks[0].told.messages[0], {"role": "assistant", "content": wrong[0]}), {}, 0)
    assert bench.right(loaded, [changed, tasks[1].told]) == 0.5


def test_every_training_method_can_be_tried(tmp_path):
    names = [entry.name for entry in bench.method]
    found = bench.one(0, argparse.Namespace(**SMALL, rate=2e-3), names, tmp_path)
    for name in names:
        for kind in ("safe", "unsafe", "jailbreak", "customer"):
            assert 0 <= found[f"{name}.capable.{kind}"] + found[f"{name}.refused.{kind}"] <= 1
    assert all(math.isfinite(value) for value in found.values())
    assert found["alpha 1.refused.unsafe"] == found["safety.refused.unsafe"], "alpha 1 is the model as tuned"


def test_records(tmp_path, capsys):
    words = [word for name, number in SMALL.items() for word in (f"--{name}", str(number))]
    bench.main([*words, "--seeds", "2", "--methods", "sft", "--out", str(tmp_path / "results.json")])
    rows = {row["what"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    assert {"safety.refused.unsafe", "separation", "null_sine", "sft.refused.unsafe", "sft.seconds"} <= rows.keys()
    for row in rows.values():
        assert {"what", "value", "interval", "n", "goal", "unit", "machine", "date", "setting"} <= row.keys()
        assert row["interval"][0] <= row["value"] <= row["interval"][1] and row["n"] == 2
    assert rows["separation"]["goal"] == "> separation_start"
    with pytest.raises(SystemExit):
        bench.main(["--seeds", "1"])
