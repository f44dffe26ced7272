"""Sets by name: bounds, draws, label names, prompts, and what is wrong with them."""

import dataclasses
import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from safebasin.data.source import Source, check_file, open_examples, open_prompts, open_rows, open_table
from safebasin.errors import UserError

ROWS = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2} for i in range(6)]


@pytest.fixture
def path(tmp_path) -> str:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    "fields",
    [{"take": 0}, {"take": -1}, {"skip": -1}, {"limit": 0}, {"limit": -3}, {"seed": -1}, {"take": 1.5}, {"seed": "x"}],
)
def test_a_recipe_keeps_to_the_bounds(fields):
    with pytest.raises(ValidationError):
        TypeAdapter(Source).validate_python({"path": "x"} | fields)
    least = {"take": 1, "skip": 0, "limit": 1, "seed": 0}
    assert TypeAdapter(Source).validate_python({"path": "x"} | least) == Source(
        path="x", take=1, skip=0, limit=1, seed=0
    )


def test_skip_limit_and_take_in_their_order(path):
    source = Source(path=path, skip=1, limit=4)
    assert [e.prompt for e in open_examples(source)] == ["q1", "q2", "q3", "q4"]
    drawn = [e.line for e in open_examples(dataclasses.replace(source, take=2))]
    assert drawn == sorted(drawn) and set(drawn) <= {2, 3, 4, 5} and len(drawn) == 2
    with pytest.raises(UserError, match=r"rows\.jsonl: the set is empty after 6 rows"):
        open_rows(Source(path=path, skip=6))


def test_names_of_labels(path):
    source = Source(path=path, prompt="{prompt}", answer="{label}", values={"label": ["no", "yes"]})
    assert [e.answer for e in open_examples(source)] == ["no", "yes"] * 3


@pytest.mark.parametrize("label", ["2", "-1", "x", "²", "9" * 5000, None, 1.0, [0], "\ud800"])
def test_a_label_without_a_name_is_a_bad_row(label, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([ROWS[0], ROWS[0] | {"label": label}]))
    rows = open_rows(Source(path=str(tmp_path / "x.json"), values={"label": ["no", "yes"]}))
    assert len(rows.examples) == 1 and rows.bad[0].line == 2 and len(rows.bad[0].reason) < 200
    with pytest.raises(UserError, match=r"^[^\n]*x\.json: line 2: [^\n]*\(1 such rows\)$"):
        open_examples(Source(path=str(tmp_path / "x.json"), values={"label": ["no", "yes"]}))


def test_prompts(path, tmp_path):
    prompts = open_prompts(path, category="label", template="{label}: {prompt}", limit=2)
    assert [(p.id, p.text, p.category) for p in prompts] == [("1", "0: q0", "0"), ("2", "1: q1", "1")]
    assert [p.text for p in open_prompts(path, take=6)] == [row["prompt"] for row in ROWS]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "line 2: a row must be an object, found list"),
        ("{", "line 2: not JSON"),
        ('{"prompt": "\\ud800"}', "line 2: a lone surrogate"),
        ('{"prompt": NaN}', "line 2: not JSON"),
        ('{"goal": "x"}', "line 2: no column 'prompt'; it has: goal"),
        ('{"prompt": null}', "line 2: no column 'prompt'"),
        ('{"prompt": " "}', "line 2: the prompt is empty"),
        ('{"' + "x" * 9000 + '": 1}', "line 2: no column"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_one_line(line, words, tmp_path):
    (tmp_path / "x.jsonl").write_text(f'{{"prompt": "q"}}\n{line}\n')
    with pytest.raises(UserError) as refusal:
        open_prompts(str(tmp_path / "x.jsonl"))
    assert words in str(refusal.value) and "\n" not in str(refusal.value) and len(str(refusal.value)) < 600
    with pytest.raises(UserError, match="no column 'kind'"):
        open_prompts(str(tmp_path / "x.jsonl"), category="kind", limit=1)


def test_the_hub_offline_is_one_line_that_says_what_to_do(monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for name in ("org/none", "org/none:train", "org/none:main:train"):
        with pytest.raises(
            UserError, match=rf"^cannot fetch '{name}' from the Hub \([^\n]*\); [^\n]*--set {name}=FILE$"
        ):
            open_table(name)
        check_file(name)  # the Hub is not asked
    assert capfd.readouterr() == ("", "")


def test_names_that_are_no_set(tmp_path):
    for name in ("none.jsonl", "org/none.csv", "./none", "a/b/c", "x" * 300, "https://me:pa55@host/x.jsonl", ""):
        for function in (open_table, check_file):
            with pytest.raises(UserError) as refusal:
                function(name)
            assert "\n" not in str(refusal.value) and "pa55" not in str(refusal.value)
    with pytest.raises(UserError, match="no built-in set 'builtin:none'"):
        check_file("builtin:none")
    with pytest.raises(UserError, match="is a folder"):
        check_file(str(tmp_path))


def test_a_folder_here_hides_a_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    with pytest.raises(UserError, match="is a folder"):
        open_table("org/name")
