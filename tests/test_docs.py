"""The code of docs/own_trainer.md runs as it is, on the tiny model, and equals a plain loop and a plain Trainer."""

import contextlib
import re
import warnings
from pathlib import Path

import pytest
import torch
from aligned import aligned_model
from tiny import LORA, PAD, random_rows, tiny_model
from transformers import Trainer

from safebasin.data.source import Source, open_examples
from safebasin.models.adapter import fresh_adapter
from safebasin.pipeline.convert import as_messages, as_tokens, write_converted
from safebasin.train.compose import Composition
from safebasin.train.settings import training_arguments
from safebasin.vector import trainable

pytestmark = pytest.mark.slow

TEXT = (Path(__file__).parents[1] / "docs" / "own_trainer.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that the blocks of the page define, run one after another, beside files that were converted."""
    folder = tmp_path_factory.mktemp("docs")
    for part in aligned_model():
        part.save_pretrained(folder)
    examples = open_examples(Source(path="builtin:support-train", take=16))
    tokens = as_tokens(examples, aligned_model().tokenizer, 1024)
    weighted = [row | {"weights": [float(label != -100) / 2 for label in row["labels"]]} for row in tokens.rows]
    write_converted(folder / "mine_trl", as_messages(examples, "trl"), "trl")
    write_converted(folder / "mine_weighted", tokens._replace(rows=weighted), "tokens")
    names: dict = {}
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'pin_memory' argument")  # the page's own arguments, on a CPU
        patch.setenv("CI", "1")  # TRL sends no telemetry then
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
            exec(compile(block.replace("builtin:smollm2-aligned", str(folder)), "own_trainer.md", "exec"), names)
    return names


def test_the_loop_learns(page):
    assert all(p.any() for name, p in page["parameters"].items() if "lora_B" in name)
    assert page["trainer"].state.global_step == 4
    assert page["oracle"].losses.keys() == {"task", "align"}


def trained(kind: type, rows: list[dict], folder: Path, **settings) -> dict[str, torch.Tensor]:
    args = training_arguments(
        {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01, "adam_epsilon": 1e-4, "seed": 0}
        | settings,
        folder,
    )
    model = fresh_adapter(tiny_model(), LORA, seed=0)
    kind(model=model, args=args, train_dataset=rows, data_collator=padded).train()
    return {name: p.detach() for name, p in trainable(model).items()}


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Padding on the right, -100 where nothing is learned: what the field's collators hand over."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows]) for key, value in fill.items()
    }


def items(rows) -> list[dict]:
    labels = [
        [token if is_answer else -100 for token, is_answer in zip(row.ids.tolist(), row.answer.tolist(), strict=True)]
        for row in rows
    ]
    return [
        {"input_ids": row.ids.tolist(), "attention_mask": [1] * len(row), "labels": labels_of_row}
        for row, labels_of_row in zip(rows, labels, strict=True)
    ]


def test_a_trainer_with_sft_is_the_plain_trainer(page, tmp_path):
    """Four steps of AdamW on right-padded rows: one path through Oracle, one through Trainer's own loss."""
    rows = items(random_rows(16, 3))
    mine = type("Plain", (page["Defended"],), {"methods": Composition.of(["sft"]), "others": {}})
    expected, actual = trained(Trainer, rows, tmp_path), trained(mine, rows, tmp_path)
    start = trainable(fresh_adapter(tiny_model(), LORA, seed=0))
    way = sum((expected[name] - start[name]).square().sum() for name in start).sqrt()
    distance = sum((expected[name] - actual[name]).square().sum() for name in start).sqrt()
    assert way > 0.1
    assert distance < 1e-4 * way


def test_a_trainer_with_a_defence_aligns(page, tmp_path):
    """Its update is another one than plain tuning's."""
    rows = items(random_rows(16, 3))
    plain = trained(
        type("Plain", (page["Defended"],), {"methods": Composition.of(["sft"]), "others": {}}), rows, tmp_path
    )
    actual = trained(page["Defended"], rows, tmp_path)
    assert any(not torch.allclose(actual[name], plain[name], atol=1e-3) for name in plain)
