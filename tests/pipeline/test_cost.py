"""What a dry run says of memory, by hand on the tiny model."""

import math

import pytest
import yaml
from product import command, product

from safebasin.models.load import load
from safebasin.pipeline import cost
from safebasin.pipeline.parse import parse
from safebasin.pipeline.plan import Plan

ADAPTER = {"r": 4, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return product(tmp_path_factory.mktemp("cost"))


def plan(recipe, adapter, model=(), arms=None):
    tree = yaml.safe_load(recipe.read_text())
    tree["train"]["adapter"], tree["gate"] = adapter, {}
    tree["model"] |= dict(model)
    return Plan.of(parse(yaml.safe_dump(tree | {"arms": arms or {"plain": {"train": ["sft"]}}})))


def test_numbers_that_are_tuned(recipe):
    model = load(str(recipe.parent / "model"), dtype="float32").model
    shapes = cost._shapes(str(recipe.parent / "model"))
    assert shapes is not None and {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes
    assert cost._tuned(plan(recipe, None), shapes) == sum(p.numel() for p in model.parameters())
    queries = [shape for name, shape in shapes.items() if name.endswith("q_proj.weight")]
    assert cost._tuned(plan(recipe, ADAPTER), shapes) == sum(4 * (out + into) for out, into in queries)


def test_bytes_by_hand(recipe, monkeypatch):
    """Full: weights, two moments, direction and gradients of a stream in 4 bytes; asft holds its blocks once more."""
    monkeypatch.setattr(cost, "_speed", lambda dtype: 1e9)
    monkeypatch.setattr(cost, "_shapes", lambda name: {"model.layers.0.q_proj.weight": (2**14, 2**14)})
    gib = {"full": 5, "copy": 7, "adapter": 1 + 5 * 4 * 2**15 * 4 / 2**30}
    star = {"plain": {"columns": {"star": "gradshield"}, "train": ["star_dss"]}}
    copied = plan(recipe, None, arms=star)
    copied.recipe.train["reference"] = "copy"
    lines = [
        cost.costs(plan(recipe, None)),
        cost.costs(copied),
        cost.costs(plan(recipe, ADAPTER)),
    ]
    assert f", {gib['full']:.1f} GiB" in lines[0][0]
    assert f", {gib['copy'] - 1:.1f} GiB" in lines[1][0]  # the second model in float32
    assert f", {gib['adapter']:.1f} GiB" in lines[2][0]
    assert lines[0][-1].endswith("1 GFLOP/s")
    packed = cost.costs(plan(recipe, ADAPTER, {"quantization": "nf4"}))
    assert f", {cost.NF4 / 4 + gib['adapter'] - 1:.1f} GiB" in packed[0]


def test_a_dry_run_says_so_and_stays_yaml(recipe, capsys):
    assert command("run", str(recipe), "--dry-run") == 0
    text = capsys.readouterr().out
    assert "# arm defended: " in text and "GiB and the activations" in text
    assert yaml.safe_load(text)["train"]["max_steps"] == 4
    assert not math.isnan(float(text.split("moment: ")[1].split()[0]))


def test_a_model_that_is_not_here_has_no_sizes(recipe):
    assert cost.costs(plan(recipe, ADAPTER, {"name": "nobody/nothing"})) == [
        "memory and time: nobody/nothing is not on this machine yet"
    ]


def test_targets_that_are_nowhere_are_said(recipe):
    assert cost.costs(plan(recipe, {"r": 4, "target_modules": ["nope"]})) == [
        "no matrix in the files of the model is named by train.adapter: {'r': 4, 'target_modules': ['nope']}"
    ]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"name": "./no/such/folder"}, "no such folder"),
        ({"name": "~/models/mine"}, "no such folder"),
        ({"revision": "main"}, "has no revision 'main'"),
        ({"template": {"thinking": True}}, "does not read 'thinking'"),
    ],
)
def test_a_dry_run_refuses_a_model_that_a_run_would_not_load(recipe, tmp_path, capsys, model, words):
    """Before, it passed, and the run broke; with no arm that is tuned too."""
    tree = yaml.safe_load(recipe.read_text())
    tree["model"] |= model
    for i, arms in enumerate((tree["arms"], {"start": {}})):
        path = tmp_path / f"{i}.yaml"
        path.write_text(yaml.safe_dump(tree | {"arms": arms, "gate": {}}))
        assert command("run", str(path), "--dry-run") == 1
        assert words in capsys.readouterr().err
