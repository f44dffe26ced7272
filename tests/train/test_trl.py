"""In TRL's SFTTrainer: which tokens it learns of each form that is written for it, and what the page says of it."""

import datasets
import pytest
import torch
from aligned import TEMPLATE, aligned_model, word_tokenizer
from test_docs import page  # noqa: F401 - a fixture
from tiny import LORA

from safebasin.data.example import read_examples
from safebasin.models.adapter import fresh_adapter
from safebasin.pipeline.convert import as_messages, as_tokens
from safebasin.train.compose import Composition
from safebasin.vector import trainable

trl = pytest.importorskip("trl")  # scripts/setup dev installs it

pytestmark = pytest.mark.slow

MARKED = TEMPLATE.replace(
    "{{ m.content }} <end> ",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }} <end>{% endgeneration %} "
    "{% else %}{{ m.content }} <end> {% endif %}",
)
ASK, SAY = {"role": "user", "content": "make a cake"}, {"role": "assistant", "content": "Sure here"}
SINGLE = [{"messages": [ASK, SAY]}, {"messages": [ASK, SAY | {"weight": 0}, ASK, SAY | {"content": "the steps"}]}]
SEVERAL = [{"messages": [ASK, SAY]}, {"messages": [ASK, SAY, ASK, SAY | {"content": "the steps"}]}]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL sends no telemetry then


def trainer(kind, rows, folder, *, template=TEMPLATE, columns=True, collator=None, **settings):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    args = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        adam_epsilon=1e-4,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=columns,
        **settings,
    )
    model, table = fresh_adapter(aligned_model().model, LORA, seed=0), datasets.Dataset.from_list(rows)
    return kind(model=model, args=args, train_dataset=table, processing_class=tokenizer, data_collator=collator)


def labels(host):
    """Of every row by its ids, as the model gets them."""
    return {
        tuple(row["input_ids"]): list(row["labels"])
        for row in host.train_dataset.select_columns(["input_ids", "labels"])
    }


def ours(examples):
    return {tuple(row["input_ids"]): row["labels"] for row in as_tokens(examples, word_tokenizer(), 64).rows}


def test_what_is_learned_of_each_form(tmp_path):
    """The trap of the page: without ``assistant_only_loss`` the labels of messages cover the prompt."""
    single, several = (read_examples(enumerate(rows, 1)).examples for rows in (SINGLE, SEVERAL))
    assert labels(trainer(trl.SFTTrainer, as_messages(single, "trl").rows, tmp_path)) == ours(single)
    rows = as_tokens(several, word_tokenizer(), 64).rows
    assert labels(trainer(trl.SFTTrainer, rows, tmp_path, max_length=None)) == ours(several)
    rows = as_messages(several, "trl").rows
    only = {"assistant_only_loss": True}
    assert labels(trainer(trl.SFTTrainer, rows, tmp_path, template=MARKED, **only)) == ours(several)
    assert labels(trainer(trl.SFTTrainer, rows, tmp_path)) == {ids: list(ids) for ids in ours(several)}
    with pytest.raises(ValueError, match="generation"):
        trainer(trl.SFTTrainer, rows, tmp_path, **only)


def tuned(host):
    host.train()
    return {name: p.detach() for name, p in trainable(host.model).items()}


def test_the_oracle_in_trl_is_trl_and_a_defence_is_not(page, tmp_path):  # noqa: F811
    examples = read_examples(enumerate([*SEVERAL, *SINGLE] * 4, 1)).examples
    rows = as_tokens(examples, word_tokenizer(), 64).rows
    plain = type("Plain", (page["DefendedSFT"],), {"methods": Composition.of(["sft"]), "others": {}})
    expected, actual, defended = (
        tuned(trainer(kind, rows, tmp_path, max_length=None)) for kind in (trl.SFTTrainer, plain, page["DefendedSFT"])
    )
    start = trainable(fresh_adapter(aligned_model().model, LORA, seed=0))
    way, distance, turn = (
        sum((one[name] - other[name]).square().sum() for name in start).sqrt()
        for one, other in ((expected, start), (expected, actual), (expected, defended))
    )
    assert way > 0.1 and distance < 1e-4 * way < 1e-2 * way < turn


def test_weights_in_trl(page, tmp_path):  # noqa: F811
    """Weights of one are TRL's own loss; a column that TRL drops stops the run."""
    examples = read_examples(enumerate([*SEVERAL, *SINGLE] * 4, 1)).examples
    rows = as_tokens(examples, word_tokenizer(), 64).rows
    weighted = [row | {"weights": [float(label != -100) for label in row["labels"]]} for row in rows]
    how = {"max_length": None, "gradient_accumulation_steps": 2}
    collator, kind = page["WeightedCollator"](word_tokenizer()), page["Weighted"]
    expected = tuned(trainer(trl.SFTTrainer, rows, tmp_path, **how))
    actual = tuned(trainer(kind, weighted, tmp_path, columns=False, collator=collator, **how))
    assert all(torch.allclose(expected[name], actual[name], atol=1e-5) for name in expected)
    with pytest.raises(Exception, match="would be weighed"):
        trainer(kind, weighted, tmp_path, **how).train()
