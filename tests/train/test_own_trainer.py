"""The weighted Trainer of docs/own_trainer.md is STAR-DSS without its pull, and the defended one takes columns."""

import pytest
import torch
from aligned import word_tokenizer
from test_docs import page  # noqa: F401 - a fixture
from tiny import LORA, random_rows, tiny_model
from transformers import Trainer

from safebasin.models.adapter import fresh_adapter
from safebasin.train.compose import Composition
from safebasin.train.settings import training_arguments
from safebasin.train.weighted import WeightedCollator, WeightedLoss
from safebasin.vector import trainable

pytestmark = pytest.mark.slow

ROWS = random_rows(16, 3, columns=("star",))
Weighted = type("Weighted", (WeightedLoss, Trainer), {})


def item(row):
    star = iter(row.columns["star"])
    labels = [token if learned else -100 for token, learned in zip(row.ids.tolist(), row.answer.tolist(), strict=True)]
    return {"input_ids": row.ids.tolist(), "labels": labels, "weights": [next(star) if a else 0.0 for a in row.answer]}


def trained(kind, folder, accumulation=1):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    args = training_arguments(settings | {"learning_rate": 0.01, "adam_epsilon": 1e-4, "seed": 0}, folder)
    model = fresh_adapter(tiny_model(), LORA, seed=0)
    collator = WeightedCollator(word_tokenizer())
    kind(model=model, args=args, train_dataset=[item(row) for row in ROWS], data_collator=collator).train()
    return {name: p.detach() for name, p in trainable(model).items()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_weights_as_a_column_are_star_dss_without_its_pull(accumulation, page, tmp_path):  # noqa: F811
    mine = type("Star", (page["Defended"],), {"methods": Composition.of([{"star_dss": {"kl": 0.0}}]), "others": {}})
    expected, actual = trained(mine, tmp_path), trained(Weighted, tmp_path, accumulation)
    start = trainable(fresh_adapter(tiny_model(), LORA, seed=0))
    way = sum((expected[name] - start[name]).square().sum() for name in start).sqrt()
    distance = sum((expected[name] - actual[name]).square().sum() for name in start).sqrt()
    assert way > 0.1
    assert distance < 1e-4 * way
    plain = trained(type("Plain", (page["Defended"],), {"methods": Composition.of(["sft"]), "others": {}}), tmp_path)
    assert sum((expected[name] - plain[name]).square().sum() for name in start).sqrt() > 1e-2 * way
    assert not torch.equal(*(next(iter(each.values())) for each in (expected, plain)))
