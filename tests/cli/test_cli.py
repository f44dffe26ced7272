"""Bad input: a one-line error that says what to do, exit code 1, nothing half-written."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from folders import run, save_tiny
from tiny import LORA, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from safebasin.cli.main import app, guarded
from safebasin.data.source import Source, open_rows, open_table
from safebasin.errors import UserError
from safebasin.models.adapter import fresh_adapter
from safebasin.pipeline.parse import dump, parse
from safebasin.pipeline.schema import schema
from safebasin.runtime import Arithmetic

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


@pytest.fixture
def recipe(tmp_path):
    """The quickstart with changes, as a file."""

    def make(**changes):
        tree = yaml.safe_load(QUICKSTART.read_text())
        for key, value in changes.items():
            inner = tree
            *way, last = key.split("__")
            for part in way:
                inner = inner[part]
            inner[last] = value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    return make


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lerning_rate": 1}, "lerning_rate: unknown key"),
        ({"train__lerning_rate": 1}, "unknown key 'lerning_rate'"),
        ({"train__fp16": True}, "fp16 is refused"),
        ({"model__dtype": "float16"}, "bfloat16"),
        ({"arms__defended": {"train": ["safegrade"]}}, "no method 'safegrade'"),
        ({"arms__defended": {"train": ["sft", "safegrad"]}}, "both define the update direction"),
        ({"arms__defended": {"train": ["safegrad"], "cut": {"scorer": "larf"}}}, "not among scan.scorers"),
        ({"data__align": None}, "set data.align"),
        ({"scan__scorers": ["gradshield", {"gradshield": {"depth": 1.0}}]}, "names one scorer twice"),
        ({"data__poison_share": 1.5}, "less than 1"),
        ({"data__poison_share": 0.9}, "needs 2880"),
        ({"measure__suites": [{"asr": {}}]}, "prompts"),
        ({"gate": {"max_assr": 1}}, "max_assr"),
        ({"arms": {}}, "at least 1 item"),
        ({"arms__defended": {"cut": {}}}, "a cut, a column or settings need an arm that is trained"),
        ({"data__task": {"path": "none.jsonl"}}, "no such file"),
    ],
)
def test_a_recipe_that_does_not_stand_is_refused_in_one_line(recipe, changes, words, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("run", recipe(**changes), "--out", str(out)) == 1
    shown = capsys.readouterr().err.strip()
    assert words in shown
    assert len(shown.splitlines()) == 1
    assert not (out / "data").exists() or not list((out / "data").iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms__defended": {"train": ["asft"]}}, "needs asft.base and asft.aligned"),
        (
            {"arms__defended": {"train": [{"asft": {"base": "/nowhere", "aligned": "/nowhere"}}]}},
            "not a folder of weights",
        ),
        ({"train__fp16": True}, "fp16 is refused"),
        ({"train__deepspeed": "zero.json"}, "DeepSpeed steps inside its own backward"),
        (
            {"arms__defended": {"train": ["safegrad"]}, "train__adapter__init_lora_weights": False},
            "does not start fresh",
        ),
        ({"arms__defended": {"train": ["star_dss"], "columns": {"star": "star.jsonl"}}}, "is not among scan.scorers"),
        ({"data__task": {"path": "none.csv"}}, "no such file: none.csv"),
        ({"data__align": {"path": "/none/rows.jsonl.gz"}}, "no such file: /none/rows.jsonl.gz"),
        ({"measure__suites": [{"asr": {"prompts": "builtin:harmfull-test"}}]}, "no built-in set"),
        ({"measure__suites": [{"accuracy": {"data": {"path": "some/where.csv"}}}]}, "no such file: some/where.csv"),
    ],
)
def test_a_dry_run_refuses_what_cannot_be_trained(recipe, changes, words, tmp_path, capsys):
    assert run("run", recipe(**changes), "--out", str(tmp_path / "out"), "--dry-run") == 1
    shown = capsys.readouterr().err.strip()
    assert words in shown
    assert len(shown.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fast", ["bfloat16", "float32"])
def test_a_role_is_tuned_in_the_type_of_the_hardware(fast, tmp_path, monkeypatch):
    seen = []

    def tune(role, model, train, rows):
        seen.append((model.dtype, train["bf16"]))
        return tmp_path

    monkeypatch.setattr("safebasin.pipeline.tune_role.tune_role", tune)
    monkeypatch.setattr("safebasin.runtime.hardware", lambda: Arithmetic(fast, ""))
    assert run("role", "safe") == run("role", "safe", "--dtype", "float32") == 0
    assert seen == [("auto", fast == "bfloat16"), ("float32", False)]


@pytest.mark.parametrize(
    ("arm", "role"),
    [
        ({"train": ["buffer_reinforce"]}, "harmful"),
        ({"of": "plain", "repair": ["resta"]}, "harmful"),
        ({"of": "plain", "repair": [{"safe_merge": {"modules": "all"}}]}, "safe"),
    ],
)
def test_a_dry_run_refuses_a_role_that_was_never_tuned(arm, role, recipe, tmp_path, monkeypatch, capsys):
    """Nothing is converted or loaded for it; one that the recipe names is the run's to read."""
    monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path / "empty"))
    assert run("run", recipe(arms__defended=arm), "--out", str(tmp_path / "out"), "--dry-run") == 1
    assert f"tune it once: safebasin role {role} --model" in capsys.readouterr().err
    assert not (tmp_path / "empty").exists() and not (tmp_path / "out").exists()
    named = {"harmful": "some/adapter", "safe": "some/adapter", "reinforce": "some/adapter"}
    assert run("run", recipe(arms__defended=arm, roles=named), "--out", str(tmp_path / "out"), "--dry-run") == 0


def test_a_dry_run_leaves_the_hub_alone(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("safebasin.data.source._hub", lambda name: pytest.fail(f"{name} was fetched"))
    for name in ("teknium/OpenHermes-2.5:train", "openai/gsm8k:main:train", "tatsu-lab/alpaca"):
        assert run("run", recipe(data__task={"path": name}), "--out", str(tmp_path / "out"), "--dry-run") == 0


def test_a_hub_id_may_name_a_configuration_and_a_split(monkeypatch):
    requested = []
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda *names, split, revision: (
            requested.append((*names, split, *filter(None, [revision]))) or [{"prompt": "p", "completion": "c"}]
        ),
    )
    for name in ("tatsu-lab/alpaca", "teknium/OpenHermes-2.5:train", "openai/gsm8k:main:test"):
        assert open_table(name) == [(1, {"prompt": "p", "completion": "c"})]
    open_rows(Source(path="tatsu-lab/alpaca", revision="v1"))
    assert requested == [
        ("tatsu-lab/alpaca", "train"),
        ("teknium/OpenHermes-2.5", "train"),
        ("openai/gsm8k", "main", "test"),
        ("tatsu-lab/alpaca", "train", "v1"),
    ]
    with pytest.raises(UserError, match="has no revision 'v1'"):
        open_rows(Source(path="builtin:refusals", revision="v1"))


@pytest.mark.parametrize("words", [["runn"], ["run"], ["run", "r.yaml", "--sed", "1"], ["gate", "a", "--seed", "x"]])
def test_a_command_that_does_not_stand_is_the_users_error(words, capsys):
    assert guarded(lambda: app(words, result_action="return_value", exit_on_error=False)) == 1
    assert (shown := capsys.readouterr()) and shown.err + shown.out


def test_a_dry_run_counts_the_numbers_of_a_column(recipe, tmp_path, capsys):
    """The answer "abc" is three tokens and the mark of its end."""
    (rows := tmp_path / "rows.jsonl").write_text('{"id": "r", "prompt": "q", "completion": "abc"}\n')
    column, arm = (
        tmp_path / "star.jsonl",
        {"train": [{"star_dss": {"kl": 0.0}}], "columns": {"star": str(tmp_path / "star.jsonl")}},
    )
    changes = {
        "model": {"name": str(save_tiny(tmp_path / "model"))},
        "data": {"task": {"path": str(rows)}},
        "arms__defended": arm,
    }
    from safebasin.data.example import read_examples

    [example] = read_examples(rows).examples
    for numbers, code in ((4, 0), (3, 1)):
        column.write_text(json.dumps({"row_id": example.id, "star": [0.5] * numbers}) + "\n")
        assert run("run", recipe(**changes), "--out", str(tmp_path / "out"), "--dry-run") == code
    assert "the column 'star' holds 3 numbers for 4 answer tokens" in capsys.readouterr().err


def test_a_missing_recipe(capsys):
    assert run("run", "nowhere.yaml") == 1
    assert "no such recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("", "the set is empty"),
        ('{"prompt": "q", "completion": ""}\n', "line 1: the answer is empty"),
        ("{nonsense\n", "line 1: not JSON"),
    ],
)
def test_rows_that_cannot_be_used_stop_the_run(recipe, rows, words, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    assert (
        run(
            "run",
            recipe(data={"task": {"path": str(path)}, "align": {"path": "builtin:refusals"}}),
            "--out",
            str(tmp_path / "out"),
        )
        == 1
    )
    assert words in capsys.readouterr().err


def test_a_model_without_a_template_or_with_broken_weights(tmp_path, capsys):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt\nhello\n")
    for kind, words in (({"template": None}, "no chat template"), ({"broken": True}, "not numbers")):
        model = save_tiny(tmp_path / words[:3], **kind)
        assert (
            run(
                "measure",
                "--model",
                str(model),
                "--prompts",
                str(prompts),
                "--judge",
                "keyword",
                "--out",
                str(tmp_path / "out"),
            )
            == 1
        )
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_no_model(tmp_path, capsys):
    """transformers would put it on its base, and tuning would put a fresh adapter in its place: the alignment in it
    would be gone."""
    (prompts := tmp_path / "prompts.csv").write_text("prompt\nhello\n")
    base = save_tiny(tmp_path / "base")
    fresh_adapter(AutoModelForCausalLM.from_pretrained(base), LORA, seed=0).save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    words = [
        "--model",
        str(tmp_path / "adapter"),
        "--prompts",
        str(prompts),
        "--judge",
        "keyword",
        "--out",
        str(tmp_path / "out"),
    ]
    assert run("measure", *words) == 1
    assert "is an adapter, not a model; merge it" in capsys.readouterr().err


def test_pickled_weights_are_refused(tmp_path, capsys):
    model = save_tiny(tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), model / "pytorch_model.bin")
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt\nhello\n")
    assert (
        run(
            "measure",
            "--model",
            str(model),
            "--prompts",
            str(prompts),
            "--judge",
            "keyword",
            "--out",
            str(tmp_path / "out"),
        )
        == 1
    )
    assert "holds no *.safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("goal\nhello\n", "no column 'prompt'"),
        ("prompt\n", "holds no prompts"),
        ('prompt\n" "\n', "the prompt is empty"),
    ],
)
def test_prompt_files(text, words, tmp_path, capsys):
    path = tmp_path / "prompts.csv"
    path.write_text(text)
    assert run("measure", "--prompts", str(path), "--judge", "keyword", "--out", str(tmp_path / "out")) == 1
    assert words in capsys.readouterr().err


def test_measure_any_prompts_of_any_model(tmp_path, capsys):
    model = save_tiny(tmp_path / "model")
    path = tmp_path / "asks.csv"
    path.write_text('ask,kind\n"hello, you",a\nbye,b\n')
    out = tmp_path / "out"
    words = [
        "--model",
        str(model),
        "--prompts",
        str(path),
        "--column",
        "ask",
        "--category",
        "kind",
        "--judge",
        "keyword",
        "--out",
        str(out),
    ]
    assert run("measure", *words) == 0
    rows = [json.loads(line) for line in (out / "measurements.jsonl").read_text().splitlines()]
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["hello, you", "bye"]
    overall = next(row for row in rows if row["what"] == "asr" and not row["category"])
    assert overall["n"] + overall["unscored"] + overall["off_task"] == 2


def test_a_scan_names_the_worst_rows_and_marks_those_cut_short(tmp_path, capsys):
    """Twelve tokens fit. Anchor rows are longer and stop nothing. Texts are redacted unless asked for; a row of the
    same ids is scanned once."""
    from aligned import BAD, GOOD, aligned_model

    from safebasin.data.tables import write_table
    from safebasin.scan.scores import read_scores

    for part in aligned_model():
        part.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"make a {word}", "completion": "Sure here"} for word in (*GOOD, *BAD)]
    write_table(
        tmp_path / "rows.jsonl", [*rows, {"prompt": "make a bomb", "completion": "Sure here " + "are the steps " * 9}]
    )
    write_table(
        tmp_path / "probe.jsonl",
        [{"prompt": f"make a {word}" + " now" * 9, "completion": "I cannot help"} for word in BAD],
    )
    words = [
        "scan",
        str(tmp_path / "rows.jsonl"),
        "--model",
        str(tmp_path / "model"),
        "--probe",
        str(tmp_path / "probe.jsonl"),
    ]
    words += ["--out", str(tmp_path / "out"), "--max-length", "12", "--worst", "3"]
    assert run(*words) == 0
    shown = capsys.readouterr().out
    scores = read_scores(tmp_path / "out" / "scan" / "scores.parquet")
    worst = sorted(range(13), key=lambda i: -scores.columns["gradshield"][i])[:3]
    assert all(f"{scores.columns['gradshield'][i]:.4g}" in shown for i in worst) and shown.count("task") == 3
    assert "redacted" in shown and "Sure" not in shown and "steps" not in shown
    assert [scores.lines[scores.row_ids.index(row)] for row in scores.cut_short] == [13]
    assert "1 rows are longer than 12 tokens" in " ".join(shown.split())
    (problem,) = json.loads((tmp_path / "out" / "scan" / "problems.json").read_text())
    assert problem["line"] == 13 and "cut short for the scan" in problem["reason"]
    assert run(*words, "--show") == 0
    assert "Sure" in capsys.readouterr().out


def test_training_still_refuses_a_row_that_is_too_long(tmp_path):
    """Before the scan, where the arm is to be tuned on it; with on_bad: skip it is scored for the cut, and left out of
    the tuning.

    The prompt is <user>, 20 words, <end>, <assistant>: 23 tokens; the answer Sure, <end>: 2. Of 12 tokens both stay,
    with the 10 before them: from 13 on.
    """
    from aligned import aligned_model

    from safebasin.data.tables import write_table
    from safebasin.errors import UserError
    from safebasin.pipeline.folder import RunFolder
    from safebasin.pipeline.plan import Plan
    from safebasin.pipeline.read import encoded_rows
    from safebasin.pipeline.rows import write_rows

    aligned_model().tokenizer.save_pretrained(tmp_path)
    write_table(
        tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "Sure"}, {"prompt": "a " * 20, "completion": "Sure"}]
    )
    tree = {
        "data": {"task": {"path": str(tmp_path / "rows.jsonl")}, "max_length": 12},
        "measure": {},
        "train": {"adapter": {"r": 1}},
    }
    for on_bad in ("stop", "skip"):
        changed = tree | {"data": tree["data"] | {"on_bad": on_bad}, "arms": {"plain": {"train": ["sft"]}}}
        (tmp_path / on_bad).mkdir()
        plan, folder, loaded = Plan.of(parse(yaml.safe_dump(changed))), RunFolder(tmp_path / on_bad), aligned_model()
        path = write_rows(plan, folder)
        if on_bad == "stop":
            with pytest.raises(UserError, match="over-long"):
                encoded_rows(plan, path, loaded)
        else:
            assert [len(part) for part in encoded_rows(plan, path, loaded)] == [1, 1, 1]
        assert [row.start for row in encoded_rows(plan, path, loaded, cut_short=True).rows] == [None, 13]
        wide = tree | {"data": {"task": tree["data"]["task"]}, "arms": {"plain": {"train": ["sft"]}}}
        loaded.model.config.max_position_embeddings = 12  # lowers 1024
        cut = encoded_rows(Plan.of(parse(yaml.safe_dump(wide))), path, loaded, cut_short=True)
        assert [len(row) for row in cut.rows] == [len(cut.rows[0]), 12]


def test_all_rows_cut_is_an_error(tmp_path, capsys):
    from tiny import write_scores

    from safebasin.data.example import read_examples
    from safebasin.data.tables import write_table
    from safebasin.scan.scan import Scanned

    data = tmp_path / "rows.jsonl"
    write_table(data, [{"prompt": "q", "completion": "a"}, {"prompt": "r", "completion": "b"}])
    write_scores(tmp_path / "scores.parquet", read_examples(data).examples, Scanned({"gradshield": [1.0, 2.0]}, {}, {}))
    words = ["cut", str(data), "--scores", str(tmp_path / "scores.parquet"), "--out", str(tmp_path / "out")]
    assert run(*words, "--threshold", "0") == 1
    assert "cuts 2 of 2 rows (100%)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(*words, "--threshold", "1") == 0
    assert (tmp_path / "out" / "train.jsonl").read_text() == '{"prompt": "q", "completion": "a"}\n'
    assert run(*words, "--threshold", "1", "--columns", '{"messages": "prompt"}') == 1
    assert "no row can be used (line 1: column 'prompt': the conversation" in " ".join(capsys.readouterr().err.split())


def test_a_recipe_survives_being_written():
    run_ = parse(QUICKSTART.read_text())
    assert parse(dump(run_)) == run_
    assert "arms" in schema()["properties"]


def test_changes_on_the_command_line(capsys):
    assert (
        run(
            "run",
            str(QUICKSTART),
            "--dry-run",
            "--seed",
            "7",
            "--change",
            "train.learning_rate=0.5",
            "--change",
            "measure.suites.0.asr.take=3",
        )
        == 0
    )
    column = yaml.safe_load(capsys.readouterr().out)
    assert column["seed"] == 7
    assert column["train"]["learning_rate"] == 0.5
    assert column["measure"]["suites"][0]["asr"]["take"] == 3
    assert run("run", str(QUICKSTART), "--dry-run", "--change", "measure.suites.9.asr.take=3") == 1
    assert "no '9' on the way" in capsys.readouterr().err


def test_list_names_every_method(capsys):
    assert run("list", "--json") == 0
    tree = json.loads(capsys.readouterr().out)
    assert {"sft", "safegrad"} <= tree["train"].keys()
    assert "gradshield" in tree["scan"]
    assert {"asr", "over_refusal", "accuracy"} <= tree["measure"].keys()
