"""The grammar world: its laws, and that every training method can be tried in it."""

import json
import math

import pytest

from benchmarks import harness
from benchmarks.mechanics import mechanics as bench
from safebasin.errors import UserError

SMALL = {"steps": 2, "safety": 2, "texts": 40, "rows": 32, "epochs": 1, "test": 10}


def parts(task):
    operator, *text = task.answered.prompt.split()
    return int(operator[1:]), text, task.answered.answer.split()


@pytest.mark.parametrize("seed", range(3))
def test_the_world(seed):
    """Operators are bijections and hidden ones are maps under another name; a text's pairs belong to one node only."""
    world = bench.World(seed)
    for operator in world.maps.values():
        assert sorted(operator) == sorted(operator.values()) == sorted(bench.LETTERS)
    assert all(world.maps[hidden] == world.maps[shown] for hidden, shown in bench.HIDDEN.items())
    assert world.maps[bench.CUSTOMER] not in [world.maps[i] for i in range(8)]
    assert set(bench.UNSAFE["A"]) < set(bench.UNSAFE["B"]) and set(bench.SAFE["B"]) < set(bench.SAFE["A"])
    pairs = {node: set() for node in "AB"}
    for node in "AB":
        for task in world.tasks(60, {node: bench.UNSAFE[node]}):
            operator, text, answer = parts(task)
            assert (
                operator in bench.UNSAFE[node]
                and task.refused.answer == "null"
                and task.refused.prompt == task.answered.prompt
            )
            assert answer == [world.maps[operator][x] for x in text] and len(text) == 8
            pairs[node] |= set(zip(text[::2], text[1::2], strict=True))
    assert not pairs["A"] & pairs["B"]
    assert {a for a, _ in pairs["A"]} == {a for a, _ in pairs["B"]}, "no letter gives the node away"


def test_right_is_to_the_letter():
    """A random model is never right; after learning three answers it is right in these, not with one letter changed."""
    words = bench.tokenizer()
    loaded, world = bench.ModelAndTokenizer(bench.random_model(0, len(words)), words), bench.World(0)
    tasks = world.tasks(3, bench.SAFE)
    assert bench.right(loaded, [task.answered for task in tasks]) == 0
    bench.learn(loaded.model, bench.coded(loaded, [task.answered for task in tasks]), 60, 3e-3, 0, size=3)
    assert bench.right(loaded, [task.answered for task in tasks]) == 1
    wrong = [tasks[0].answered.answer[:-1] + ("a" if tasks[0].answered.answer[-1] != "a" else "b")]
    changed = bench.Example("x", (tasks[0].answered.messages[0], {"role": "assistant", "content": wrong[0]}), {}, 0)
    assert bench.right(loaded, [changed, tasks[1].answered]) == 0.5


def test_every_training_method_can_be_tried(tmp_path):
    names = [entry.name for entry in bench.method if entry.name != "task_frame"]  # which needs one beside it
    values = bench.one(0, bench.Size(**SMALL, rate=2e-3), names, tmp_path)
    for name in names:
        for kind in ("safe", "unsafe", "jailbreak", "customer"):
            assert 0 <= values[f"{name}.capable.{kind}"] + values[f"{name}.refused.{kind}"] <= 1
    assert all(math.isfinite(value) for value in values.values())
    assert values["alpha 1.refused.unsafe"] == values["safety.refused.unsafe"], "alpha 1 is the model as tuned"


def test_records(tmp_path, capsys):
    words = [word for name, number in SMALL.items() for word in (f"--{name}", str(number))]
    words += ["--seeds", "2", "--methods", "sft", "--keep", str(tmp_path), "--out", str(tmp_path / "results.json")]
    harness.main(["mechanics", *words])
    rows = {row["what"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    assert {"safety.refused.unsafe", "separation", "null_sine", "sft.refused.unsafe", "sft.seconds"} <= rows.keys()
    for row in rows.values():
        assert {*harness.FIELDS, "setting"} <= row.keys()
        assert row["interval"][0] <= row["value"] <= row["interval"][1] and row["n"] == 2
    assert rows["separation"]["goal"] == "> separation_start"
    with pytest.raises(UserError, match="two or more"):
        harness.main(["mechanics", "--seeds", "1"])
