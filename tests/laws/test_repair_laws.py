"""Laws of repair, over every registered edit: on random matrices of three modules, in low rank and dense.

L1 to L14 are the names of the specification: what an edit of nothing, of another order, of other factors, of dense
weights and at the ends of its strength must give.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from peft.utils.merge_utils import task_arithmetic
from tuned import SHAPES, densified, random_roles

from safebasin.errors import DefenceError, UserError
from safebasin.layer import Update
from safebasin.repair import edit
from safebasin.repair.methods.safe_delta import column_sizes
from safebasin.repair.obs import compensated, damped, inverse_factor, sweep
from safebasin.repair.update import cosine, image, svd, truncated
from safebasin.repair.walk import ROLES, Layer, Roles, Walk, gives_dense, make_edits, needs

OWN = {"control": {"of": {"shrink": {"alpha": 0.3}}}, "truncate": {"rank": 2}, "irr": {"block": 4}, "lox": {"k": 2}}
OWN |= {"two_sided": {"k": 3}, "safe_lora": {"tau": None, "lowest": 2}, "prune": {"share": 0.5}}
OWN |= {"safe_merge": {"tau": 1.1}, "null_space": {"energy": 0.6}}
NAMES = [entry.name for entry in edit]
STRONG = [entry.name for entry in edit if entry.strength]
BY_FACTORS = {"antidote"}  # L4: their result is no function of the product, and says so
PROJECTED = {"safe_lora", "two_sided", "null_space", "lox", "safe_merge", "truncate", "resta", "reinforce"}
RANK_OUT = {"safe_merge": 3 + 2, "resta": 3 + 2, "reinforce": 3 + 2, "lox": 3 + 2, "control": 3 + 3, "truncate": 2}


def at(name: str, **fields):
    """An edit with the fields of these tests."""
    own = OWN.get(name, {})
    if name == "safe_lora" and "tau" in fields:
        own = {}
    return edit.make({name: {**own, **fields}})


def strong(name: str, end: int):
    """An edit at the end of its strength: 1 changes nothing, 2 is the strongest."""
    field, *_ = strength = edit[name].strength
    more = {"rank": None} if name == "truncate" and end == 2 else {}
    return at(name, **{field: strength[end]}, **more)


def results(edits, roles: Roles) -> dict[str, Update]:
    walk = Walk(edits, roles)
    return {name: walk.result(name)[0] for name in roles.tuned}


def distance(some: dict[str, Update], others: dict[str, Update]) -> float:
    size = math.sqrt(sum(each.norm() ** 2 for each in others.values()))
    return math.sqrt(sum((some[name] - others[name]).norm() ** 2 for name in others)) / size


def dense(updates: dict[str, Update]) -> dict[str, Update]:
    return {name: Update(each.dense()) for name, each in updates.items()}


def same_bits(some: dict[str, Update], others: dict[str, Update]) -> bool:
    return all(torch.equal(some[name].dense(), others[name].dense()) for name in others)


@pytest.mark.parametrize("name", NAMES)
def test_l1_a_module_that_was_not_tuned_stays_so(name):
    roles = random_roles()
    first = next(iter(SHAPES))
    tuned = {**roles.tuned, first: roles.tuned[first] * 0.0}
    walk = Walk([at(name)], dataclasses.replace(roles, tuned=tuned))
    assert walk.skipped == (first,)
    assert not walk.result(first)[0].dense().any()
    assert walk.result(first)[1].selected == ()


@pytest.mark.parametrize("name", STRONG)
def test_l2_the_end_of_its_strength_that_changes_nothing(name):
    roles = random_roles()
    method = at(name, energy=1.0, rank=99) if name == "truncate" else strong(name, 1)
    if name == "truncate":
        assert distance(results([method], roles), roles.tuned) < 1e-6
        return
    walk = Walk([method], roles)
    assert same_bits({each: walk.result(each)[0] for each in SHAPES}, roles.tuned)
    with pytest.raises(DefenceError, match="changed nothing"):
        walk.check_changed()
    with pytest.raises(UserError, match="changes nothing"):
        make_edits([{name: {edit[name].strength[0]: edit[name].strength[1]}}])


START = {"shrink", "prune", "antidote", "null_space", "safe_delta"}  # whose other end is the model before tuning


@pytest.mark.parametrize("name", sorted(START))
@pytest.mark.parametrize("rank", [3, None])
def test_l2_the_other_end_is_the_start(name, rank):
    roles = random_roles(rank=rank)
    last = results([strong(name, 2)], roles)
    assert max(each.norm() for each in last.values()) <= (1e-5 if name == "null_space" else 0.0)


def test_l2_of_the_others():
    """safe_merge at w = 1 is the safe adapter, Safe LoRA at tau = 1 projects every module, RESTA of its own update and
    IRR of an update that opposes safety in every entry give the start."""
    roles = random_roles()
    assert same_bits(results([at("safe_merge", w=1.0)], roles), roles.safe)
    projected = results([at("safe_lora", tau=1.0)], roles)
    assert all(torch.equal(projected[name].b, image(roles.base[name], roles.tuned[name].b)) for name in SHAPES)
    own = dataclasses.replace(roles, harmful=roles.tuned)
    assert distance(results([at("resta", beta=1.0)], own), roles.tuned) == pytest.approx(1, abs=1e-6)
    assert all(not each.dense().any() for each in results([at("irr", block=99)], own).values())
    against = dataclasses.replace(roles, harmful={name: each * -1.0 for name, each in roles.tuned.items()})
    assert distance(results([at("irr")], against), dense(roles.tuned)) < 1e-6
    assert max(svd(each.dense(), 9)[1][2] for each in results([strong("two_sided", 2)], roles).values()) > 0


@pytest.mark.parametrize("name", ["shrink", "prune", "safe_merge", "two_sided", "null_space", "resta", "lox"])
def test_l3_a_stronger_edit_goes_farther(name):
    field, off, full = edit[name].strength
    roles = random_roles()
    steps = [off + (full - off) * share for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    ways = [distance(results([at(name, **{field: value})], roles), roles.tuned) for value in steps]
    assert ways == sorted(ways)
    assert ways[-1] > ways[0]


def test_l3_the_columns_of_safe_delta_are_nested():
    roles = random_roles()
    layer = Layer(
        name="m", tuned=roles.tuned["model.layers.1.q"], moments={"probe": roles.moments["probe"]["model.layers.1.q"]}
    )
    masks = [at("safe_delta", keep=keep).columns(layer) for keep in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    assert [int(mask.sum()) for mask in masks] == sorted(int(mask.sum()) for mask in masks)
    for smaller, larger in itertools.pairwise(masks):
        assert not (smaller & ~larger).any()
    assert masks[-1].all()


@pytest.mark.parametrize("name", NAMES)
def test_l4_a_function_of_the_product(name):
    """B M and M^-1 A are the same update: antidote alone tells them apart, unless it is canonical."""
    roles = random_roles()
    draw = torch.Generator().manual_seed(9)
    turned = {}
    for module, each in roles.tuned.items():
        m = torch.randn(3, 3, generator=draw, dtype=torch.float64) + 3 * torch.eye(3, dtype=torch.float64)
        turned[module] = Update((each.b.double() @ m).float(), (torch.linalg.inv(m) @ each.a.double()).float())
    if name == "control":  # noise has factors of its own
        return
    way = distance(results([at(name)], dataclasses.replace(roles, tuned=turned)), results([at(name)], roles))
    assert way > 0.1 if name in BY_FACTORS else way < 1e-5
    if name in BY_FACTORS:
        canonical = [at(name, canonical=True)]
        assert distance(results(canonical, dataclasses.replace(roles, tuned=turned)), results(canonical, roles)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_l5_l12_the_order_of_the_file_and_the_run_do_not_matter(name):
    roles = random_roles()
    shuffled = dataclasses.replace(roles, tuned=dict(reversed(roles.tuned.items())))
    assert same_bits(results([at(name)], shuffled), results([at(name)], roles))
    assert same_bits(results([at(name)], random_roles()), results([at(name)], roles))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_FACTORS | {"control"}])
def test_l6_low_rank_is_the_dense_edit(name):
    """reinforce on dense weights has no factors, and takes Q from dW itself: equal where no eigenvalue is dropped."""
    roles = random_roles()
    if name == "reinforce":
        roles = dataclasses.replace(roles, tuned={each: Update(u.b, u.a) for each, u in roles.tuned.items()})
        low = {
            m: at(name, alpha=1.0).edit(Layer(name=m, tuned=roles.tuned[m], roles={"safe": roles.safe[m]}))
            for m in SHAPES
        }
        for module, each in low.items():
            q = torch.linalg.qr(roles.tuned[module].b)[0]
            safe = roles.safe[module].dense()
            truth = roles.tuned[module].dense() + safe - q @ (q.T @ safe)
            assert torch.allclose(each.dense(), truth, atol=1e-4)
        return
    assert distance(results([at(name)], densified(roles)), dense(results([at(name)], roles))) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_l7_the_rank_that_comes_out(name):
    roles = random_roles()
    walk = Walk([at(name)], roles)
    records = [walk.result(module)[1] for module in SHAPES]
    assert gives_dense([at(name)]) == (name == "irr")
    for record in records:
        expected = RANK_OUT.get(name, 3) if record.selected else 3
        assert record.rank_out == (None if name == "irr" else expected)
        assert record.rank_in == 3
    assert gives_dense([at("lox", k=0)]) and not gives_dense([at("irr"), at("truncate")])
    assert gives_dense([at("control", by="mask")])


@pytest.mark.parametrize("role", sorted(ROLES))
def test_l9_l10_roles_that_are_missing_or_do_not_fit(role):
    roles = random_roles()
    methods = [at(name) for name in NAMES if role in needs([at(name)], "roles")]
    assert methods
    for method in methods:
        with pytest.raises(UserError, match=f"{method.entry.name} needs the role {role}"):
            Walk([method], dataclasses.replace(roles, **{role: None}))
        few = dict(list(getattr(roles, role).items())[1:])
        with pytest.raises(UserError, match=f"the role {role} has no module model.layers.0.q"):
            Walk([method], dataclasses.replace(roles, **{role: few}))
    if role == "base":
        same = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        with pytest.raises(UserError, match="base and start hold the same weights"):
            Walk([methods[0]], dataclasses.replace(roles, base=same))
    else:
        turned = {name: Update(each.a.T, each.b.T) for name, each in getattr(roles, role).items()}
        with pytest.raises(UserError, match=r"model.layers.0.q is \(8, 12\) in the role"):
            Walk([methods[0]], dataclasses.replace(roles, **{role: turned}))


def test_l11_twice_is_once_for_a_projector_and_for_pruning_alone():
    roles = random_roles()
    for name, fields, idempotent in (
        ("safe_lora", {"tau": 1.0, "matrix": "topk", "k": 3}, True),
        ("safe_lora", {"tau": 1.0}, False),
        ("null_space", {}, True),
        ("shrink", {}, False),
    ):
        once = results([at(name, **fields)], roles)
        twice = results([at(name, **fields)] * 2, roles)
        assert (distance(twice, once) < 1e-5) == idempotent, name


def test_c_is_not_free_of_scale():
    """V -> 7 V multiplies the projection by 7, and leaves the cosine: the flaw of the official matrix."""
    roles = random_roles()
    larger = dataclasses.replace(roles, base={name: 7 * v for name, v in roles.base.items()})
    some, others = (results([at("safe_lora", tau=1.0)], each) for each in (larger, roles))
    assert distance(some, {name: each * 7.0 for name, each in others.items()}) < 1e-5
    method = at("safe_lora")
    layers = [Walk([method], each).layer("model.layers.0.q", 0) for each in (roles, larger)]
    assert abs(method.statistic(layers[0]) - method.statistic(layers[1])) <= 1e-5


def test_l13_safe_lora_is_the_official_formula():
    """C formed, as the release forms it, in float64; cosines to its five decimals."""
    roles = random_roles()
    method = at("safe_lora", tau=1.0)
    for name, v in roles.base.items():
        c = v.double() @ v.double().T / v.double().norm()
        d = roles.tuned[name].dense().double()
        official = torch.nn.functional.cosine_similarity((c @ d).flatten(), d.flatten(), 0)
        layer = Walk([method], roles).layer(name, 0)
        assert abs(method.statistic(layer) - float(official)) <= 1.1e-5
        assert torch.allclose(method.edit(layer).dense().double(), c @ d, rtol=1e-4, atol=1e-5)


def test_l13_safe_lora_takes_the_lowest():
    roles = random_roles()
    walk = Walk([at("safe_lora", tau=None, lowest=2)], roles)
    values = {
        name: cosine(each.left(lambda x, n=name: image(roles.base[n], x)), each) for name, each in roles.tuned.items()
    }
    assert walk.selected[0] == frozenset(sorted(values, key=values.get)[:2])


def test_l13_merging_is_peft_cat_and_not_its_linear():
    """`cat` concatenates weighted factors; `linear` adds them, which is far from the paper's formula."""
    draw = torch.Generator().manual_seed(4)
    a, b, a2, b2 = (torch.randn(*s, generator=draw) for s in ((3, 8), (12, 3), (3, 8), (12, 3)))
    layer = Layer(name="m", tuned=Update(b, a), roles={"safe": Update(b2, a2)})
    ours = at("safe_merge", w=0.2).edit(layer).dense()
    assert torch.allclose(ours, 0.8 * b @ a + 0.2 * b2 @ a2, atol=1e-5)
    weights = torch.tensor([0.8, 0.2]).sqrt()
    linear = task_arithmetic([b, b2], weights) @ task_arithmetic([a, a2], weights)
    assert (linear - ours).norm() / ours.norm() > 0.3


def test_l13_the_sweep_of_irr_is_that_of_the_paper():
    """One row and one column at a time, as the equations read."""
    draw = torch.Generator().manual_seed(5)
    h, w = random_roles().moments["task"]["model.layers.1.q"], torch.randn(3, 12, generator=draw, dtype=torch.float64)
    upper = inverse_factor(h, 0.01, "m")
    zero = torch.rand(3, 12, generator=draw) < 0.5
    fast = w.clone()
    for first in (0, 4, 8):
        target = torch.where(zero[:, first : first + 4], 0.0, torch.nan).double()
        sweep(fast, target, upper, first, first + 4)
    for row, mask in zip(w, zero, strict=True):
        for i in range(12):
            if mask[i]:
                row -= row[i].item() / upper[i, i] * upper[i]
                row[i] = 0
    assert torch.allclose(fast, w, atol=1e-9)


def test_l13_compensation_costs_less_than_none_and_than_the_sweep():
    """tr(D H D^T): tuned > sweep and columns alone > the exact form, which is the least."""
    roles = random_roles()
    name = "model.layers.1.q"
    h, d = damped(roles.moments["probe"][name], 0.01), roles.tuned[name].dense()
    layer = Layer(name=name, tuned=roles.tuned[name], moments={"probe": roles.moments["probe"][name]})
    stays = at("safe_delta", keep=0.5).columns(layer)
    alone = torch.where(stays, d, 0)
    best = compensated(d, stays, h)
    upper = inverse_factor(roles.moments["probe"][name], 0.01, name)
    swept = torch.zeros_like(d).double()
    sweep(swept, torch.where(stays, d.double(), torch.nan), upper, 0, 12)
    losses = [float((x.double() @ h * x.double()).sum()) for x in (best, swept, alone, d)]
    assert losses[0] < losses[1] < losses[3]
    assert losses[0] < losses[2] < losses[3]
    assert torch.allclose(swept[:, stays].float(), d[:, stays], atol=1e-6)


def test_safe_delta_in_low_rank_is_that_of_the_rows():
    """The sweep and the losses are the same for all rows, so they act on A alone; the scale of H cancels."""
    roles = random_roles()
    name = "model.layers.0.q"
    low, h = roles.tuned[name], roles.moments["probe"][name]
    assert torch.allclose(column_sizes(low), low.dense().double().square().sum(0), rtol=1e-5)
    method = at("safe_delta", keep=0.4)
    some, others = (method.edit(Layer(name=name, tuned=low, moments={"probe": each})) for each in (h, 1000 * h))
    assert torch.allclose(some.dense(), others.dense(), atol=1e-4)
    assert some.rank == 3


def test_identities_of_the_family():
    """A zero safe adapter makes SafeMERGE a shrink; all of V makes the truncation V itself."""
    roles = random_roles()
    nothing = dataclasses.replace(roles, safe={name: each * 0.0 for name, each in roles.safe.items()})
    merged = results([at("safe_merge", w=0.3)], nothing)
    assert distance(merged, results([at("shrink", alpha=0.3)], roles)) < 1e-6
    v = roles.base["model.layers.1.q"]
    assert torch.allclose(truncated(v, 8).dense(), v, atol=1e-4)


def test_edits_compose_from_left_to_right():
    roles = random_roles()
    both = results([at("shrink", alpha=0.5), at("resta", beta=1.0)], roles)
    other = results([at("resta", beta=1.0), at("shrink", alpha=0.5)], roles)
    truth = {name: each * 0.5 - roles.harmful[name] for name, each in roles.tuned.items()}
    assert distance(both, truth) < 1e-6
    assert distance(other, truth) > 0.1


def test_l14_a_control_moves_every_module_as_far():
    roles = random_roles()
    for by in ("shrink", "noise"):
        ours, theirs = (
            Walk([each], roles) for each in (at("control", of={"resta": {"beta": 0.3}}, by=by), at("resta", beta=0.3))
        )
        for name in SHAPES:
            assert ours.result(name)[1].distance == pytest.approx(theirs.result(name)[1].distance, rel=1e-4)


def test_reinforce():
    """No safe update: the user's; alpha 0: the plain sum; alpha 1: Q^T dW_perp = 0."""
    roles = random_roles()
    plain = results([at("reinforce", alpha=0.0)], roles)
    assert distance(plain, {name: each + roles.safe[name] for name, each in roles.tuned.items()}) < 1e-6
    disjoint = results([at("reinforce", alpha=1.0)], roles)
    for name, each in disjoint.items():
        q = torch.linalg.qr(roles.tuned[name].b)[0]
        assert (q.T @ (each.dense() - roles.tuned[name].dense())).abs().max() < 1e-5
    nothing = dataclasses.replace(roles, safe={name: each * 0.0 for name, each in roles.safe.items()})
    assert distance(results([at("reinforce", scale=0.5)], nothing), {n: u * 0.5 for n, u in roles.tuned.items()}) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -2])
@pytest.mark.parametrize("entry", list(edit), ids=lambda entry: entry.name)
def test_every_number_of_an_edit_is_bounded(entry, bad):
    for field in dataclasses.fields(entry.kind):
        if isinstance(field.default, int | float) and not isinstance(field.default, bool) and field.name != "above":
            with pytest.raises(UserError, match=field.name):
                at(entry.name, **{field.name: bad})


@pytest.mark.parametrize(
    "spec", [{"safe_lora": {"tau": 0.5, "lowest": 3}}, {"truncate": {}}, {"shrnk": {}}, {"shrink": {"a": 1}}]
)
def test_what_is_no_edit_is_said(spec):
    with pytest.raises(UserError):
        make_edits([spec])
