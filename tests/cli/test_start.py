"""The verbs that need no torch start without it: torch, transformers and accelerate are blocked, and each of them
still works."""

import json
import subprocess
import sys

import pytest

from safebasin.cli.main import VERBS, app
from safebasin.data.tables import write_table

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft", "accelerate", "datasets"):
            raise ImportError(f"{name} is blocked: this verb must start without it")
sys.meta_path.insert(0, Block())
sys.argv[0] = "safebasin"
from safebasin.cli.main import main
main()
"""


def run(*words: str, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", BLOCKED, *words], capture_output=True, text=True, cwd=cwd, timeout=60)


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["run", "--help"], ["list"], ["list", "--json"], ["gate", "none"], ["report", "none"]],
)
def test_it_starts_without_torch(words):
    ended = run(*words)
    assert "Traceback" not in ended.stderr and "blocked" not in ended.stderr, ended.stderr[-2000:]
    assert ended.returncode == (1 if "none" in words else 0)


def test_every_verb_says_what_it_does():
    words = [line.strip("│ ").split() for line in run("--help").stdout.splitlines()]
    assert {line[0] for line in words if line and line[0] in VERBS and len(line) > 3} == set(VERBS)


@pytest.mark.parametrize("name", VERBS)
def test_every_option_says_what_it_is(name):
    rows = app[name].assemble_argument_collection()
    assert [argument.name for argument in rows if argument.show and not argument.parameter.help] == []


def test_a_cut_without_torch(tmp_path):
    import pyarrow
    import pyarrow.parquet

    from safebasin.data.example import read_examples

    write_table(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "a"}, {"prompt": "r", "completion": "b"}])
    examples = read_examples(tmp_path / "rows.jsonl").examples
    table = {"row_id": [e.id for e in examples], "line": [1, 2], "score_it": [1.0, 2.0]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "scores.parquet")
    words = ["cut", "rows.jsonl", "--scores", "scores.parquet", "--scorer", "it", "--threshold", "1.5", "--out", "out"]
    ended = run(*words, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "1 rows stay, 1 go" in ended.stdout


def test_the_list_is_that_of_the_registries():
    """What is read from the sources is what the decorators say."""
    from safebasin import attack, measure, scan, train
    from safebasin.outline import outline

    registries = {
        "attack": attack.attack,
        "scan": scan.scorer,
        "train": train.method,
        "measure": measure.suite,
        "judge": measure.judge,
    }
    import dataclasses

    for stage, registry in registries.items():
        listed = {each.name: each for each in outline(stage)}
        assert listed.keys() == {entry.name for entry in registry}
        for entry in registry:
            each = listed[entry.name]
            assert each.summary == entry.summary and each.paper == entry.paper
            assert set(each.fields) == {field.name for field in dataclasses.fields(entry.kind)}
    assert "safegrad" in json.loads(run("list", "--json").stdout)["train"]
