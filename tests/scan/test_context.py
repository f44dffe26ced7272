"""A model of learned positions and a short context, which ends where its table of positions ends: what a scorer reads
beside the rows is cut to it, and said, or one line says what does not fit."""

import json

import pytest
import torch
from tiny_families import tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

import safebasin
from safebasin.data.tables import write_table
from safebasin.errors import UserError
from safebasin.models.load import ModelAndTokenizer
from safebasin.pipeline.config import Recipe
from safebasin.pipeline.parse import validate
from safebasin.pipeline.run import Run
from safebasin.scan import scorer
from safebasin.scan.scores import read_scores

ROWS = [{"prompt": f"say {word}", "completion": word} for word in ("one", "six", "ten")]
LETTERS = {"tokens": ("N", "Y")}
SETTINGS = {"gradshield": LETTERS, "self_refusal": LETTERS, "larf": LETTERS, "dsa": {"guard": None}}
REFUSED = {  # what one line says of the others
    "dsa": "over-long",
    "guard": "the guard's context of 64 tokens does not hold a prompt of",
}
NAMES = [entry.name for entry in scorer if entry.implements("fit") and entry.name not in ("keyword", "toss")]


@pytest.fixture(scope="module")
def loaded() -> ModelAndTokenizer:
    """A letter is a token, so that no built-in row fits into the context."""
    words = tokenizer("chatml")
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": len(words)}
    config = GPT2Config(**sizes, eos_token_id=words.eos_token_id, attn_implementation="eager")
    return ModelAndTokenizer(GPT2LMHeadModel(config).eval(), words)


@pytest.mark.parametrize("name", NAMES)
def test_a_scorer_ends_in_scores_or_a_line(loaded, name, capsys):
    settings = {"scorers": [{name: SETTINGS.get(name)}], "batch_size": 2}
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            safebasin.scan_rows(safebasin.read_rows(ROWS), loaded, **settings)
    else:
        scores = safebasin.scan_rows(safebasin.read_rows(ROWS), loaded, **settings)
        assert len(set(scores.columns[name])) == 3
    assert "the anchor set harmful: 40 of 40 rows are cut short: the model's context is 64" in capsys.readouterr().err


def test_a_recipe(loaded, tmp_path):
    """Its anchors are cut, a long row of a measurement is unscored, and a long row to learn is refused."""
    for part in loaded:
        part.save_pretrained(tmp_path / "model")
    rows, held = tmp_path / "task.jsonl", tmp_path / "held.jsonl"
    write_table(rows, ROWS)
    write_table(held, [*ROWS, {"prompt": "say it", "completion": "on and " * 9}])
    drift = {"data": {"path": str(held)}, "harmful": str(rows), "harmless": str(rows)}
    recipe = {
        "model": {"name": str(tmp_path / "model"), "dtype": "float32"},
        "data": {"task": {"path": str(rows)}, "align": {"path": str(held)}},
        "scan": {"scorers": ["refusal_place", "trajectory"]},
        "train": {"adapter": {"r": 2, "target_modules": "all-linear"}, "max_steps": 1},
        "measure": {"suites": [{"token_accuracy": {"data": {"path": str(held)}}}, {"drift": drift}]},
        "arms": {"start": {}, "aligned": {"train": ["safegrad"]}},
    }
    with Run(validate(Recipe, recipe, "a test"), tmp_path / "run") as run:
        scores = read_scores(run.scores, tokens=False)
        assert {len(set(column)) for column in scores.columns.values()} == {3}
        run.measure("start")
        lines = (tmp_path / "run" / "arms" / "start" / "measurements.jsonl").read_text().splitlines()
        counts = {m["what"]: (m["n"], m["unscored"]) for m in map(json.loads, lines)}
        assert counts["token_accuracy"] == counts["kl"] == (3, 1)
        with pytest.raises(UserError, match=r"over-long: .* max_length is 64"):
            run.ensure("aligned")
