"""What is lent is the start model as it would be loaded, and what is done to it is no one else's."""

import pytest
import torch
from folders import save_tiny
from tiny import LORA
from torch import nn

from safebasin.models import lend
from safebasin.models.adapter import fresh_adapter
from safebasin.models.lend import Lender
from safebasin.models.load import load
from safebasin.vector import trainable


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("lend") / "model"))


@pytest.fixture
def loads(monkeypatch):
    """The names of the models that are loaded."""
    names = []
    monkeypatch.setattr(lend, "load", lambda name, **how: (names.append(name), load(name, **how))[1])
    return names


def test_one_model_is_loaded_once_and_its_weights_are_shared(saved_model, loads):
    lender = Lender()
    first, second = (lender.lend(saved_model, dtype="float32").model for _ in range(2))
    assert loads == [saved_model]
    weights = dict(load(saved_model, dtype="float32").model.named_parameters())
    for (name, mine), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, weights[name]) and mine is not theirs and mine.data_ptr() == theirs.data_ptr()
    assert first.get_output_embeddings().weight.data_ptr() == second.get_output_embeddings().weight.data_ptr()


def test_an_adapter_a_hook_and_frozen_weights_are_no_one_elses(saved_model, loads, tmp_path):
    lender = Lender()
    tuned = fresh_adapter(lender.lend(saved_model, dtype="float32").model, LORA, seed=0)
    for parameter in trainable(tuned).values():
        nn.init.normal_(parameter, std=0.1)
    tuned.config.use_cache = False
    tuned.save_pretrained(tmp_path / "adapter")
    plain, loaded = lender.lend(saved_model, dtype="float32").model, load(saved_model, dtype="float32").model
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in loaded.named_modules()]
    assert all(parameter.requires_grad for parameter in plain.parameters()) and plain.config.use_cache
    ids = torch.tensor([[5, 6, 7]], device=plain.device)
    beside = lender.lend(saved_model, tmp_path / "adapter", dtype="float32").model
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, loaded(input_ids=ids).logits)
        assert torch.equal(beside(input_ids=ids).logits, tuned.eval()(input_ids=ids).logits)
    assert loads == [saved_model]


def test_weights_that_were_changed_are_not_lent(saved_model, loads):
    lender = Lender()
    model = lender.lend(saved_model, dtype="float32").model
    with torch.no_grad():
        next(model.parameters()).add_(1)
    again, truth = lender.lend(saved_model, dtype="float32").model, load(saved_model, dtype="float32").model
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again.parameters(), truth.parameters(), strict=True))
    assert loads == [saved_model] * 2


def test_another_model_or_type_is_loaded(saved_model, loads):
    lender = Lender()
    assert lender.lend(saved_model, dtype="float32").model.dtype == torch.float32
    assert lender.lend(saved_model, dtype="bfloat16").model.dtype == torch.bfloat16
    assert loads == [saved_model] * 2
