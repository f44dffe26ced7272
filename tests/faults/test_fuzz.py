"""1,500 broken recipes, row files and folders: none gives a traceback, a wrong exit code or more than one line, and no
nonsense is accepted.

Every case is drawn by its number, so that a failure names it. Recipes are dry runs; rows go through ``preview``;
folders of a model, of an adapter and of a run through ``measure``, ``report``, ``gate`` and ``run``.
"""

import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from product import command, product

from safebasin.report.manifest import read_manifest

pytestmark = pytest.mark.slow

RECIPES, ROWS, FOLDERS = 900, 400, 200
SUBJECTS = (*["model"] * 6, *["adapter"] * 5, *["gate"] * 3, *["report"] * 2, "run")  # a run costs seconds
NEEDED = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
NEEDED |= {"adapter_config.json", "adapter_model.safetensors"}
PATIENCE = 120  # seconds a case may take; one that hangs is a fault too
NAN, INF = float("nan"), float("inf")
NOT_A_NUMBER = (NAN, INF, -INF, "x", "", "3", True, [], {}, [1, 2], {"a": 1}, "1e999")
FAR = (-1, -0.5, -(10**30))
MAY_BE_NEGATIVE = ("threshold", "ends", "alphas", "logging_steps", "max_steps", "tau")
MAY_BE_BOOLEAN = ("bf16",)
WORDS = (
    "",
    "no such thing",
    "\x1b[31mred",
    "../../etc/passwd",
    "x" * 5000,
    "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
    "\u202eabc",
    "a\nb",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return folder, product(folder)


@pytest.fixture(autouse=True)
def tracebacks(monkeypatch, tmp_path):
    """Where the last catch would leave a traceback; the test looks that none is there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def leaves(tree: Any, way: tuple = ()) -> list[tuple]:
    """The ways to every value of a tree that is no mapping and no list."""
    if isinstance(tree, dict) and tree:
        return [leaf for key, value in tree.items() for leaf in leaves(value, (*way, key))]
    if isinstance(tree, list) and tree:
        return [leaf for i, value in enumerate(tree) for leaf in leaves(value, (*way, i))]
    return [way]


def put(tree: Any, way: tuple, value: Any) -> Any:
    tree = copy.deepcopy(tree)
    inner = tree
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = value
    return tree


def get(tree: Any, way: tuple) -> Any:
    for key in way:
        tree = tree[key]
    return tree


def rich_tree(tree: Any) -> Any:
    """The recipe with every kind of field in it that a method may have."""
    return tree | {
        "seed": 0,
        "measure": {
            "labels": ["yes"],
            "system": "Be brief.",
            "suites": [
                *tree["measure"]["suites"],
                {
                    "over_refusal": {
                        "prompts": "builtin:lookalike-test",
                        "take": 3,
                        "judges": ["keyword"],
                        "max_new_tokens": 4,
                    }
                },
                {
                    "token_accuracy": {
                        "data": {"path": "builtin:support-test", "take": 4, "seed": 1, "skip": 2},
                        "max_length": 64,
                        "batch_size": 2,
                    }
                },
                {
                    "landscape": {
                        "prompts": "builtin:harmful-test",
                        "take": 2,
                        "directions": 1,
                        "points": 3,
                        "judges": ["keyword"],
                    }
                },
            ],
        },
    }


def told_wrong(capsys, folder: Path, code: int, allowed: tuple[int, ...]) -> str:
    """What is wrong with how a command ended, or nothing."""
    error = capsys.readouterr().err
    lines = [line for line in error.strip().splitlines() if line.startswith("safebasin:")]
    if list(folder.glob("safebasin-*.log")):
        log = next(folder.glob("safebasin-*.log"))
        text = log.read_text()[-600:]
        for each in folder.glob("safebasin-*.log"):
            each.unlink()
        return f"traceback: {text}"
    if code not in allowed:
        return f"exit code {code}: {error[-300:]}"
    if "Traceback" in error:
        return f"traceback: {error[-600:]}"
    if code == 1 and len(lines) != 1:
        return f"{len(lines)} lines: {error[-300:]}"
    if "\x1b" in error or "\u202e" in error:
        return f"a control character reached the terminal: {error[-100:]!r}"
    return ""


def test_recipes(home, capsys, tracebacks):
    """A number becomes no number, a name an unknown one, a value another shape; the text itself is damaged."""
    folder, recipe = home
    tree = rich_tree(yaml.safe_load(recipe.read_text()))
    path, wrong = folder / "fuzzed.yaml", []
    ways = leaves(tree)
    (folder / "whole.yaml").write_text(yaml.safe_dump(tree))
    assert command("run", str(folder / "whole.yaml"), "--out", str(folder / "out"), "--dry-run") == 0
    capsys.readouterr()
    for case in range(RECIPES):
        chance = random.Random(case)
        way = chance.choice(ways)
        value, allowed, new = get(tree, way), (1,), None
        kind = chance.random()
        if kind < 0.15:  # the text itself
            text = bytearray(yaml.safe_dump(tree).encode())
            for _ in range(chance.randint(1, 4)):
                place = chance.randrange(len(text))
                text[place : place + chance.randint(0, 3)] = bytes(
                    chance.randrange(256) for _ in range(chance.randint(0, 3))
                )
            path.write_bytes(text)
            allowed = (0, 1)
            way = ("text",)
        elif kind < 0.3:  # a key that nobody knows
            inner = get(tree, way[:-1])
            if isinstance(inner, list):
                continue
            path.write_text(yaml.safe_dump(put(tree, (*way[:-1], "no_such_key"), 1)))
            allowed = (0, 1) if way[0] in ("arms",) and len(way) <= 2 else (1,)
        elif isinstance(value, bool) or value is None:
            path.write_text(yaml.safe_dump(put(tree, way, chance.choice(("perhaps", [], {}, 3.5)))))
            allowed = (0, 1)
        elif isinstance(value, int | float):
            new = chance.choice((*NOT_A_NUMBER, *FAR))
            if new in FAR and any(str(key) in MAY_BE_NEGATIVE for key in way):
                allowed = (0, 1)
            path.write_text(yaml.safe_dump(put(tree, way, new)))
        else:
            new = chance.choice((*WORDS, 3, None, [], {}, [[]], {"a": None}))
            path.write_text(yaml.safe_dump(put(tree, way, new), allow_unicode=True))
            free = way[-1] in ("system", "model", "r", "name") or new is None or value == new or "labels" in way
            of_the_model = {"target_modules", "tokens"} & {*way} and new  # names that only the model knows
            allowed = (0, 1) if free or of_the_model else (1,)
        code = command("run", str(path), "--out", str(folder / "out"), "--dry-run")
        if problem := told_wrong(capsys, tracebacks, code, allowed):
            wrong.append((case, way, problem, repr(new)[:60]))
    assert not wrong, f"{len(wrong)} of {RECIPES}:\n" + "\n".join(map(str, wrong[:40]))


def hostile(chance: random.Random, depth: int = 0) -> Any:
    """A JSON value of any kind, texts among them that no terminal should see."""
    texts = (
        "",
        "a",
        "\ud800",
        "\x00",
        "\u202e",
        "<|im_end|>",
        "{{ 7 }}",
        "é" * 300,
        "=1+1",
        "\x1b[2J",
        "user",
        "assistant",
        "gpt",
    )
    kind = chance.randrange(9 if depth < 4 else 6)
    if kind == 0:
        return None
    if kind == 1:
        return chance.choice((True, False))
    if kind == 2:
        return chance.choice((0, -1, 10**40, 1.5, NAN, INF, -0.0))
    if kind < 6:
        return chance.choice(texts)
    if kind == 6:
        return [hostile(chance, depth + 1) for _ in range(chance.randint(0, 3))]
    keys = (
        "role",
        "content",
        "from",
        "value",
        "weight",
        "messages",
        "prompt",
        "completion",
        "x",
        "instruction",
        "output",
        "conversations",
    )
    return {chance.choice(keys): hostile(chance, depth + 1) for _ in range(chance.randint(0, 4))}


def row(chance: random.Random) -> Any:
    """A row that is right but for one value, or no row at all."""
    turns = [{"role": "user", "content": "make a cake"}, {"role": "assistant", "content": "Sure here"}]
    good = chance.choice(
        (
            {"prompt": "make a cake", "completion": "Sure here"},
            {"messages": turns},
            {"instruction": "make", "input": "a cake", "output": "Sure"},
            {"conversations": [{"from": "human", "value": "make"}, {"from": "gpt", "value": "Sure"}]},
        )
    )
    if chance.random() < 0.2:
        return hostile(chance)
    if chance.random() < 0.2:
        return good
    return put(good, chance.choice(leaves(good)), hostile(chance))


def rows_file(chance: random.Random, folder: Path) -> Path:
    """A file of rows in one of the forms, some of them damaged as files."""
    rows = [row(chance) for _ in range(chance.randint(0, 6))]
    suffix = chance.choice((".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".txt", ""))
    path = folder / f"rows{suffix}"
    text = "\n".join(json.dumps(each) for each in rows) if suffix in (".jsonl", ".txt", "") else json.dumps(rows)
    raw = text.encode("utf-8", "surrogatepass")
    if suffix == ".csv":
        raw = b"prompt,completion\n" + b"\n".join(json.dumps(str(each)).encode("utf-8", "replace") for each in rows)
    if suffix == ".jsonl.gz" and chance.random() < 0.5:
        import gzip

        raw = gzip.compress("\n".join(json.dumps(each) for each in rows).encode())
    if suffix == ".parquet" and chance.random() < 0.5:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(
            pyarrow.table({"prompt": ["make a cake"], "completion": [chance.choice(["Sure", None])], "n": [1]}), path
        )
        raw = path.read_bytes()
    if chance.random() < 0.3 and raw:
        cut = chance.randrange(len(raw))
        raw = chance.choice((raw[:cut], raw[:cut] + b"\xff\xfe\x00" + raw[cut:], raw + b"\x00" * 9))
    path.write_bytes(raw)
    return path


def test_rows(home, tmp_path, capsys, tracebacks):
    folder, _ = home
    wrong = []
    for case in range(ROWS):
        chance = random.Random(10_000 + case)
        path = rows_file(chance, tmp_path)
        code = command(
            "preview",
            str(path),
            "--model",
            str(folder / "model"),
            *(("--json",) if case % 2 else ()),
            "--max-length",
            "64",
        )
        shown = capsys.readouterr()
        if case % 2 and code == 0:
            for line in shown.out.splitlines():
                held = json.loads(line)
                if not {"line", "bad"} <= held.keys() and not {"line", "text", "trained", "bos", "last"} <= held.keys():
                    wrong.append((case, line))
        if not case % 2 and any(mark in shown.out for mark in ("\x1b", "\u202e", "\x00")):
            wrong.append((case, "a control character reached the terminal"))
        print(shown.err, end="", file=sys.stderr)
        if problem := told_wrong(capsys, tracebacks, code, (0, 1)):
            wrong.append((case, path.name, problem))
        path.unlink()
    assert not wrong, f"{len(wrong)} of {ROWS}:\n" + "\n".join(map(str, wrong[:40]))


def damage(chance: random.Random, path: Path) -> str:
    """Damage one file, or take it away; what was done."""
    raw = path.read_bytes()
    place = chance.randrange(max(1, len(raw)))
    noise = bytes(chance.randrange(256) for _ in range(20))
    shape = chance.choice(("[]", "{}", "null", "3", '"x"', '{"a": [1]}', "[[1]]", "a: b"))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"
    contents = {
        "empty": b"",
        "cut": raw[:place],
        "noise": raw[:place] + noise + raw[place + 20 :],
        "shape": shape.encode(),
        "pointer": pointer.encode(),
    }
    kind = chance.choice(("gone", "folder", *contents))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(contents[kind])
    return f"{path.name}: {kind}"


def in_time(*words: str) -> int:
    """The exit code of a command; ``Slow`` where it takes longer than ``PATIENCE``."""

    class Slow(BaseException):  # the command line's last catch must not take it
        pass

    def ring(*_: object) -> None:
        raise Slow(f"more than {PATIENCE} s: {' '.join(words)}")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE)
    try:
        return command(*words)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_folders(home, tmp_path, capsys, tracebacks):
    """A file of a model, of an adapter or of a run is damaged: one line, or the run makes it again."""
    folder, recipe = home
    run, work, wrong = folder / "run", tmp_path / "work", []
    asks = ("--prompts", str(folder / "prompts.jsonl"), "--take", "2", "--judge", "keyword", "--max-new-tokens", "2")
    assert command("run", str(recipe), "--out", str(run)) == 0, capsys.readouterr().err[-2000:]
    capsys.readouterr()
    written = {path for step in read_manifest(run)["steps"].values() for path in step["outputs"]}
    for case in range(FOLDERS):
        chance = random.Random(20_000 + case)
        shutil.rmtree(work, ignore_errors=True)
        subject = chance.choice(SUBJECTS)
        if subject in ("model", "adapter"):
            shutil.copytree(
                folder / "model" if subject == "model" else run / "arms" / "plain" / "adapter", work / "copy"
            )
            target = chance.choice(sorted((work / "copy").iterdir()))
            what, name = damage(chance, target), target.name
            models = ("--model", str(folder / "model"), "--adapter") if subject == "adapter" else ("--model",)
            call = ("measure", *models, str(work / "copy"), *asks, "--out", str(work / "m"))
            same_form = what.endswith("noise") or what == "chat_template.jinja: cut"  # it may still be a model
            allowed = (1,) if name in NEEDED and not same_form else (0, 1)
        else:
            shutil.copytree(run, work / "run")
            target = chance.choice([path for path in sorted((work / "run").rglob("*")) if path.is_file()])
            what, name = damage(chance, target), target.relative_to(work / "run").as_posix()
            call = (
                ("run", str(recipe), "--out", str(work / "run")) if subject == "run" else (subject, str(work / "run"))
            )
            allowed = (0, 1) if subject != "gate" else (1, 4) if name in written else (0, 1, 3, 4)
        code = in_time(*call)
        if problem := told_wrong(capsys, tracebacks, code, allowed):
            wrong.append((case, subject, what, problem))
    assert not wrong, f"{len(wrong)} of {FOLDERS}:\n" + "\n".join(map(str, wrong[:40]))


def test_nothing_is_left_behind(home):
    folder, _ = home
    assert not (folder / "out").exists() or not os.listdir(folder / "out")
