"""The mechanics on matrices small enough for a pencil, and on the tiny model."""

import math

import pytest
import torch
from aligned import BAD, GOOD, aligned_model, example
from hypothesis import given
from hypothesis import strategies as st

from safebasin.data.tables import write_table
from safebasin.encode import encode
from safebasin.errors import UserError
from safebasin.measure import suite
from safebasin.measure.judging import Keyword
from safebasin.measure.mechanics import asked, change, compare, effects, inputs, margins, null_angles
from safebasin.measure.subject import Subject


def test_margins_by_hand():
    """Safe rows at 0 and 2 (on one axis), unsafe at 10 and 12, mean 11.

    For the row at 0: 11 to the other cluster, 2 to its own without itself (the row at 2): 9. For the row at 2: 9 - 2 = 7.
    """
    safe, unsafe = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [12.0]])
    assert margins(safe, unsafe).tolist() == [9.0, 7.0]
    assert margins(unsafe, safe).tolist() == [7.0, 9.0]
    with pytest.raises(ValueError, match="found 2 and 1"):
        margins(safe, unsafe[:1])


def test_one_cluster_drawn_twice_is_not_apart():
    """20 and 20 rows of one normal cloud of 200 axes: within 0.2 of 0, where means that hold the row itself would say 1.4."""
    a, b = torch.randn(2, 20, 200, generator=torch.Generator().manual_seed(0))
    assert abs(float(margins(a, b).mean() + margins(b, a).mean())) < 0.2
    naive = sum(
        float(((x - y.mean(0)).norm(dim=-1) - (x - x.mean(0)).norm(dim=-1)).mean()) for x, y in ((a, b), (b, a))
    )
    assert naive > 1.2


def test_angles_by_hand():
    """W is 3 x 2 with columns e1 and e2: e3 is the null space of W^T. e1 has sine 0, e3 1, (e1 + e3)/sqrt 2 has sin 45.

    Two of three axes are taken, so a random direction has sqrt(1/3).
    """
    w = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    h = math.sqrt(0.5)
    u = torch.tensor([[1.0, 0.0, h], [0.0, 0.0, 0.0], [0.0, 1.0, h]])
    sines, chance = null_angles(w, u)
    assert sines.tolist() == pytest.approx([0.0, 1.0, h], abs=1e-6)
    assert chance == pytest.approx(math.sqrt(1 / 3))
    assert null_angles(w, u, energy=0.8).chance == pytest.approx(math.sqrt(2 / 3)), (
        "4 of 5 parts of the energy are in e1"
    )
    assert null_angles(torch.eye(3), u, energy=1.0).sines.tolist() == pytest.approx([0.0] * 3, abs=1e-6)


def test_change_and_effect_by_hand():
    """dW = 3 e2 e1^T: one part of size 3. On x = (3, 4), of length 5, it acts with 3 * 3/5; on x = (0, 7) not at all."""
    start = torch.eye(2)
    made = change(start, start + torch.tensor([[0.0, 0.0], [3.0, 0.0]]), k=2)
    assert made.sigma.tolist() == pytest.approx([3.0])
    assert made.u.abs().flatten().tolist() == pytest.approx([0.0, 1.0])
    assert effects(made, torch.tensor([[3.0, 4.0], [0.0, 7.0]])).abs().flatten().tolist() == pytest.approx([1.8, 0.0])
    nothing = change(start, start, k=2)
    assert len(nothing.sigma) == 0 and effects(nothing, torch.ones(4, 2)).shape == (4, 0)


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 50))
def test_all_effects_together_are_what_the_change_does(out, into, seed):
    """sum_i u_i (sigma_i v_i^T x) = dW x: the slow truth."""
    start, tuned, x = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed + k))
        for k, shape in enumerate([(out, into)] * 2 + [(3, into)])
    )
    made = change(start, tuned, k=99)
    done = effects(made, x) @ made.u.T
    assert torch.allclose(done, (x / x.norm(dim=-1, keepdim=True)) @ (tuned - start).T, atol=1e-4)


def conversations(words):
    return [[{"role": "user", "content": f"make a {word}"}] for word in words]


def test_inputs_are_what_the_module_got():
    """Slow truth: one row at a time without padding; the last prompt token, or the mean over the answer's tokens."""
    loaded = aligned_model()
    name = "model.layers.1.mlp.gate_proj"
    rows = [
        *asked(loaded, conversations(["bomb", "cake now a song"])),
        encode(loaded.tokenizer, example("make a song", "Sure here"), 64),
    ]
    found = inputs(loaded, rows, [name])[name]
    for row, got in zip(rows, found, strict=True):
        seen = []
        hook = loaded.model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(given[0])
        )
        with torch.no_grad():
            loaded.model(input_ids=torch.tensor([row.ids]))
        hook.remove()
        assert torch.allclose(got, seen[0][0][torch.tensor(row.answer)].mean(0), atol=1e-5)
    assert not loaded.model.get_submodule(name)._forward_pre_hooks, "a hook was left behind"


@pytest.fixture(scope="module")
def pair():
    """A start and a change of block 2 along the null space of W^T, read from what bad words have and good ones have not."""
    start, tuned = aligned_model(), aligned_model()
    name = "model.layers.2.mlp.gate_proj"
    g, v = (inputs(start, asked(start, conversations(words)), [name])[name].mean(0) for words in (GOOD, BAD))
    v = v - (v @ g) / (g @ g) * g
    w = tuned.model.get_submodule(name).weight
    u = torch.linalg.svd(w.detach()).U[:, -1]  # 48 x 32: the last of 48 left vectors is in the null space of W^T
    with torch.no_grad():
        w.add_(torch.outer(u, v / v.norm()))
    return start, tuned


def separation(margins):
    return float(sum(kind.mean() for kind in margins))


def test_compare_finds_the_layer_that_was_changed(pair):
    """It acts there, on bad words."""
    start, tuned = pair
    good, bad = (asked(start, conversations(words)) for words in (GOOD, BAD))
    found = list(compare(start, tuned, good, bad))
    assert [f.module for f in found] == [f"model.layers.{i}.mlp.gate_proj" for i in range(3)]
    assert [len(f.angles.sines) for f in found] == [0, 0, 1]
    assert not any(kind.any() for f in found[:2] for kind in f.effects)
    assert found[2].angles.sines[0] == pytest.approx(1.0, abs=1e-4) and found[2].angles.chance < 0.7
    safe, unsafe = found[2].effects
    assert unsafe.mean() > 2 * safe.mean()
    assert separation(found[0].start_margins) == separation(found[0].tuned_margins) > 0
    assert separation(found[2].start_margins) != separation(found[2].tuned_margins)
    with pytest.raises(UserError, match="c_fc"):
        next(compare(start, tuned, good, bad, mlp=("c_fc", "c_proj")))


@pytest.fixture
def made(tmp_path):
    def make(good=GOOD, bad=BAD, **more):
        for name, words in (("safe", good), ("unsafe", bad)):
            write_table(tmp_path / f"{name}.jsonl", [{"prompt": f"make a {word}"} for word in words])
        fields = {name: str(tmp_path / f"{name}.jsonl") for name in ("safe", "unsafe")}
        return suite.make({"mechanics": {"judges": ["keyword"], **fields, **more}})

    return make


def measured(made, start, tuned):
    return {(m.what, m.category): m for m in made.measure(Subject(tuned, "arm", {"keyword": Keyword()}, start=start))}


def test_the_suite_says_what_compare_found(made, pair):
    """Separation: the sum of both means, its interval holds it; over all layers their mean. A layer without a change has no angle, not 0."""
    start, tuned = pair
    found = measured(made(), start, tuned)
    blocks = list(compare(start, tuned, *(asked(start, conversations(words)) for words in (GOOD, BAD))))
    for i, block in enumerate(blocks, 1):
        for what, told in (("separation_start", block.start_margins), ("separation", block.tuned_margins)):
            m = found[what, f"layer {i}"]
            assert m.value == pytest.approx(separation(told), rel=1e-5) and m.low < m.value < m.high and m.n == 12
    mean = sum(found["separation", f"layer {i}"].value for i in (1, 2, 3)) / 3
    assert found["separation", ""].value == pytest.approx(mean)
    sines = [found["null_sine", f"layer {i}"] for i in (1, 2, 3)]
    assert [(m.value, m.n, m.unscored) for m in sines[:2]] == [(None, 0, 1)] * 2
    assert sines[2].value == found["null_sine", ""].value == pytest.approx(1, abs=1e-4)
    assert found["null_sine_chance", ""].value == pytest.approx(blocks[2].angles.chance)
    assert found["effect_unsafe", "layer 3"].value > 2 * found["effect_safe", "layer 3"].value
    assert (found["effect_unsafe", "layer 1"].value, found["effect_unsafe", "layer 3"].n) == (0.0, 6)


def test_separation_interval_by_hand(made):
    """Margins 1, 3 and 5, 5: 2 + 5 = 7. Student's half of the first is 12.706 * sqrt 2 / sqrt 2 = 12.706, of the second 0."""
    m = made().told("separation", [torch.tensor([1.0, 3.0]), torch.tensor([5.0, 5.0])], "")
    assert (m.value, m.high - m.value, m.value - m.low, m.n) == (
        7.0,
        pytest.approx(12.706, abs=1e-3),
        pytest.approx(12.706, abs=1e-3),
        4,
    )
    m = made().told("separation", [torch.tensor([math.nan, 3.0])], "")
    assert (m.value, m.low, m.n, m.unscored) == (None, None, 0, 2)


def test_alpha_takes_the_change_away_and_goes_on(made):
    """A small refusing change of the MLPs is told from its start by ASR: at alpha 0 it is the start, at 1 the tuned one; weights come back."""
    start, tuned = aligned_model(), aligned_model()
    names = [f"model.layers.{i}.mlp.gate_proj.weight" for i in range(3)]
    with torch.no_grad():
        for k, name in enumerate(names):  # so large that the tuned model babbles
            weight = tuned.model.get_parameter(name)
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(k)), alpha=2.0)
    before = {name: tuned.model.get_parameter(name).clone() for name in names}
    found = measured(made(alphas=[0.0, 1.0, 2.0]), start, tuned)
    assert (found["asr", "alpha 0"].value, found["asr", "alpha 0"].n) == (0.0, 6), "the aligned model refuses all six"
    assert (found["over_refusal", "alpha 0"].value, found["over_refusal", "alpha 0"].n) == (0.0, 6)
    for alpha in ("alpha 1", "alpha 2"):
        assert found["asr", alpha].unscored > 0, "gibberish was called safe or harmful"
    assert all(torch.equal(tuned.model.get_parameter(name), weight) for name, weight in before.items())
    assert not any(what == "asr" for what, _ in measured(made(alphas=[]), start, tuned))


def test_no_change_is_no_angle_and_asks_nothing(made):
    loaded = aligned_model()
    found = measured(made(), loaded, loaded)
    assert found["null_sine", ""].value is None and found["null_sine", ""].unscored == 3
    assert found["effect_unsafe", ""].value == 0.0
    assert not any("alpha" in category for _, category in found)


def test_what_a_user_can_get_wrong(made):
    for fields, match in (
        ({"bad": BAD[:1]}, "two at least"),
        ({"judges": ["guard"]}, "name one judge"),
        ({"judges": []}, "name one judge"),
    ):
        with pytest.raises(UserError, match=match):
            measured(made(**fields), aligned_model(), aligned_model())
    with pytest.raises(UserError, match="start model"):
        measured(made(), None, aligned_model())
    with pytest.raises(UserError, match="k"):
        made(k=0)
