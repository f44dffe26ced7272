"""The benchmark of GPUs, on a CPU: its recipe is one, and its large model runs at a small size."""

import json

import pytest
import torch

from benchmarks.gpu import gpu
from benchmarks.harness import Bench
from safebasin.pipeline.config import Recipe
from safebasin.pipeline.parse import validate
from safebasin.pipeline.plan import Plan


def test_its_recipe_names_every_arm_and_needs_one_scan():
    plan = Plan.of(validate(Recipe, gpu.run_of(gpu.ARMS, 8), "the recipe"))
    assert set(plan.recipe.arms) == {"start", *gpu.ARMS}
    assert plan.recipe.model.dtype == "float32" and plan.recipe.arms["star_dss"].columns


def test_a_relative_difference_by_hand():
    assert gpu.relative(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


@pytest.mark.slow
def test_the_large_part_at_a_small_size(monkeypatch, tmp_path):
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    monkeypatch.setattr(gpu, "SHAPE", gpu.SHAPE | small | {"num_key_value_heads": 2, "vocab_size": 49152})
    monkeypatch.setattr(gpu, "TOKENS", 64)
    monkeypatch.setattr(gpu, "ANSWER", 16)
    gpu.large(Bench(tmp_path / "results.json", tmp_path, replaces=("what",)), 4, 2, 2)
    rows = {row["what"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    for name in ("forward", "gradshield.512", "gradshield.all_layers.4096", "trajectory.512", "sft"):
        tokens, share = rows[f"large.{name}.tokens"], rows[f"large.{name}.peak_share"]
        passes = 1.0 if name == "forward" else 3.0 if "all" in name else 2.0 if name == "sft" else 1.5
        assert share["value"] == pytest.approx(2 * share["weights"] * passes * tokens["value"] / gpu.PEAK, rel=1e-4)
