"""AsFT: the low-rank form is the dense form, and the anchor is silent at the start."""

import pytest
import torch
from away import adapted
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LORA, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from safebasin.errors import UserError
from safebasin.models.adapter import fresh_adapter
from safebasin.train.anchor_projector import AnchorProjector, Departure
from safebasin.train.compose import Composition
from safebasin.train.methods import asft
from safebasin.train.methods.asft import AsFT
from safebasin.vector import trainable

PROJECTORS = ["official", "topk", "rank1"]


def dense(d, update, projector, k=2):
    """|(I - C) dW|_F^2 with C, or the projection of vec(dW), written out."""
    if projector == "rank1":
        return (update - (update * d).sum() / (d * d).sum() * d).square().sum()
    u = torch.linalg.svd(d, full_matrices=False).U[:, :k]
    c = d @ d.T / d.norm() if projector == "official" else u @ u.T
    if projector == "official" and (largest := torch.linalg.matrix_norm(c, 2)) > 2:
        c = c / largest
    return ((torch.eye(len(d), dtype=d.dtype) - c) @ update).square().sum()


@pytest.mark.parametrize(("projector", "expected"), [("official", 0.19140625), ("topk", 1.0), ("rank1", 1.64)])
def test_by_hand(projector, expected):
    """d = diag(3, 4), |d| = 5, B = (1, 1)^T, A = (1, 0), so B A = [[1, 0], [1, 0]].

    official: C = diag(9, 16) / 5 = diag(1.8, 3.2) is above 2, so C = diag(9, 16) / 16; (7 / 16)^2 = 0.19140625.
    topk, k = 1: U = e_2, only the first row remains: 1.      rank1: |B A|^2 - <B A, d>^2 / |d|^2 = 2 - 9 / 25 = 1.64.
    """
    d, b, a = torch.diag(torch.tensor([3.0, 4.0])), torch.ones(2, 1), torch.tensor([[1.0, 0.0]])
    assert AnchorProjector.of(d, projector, 1).departure(b, a)[0].item() == pytest.approx(expected, abs=1e-5)


def test_a_small_direction_is_punished_as_in_the_official_code():
    """d = diag(0.6, 0.8), |d| = 1, C = diag(0.36, 0.64), which is below 2: 0.64^2 + 0.36^2 = 0.5392."""
    projector = AnchorProjector.of(torch.diag(torch.tensor([0.6, 0.8])), "official", 1)
    assert projector.departure(torch.ones(2, 1), torch.tensor([[1.0, 0.0]]))[0].item() == pytest.approx(0.5392)
    assert projector.eigenvalue == pytest.approx(0.64)


def test_no_direction_is_punished_more_than_one_that_has_nothing_to_do_with_it():
    """|(I - C) dW|^2 <= |dW|^2 for every rank-1 update, however large d is."""
    d = 10 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    u = torch.linalg.svd(d).U
    values = [
        AnchorProjector.of(d, "official", 1).departure(u[:, i : i + 1], torch.ones(1, 5))[0] / 5 for i in range(6)
    ]
    assert max(values) <= 1 + 1e-5 and float(values[0]) == pytest.approx(0, abs=1e-6)


@given(st.sampled_from(PROJECTORS), st.integers(2, 12), st.integers(2, 12), st.integers(1, 5), st.integers(0, 99))
def test_the_low_rank_form_is_the_dense_form(projector, out, into, r, seed):
    draw = torch.Generator().manual_seed(seed)
    d, b, a = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((out, into), (out, r), (r, into)))
    size = float((b @ a).square().sum()) * max(1.0, float(d.norm())) ** 2  # of what cancels
    actual = float(AnchorProjector.of(d, projector, 2).departure(b, a)[0])
    assert actual == pytest.approx(float(dense(d, b @ a, projector)), rel=1e-8, abs=1e-12 * size)


@given(st.sampled_from(PROJECTORS), st.integers(2, 7), st.integers(2, 7), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=20)
def test_the_gradient_is_that_of_the_dense_form(projector, out, into, r, seed):
    """By equation 3, by autograd through the dense form, and by differences; for a long and a wide matrix."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((out, into), (into, out))
    ds = [torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes]
    projectors = [AnchorProjector.of(d, projector, 2) for d in ds]
    matrices = [
        torch.randn(*s, generator=draw, dtype=torch.float64, requires_grad=True)
        for o, i in shapes
        for s in ((o, r), (r, i))
    ]
    truth = torch.autograd.grad(
        sum(dense(d, b @ a, projector) for d, b, a in zip(ds, matrices[::2], matrices[1::2], strict=True)), matrices
    )
    actual = torch.autograd.grad(3 * Departure.apply(projectors, *matrices), matrices)
    for mine, theirs in zip(actual, truth, strict=True):
        assert torch.allclose(mine, 3 * theirs, rtol=1e-8, atol=1e-8 * float(theirs.abs().max()) + 1e-12)
    assert torch.autograd.gradcheck(lambda *pairs: Departure.apply(projectors, *pairs), matrices, rtol=1e-3)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
@pytest.mark.parametrize("projector", PROJECTORS)
def test_no_factor_is_larger_than_the_direction(projector, shape):
    factors = AnchorProjector.of(torch.ones(*shape), projector, 2)
    assert all(part is None or part.numel() <= 28 for part in (factors.d, factors.h))
    assert factors.h is None or len(factors.h) <= 4


def test_along_the_direction_an_update_is_free():
    d = torch.outer(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.6, 0.8]))  # rank 1, |d| = 3
    b, a = d @ torch.tensor([[0.6], [0.8]]), torch.tensor([[0.6, 0.8]])  # B A = d
    for projector in ("rank1", "topk"):
        assert AnchorProjector.of(d, projector, 2).departure(b, a)[0].item() == pytest.approx(0.0, abs=1e-5)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two tiny models on disk, the older and the newer."""
    monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path / "cache"))
    for name, seed in (("base", 5), ("aligned", 0)):
        tiny_model(seed).save_pretrained(tmp_path / name)
    return {"base": str(tmp_path / "base"), "aligned": str(tmp_path / "aligned")}


@pytest.mark.parametrize("projector", PROJECTORS)
def test_on_a_model_every_matrix_meets_its_own_direction(projector, folders):
    """Penalty and gradient of the whole adapter against the dense form, matrices taken by name from the two models."""
    base, aligned, model = tiny_model(5), tiny_model(0), adapted(0.1)
    point = trainable(model)
    actual = AsFT(**folders, projector=projector, k=2, scale=2.0, lam=0.5).penalty(point)
    truth, count = 0.0, 0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            plain = name.removeprefix("base_model.model.")
            d = aligned.get_parameter(f"{plain}.weight") - base.get_parameter(f"{plain}.weight")
            update = module.get_delta_weight("default")  # alpha / r = 2
            truth += 0.5 * float(dense(d.detach(), update.detach(), projector))
            count += 1
    assert count == 9
    assert actual.item() == pytest.approx(truth, rel=1e-3)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_at_the_start_it_is_silent(projector, folders):
    point = trainable(fresh_adapter(tiny_model(), LORA, seed=0))
    value = AsFT(**folders, projector=projector).penalty(point)
    parts = torch.autograd.grad(value, list(point.values()))
    assert value.item() == 0
    assert not any(part.any() for part in parts)


def test_the_directions_are_read_once_a_method_and_stored(folders, tmp_path, monkeypatch):
    """Another method on the same models reads the stored file; a further step of one method reads nothing."""
    point = trainable(adapted(0.1))
    method = AsFT(**folders)
    first = method.penalty(point).item()
    with monkeypatch.context() as patch:
        patch.setattr(asft, "directions", None)
        assert method.penalty(point).item() == first
    [file] = (tmp_path / "cache").glob("directions-*.safetensors")
    before = file.stat().st_mtime_ns
    assert AsFT(**folders, lam=2.0).penalty(point).item() == pytest.approx(2 * first)
    assert [p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()] == [before]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": ""}, "asft.base and asft.aligned"),
        ({"base": "/nowhere"}, "not a folder"),
        ({"base": "narrow"}, r"layers\.0\..* is \(\d+, \d+\) in .* and \(\d+, \d+\) in"),
        ({"base": "shallow"}, "has no tensor model.layers.2"),
    ],
)
def test_what_are_not_two_ends_of_one_model_is_said_without_a_model(change, message, folders, tmp_path):
    """So in a dry run, which composes the methods of every arm."""
    for name, changes in {"narrow": {"intermediate_size": 40}, "shallow": {"num_hidden_layers": 2}}.items():
        LlamaForCausalLM(LlamaConfig(**tiny_model().config.to_dict() | changes)).save_pretrained(tmp_path / name)
        folders |= {name: str(tmp_path / name)}
    fields = {name: folders[name] for name in ("base", "aligned")} | {
        name: folders.get(value, value) for name, value in change.items()
    }
    with pytest.raises(UserError, match=message):
        Composition.of([{"asft": fields}])


def test_twins_have_no_alignment_direction(folders):
    with pytest.raises(UserError, match="no alignment direction"):
        AsFT(**folders | {"base": folders["aligned"]}).penalty(trainable(adapted()))


def test_without_an_adapter_there_is_nothing_to_penalise(folders):
    with pytest.raises(UserError, match="LoRA"):
        AsFT(**folders).penalty({"lm_head.weight": torch.zeros(2, 2)})


def test_a_pair_of_another_shape_is_refused(folders):
    """The files agree with one another but not with the model: k_proj is [16, 32] there and this B is [32, 4]."""
    renamed = {name.replace("q_proj", "k_proj"): p for name, p in trainable(adapted()).items()}
    with pytest.raises(UserError, match=r"k_proj has the direction \(16, 32\) but is tuned as \(32, 32\)"):
        AsFT(**folders).penalty(renamed)
