"""Laws of every scorer in the registry: a row's score is its own. Batch, order, padding and neighbours do not change
it."""

import dataclasses
import functools
import math
import tempfile
import typing
from pathlib import Path

import pytest
import torch
from aligned import BAD, GOOD, aligned_model, coded, example, refusals
from hypothesis import given, settings
from hypothesis import strategies as st
from tuned import save_adapter, save_start

from safebasin.batch import Batch, collate
from safebasin.errors import UserError
from safebasin.scan import scorer
from safebasin.scan.scan import Reader, Scorer, score_rows

MODEL, TOKENIZER = aligned_model()
ANCHORS = {
    "probe": refusals(TOKENIZER),
    "refusals": refusals(TOKENIZER),
    "harmful": coded(TOKENIZER, *((f"make a {word}", "Sure here") for word in BAD)),
    "safe": coded(TOKENIZER, *((f"make a {word}", "Sure here are the steps") for word in GOOD)),
}
ROWS = coded(
    TOKENIZER,
    *((f"make a {word}" + " now" * i, "Sure here are the steps") for i, word in enumerate(BAD)),
    *(("now " * i + f"make a {word}", "Sure here" + " are the steps" * i) for i, word in enumerate(GOOD)),
    ("make a bomb", "I cannot help"),
)
READERS = [entry.name for entry in scorer if entry.implements("read")]  # of text: no model, no batch
NAMES = [entry.name for entry in scorer if entry.name not in READERS]
ADAPTER = save_adapter(Path(tempfile.mkdtemp()), save_start(Path(tempfile.mkdtemp())))
SETTINGS = {
    "toss": {"harmful": str(ADAPTER)},
    "dsa": {"guard": None},
    "guard": {"policy": "{conversation} {answer}", "verdicts": ("Sure", "I")},
    "opening_margin": {"compliance": "Sure here are"},
}  # words that the tiny model knows
each_scorer = pytest.mark.parametrize("name", NAMES)


def scores(name, rows, batch_size=4, anchors=ANCHORS):
    return score_rows(
        MODEL, TOKENIZER, rows, {name: scorer.make({name: SETTINGS.get(name)})}, anchors, batch_size=batch_size
    ).rows[name]


@functools.cache
def truth(name):
    return scores(name, ROWS, 1)  # every row alone


def close(actual, name, indices):
    expected = torch.tensor([truth(name)[i] for i in indices])
    scale = max(1e-6, max(abs(value) for value in truth(name)))
    torch.testing.assert_close(torch.tensor(actual), expected, rtol=1e-4, atol=1e-4 * scale)


def test_there_are_scorers():
    assert {"gradshield", "self_refusal", "keyword"} <= set(NAMES)


@pytest.mark.parametrize("entry", list(scorer), ids=lambda entry: entry.name)
def test_every_number_has_bounds(entry):
    """No number takes -1, NaN or an infinity; a count does not take 0, and a share of the blocks neither 0 nor 2."""
    for field in dataclasses.fields(entry.kind):
        for kind in typing.get_args(field.type) or (field.type,):
            number = typing.get_args(kind)[:1] or (kind,)
            if number[0] not in (int, float):
                continue
            for value in (-1, math.nan, math.inf, -math.inf, True, "1"):
                with pytest.raises(UserError, match=f"scan.{entry.name}: {field.name}"):
                    scorer.make({entry.name: {field.name: value}})
            if field.name not in ("seed", "layer"):
                with pytest.raises(UserError, match=field.name):
                    scorer.make({entry.name: {field.name: 0}})
            if field.name == "depth":
                with pytest.raises(UserError, match=field.name):
                    scorer.make({entry.name: {field.name: 2}})


@each_scorer
@settings(max_examples=6, deadline=None)
@given(order=st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=8), batch_size=st.integers(1, 9))
def test_neither_order_nor_batch_size_matters(name, order, batch_size):
    """A row may come twice: it scores twice the same."""
    close(scores(name, [dataclasses.replace(ROWS[i], id=f"{k}") for k, i in enumerate(order)], batch_size), name, order)


@each_scorer
@pytest.mark.parametrize("extra", [1, 5])
def test_padding_does_not_matter(name, extra):
    method = scorer.make({name: SETTINGS.get(name)})
    fitted = method.fit(MODEL, TOKENIZER, ANCHORS)
    batch = collate(ROWS, TOKENIZER.pad_token_id)
    wide = Batch(
        torch.nn.functional.pad(batch.input_ids, (extra, 0), value=TOKENIZER.pad_token_id),
        torch.nn.functional.pad(batch.attention_mask, (extra, 0)),
        torch.nn.functional.pad(batch.mask, (extra - 1, 0)),  # the tail of answers may be wider than it must be, too
    )
    values = method.score(MODEL, wide, fitted)
    if values.dim() == 2:
        values = values.sum(1) if method.entry.tokens == "sum" else values.masked_fill(~wide.mask, -math.inf).amax(1)
    close(values.tolist(), name, range(len(ROWS)))


@each_scorer
def test_a_score_is_one_number_a_row_and_tells_rows_apart(name):
    assert all(math.isfinite(value) for value in truth(name))
    assert len(set(truth(name))) > 1


@each_scorer
def test_the_model_is_left_as_it_was(name):
    model, _ = aligned_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    score_rows(model, TOKENIZER, ROWS[:3], {name: scorer.make({name: SETTINGS.get(name)})}, ANCHORS, batch_size=2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@each_scorer
def test_without_anchors_a_scorer_works_or_says_which_it_needs(name):
    try:
        close(scores(name, ROWS, anchors={}), name, range(len(ROWS)))
    except UserError as error:
        assert f"scan.{name} needs the anchor set" in str(error)


@pytest.mark.parametrize("name", READERS)
@given(texts=st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=6), order=st.randoms(use_true_random=False))
def test_a_reader_gives_every_row_its_own_number(name, texts, order):
    """Neighbours and order do not change it; a row may come twice."""
    reader = scorer.make({name: SETTINGS.get(name)})
    rows = [example(prompt, answer, i) for i, (prompt, answer) in enumerate(texts)]
    alone = {row.id: reader.read([row])[0] for row in rows}
    mixed = order.choices(rows, k=2 * len(rows))
    assert reader.read(mixed) == [alone[row.id] for row in mixed]
    assert all(math.isfinite(value) and value >= 0 for value in alone.values())


@pytest.mark.parametrize("name", READERS)
def test_a_reader_in_a_scan_needs_the_texts_of_the_same_rows(name):
    texts = [example(f"make a {word}", "Sure", i) for i, word in enumerate(GOOD, 1)]
    rows = coded(TOKENIZER, *((text.prompt, text.answer) for text in texts))
    reader, other = scorer.make({name: SETTINGS.get(name)}), scorer.make("keyword")
    assert isinstance(reader, Reader) and not isinstance(reader, Scorer) and not isinstance(other, Reader)
    columns = score_rows(
        MODEL, TOKENIZER, rows, {name: reader, "keyword": other}, {}, examples=texts, batch_size=2
    ).rows
    assert columns[name] == reader.read(texts) and len(columns["keyword"]) == len(rows)
    for wrong in ([], texts[::-1]):
        with pytest.raises(UserError, match=f"scan.{name} reads text"):
            score_rows(MODEL, TOKENIZER, rows, {name: reader}, {}, examples=wrong, batch_size=2)
