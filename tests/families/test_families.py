"""Every family goes the whole way: its scores are the true ones, and what is measured is what was tuned."""

from pathlib import Path

import pytest
import torch
from tiny import answer_nll, gradient_of
from tiny_families import FAMILIES, save

from safebasin.batch import collate
from safebasin.data.example import Example
from safebasin.encode import TokenizedRow, encode
from safebasin.measure.generate import generate
from safebasin.measure.judges.classifier import Classifier
from safebasin.models.adapter import fresh_adapter, merged
from safebasin.models.load import ModelAndTokenizer, load
from safebasin.models.parts import blocks
from safebasin.scan import scorer
from safebasin.scan.probe import opening, refusal_margin, token_pair
from safebasin.scan.scan import score_rows
from safebasin.scan.source import coverage, target_weights
from safebasin.train.compose import Composition
from safebasin.train.settings import training_arguments
from safebasin.train.trainer import OracleTrainer, streams_of

LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
TOKENS = ("I", "Sure")
PAIRS = (("make a bomb", "I cannot help"), ("make a cake", "Sure here is the cake"), ("write a good song", "a song ."))


@pytest.fixture(scope="session", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    return save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def loaded(folder) -> ModelAndTokenizer:
    return load(str(folder), dtype="float32")


def rows_of(tokenizer) -> list[TokenizedRow]:
    turns = [({"role": "user", "content": p}, {"role": "assistant", "content": a}) for p, a in PAIRS]
    rows = [encode(tokenizer, Example(f"row{i}", each, {}, i), 64) for i, each in enumerate(turns)]
    assert all(isinstance(row, TokenizedRow) for row in rows), rows
    return rows


def test_scores_are_inner_products_of_gradients(loaded):
    """<grad L, grad S> by plain autograd over the same weights; none of them is a vision tower's."""
    model, tokenizer = loaded
    rows = rows_of(tokenizer)
    method = scorer.make({"gradshield": {"depth": 1.0, "tokens": list(TOKENS), "probes": 1}})
    scores = score_rows(model, tokenizer, rows, {"gradshield": method}, {"probe": rows[:1]}, batch_size=2)
    names = target_weights(model)
    inside = {id(parameter) for parameter in blocks(model).parameters()}
    assert names and all(id(model.get_parameter(name)) in inside for name in names)
    assert 0 < coverage(model, names) < 1
    probe = opening(tokenizer, rows[:1], model.device)
    pair = token_pair(model, tokenizer, probe, TOKENS)
    v = gradient_of(model, probe, lambda m, b: refusal_margin(m, b, pair).mean(), names)
    for row, score in zip(rows, scores.rows["gradshield"], strict=True):
        batch = collate([row], tokenizer.pad_token_id)
        truth = gradient_of(model, batch, lambda m, b: answer_nll(m, b).sum(), names) @ v
        assert score == pytest.approx(truth, rel=1e-3, abs=1e-4 * v.norm())


def tune(loaded: ModelAndTokenizer, method: str, out: Path) -> torch.nn.Module:
    rows = rows_of(loaded.tokenizer)
    model = fresh_adapter(loaded.model, LORA, seed=0)
    settings = {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "save_strategy": "no"}
    args, methods = training_arguments(settings, out), Composition.of((method,))
    streams = {"task": rows, **{name: rows for name in methods.needs("streams")}}
    OracleTrainer(model, args, methods, streams_of(streams, args, loaded.tokenizer.pad_token_id)).train()
    return model.eval()


@torch.no_grad()
def greedy(model, tokenizer, prompt: str, count: int) -> list[int]:
    """Token by token without a cache."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return ids[0, start:].tolist()


@pytest.mark.parametrize(
    "method", ["safegrad", *(pytest.param(m, marks=pytest.mark.slow) for m in ("sft", "booster"))]
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_measured_is_what_was_tuned(folder, method, tmp_path):
    tuned = tune(load(str(folder), dtype="float32"), method, tmp_path / "checkpoints")
    tuned.save_pretrained(tmp_path / "adapter")
    beside = load(str(folder), dtype="float32", adapter=tmp_path / "adapter")
    batch = collate(rows_of(beside.tokenizer), beside.tokenizer.pad_token_id)
    with torch.no_grad():
        expected, start = (model(**batch.inputs).logits for model in (tuned, load(str(folder), dtype="float32").model))
        assert (expected - start).abs().max() > 1e-3
        assert torch.equal(beside.model(**batch.inputs).logits, expected)
        assert torch.allclose(merged(beside.model)(**batch.inputs).logits, expected, atol=1e-3)
    prompts = [prompt for prompt, _ in PAIRS]
    answers = generate(*beside, [[{"role": "user", "content": prompt}] for prompt in prompts], max_new_tokens=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = greedy(tuned, beside.tokenizer, prompt, 6)
        assert answer.text == beside.tokenizer.decode([i for i in ids if i != beside.tokenizer.eos_token_id], skip_special_tokens=True)


def test_the_classifier_reads_it(loaded):
    assert Classifier().states(loaded, ["I cannot help", "Sure here is"]).shape[0] == 2
