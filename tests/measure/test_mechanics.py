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
from safebasin.measure.judges.keyword import Keyword
from safebasin.measure.mechanics import change, compare, effects, inputs, margins, null_angles, prompt_rows
from safebasin.measure.subject import Subject


def test_margins_by_hand():
    """Safe rows at 0 and 2 (on one axis), unsafe at 10 and 12, mean 11.

    The row at 0: 11 to the other cluster, 2 to its own without itself (the row at 2): 9. The row at 2: 9 - 2 = 7.
    """
    safe, unsafe = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [12.0]])
    assert margins(safe, unsafe).tolist() == [9.0, 7.0]
    assert margins(unsafe, safe).tolist() == [7.0, 9.0]
    with pytest.raises(ValueError, match="found 2 and 1"):
        margins(safe, unsafe[:1])


def test_one_cluster_drawn_twice_is_not_separated():
    """20 and 20 rows of one normal cloud of 200 axes: within 0.2 of 0; means with the row itself would give 1.4."""
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
    """dW = 3 e2 e1^T: one part of size 3. On x = (3, 4), of length 5, it acts with 9/5; on x = (0, 7) not at all."""
    start = torch.eye(2)
    parts = change(start, start + torch.tensor([[0.0, 0.0], [3.0, 0.0]]), k=2)
    assert parts.sigma.tolist() == pytest.approx([3.0])
    assert parts.u.abs().flatten().tolist() == pytest.approx([0.0, 1.0])
    assert effects(parts, torch.tensor([[3.0, 4.0], [0.0, 7.0]])).abs().flatten().tolist() == pytest.approx([1.8, 0.0])
    nothing = change(start, start, k=2)
    assert len(nothing.sigma) == 0 and effects(nothing, torch.ones(4, 2)).shape == (4, 0)


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 50))
def test_all_effects_together_are_what_the_change_does(out, into, seed):
    """sum_i u_i (sigma_i v_i^T x) = dW x: the slow truth."""
    start, tuned, x = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed + k))
        for k, shape in enumerate([(out, into)] * 2 + [(3, into)])
    )
    parts = change(start, tuned, k=99)
    done = effects(parts, x) @ parts.u.T
    assert torch.allclose(done, (x / x.norm(dim=-1, keepdim=True)) @ (tuned - start).T, atol=1e-4)


def conversations(words):
    return [[{"role": "user", "content": f"make a {word}"}] for word in words]


def test_inputs_are_what_the_module_got():
    """Slow truth: one row at a time without padding; the last prompt token, or the mean over the answer's tokens."""
    loaded = aligned_model()
    name = "model.layers.1.mlp.gate_proj"
    rows = [
        *prompt_rows(loaded, conversations(["bomb", "cake now a song"])),
        encode(loaded.tokenizer, example("make a song", "Sure here"), 64),
    ]
    means = inputs(loaded, rows, [name])[name]
    for row, got in zip(rows, means, strict=True):
        seen = []
        hook = loaded.model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(given[0])
        )
        with torch.no_grad():
            loaded.model(input_ids=torch.tensor(row.ids)[None])
        hook.remove()
        assert torch.allclose(got, seen[0][0][torch.tensor(row.answer)].mean(0), atol=1e-5)
    assert not loaded.model.get_submodule(name)._forward_pre_hooks, "a hook was left behind"


@pytest.fixture(scope="module")
def pair():
    """A start and a change of block 2 into the null space of W^T, from what bad words have and good ones have not."""
    start, tuned = aligned_model(), aligned_model()
    name = "model.layers.2.mlp.gate_proj"
    g, v = (inputs(start, prompt_rows(start, conversations(words)), [name])[name].mean(0) for words in (GOOD, BAD))
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
    good, bad = (prompt_rows(start, conversations(words)) for words in (GOOD, BAD))
    blocks = list(compare(start, tuned, good, bad))
    assert [f.module for f in blocks] == [f"model.layers.{i}.mlp.gate_proj" for i in range(3)]
    assert [len(f.angles.sines) for f in blocks] == [0, 0, 1]
    assert not any(kind.any() for f in blocks[:2] for kind in f.effects)
    assert blocks[2].angles.sines[0] == pytest.approx(1.0, abs=1e-4) and blocks[2].angles.chance < 0.7
    safe, unsafe = blocks[2].effects
    assert unsafe.mean() > 2 * safe.mean()
    assert separation(blocks[0].start_margins) == separation(blocks[0].tuned_margins) > 0
    assert separation(blocks[2].start_margins) != separation(blocks[2].tuned_margins)
    with pytest.raises(UserError, match="c_fc"):
        next(compare(start, tuned, good, bad, mlp=("c_fc", "c_proj")))


@pytest.fixture
def suite_of(tmp_path):
    def make(good=GOOD, bad=BAD, **more):
        for name, words in (("safe", good), ("unsafe", bad)):
            write_table(tmp_path / f"{name}.jsonl", [{"prompt": f"make a {word}"} for word in words])
        fields = {name: str(tmp_path / f"{name}.jsonl") for name in ("safe", "unsafe")}
        return suite.make({"mechanics": {"judges": ["keyword"], **fields, **more}})

    return make


def measured(suite_of, start, tuned):
    return {
        (m.what, m.category): m for m in suite_of.measure(Subject(tuned, "arm", {"keyword": Keyword()}, start=start))
    }


def test_the_suite_says_what_compare_found(suite_of, pair):
    """Separation: the sum of both means, its interval holds it; over all layers their mean.

    A layer without a change has no angle, not 0.
    """
    start, tuned = pair
    numbers = measured(suite_of(), start, tuned)
    blocks = list(compare(start, tuned, *(prompt_rows(start, conversations(words)) for words in (GOOD, BAD))))
    for i, block in enumerate(blocks, 1):
        for what, pair in (("separation_start", block.start_margins), ("separation", block.tuned_margins)):
            m = numbers[what, f"layer {i}"]
            assert m.value == pytest.approx(separation(pair), rel=1e-5) and m.low < m.value < m.high and m.n == 12
    mean = sum(numbers["separation", f"layer {i}"].value for i in (1, 2, 3)) / 3
    assert numbers["separation", ""].value == pytest.approx(mean)
    sines = [numbers["null_sine", f"layer {i}"] for i in (1, 2, 3)]
    assert [(m.value, m.n, m.unscored) for m in sines[:2]] == [(None, 0, 1)] * 2
    assert sines[2].value == numbers["null_sine", ""].value == pytest.approx(1, abs=1e-4)
    assert numbers["null_sine_chance", ""].value == pytest.approx(blocks[2].angles.chance)
    assert numbers["effect_unsafe", "layer 3"].value > 2 * numbers["effect_safe", "layer 3"].value
    assert (numbers["effect_unsafe", "layer 1"].value, numbers["effect_unsafe", "layer 3"].n) == (0.0, 6)


def test_separation_interval_by_hand(suite_of):
    """Margins 1, 3 and 5, 5: 2 + 5 = 7. Student's half is 12.706 sqrt 2 / sqrt 2 = 12.706 of the one, 0 of the
    other."""
    m = suite_of().summed("separation", [torch.tensor([1.0, 3.0]), torch.tensor([5.0, 5.0])], "")
    assert (m.value, m.high - m.value, m.value - m.low, m.n) == (
        7.0,
        pytest.approx(12.706, abs=1e-3),
        pytest.approx(12.706, abs=1e-3),
        4,
    )
    m = suite_of().summed("separation", [torch.tensor([math.nan, 3.0])], "")
    assert (m.value, m.low, m.n, m.unscored) == (None, None, 0, 2)


def test_alpha_takes_the_change_away_and_goes_on(suite_of):
    """A change of the MLPs that makes the model babble: at alpha 0 it is the start again; the weights come back."""
    start, tuned = aligned_model(), aligned_model()
    names = [f"model.layers.{i}.mlp.gate_proj.weight" for i in range(3)]
    with torch.no_grad():
        for k, name in enumerate(names):  # so large that the tuned model babbles
            weight = tuned.model.get_parameter(name)
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(k)), alpha=2.0)
    before = {name: tuned.model.get_parameter(name).clone() for name in names}
    numbers = measured(suite_of(alphas=[0.0, 1.0, 2.0]), start, tuned)
    assert (numbers["asr", "alpha 0"].value, numbers["asr", "alpha 0"].n) == (0.0, 6), (
        "the aligned model refuses all six"
    )
    assert (numbers["over_refusal", "alpha 0"].value, numbers["over_refusal", "alpha 0"].n) == (0.0, 6)
    for alpha in ("alpha 1", "alpha 2"):
        assert numbers["asr", alpha].unscored > 0, "gibberish was called safe or harmful"
    assert all(torch.equal(tuned.model.get_parameter(name), weight) for name, weight in before.items())
    assert not any(what == "asr" for what, _ in measured(suite_of(alphas=[]), start, tuned))


def test_no_change_is_no_angle_and_asks_nothing(suite_of):
    loaded = aligned_model()
    numbers = measured(suite_of(), loaded, loaded)
    assert numbers["null_sine", ""].value is None and numbers["null_sine", ""].unscored == 3
    assert numbers["effect_unsafe", ""].value == 0.0
    assert not any("alpha" in category for _, category in numbers)


def test_what_a_user_can_get_wrong(suite_of):
    for fields, match in (
        ({"bad": BAD[:1]}, "two at least"),
        ({"judges": ["classifier"]}, "no judge 'classifier'"),
        ({"judges": ["guard"]}, "for harmful requests only"),
        ({"judges": []}, "judges: .*at least 1"),
    ):
        with pytest.raises(UserError, match=match):
            measured(suite_of(**fields), aligned_model(), aligned_model())
    with pytest.raises(UserError, match="start model"):
        measured(suite_of(), None, aligned_model())
    with pytest.raises(UserError, match="k"):
        suite_of(k=0)
