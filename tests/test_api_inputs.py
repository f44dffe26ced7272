"""What people hand to the functions of Python: tables, models in any state; and the state that these are left in."""

import inspect
from pathlib import Path

import pandas
import peft
import pyarrow
import pytest
import torch
from aligned import BAD, GOOD, aligned_model
from tuned import save_adapter, save_start

import safebasin
from safebasin.data.tables import write_table
from safebasin.errors import UserError
from safebasin.models.load import load

ROWS = [{"prompt": f"make a {word} now", "completion": "Sure here are the steps"} for word in GOOD]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_table(path, [{"prompt": f"make a {word}", "completion": "I cannot help"} for word in BAD])
    return str(path)


def with_dropout():
    """A tuned model, its adapter beside the weights, with much dropout."""
    loaded = aligned_model()
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(lora_dropout=0.5, init_lora_weights=False, **settings)
    return loaded._replace(model=peft.get_peft_model(loaded.model, config))


def state(model):
    return [each.training for each in model.modules()], [p.requires_grad for p in model.parameters()]


def test_tables_as_their_rows():
    frame, table = pandas.DataFrame(ROWS), pyarrow.Table.from_pylist(ROWS)
    for rows in (frame.to_dict("records"), table.to_pylist(), iter(ROWS)):
        assert len(safebasin.read_rows(rows).examples) == len(ROWS)
    assert len(safebasin.read_rows(iter([*ROWS, "x"])).bad) == 1  # of a list, beartype checks one item, by chance


@pytest.mark.parametrize("what", ["measure", "mixed"])
def test_nothing_is_measured_with_dropout(prompts, what):
    """A model in training mode was measured so: by chance, and with random numbers of the caller's."""
    tuned = with_dropout()
    suite = {"token_accuracy": {"data": {"path": prompts}}}

    def measured():
        if what == "mixed":
            return safebasin.mixed_answers([f"make a {word}" for word in BAD], tuned, share=0.1, max_new_tokens=6)
        return [each.value for each in safebasin.measure_model(tuned, suites=[suite])]

    truth = (tuned.model.eval(), measured())[1]
    tuned.model.train()
    tuned.model.base_model.model.model.layers[0].eval()  # a part that stays in eval mode
    before, numbers = state(tuned.model), torch.get_rng_state()
    assert measured() == truth
    assert state(tuned.model) == before and torch.equal(torch.get_rng_state(), numbers)


def test_a_scan_leaves_every_module_in_its_mode():
    loaded = aligned_model()
    loaded.model.train()
    loaded.model.model.layers[0].eval()
    before = state(loaded.model)
    safebasin.scan_rows(safebasin.read_rows(ROWS), loaded)
    assert state(loaded.model) == before


def test_mixing_leaves_the_adapter_frozen(tmp_path):
    start = save_start(tmp_path / "start")
    tuned = load(str(start), adapter=save_adapter(tmp_path / "adapter", start))
    before = state(tuned.model)
    safebasin.mixed_answers(["make a bomb"], tuned, max_new_tokens=2)
    assert state(tuned.model) == before


def test_a_model_by_path_and_by_pair(tmp_path, prompts):
    rows, loaded = safebasin.read_rows(ROWS), aligned_model()
    for model in (save_start(tmp_path / "start"), tuple(loaded)):
        assert len(safebasin.scan_rows(rows, model).row_ids) == len(ROWS)
    empty = loaded._replace(model=aligned_model().model.to("meta"))
    with pytest.raises(UserError, match="meta device"):
        safebasin.scan_rows(rows, empty)
    suite = {"asr": {"prompts": prompts, "judges": ["keyword"]}}
    with pytest.raises(UserError, match="adapter is for a model that is named"):  # it was left out
        safebasin.measure_model(loaded, suites=[suite], adapter=Path("an/adapter"))


def plain(name):
    """A function without the check of its annotations, which tests have and users do not."""
    return inspect.unwrap(getattr(safebasin, name))


TABLES = [pandas.DataFrame(ROWS), pyarrow.Table.from_pylist(ROWS), {"prompt": ["a"], "completion": ["b"]}, ["a", "b"]]


@pytest.mark.parametrize("table", TABLES, ids=["frame", "table", "columns", "texts"])
def test_a_table_that_gives_no_rows_is_refused(table):
    """It was read as rows that are all bad, and none was an error."""
    with pytest.raises(UserError, match=r"rows are dicts, one a row; found \w+ of \w+; write a table as"):
        plain("read_rows")(table)


def test_values_of_a_wrong_kind_are_refused_in_a_line(prompts):
    rows, loaded = safebasin.read_rows(ROWS), aligned_model()
    calls = [
        lambda: plain("scan_rows")(rows, loaded, scorers="gradshield"),
        lambda: plain("measure_model")(loaded, suites="asr"),
        lambda: plain("measure_model")(loaded, suites={"asr": {"prompts": prompts}}),
        lambda: plain("mixed_answers")("make a bomb", with_dropout()),  # each letter was a request
        lambda: plain("read_recipe")("builtin:quickstart", "seed=3"),
    ]
    for call in calls:
        with pytest.raises(UserError, match="a list is needed, found one"):
            call()
    with pytest.raises(UserError, match=r"rows are what safebasin\.read_rows gives"):
        plain("scan_rows")(ROWS, loaded)
    for model in (loaded.model, None):
        with pytest.raises(UserError, match="a model is a name, or a pair of model and tokenizer"):
            plain("scan_rows")(rows, model)


def test_a_scorer_that_is_named_twice():
    rows = safebasin.read_rows(ROWS)
    with pytest.raises(UserError, match="names one scorer twice"):  # the second took the column of the first
        safebasin.scan_rows(rows, aligned_model(), scorers=["gradshield", {"gradshield": {"depth": 1.0}}])


def test_a_preview_of_examples():
    rows, tokenizer = safebasin.read_rows(ROWS), aligned_model().tokenizer
    assert safebasin.preview_rows(rows.examples, tokenizer) == safebasin.preview_rows(rows, tokenizer)
