"""Every edit against a number that is worked out by hand, on one small matrix."""

import pytest
import torch

from safebasin.errors import DefenceError
from safebasin.layer import Update
from safebasin.repair import edit
from safebasin.repair.methods.prune import robust_z
from safebasin.repair.obs import compensated, inverse_factor
from safebasin.repair.update import svd
from safebasin.repair.walk import Layer, Roles, Walk, make_edits

EYE = torch.eye(2)
H = torch.tensor([[2.0, 1.0], [1.0, 2.0]])


def matrix(*rows) -> torch.Tensor:
    return torch.tensor([[float(x) for x in row] for row in rows])


def dense(*rows) -> Update:
    return Update(matrix(*rows))


def low(*rows) -> Update:
    """The same in low rank: B = dW, A = I."""
    return Update(matrix(*rows), torch.eye(len(rows[0])))


def edited(spec, **layer) -> torch.Tensor:
    return edit.make(spec).edit(Layer(name="m", **layer)).dense()


def assert_is(actual: torch.Tensor, *rows) -> None:
    assert torch.allclose(actual.double(), matrix(*rows).double(), atol=2e-6), actual


def test_shrink():
    """alpha 1/4, dW = [4]: 3."""
    assert_is(edited({"shrink": {"alpha": 0.25}}, tuned=low([4])), [3])


def test_safe_lora():
    """V = diag(2, 1), C = diag(4, 1) / sqrt 5, dW = (1, 1)^T (1, 0): cos = 5 / sqrt 34, B' = (4, 1) / sqrt 5."""
    layer = Layer(
        name="m",
        tuned=Update(torch.ones(2, 1), matrix([1, 0])),
        roles={"base": Update(torch.diag(torch.tensor([2.0, 1])))},
    )
    method = edit.make("safe_lora")
    assert method.statistic(layer) == 0.85749
    assert method.edit(layer).b.flatten().tolist() == pytest.approx([1.788854, 0.447214], abs=1e-6)
    assert torch.equal(method.edit(layer).a, layer.tuned.a)


def test_prune():
    """d = 0.1, 0.2, 0.9: median 0.2, interquartile range 0.4, z = -1/4, 0, 7/4; the largest third is the third."""
    values = {"a": 0.1, "b": 0.2, "c": 0.9}
    assert list(robust_z(values).values()) == pytest.approx([-0.25, 0, 1.75])
    assert edit.make({"prune": {"share": 1 / 3}}).select(values) == ["c"]
    assert edit.make({"prune": {"above": 1.0}}).select(values) == ["c"]
    assert not edited({"prune": {}}, tuned=low([1, 0], [1, 0])).any()


def test_the_distance_of_prune():
    """C dW - dW with C = diag(4, 1) / sqrt 5 and dW = (1, 1)^T (1, 0): (4 / sqrt 5 - 1, 1 / sqrt 5 - 1)."""
    layer = Layer(name="m", tuned=low([1, 0], [1, 0]), roles={"base": dense([2, 0], [0, 1])})
    distance = ((4 / 5**0.5 - 1) ** 2 + (1 / 5**0.5 - 1) ** 2) ** 0.5 / 2**0.5
    assert edit.make("prune").statistic(layer) == pytest.approx(distance, rel=1e-6)


def test_safe_merge():
    """dW = [[1, 0], [1, 0]], dW_safe = [[0, 0], [0, 2]], w = 0.2; the sum of factors would be [[.8, .4], [1.6, .8]]."""
    tuned, safe = Update(torch.ones(2, 1), matrix([1, 0])), Update(matrix([0], [1]), matrix([0, 2]))
    assert_is(edited({"safe_merge": {"w": 0.2}}, tuned=tuned, roles={"safe": safe}), [0.8, 0], [0.8, 0.4])
    assert edit.make("safe_merge").select({"a": 0.34, "b": 0.35}) == ["a"]


def test_resta():
    roles = {"harmful": low([0.5, 0], [0, 1])}
    assert_is(edited({"resta": {"beta": 0.5}}, tuned=low([1, 0], [0, 0]), roles=roles), [0.75, 0], [0, -0.5])


def test_lox():
    """V = diag(2, 1): its best part of rank 1 is [[2, 0], [0, 0]]; half of it is added."""
    roles = {"base": dense([2, 0], [0, 1])}
    tuned = low([0, 3], [0, 0])
    assert_is(edited({"lox": {"k": 1, "coef": 0.5}}, tuned=tuned, roles=roles), [1, 3], [0, 0])
    assert_is(edited({"lox": {"k": 0, "coef": 1}}, tuned=tuned, roles=roles), [2, 3], [0, 1])


def test_two_sided():
    """dW all ones, U = V = e_1, c = 1/2: one side outside 1/2, both 1/4."""
    roles = {"base": dense([1, 0], [0, 0])}
    tuned = Update(torch.ones(2, 1), torch.ones(1, 2))
    assert_is(edited({"two_sided": {"c": 0.5, "k": 1}}, tuned=tuned, roles=roles), [1, 0.5], [0.5, 0.25])


def safety_loss(d: torch.Tensor) -> float:
    return float((d @ H * d).sum())


def test_safe_delta():
    """H = [[2, 1], [1, 2]]: U = [[.816497, -.408248], [0, .707107]], p = (3/2, 2). dW = (1, 1): losses 1.5 and 2.

    Half of 3.5 lets column 1 in; column 2 becomes -1/2. tr(D H D^T): tuned 6, column 1 alone 2, compensated 1.5.
    """
    upper = inverse_factor(H, 0.0, "m")
    assert_is(upper, [0.816497, -0.408248], [0, 0.707107])
    assert (upper.diagonal() ** -2).tolist() == pytest.approx([1.5, 2])
    layer = {"tuned": low([1, 1]), "moments": {"probe": H}}
    alone = edited({"safe_delta": {"keep": 0.5, "damp": 0, "compensate": False}}, **layer)
    best = edited({"safe_delta": {"keep": 0.5, "damp": 0}}, **layer)
    assert_is(alone, [1, 0])
    assert_is(best, [1, -0.5])
    assert [safety_loss(d) for d in (matrix([1, 1]), alone, best)] == pytest.approx([6, 2, 1.5])


def test_null_space():
    """H = [[2, 1], [1, 2]] has q = (1, 1) / sqrt 2 with 3/4 of its trace; dW = (1, 0) -> (1/2, -1/2); loss 2 -> 1/2."""
    layer = {"tuned": low([1, 0]), "moments": {"probe": H}}
    for fields in ({"energy": 0.7}, {"energy": 0.75}, {"k": 1}):
        actual = edited({"null_space": fields}, **layer)
        assert_is(actual, [0.5, -0.5])
    assert safety_loss(matrix([1, 0])) == 2
    assert safety_loss(actual) == pytest.approx(0.5)
    assert not edited({"null_space": {"energy": 0.76}}, **layer).abs().max() > 1e-6


def test_irr():
    """dW = (1, 2), v = (-1, 1), so column 1 is flagged; err = 1 / .816497, and column 2 moves by .408248 err: 2.5."""
    layer = {
        "tuned": low([1, 2]),
        "roles": {"harmful": low([1, -1])},
        "moments": {"task": H},
        "gradients": torch.ones(1, 2),
    }
    assert_is(edited({"irr": {"damp": 0}}, **layer), [0, 2.5])


def test_irr_keeps_the_flagged_entries_of_low_f():
    """All four are flagged; of F = 4, 1, 3, 2 half stay: the entries of 1 and 2. H = I moves nothing."""
    layer = {
        "tuned": low([1, 2], [3, 4]),
        "roles": {"harmful": low([1, 1], [1, 1])},
        "moments": {"task": EYE},
        "gradients": matrix([4, 1], [3, 2]),
    }
    assert_is(edited({"irr": {"keep": 0.5, "damp": 0}}, **layer), [0, 2], [0, 4])


def test_antidote():
    """Inputs with squares (4, 1): scores of A = (1, 3) are 2 and 3, so 3 goes; B [2, 1] has one entry a row, which goes
    where half of one entry is removed, rounded up."""
    moments = {"harmful": torch.diag(torch.tensor([4.0, 1]))}
    method = edit.make({"antidote": {"dense": 0.5}})
    update = method.edit(Layer(name="m", tuned=Update(matrix([1, 2], [2, 1]), matrix([1, 3], [5, 1])), moments=moments))
    assert update.a.tolist() == [[1, 0], [0, 1]]
    # A x has the squares A H A^T: 4 + 9 = 13 and 100 + 1 = 101: scores of B sqrt 13, 2 sqrt 101; 2 sqrt 13, sqrt 101
    assert update.b.tolist() == [[1, 0], [2, 0]]


@pytest.mark.parametrize(("r", "removed"), [(2, 0.5), (4, 0.25), (8, 0.125), (16, 0.125), (256, 26 / 256)])
def test_antidote_removes_at_least_one_entry_a_row(r, removed):
    w = edit.make("antidote").pruned(torch.rand(3, r) + 1, torch.ones(r))
    assert float((w == 0).float().mean()) == removed


def test_truncate():
    """diag(3, 1): rank 1 holds 9/10 of the energy."""
    for fields in ({"rank": 1}, {"energy": 0.9}):
        assert_is(edited({"truncate": fields}, tuned=dense([3, 0], [0, 1])), [3, 0], [0, 0])
    assert_is(edited({"truncate": {"energy": 0.91}}, tuned=low([3, 0], [0, 1])), [3, 0], [0, 1])


def test_reinforce():
    """Q = (1, 0)^T; dW_safe = [[0, 2], [0, 2]] loses its first row at alpha 1; the sum is [[1, 1], [0, 2]]."""
    tuned, safe = Update(matrix([1], [0]), matrix([1, 1])), Update(torch.ones(2, 1), matrix([0, 2]))
    actual = edited({"reinforce": {"alpha": 1}}, tuned=tuned, roles={"safe": safe})
    assert_is(actual, [1, 1], [0, 2])
    assert_is(edited({"reinforce": {"alpha": 0, "scale": 0.5}}, tuned=tuned, roles={"safe": safe}), [0.5, 1.5], [0, 1])


@pytest.mark.parametrize("by", ["shrink", "noise", "mask"])
def test_a_control_goes_as_far_as_its_edit(by):
    """shrink at 1/4 moves dW by a quarter of its length; a mask of equal entries stops one short of it."""
    tuned = Update(torch.ones(8, 1), torch.ones(1, 8))
    new = edit.make({"control": {"of": {"shrink": {"alpha": 0.25}}, "by": by}}).edit(Layer(name="m", tuned=tuned))
    assert (new - tuned).norm() / tuned.norm() == pytest.approx(0.25, rel=1e-5)


def test_a_mask_cannot_go_further_than_the_whole_update():
    """resta takes a harmful update of three lengths away, so that it moves by 300 %."""
    tuned = Update(torch.ones(4, 1), torch.ones(1, 4))
    layer = Layer(name="m", tuned=tuned, roles={"harmful": tuned * 3})
    control = edit.make({"control": {"of": {"resta": {"beta": 1}}, "by": "mask"}})
    with pytest.raises(DefenceError, match="m: resta moves it by 300% of its length, a mask by 100 % at most"):
        control.edit(layer)


def test_exact_compensation_has_no_gradient_on_the_free_columns():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 12, generator=draw)
    h, d = x.T @ x, torch.randn(3, 12, generator=draw)
    stays = torch.arange(12) % 3 == 0
    best = compensated(d, stays, h.double())
    gradient = 2 * best.double() @ h.double()
    assert torch.equal(best[:, stays], d[:, stays])
    assert gradient[:, ~stays].abs().max() < 1e-4 < 1 < gradient[:, stays].abs().max()


def test_directions_beyond_the_rank_are_none():
    u, _, v = svd(torch.outer(torch.tensor([3.0, 4.0]), torch.ones(3)), 2)
    assert torch.linalg.matrix_rank(u) == torch.linalg.matrix_rank(v) == 1


def test_an_edit_that_left_nothing_is_truncated_to_nothing():
    """shrink at 1 leaves zero, so there is no energy that a truncation could lose."""
    edits = make_edits([{"shrink": {"alpha": 1.0}}, {"truncate": {"rank": 1}}])
    update, record = Walk(edits, Roles(tuned={"m": dense([1, 1], [1, 1])})).result("m")
    assert update.norm() == 0 and record.energy == 1.0 and record.distance == pytest.approx(1.0)
