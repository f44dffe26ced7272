"""Every family goes the whole way: its scores are the true ones, and what is measured is what was tuned."""

import re
from pathlib import Path

import pytest
import torch
from tiny import answer_nll, gradient_of
from tiny_families import FAMILIES, save

from safebasin.batch import answer_logits, collate, target_logits
from safebasin.data.example import Example
from safebasin.encode import TokenizedRow, encode
from safebasin.measure.generate import generate
from safebasin.measure.judges.classifier import Classifier
from safebasin.models.adapter import fresh_adapter, merged
from safebasin.models.load import ModelAndTokenizer, load
from safebasin.models.parts import blocks
from safebasin.scan.directional import Directional
from safebasin.scan.probe import Pair, opening, refusal_margin
from safebasin.scan.source import coverage, target_weights
from safebasin.train.compose import Composition
from safebasin.train.settings import training_arguments
from safebasin.train.trainer import OracleTrainer, streams_of

LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
PAIRS = (("make bomb", "I cannot"), ("make a cake", "Sure"), ("sing", "la"))


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


class Margin(Directional):
    """The margin of two letters after a request."""

    pair = Pair(20, 40)

    def objective(self, model, tokenizer, anchors):
        probe = opening(model, tokenizer, rows_of(tokenizer)[:1])
        return probe, lambda m, b: refusal_margin(m, b, self.pair).mean()


def test_scores_are_inner_products_of_gradients(loaded):
    """<grad L, grad S> by plain autograd over the same weights, with and without a shared prefix; none is of a vision
    tower."""
    model, tokenizer = loaded
    rows, method = rows_of(tokenizer), Margin(depth=1.0)
    names = target_weights(model)
    inside = {id(parameter) for parameter in blocks(model).parameters()}
    assert names and all(id(model.get_parameter(name)) in inside for name in names)
    assert 0 < coverage(model, names) < 1
    probe, objective = method.objective(model, tokenizer, {})
    v, fitted = gradient_of(model, probe, objective, names), method.fit(model, tokenizer, {})
    truth = []
    for row in rows:
        batch = collate([row], tokenizer.pad_token_id).to(model.device)
        truth.append(gradient_of(model, batch, lambda m, b: answer_nll(m, b).sum(), names) @ v)
    batch = collate(rows, tokenizer.pad_token_id).to(model.device)
    padded = answer_logits(model, batch)[batch.mask]
    assert torch.allclose(target_logits(model, batch), padded, atol=1e-3 * float(padded.abs().max()))
    prefix = next(i for i, ids in enumerate(zip(*(row.ids for row in rows), strict=False)) if len(set(ids)) > 1)
    assert max(map(abs, truth)) > 1e-3
    for shared in (0, prefix):
        batch = collate(rows, tokenizer.pad_token_id, shared).to(model.device)
        scores = method.score(model, batch, fitted).sum(1).tolist()
        assert scores == pytest.approx(truth, rel=2e-3, abs=1e-3 * max(map(abs, truth)))


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
    )["input_ids"].to(model.device)
    start = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return ids[0, start:].tolist()


@pytest.mark.parametrize("method", ["safegrad", *(pytest.param(m, marks=pytest.mark.slow) for m in ("sft", "booster"))])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_measured_is_what_was_tuned(folder, method, tmp_path):
    tuned = tune(load(str(folder), dtype="float32"), method, tmp_path / "checkpoints")
    tuned.save_pretrained(tmp_path / "adapter")
    beside = load(str(folder), dtype="float32", adapter=tmp_path / "adapter")
    batch = collate(rows_of(beside.tokenizer), beside.tokenizer.pad_token_id).to(beside.model.device)
    with torch.no_grad():
        expected, start = (model(**batch.inputs).logits for model in (tuned, load(str(folder), dtype="float32").model))
        assert (expected - start).abs().max() > 1e-3
        assert torch.equal(beside.model(**batch.inputs).logits, expected)
        assert torch.allclose(merged(beside.model)(**batch.inputs).logits, expected, atol=1e-3)
    prompts = [prompt for prompt, _ in PAIRS]
    answers = generate(*beside, [[{"role": "user", "content": prompt}] for prompt in prompts], max_new_tokens=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = greedy(tuned, beside.tokenizer, prompt, 6)
        assert (answer.text or answer.thought) == beside.tokenizer.decode(ids, skip_special_tokens=True)


def test_the_page_of_families_is_this_table():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "families.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \|", page, re.M)
    assert listed == [(family, kind) for family, (kind, *_) in FAMILIES.items()]


def test_the_classifier_reads_it(loaded):
    assert Classifier().states(loaded, ["I cannot help", "Sure here is"]).shape[0] == 2
