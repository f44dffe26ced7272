"""Rows packed into one sequence have the logits and the gradients of padded rows, which have those of one row alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LORA, PAD, random_rows, tiny_model
from torch import nn

from safebasin.batch import answer_logits, collate, layout, pack, padded_because, target_logits
from safebasin.encode import TokenizedRow
from safebasin.models.adapter import fresh_adapter, without_adapter
from safebasin.train.loss import nll
from safebasin.tree import by_prefix
from safebasin.vector import trainable

# Eager attention takes its softmax in float32 whatever the weights are, so only SDPA is exact in float64.
WIDE, NARROW = tiny_model(dtype=torch.float64), tiny_model()
WIDE.config._attn_implementation = "sdpa"


def row(prompt: tuple[int, ...], answer: tuple[int, ...]) -> TokenizedRow:
    return TokenizedRow("row", prompt + answer, (False,) * len(prompt) + (True,) * len(answer))


tokens = st.lists(st.integers(1, 3), min_size=1, max_size=6).map(tuple)  # few tokens: many rows begin alike
rows_alike = st.lists(st.builds(row, tokens, tokens), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(rows_alike)
def test_logits_are_those_of_the_padded_rows(rows):
    """Of numbers near 1, whatever rows share (an answer within a prefix too); every prefix stands once."""
    batch = collate(rows, PAD)
    for model, mask_dtype, tolerance in ((WIDE, torch.bool, 1e-12), (NARROW, torch.float32, 1e-5)):
        packed = pack(batch, mask_dtype)
        assert packed is not None
        actual = packed.targets(model(**packed.inputs).logits)
        assert torch.allclose(actual, answer_logits(model, batch)[batch.mask], atol=tolerance)
        assert len(packed.attends) == len({r.ids[: i + 1].tobytes() for r in rows for i in range(len(r))})


def test_one_tree_by_hand():
    """Rows 5 6 [7] and 5 6 [8 9] are the tokens 5 6 7 8 9; 8 stands behind 6 and does not see 7."""
    packed = pack(collate([row((5, 6), (7,)), row((5, 6), (8, 9))], PAD))
    assert packed is not None
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 2, 3]]
    assert packed.predicts.tolist() == [1, 1, 3]
    assert packed.attends.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


def test_gradients_of_the_adapter_are_those_of_the_padded_rows():
    model = fresh_adapter(tiny_model(dtype=torch.float64), LORA, seed=0)
    without_adapter(model).config._attn_implementation = "sdpa"
    for name, parameter in trainable(model).items():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    batch = collate(random_rows(5, 1, columns=("star",)), PAD)
    assert type(layout(model, batch)).__name__ == "Packed"
    parameters = list(trainable(model).values())
    actual = torch.autograd.grad(nll(model, batch).sum(), parameters)
    logits = answer_logits(model, batch)[batch.mask]
    truth = torch.autograd.grad(
        nn.functional.cross_entropy(logits, batch.labels[batch.mask], reduction="sum"), parameters
    )
    for mine, theirs in zip(actual, truth, strict=True):
        assert (mine - theirs).norm() < 1e-6 * theirs.norm()  # the loss itself is in float32


def test_what_cannot_be_packed_is_padded():
    batch = collate(random_rows(3), PAD)
    silent = batch.silent()
    assert layout(WIDE, silent) is silent
    assert pack(collate([row((), (5, 6)), row((1, 2, 3), (4,))], PAD)) is None
    model = fresh_adapter(tiny_model(), LORA | {"lora_dropout": 0.1}, seed=0)
    assert padded_because(model.eval()) is None
    assert "dropout" in str(padded_because(model.train()))
    assert layout(model, batch) is batch
    without_adapter(model).config._attn_implementation = "flash_attention_2"
    assert "mask" in str(padded_because(model.eval()))


@pytest.mark.parametrize("alike", [True, False])
def test_rows_are_packed_where_that_is_less_work(alike):
    """A tree of 40 rows of 100 tokens that share nothing has 40 times the pairs of tokens: padding is cheaper there."""
    draw = [torch.Generator().manual_seed(0 if alike else i) for i in range(40)]
    prompts = [tuple(torch.randint(1, 60, (100,), generator=each).tolist()) for each in draw]
    batch = collate([row(prompt, (i + 1,)) for i, prompt in enumerate(prompts)], PAD)
    assert (layout(WIDE, batch) is batch) == (not alike)
    assert torch.allclose(target_logits(WIDE, batch), answer_logits(WIDE, batch)[batch.mask], atol=1e-9)


def test_rows_that_each_go_on_where_another_ends_are_grouped():
    """1,500 families, one inside the other, are more than the stack of calls holds; every row is in one batch."""
    ids = [(1,) * 9 * (i + 1) + (2,) for i in range(1500)]
    groups = list(by_prefix([row(each, (3,)) for each in ids], 1))
    assert sorted(i for group in groups for i in group.rows) == list(range(1500))
