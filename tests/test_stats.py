"""Intervals, paired tests and agreement against numbers that were derived by hand."""

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from safebasin.stats import (
    Difference,
    exact,
    kappa,
    mcnemar,
    mean,
    non_inferior,
    paired_difference,
    two_level,
    two_level_counts,
    two_level_difference,
    wilson,
)

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def test_wilson_by_hand():
    """1 of 4, z = 1.959964: v = z^2/4 = 0.960365; middle (0.25 + v/2) / (1 + v) = 0.372473;

    half z / (1 + v) * sqrt(0.25 * 0.75 / 4 + v / 16) = 0.999795 * 0.326952 = 0.326885.
    """
    assert wilson(1, 4) == pytest.approx((0.045588, 0.699358), abs=2e-6)


def test_wilson_at_the_ends_has_width():
    """0 of 60: high = z^2 / (n + z^2) = 3.841459 / 63.841459 = 0.0602; 60 of 60 is its mirror. The ends are exact."""
    assert wilson(0, 60) == pytest.approx((0.0, 3.841459 / 63.841459)) and wilson(0, 60).low == 0
    assert wilson(60, 60) == pytest.approx((1 - 3.841459 / 63.841459, 1.0)) and wilson(60, 60).high == 1


def test_no_share_of_nothing():
    for share, (hits, n) in itertools.product((wilson, exact), ((0, 0), (3, 2), (-1, 2))):
        with pytest.raises(ValueError, match="undefined"):
            share(hits, n)
    with pytest.raises(ValueError, match="pairs"):
        paired_difference([], [])
    with pytest.raises(ValueError, match="pairs"):
        paired_difference([True], [True, False])
    with pytest.raises(ValueError, match="pairs"):
        kappa([], [])


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share(drawn):
    hits, n = drawn
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1 and low < high
    mirrored = wilson(n - hits, n)
    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_mcnemar_by_hand():
    """1 against 5 of 6 that differ: 2 (C(6,0) + C(6,1)) / 2^6 = 14 / 64."""
    assert mcnemar(1, 5) == mcnemar(5, 1) == pytest.approx(14 / 64)
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1.0


def test_paired_difference_by_hand():
    """Wilson of 2 of 4 is 0.5 -+ d, d = 0.99980 * sqrt(0.0625 + 0.060025) = 0.34996.

    Equal answers (2 both, 2 neither): phi = (2*2 - 0 - 4/2) / sqrt(2*2*2*2) = 1/2, half-width sqrt(d^2 - d^2 + d^2).
    Independent ones (1 of each): phi = 0, so it is d sqrt 2.
    """
    d = 0.34996
    first, second = [True, True, False, False], [True, False, True, False]
    assert paired_difference(first, first) == pytest.approx((0, -d, d, 4), abs=3e-5)
    assert paired_difference(first, second) == pytest.approx((0, -d * 2**0.5, d * 2**0.5, 4), abs=5e-5)


@given(pairs)
def test_a_paired_difference_changes_its_sign_and_is_in_its_interval(drawn):
    x, y = zip(*drawn, strict=True)
    there, back = paired_difference(x, y), paired_difference(y, x)
    assert there.low <= there.value <= there.high and there.low >= -1 and there.high <= 1
    assert (back.value, back.low, back.high) == pytest.approx((-there.value, -there.high, -there.low), abs=1e-12)


def test_the_interval_decides_non_inferiority():
    assert non_inferior(Difference(-0.01, -0.019, 0.0, 100), 0.02) == "yes"
    assert non_inferior(Difference(-0.01, -0.03, 0.01, 100), 0.02) == "unclear"
    assert non_inferior(Difference(-0.10, -0.15, -0.05, 100), 0.02) == "no"
    assert non_inferior(Difference(0.0, -0.02, 0.02, 100), 0.02) == "unclear", (
        "an interval that touches the margin decided"
    )


def test_kappa_by_hand():
    """3 of 4 agree; chance 2/4 * 1/4 + 2/4 * 3/4 = 1/2; (3/4 - 1/2) / (1 - 1/2) = 1/2."""
    assert kappa(["r", "r", "c", "c"], ["r", "c", "c", "c"]) == pytest.approx(0.5)
    assert kappa(["r", "c"], ["c", "r"]) == pytest.approx(-1.0)


def test_kappa_of_one_class_is_undefined_and_not_perfect():
    assert kappa(["r", "r", "r"], ["r", "r", "r"]) is None
    assert kappa(["r", "r"], ["r", "c"]) == pytest.approx(0.0)


@given(pairs)
def test_kappa_is_symmetric_and_at_most_one(drawn):
    a, b = map(list, zip(*drawn, strict=True))
    value = kappa(a, b)
    assert (value is None) == (set(a) == set(b) and len(set(a)) == 1)
    assert value is None or (-1 - 1e-9 <= value <= 1 + 1e-9 and value == pytest.approx(kappa(b, a)))
    if value is not None and a == b:
        assert value == pytest.approx(1)


def test_mean_over_seeds_by_hand():
    """1, 2, 3: mean 2, standard deviation 1; t(0.975, 2) = 4.3027, over sqrt 3: 2.4841."""
    middle, interval = mean([1.0, 2.0, 3.0])
    assert middle == 2 and interval == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)
    with pytest.raises(ValueError, match="two"):
        mean([0.5])


def test_exact_by_hand():
    """0 of 60: the upper end solves (1 - p)^60 = 0.025. 60 of 60 is its mirror."""
    assert exact(0, 60) == pytest.approx((0.0, 1 - 0.025 ** (1 / 60))) and exact(60, 60).low == pytest.approx(
        0.025 ** (1 / 60)
    )


@given(n=st.integers(1, 2000), data=st.data())
def test_intervals_of_a_share_are_those_of_scipy(n, data):
    hits = data.draw(st.integers(0, n))
    truth = scipy.stats.binomtest(hits, n)
    assert wilson(hits, n) == pytest.approx(tuple(truth.proportion_ci(method="wilson")), abs=1e-12)
    assert exact(hits, n) == pytest.approx(tuple(truth.proportion_ci(method="exact")), abs=1e-9)


def test_seeds_that_share_prompts_are_not_more_prompts():
    """Three seeds that answer alike tell as much as one: Wilson's interval of 10 of 50, not of 30 of 150."""
    one = [True] * 10 + [False] * 40
    value, interval = two_level([one] * 3)
    assert value == 0.2 and interval.low <= wilson(10, 50).low and interval.high >= wilson(10, 50).high
    assert two_level([one])[1] == pytest.approx(wilson(10, 50))
    anew = [{(seed, i): hit for i, hit in enumerate(one)} for seed in range(3)]
    assert two_level(anew)[1].high < interval.high, "prompts drawn anew by seed are more prompts"


def test_two_level_counts_by_hand():
    """Shares 0.1, 0.2, 0.3 of 100 prompts: s^2 / S = 0.01 / 3, prompts 0.16 / 100; V = 0.0049333 at
    0.0049333^2 / (0.0033333^2 / 2 + 0.0016^2 / 99) = 4.360 degrees of freedom, t = 2.6874; so
    n_e = 0.16 / 0.0049333 * (1.95996 / 2.6874)^2 = 17.25."""
    value, (low, high) = two_level_counts([0.1, 0.2, 0.3], 100)
    z, n = 1.959964, 17.25
    middle, half = (
        (0.2 + z * z / (2 * n)) / (1 + z * z / n),
        z / (1 + z * z / n) * (0.16 / n + z * z / (4 * n * n)) ** 0.5,
    )
    assert value == pytest.approx(0.2) and (low, high) == pytest.approx((middle - half, middle + half), abs=2e-4)


@pytest.mark.parametrize("hit", [False, True])
def test_an_interval_at_the_edge_has_width(hit):
    """All of 90 alike in three seeds: Wilson's of 90, whose width is z^2 / (90 + z^2) = 0.0409."""
    low, high = two_level([[hit] * 90] * 3)[1]
    assert high - low == pytest.approx(0.0409, abs=1e-4)


def test_a_difference_by_hand():
    """One seed, 4 differences 1, 1, 0, 0: mean 1/2, V = (1/4) / 4 + 1/16 = 1/8, so 1/2 +- 1.96 sqrt(1/8), cut to 1."""
    value, (low, high) = two_level_difference([[1, 1, 0, 0]])
    assert (value, low, high) == (0.5, pytest.approx(0.5 - 1.959964 * 0.125**0.5), 1.0)
    assert two_level_difference([[0.0] * 90] * 3)[1] == pytest.approx((-1.96 / 90, 1.96 / 90), abs=1e-5)


def test_two_seeds_do_not_say_how_much_seeds_vary():
    for method in (two_level, two_level_difference):
        with pytest.raises(ValueError, match="three of them, found 2"):
            method([[0.0, 1.0], [1.0, 1.0]])
        with pytest.raises(ValueError, match="no outcomes"):
            method([])


@pytest.mark.parametrize("share", [0.03, 0.3])
def test_intervals_over_three_seeds_hold_the_truth(share):
    """100 runs of three seeds on the same 60 prompts, where seeds and prompts vary: at least 93 % of the intervals hold
    the truth (docs/decisions/0018 has the table); those of pooled prompts do not."""
    chance, held, pooled = np.random.default_rng(1), 0, 0
    for _ in range(100):
        # a beta mixture: the share of a prompt, times a seed's factor of mean 1
        prompts = chance.beta(share * 2, (1 - share) * 2, 60)
        table = chance.random((3, 60)) < np.clip(prompts * chance.uniform(0.6, 1.4, (3, 1)), 0, 1)
        low, high = two_level(table.tolist())[1]
        held += low <= share <= high
        low, high = wilson(int(table.sum()), table.size)
        pooled += low <= share <= high
    assert held >= 93 > pooled
