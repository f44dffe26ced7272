"""Per-token weights: padded beside their tokens, one number by hand; the plugin for axolotl, against a stub of its
documented base class and of the calls that its builder makes."""

import ast
import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny import LORA, PAD, random_rows, tiny_model
from torch import nn
from transformers import Trainer, TrainingArguments

from safebasin.errors import UserError
from safebasin.models.adapter import fresh_adapter
from safebasin.train import weighted
from safebasin.train.weighted import WeightedCollator, WeightedLoss
from safebasin.vector import trainable

TOKENIZER = types.SimpleNamespace(pad_token_id=PAD)
ROW = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "weights": [0.0, 1.0, 0.25]}


def test_a_row_is_padded_with_its_weights():
    short = {name: values[:2] for name, values in ROW.items()}
    batch = WeightedCollator(TOKENIZER, pad_to_multiple_of=4)([ROW, short])
    assert batch["input_ids"].tolist() == [[3, 4, 5, PAD], [3, 4, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, 4, 5, -100], [-100, 4, -100, -100]]
    assert batch["weights"].tolist() == [[0.0, 1.0, 0.25, 0.0], [0.0, 1.0, 0.0, 0.0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("row", [{**ROW, "weights": [1.0]}, {**ROW, "weights": None}, {"input_ids": [3]}])
def test_a_row_without_its_weights_stops_the_run(row):
    with pytest.raises(UserError, match="of one length"):
        WeightedCollator(TOKENIZER)([ROW, row])


def test_the_loss_by_hand():
    """Even logits over 8 tokens: each label costs log 8; (1 + 0.25) log 8 over the 2 labels, or over 5 of the step."""

    class Base:
        args, accelerator = (
            types.SimpleNamespace(average_tokens_across_devices=True),
            types.SimpleNamespace(num_processes=2),
        )

    class Even(nn.Module):
        def forward(self, input_ids, attention_mask):
            return types.SimpleNamespace(logits=torch.zeros(*input_ids.shape, 8))

    host, batch = type("Host", (WeightedLoss, Base), {})(), WeightedCollator(TOKENIZER)([ROW])
    log8 = torch.tensor(8.0).log()
    assert torch.isclose(host.compute_loss(Even(), batch), 1.25 * log8 / 2)
    assert torch.isclose(host.compute_loss(Even(), batch, num_items_in_batch=5), 1.25 * log8 / 5 * 2)
    _, outputs = host.compute_loss(Even(), batch, return_outputs=True)
    assert outputs.logits.shape == (1, 3, 8) and "weights" in batch and host.model_accepts_loss_kwargs
    with pytest.raises(UserError, match="remove_unused_columns=False"):
        host.compute_loss(Even(), {name: batch[name] for name in ("input_ids", "labels")})


def test_it_runs_beside_other_versions():
    """In axolotl's environment, which has not what the package needs."""
    tree = ast.parse(Path(weighted.__file__).read_text(encoding="utf-8"))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names == {"dataclasses", "collections.abc", "typing", "torch", "torch.nn", "safebasin.errors"}


@pytest.fixture
def plugin(monkeypatch):
    """The module of the plugin beside a stub of axolotl 0.19: the hooks of BasePlugin that it uses, as documented."""

    class BasePlugin:
        def __init__(self):
            pass

        def register(self, cfg: dict): ...

        def get_trainer_cls(self, cfg): ...

        def get_training_args(self, cfg): ...

        def get_collator_cls_and_kwargs(self, cfg, is_eval: bool = False): ...

    class AxolotlTrainer(Trainer):
        def __init__(self, *args, bench_data_collator=None, eval_data_collator=None, dataset_tags=None, **kwargs):
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = False  # as axolotl does where the forward has no such argument

    for name, content in {
        "axolotl": {},
        "axolotl.integrations": {},
        "axolotl.integrations.base": {"BasePlugin": BasePlugin},
        "axolotl.core": {},
        "axolotl.core.trainers": {},
        "axolotl.core.trainers.base": {"AxolotlTrainer": AxolotlTrainer},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "safebasin.train.axolotl", raising=False)
    yield importlib.import_module("safebasin.train.axolotl")
    sys.modules.pop("safebasin.train.axolotl", None)


def test_axolotl_trains_with_the_weights(plugin, tmp_path):
    """The calls of axolotl's builder, in its order; a row of weight zero leaves no trace."""
    token_weights = plugin.TokenWeights()
    token_weights.register({"sequence_len": 1024, "sample_packing": False, "context_parallel_size": 1})
    cfg = types.SimpleNamespace()
    settings = {"output_dir": str(tmp_path), "max_steps": 1, "per_device_train_batch_size": 2, "report_to": []}
    settings |= {"gradient_accumulation_steps": 2, "save_strategy": "no", "use_cpu": True, "learning_rate": 0.01}
    args = TrainingArguments(**settings | token_weights.get_training_args(cfg))
    collator_cls, extra = token_weights.get_collator_cls_and_kwargs(cfg, is_eval=False)
    collator = collator_cls(TOKENIZER, padding=True, pad_to_multiple_of=64, return_tensors="pt", **extra)
    rows = [
        {
            "input_ids": row.ids.tolist(),
            "attention_mask": [1] * len(row),
            "labels": [
                token if learned else -100 for token, learned in zip(row.ids.tolist(), row.answer.tolist(), strict=True)
            ],
            "weights": [float(learned) * weight for learned in row.answer],
        }
        for row, weight in zip(random_rows(4, 3), (1.0, 0.0, 0.5, 0.25), strict=True)
    ]

    def tuned(rows):
        model = fresh_adapter(tiny_model(), LORA, seed=0)
        kind = token_weights.get_trainer_cls(cfg)
        kind(model=model, args=args, train_dataset=rows, data_collator=collator, eval_data_collator=collator).train()
        return {name: p.detach() for name, p in trainable(model).items()}

    other = [rows[0], rows[1] | {"input_ids": [5] * len(rows[1]["input_ids"])}, *rows[2:]]
    first, second = tuned(rows), tuned(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(p.any() for name, p in first.items() if "lora_B" in name)
    assert plugin.WeightedTrainer.__name__ == "WeightedTrainer"
    with pytest.raises(AttributeError):
        plugin.Weighted  # noqa: B018


@pytest.mark.parametrize("key", ["sample_packing", "batch_flattening", "rl", "context_parallel_size"])
def test_axolotl_is_refused_where_weights_lose_their_tokens(plugin, key):
    with pytest.raises(UserError, match=key):
        plugin.TokenWeights().register({key: 2 if "size" in key else "auto"})
