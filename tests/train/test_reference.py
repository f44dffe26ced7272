"""The reference runs once a row, and the loss and its gradient are those without the cache."""

import dataclasses
from unittest import mock

import pytest
import torch
from away import adapted, assert_same
from tiny import LORA, PAD, VOCABULARY, random_rows, tiny_model
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM

from safebasin.batch import Batch, answer_logits, collate
from safebasin.models.adapter import fresh_adapter, reference
from safebasin.train import reference as module
from safebasin.train.loss import kl_from_reference
from safebasin.train.methods.constrained_sft import ConstrainedSft
from safebasin.train.methods.star_dss import StarDss
from safebasin.train.oracle import Oracle
from safebasin.train.reference import CachedBatch, ReferenceCache, reference_logits
from safebasin.train.stream import Stream

ROWS = random_rows(8, 1, columns=("star",))
LOSSES = {
    "kl": kl_from_reference,
    "star_dss": StarDss().loss,
    "k2": StarDss(estimator="k2").loss,
    "constrained_sft": ConstrainedSft().loss,
}


def forwards(model) -> list[bool]:
    """A list that grows by one with every forward, True where the adapter was off."""
    passes: list[bool] = []
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    base = model.get_base_model()
    base.register_forward_hook(lambda *_: passes.append(layers[0].disable_adapters))
    return passes


def with_cache(cache: ReferenceCache, batch: Batch) -> CachedBatch:
    return CachedBatch(**vars(batch), cache=cache)


def gradients(loss, model, steps=6, batch=3):
    """Two epochs: the rows come back among other rows, in batches of another width."""
    oracle = Oracle(model, {"task": Stream("task", ROWS, batch, 2, 0, PAD)}, seed=0, loss=loss)
    return [oracle.at_step(step).task() for step in range(steps)], oracle


@pytest.mark.parametrize("name", LOSSES)
def test_a_cached_row_has_the_gradient_of_one_that_is_run(name):
    """Within 1e-5 of its length in float32, through two epochs; in the second one no forward is the reference's."""
    with mock.patch.object(module, "LIMIT", 0):
        truth, _ = gradients(LOSSES[name], adapted(0.1))
    model = adapted(0.1)
    passes = forwards(model)
    actual, oracle = gradients(LOSSES[name], model, steps=3)
    assert sum(passes) == 5  # 8 rows, 3 a step in batches of 2 and 1
    for step in (3, 4, 5):
        actual.append(oracle.at_step(step).task())
    assert (sum(passes), len(passes)) == (5, 15)
    for mine, theirs in zip(actual, truth, strict=True):
        assert_same(mine, theirs)


def test_beyond_the_limit_rows_are_run_again():
    model = adapted(0.1)
    passes = forwards(model)
    # float32, 32 wide: room for the longest row, and one or two more
    one = 4 * 32 * max(sum(row.answer) for row in ROWS)
    with mock.patch.object(module, "LIMIT", one):
        _, oracle = gradients(kl_from_reference, model)
    assert 5 < sum(passes) <= 10
    assert sum(states.nbytes for states in oracle.reference_cache.states.values()) <= one


def test_every_oracle_has_a_cache_of_its_own():
    """So what one run has seen is nowhere when the next one begins; a batch without a cache runs the reference."""
    model = adapted(0.1)
    passes = forwards(model)
    for _ in range(2):
        gradients(kl_from_reference, model, steps=3)
    assert sum(passes) == 10
    reference_logits(model, collate(ROWS[:2], PAD))
    assert sum(passes) == 11


def test_the_same_tokens_with_another_answer_are_another_row():
    model, row = adapted(0.1), dataclasses.replace(ROWS[0], columns={})
    cache = ReferenceCache(model)
    twin = dataclasses.replace(row, answer=tuple(k == len(row) - 1 for k in range(len(row))))
    assert sum(row.answer) > 1
    for each in (row, twin, twin, row):
        batch = collate([each], PAD)
        with reference(model):
            truth = answer_logits(model, batch)[batch.mask]
        assert torch.allclose(reference_logits(model, with_cache(cache, batch)), truth, atol=1e-6)
    assert len(cache.states) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_head_is_applied_as_the_forward_does(dtype):
    """To the bit in the batch that was cached; in another one within bfloat16's rounding, 2^-8 in three layers."""
    model = fresh_adapter(tiny_model(dtype=dtype), LORA, seed=0)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    cache = ReferenceCache(model)
    batch, other = collate(ROWS[:3], PAD), collate(ROWS[2:], PAD)
    first = reference_logits(model, with_cache(cache, batch))
    assert cache.head is not None
    again = reference_logits(model, with_cache(cache, batch))
    assert again.dtype == torch.bfloat16
    assert torch.equal(again, first)
    truth = reference_logits(model, other)
    reference_logits(model, with_cache(cache, collate(ROWS[3:], PAD)))
    actual = reference_logits(model, with_cache(cache, other))
    assert (actual.float() - truth.float()).norm() < 0.01 * truth.float().norm()


def granite() -> nn.Module:
    """It divides its logits by a number after the head."""
    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return GraniteForCausalLM(
        GraniteConfig(vocab_size=VOCABULARY, logits_scaling=2.0, attn_implementation="eager", **small)
    ).eval()


@pytest.mark.parametrize(
    ("build", "adapter"),
    [
        (granite, LORA),
        (tiny_model, LORA | {"target_modules": ["q_proj", "lm_head"]}),
        (tiny_model, LORA | {"modules_to_save": ["lm_head"]}),
    ],
)
def test_where_the_head_is_not_one_frozen_product_every_row_is_run(build, adapter):
    model = fresh_adapter(build(), adapter, seed=0)
    passes, batch = forwards(model), with_cache(ReferenceCache(model), collate(ROWS[:3], PAD))
    with reference(model):
        truth = answer_logits(model, batch)[batch.mask]
    actual = [reference_logits(model, batch) for _ in range(2)]
    assert passes == [True] * 3
    assert all(torch.allclose(each, truth, atol=1e-6) for each in actual)


def test_the_reference_has_no_dropout_and_draws_nothing():
    """So the model's own dropout is the same whether its rows are cached or not."""
    model = tiny_model()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model = fresh_adapter(model, LORA, seed=0).train()
    batch = with_cache(ReferenceCache(model), collate(ROWS[:3], PAD))
    assert not torch.equal(answer_logits(model, batch), answer_logits(model, batch))
    state = torch.get_rng_state()
    first, again = (reference_logits(model, batch) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert torch.allclose(first, again, atol=1e-6)


def test_a_rank_without_rows_may_ask_too():
    model = adapted(0.1)
    batch = with_cache(ReferenceCache(model), collate(ROWS[:1], PAD).silent())
    assert [reference_logits(model, batch).shape for _ in range(2)] == [(0, VOCABULARY)] * 2
