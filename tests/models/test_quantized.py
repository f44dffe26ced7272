"""Weights in four bits: what is trained is what is measured, scored and merged: the numbers that they stand for."""

import copy

import pytest
import torch
from aligned import aligned_model
from tiny import LORA, answer_nll, random_rows

from safebasin.batch import collate
from safebasin.errors import UserError
from safebasin.measure.answers import digest
from safebasin.models.adapter import attach, fresh_adapter, merged
from safebasin.models.load import load
from safebasin.models.quantized import dense_weight, dequantize, quantized_layers, shape
from safebasin.scan.source import coverage, target_weights
from safebasin.scan.tangent import Tangent, gradient


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nf4") / "model"
    for part in aligned_model():
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def packed(folder):
    return load(str(folder), dtype="float32", quantization="nf4").model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(1, 13)[None]).logits.float()


def plain(model):
    model = copy.deepcopy(model)
    dequantize(model)
    return model


# the paper's table (arXiv:2305.14314, appendix E)
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1.0]


def test_a_layer_by_hand(packed, folder):
    """A number is the nearest of the table, times the largest of its 64, which is stored in 8 bits of its own."""
    start = load(str(folder), dtype="float32").model
    name, layer = next(iter(quantized_layers(packed).items()))
    weight, before = dense_weight(layer), start.get_submodule(name).weight.detach()
    assert weight.shape == before.shape == shape(layer)
    table = torch.tensor(NF4)
    for block, numbers in zip(before.flatten().split(64), weight.flatten().split(64), strict=True):
        nearest = (block[:, None] / block.abs().max() - table).abs().argmin(1)
        assert torch.allclose(numbers / numbers.abs().max(), table[nearest], atol=1e-4)


def test_the_model_is_that_of_the_numbers(packed, folder):
    names = set(quantized_layers(packed))
    assert names and not any("lm_head" in name or "embed" in name for name in names)
    assert torch.allclose(logits(packed), logits(plain(packed)), atol=1e-5)
    assert (logits(packed) - logits(load(str(folder), dtype="float32").model)).abs().max() > 1e-3
    packed.eval()
    logits(packed)  # a forward in eval mode does not reorder what training reads
    assert torch.allclose(logits(packed.train()), logits(plain(packed)), atol=1e-5)


@pytest.mark.parametrize("kind", [LORA, LORA | {"use_rslora": True}, LORA | {"use_dora": True}], ids=str)
def test_what_was_trained_is_what_is_loaded_and_what_is_merged(kind, packed, folder, tmp_path):
    model = fresh_adapter(packed, kind, seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=draw)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = attach(load(str(folder), dtype="float32", quantization="nf4").model, tmp_path)
    assert torch.equal(logits(loaded), expected)
    folded = merged(loaded)
    assert not quantized_layers(folded) and quantized_layers(loaded)
    assert torch.allclose(logits(folded), expected, atol=1e-4)
    folded.save_pretrained(tmp_path / "merged")
    assert '"quantization_config"' not in (tmp_path / "merged" / "config.json").read_text()


def test_scores_are_those_of_the_numbers(packed):
    weights = target_weights(packed, depth=1.0)
    batch, probe = (collate(random_rows(3, seed, longest=9), 0) for seed in (1, 2))
    batch, probe = (type(b)(b.input_ids % 20 + 1, b.attention_mask, b.mask) for b in (batch, probe))
    scores = []
    for model in (packed, plain(packed)):
        direction = gradient(model, probe, lambda m, b: answer_nll(m, b).sum(), weights)
        scores.append(Tangent(direction).token_losses(model, batch))
        assert coverage(model, weights) == pytest.approx(coverage(plain(packed), weights))
    assert torch.allclose(*scores, rtol=1e-3, atol=1e-3 * float(scores[1].abs().max()))
    assert scores[1].abs().max() > 0


def test_a_folder_that_is_in_four_bits_already(packed, tmp_path):
    packed.save_pretrained(tmp_path)
    aligned_model().tokenizer.save_pretrained(tmp_path)
    again = load(str(tmp_path), dtype="float32").model
    assert torch.equal(logits(again), logits(packed))
    assert target_weights(again) == target_weights(packed)
    with pytest.raises(UserError, match="quantized already"):
        load(str(tmp_path), dtype="float32", quantization="nf4")


def test_scales_are_part_of_what_an_answer_depends_on(packed):
    before = digest(packed)
    layer = next(iter(quantized_layers(packed).values()))
    layer.weight.quant_state.offset += 0.1
    assert digest(packed) != before
