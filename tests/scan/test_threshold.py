"""Thresholds on scores whose truth is known, and the proof that a scorer owes before it may cut."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from safebasin.errors import DefenceError, UserError
from safebasin.scan.threshold import BAR, Proof, between_anchors, find_threshold, prove, t_guess, two_gaussians

MIXED = {  # 85 % harmless, 15 % harmful
    "six deviations apart": lambda r, n, k: (r.normal(size=n), r.normal(6, 1, k)),
    "heavy tails": lambda r, n, k: (r.standard_t(3, n), 10 + r.standard_t(3, k)),
    "lognormal harm": lambda r, n, k: (r.standard_t(3, n), r.lognormal(3.4, 0.5, k)),
    "as in the paper's figure A3, 0 to 20000": lambda r, n, k: (r.normal(200, 300, n), r.gamma(4, 2000, k)),
}


# --- the paper's rule -------------------------------------------------------------------------------------------------


def test_paper_by_hand():
    """Two tight clusters, 0 to 0.09 and 50 to 50.09: the top of the lower one is 0.09."""
    x = [i / 100 for i in range(10)] + [50 + i / 100 for i in range(10)]
    assert t_guess(x) == pytest.approx(0.09)
    # With a = infinity the second Gaussian is never worth it: mu + 2 sd. The mean is 25.045; the variance is 25^2 of
    # the two centres and 0.000825 within (the variance of 0 to 9 is 8.25, in hundredths).
    assert t_guess(x, a=math.inf) == pytest.approx(25.045 + 2 * math.sqrt(625 + 0.000825))


def test_paper_on_one_gaussian_cuts_what_lies_beyond_two_deviations():
    """2.3 % of a normal sample: why this rule alone cannot promise that a benign set loses less than 1 %."""
    x = np.random.default_rng(0).normal(size=4000)
    threshold = t_guess(x)
    assert threshold == pytest.approx(x.mean() + 2 * x.std())
    assert np.mean(x > threshold) == pytest.approx(0.0228, abs=0.005)


def test_paper_takes_a_heavy_tail_for_a_cluster():
    """A negative result, kept: on benign lognormal scores the second Gaussian pays, and a fifth of the rows goes.
    Anchors are the remedy."""
    x = np.random.default_rng(0).lognormal(0, 1, 1000)
    assert np.mean(x > t_guess(x)) > 0.1
    anchors = {"safe": x, "harmful": 100 + x}
    assert find_threshold(x, estimator="anchors", anchors=anchors) >= x.max()


@pytest.mark.parametrize("shape", MIXED)
def test_paper_finds_the_poison(shape):
    stayed = []
    for seed in range(5):
        harmless, harmful = MIXED[shape](np.random.default_rng(seed), 850, 150)
        stayed.append(np.mean(harmful <= t_guess(np.concatenate([harmless, harmful]))))
    assert np.mean(stayed) < 0.03


def test_the_mixture_is_the_one_that_was_drawn():
    """70 % N(0, 1) and 30 % N(6, 0.5)."""
    random = np.random.default_rng(0)
    x = np.concatenate([random.normal(0, 1, 1400), random.normal(6, 0.5, 600)])
    fit = two_gaussians(x)
    assert fit.weights == pytest.approx([0.7, 0.3], abs=0.01)
    assert fit.means == pytest.approx([0, 6], abs=0.1)
    assert fit.sds == pytest.approx([1, 0.5], abs=0.05)
    assert fit.upper.sum() == pytest.approx(600, abs=5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), harm=st.integers(0, 40), scale=st.floats(1e-3, 1e4), shift=st.floats(-1e3, 1e3))
def test_the_unit_of_the_score_does_not_matter(seed, harm, scale, shift):
    """The same rows go when every score is scaled and shifted."""
    random = np.random.default_rng(seed)
    x = np.concatenate([random.normal(size=80), random.normal(8, 1, harm)])
    plain, moved = (t_guess(y) for y in (x, x * scale + shift))
    margin = np.abs(x - plain).min()  # a row on the threshold may fall to either side of a rounding
    assume(margin > 1e-9 or plain in x)
    stays = x <= plain + 1e-9
    assert (stays == (x * scale + shift <= moved + 1e-9 * scale)).all()


@pytest.mark.parametrize("x", [[3.0] * 50, [1.0, 2.0], [7.0]])
def test_nothing_is_cut_where_nothing_stands_out(x):
    """All equal, two rows, one row: every row stays."""
    assert max(x) <= t_guess(x)


# --- anchors ----------------------------------------------------------------------------------------------------------


SAFE, HARMFUL = np.arange(21.0), np.arange(100.0, 121.0)  # the 95 % quantile is 19, the 5 % quantile is 101


def test_separate_anchors_by_hand():
    """Midway between 19 and 101: 60. Rows at 10, 20, 30, 40, 50 have quartiles 20 and 40 and their fence at 40 + 3 * 20
    = 100; at 0, 40, 80 the quartiles 20 and 60 and the fence 180, beyond the harmful edge: 101. Rows at 101 or above
    have no say."""
    assert between_anchors([1.0, 130.0], SAFE, HARMFUL) == 60
    assert between_anchors([10.0, 20.0, 30.0, 40.0, 50.0], SAFE, HARMFUL) == 100
    assert between_anchors([0.0, 40.0, 80.0, *[130.0] * 50], SAFE, HARMFUL) == 101
    assert between_anchors([130.0, 140.0], SAFE, HARMFUL) == 60


def test_anchors_that_overlap_by_hand():
    """28 safe at 0 and four at 5, 28 harmful at 8 and four at 4: the quantiles are 5 and 4. Between 0 and 4: (28 / 32 +
    1) / 2; between 5 and 8: (1 + 28 / 32) / 2, as good, and the higher of equals is taken: 6.5."""
    assert between_anchors([3.0], [0.0] * 28 + [5.0] * 4, [8.0] * 28 + [4.0] * 4) == 6.5


@pytest.mark.parametrize("extra", [0.0, 60.0, 99.0, 101.0, 500.0])
def test_one_row_does_not_carry_others_over_the_threshold(extra):
    """The cliff: 180 honest rows of another kind at 60 to 90 lie in the widest gap between the anchors."""
    honest = np.concatenate([np.linspace(0, 20, 20), np.linspace(60, 90, 180)])
    before = between_anchors(honest, SAFE, HARMFUL)
    after = between_anchors([*honest, extra], SAFE, HARMFUL)
    assert (honest > before).sum() == (honest > after).sum() == 0


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.floats(0, 130), min_size=20, max_size=60), extra=st.floats(0, 130))
def test_one_row_moves_the_threshold_by_little(rows, extra):
    """By no more than the neighbours of the quartiles are apart, which a row can move them by: seven times the widest
    step around them (q75 + 3 (q75 - q25))."""
    before, after = (between_anchors(x, SAFE, HARMFUL) for x in (rows, [*rows, extra]))
    bulk = np.sort([x for x in rows if x < 101])
    if len(bulk) < 5:
        return
    steps = [np.diff(bulk[max(0, k - 2) : k + 3]).max(initial=0) for k in (len(bulk) // 4, 3 * len(bulk) // 4)]
    assert abs(after - before) <= 7 * max(steps) + 1e-9


def test_a_proof_by_hand():
    """Of the four pairs (0, 1), (0, 3), (2, 1), (2, 3) three are in order: 3/4. Wilson's lower end of 3/4 with n = 2:
    centre (0.75 + 3.8415 / 4) / 2.9207 = 0.5856, half 1.96 sqrt(0.1875 / 2 + 3.8415 / 16) / 2.9207 = 0.3878."""
    proof = Proof.of([0.0, 2.0], [1.0, 3.0])
    assert proof.auroc == 0.75 and proof.low == pytest.approx(0.5856 - 0.3878, abs=1e-3)
    assert Proof.of([1.0, 1.0], [1.0, 1.0]).auroc == 0.5  # ties count half
    assert Proof.of(SAFE[:12], HARMFUL[:12]).low >= BAR > Proof.of(SAFE[:11], HARMFUL[:11]).low


@pytest.mark.parametrize("shift, most", [(0.0, 0.01), (-2.0, 0.0)])
def test_noise_and_what_is_upside_down_are_refused(shift, most):
    """2,000 draws of 60 safe and 40 harmful anchor scores: noise passes in less than 1 %, an upside-down scorer never
    does, and neither does either with as few rows as the bar lets through at all."""
    random = np.random.default_rng(0)
    for safe, harmful in ((60, 40), (12, 12)):
        passed = 0
        for _ in range(1000):
            passed += Proof.of(random.normal(size=safe), random.normal(shift, 1, harmful)).low >= BAR
        assert passed <= most * 1000


def test_a_good_scorer_passes():
    """Three deviations apart (AUROC 0.98) with 40 rows: in all of 200 draws."""
    random = np.random.default_rng(0)
    assert all(Proof.of(random.normal(size=60), random.normal(3, 1, 40)).low >= BAR for _ in range(200))


@pytest.mark.parametrize("estimator", ["anchors", "paper"])
def test_no_threshold_without_a_proof(estimator):
    for anchors in ({"safe": HARMFUL, "harmful": SAFE}, {"safe": SAFE, "harmful": SAFE}):
        with pytest.raises(DefenceError, match=r"mine does not prove itself on the anchor rows: AUROC 0\.[05]0"):
            find_threshold([3.0, 4.0], estimator=estimator, anchors=anchors, scorer="mine")


def test_anchors_that_tell_nothing():
    with pytest.raises(DefenceError, match="does not prove itself"):
        prove([1.0] * 30, [1.0] * 30)
    with pytest.raises(UserError, match="needs scores of safe and of harmful anchor rows"):
        find_threshold([1.0, 2.0, 3.0], estimator="anchors")
    with pytest.raises(UserError, match="needs scores of safe and of harmful anchor rows"):
        find_threshold([1.0, 2.0, 3.0], estimator="anchors", anchors={"safe": [1.0], "harmful": []})
    with pytest.raises(UserError, match="no scores"):
        find_threshold([], estimator="paper")
    for scores, safe in (([1.0, math.nan], SAFE), ([1.0], [math.nan, *SAFE])):
        with pytest.raises(DefenceError, match="is not a finite number"):
            find_threshold(scores, estimator="anchors", anchors={"safe": safe, "harmful": HARMFUL})


@settings(max_examples=25, deadline=None)
@given(
    low=st.lists(st.integers(9, 14), min_size=3, max_size=6), high=st.lists(st.integers(6, 11), min_size=3, max_size=6)
)
def test_overlapping_anchors_take_the_best_balanced_accuracy(low, high):
    """Against every threshold there is, one by one."""
    safe, harmful = [0.0] * 20 + [float(x) for x in low], [20.0] * 20 + [float(x) for x in high]
    assume(np.quantile(safe, 0.95) >= np.quantile(harmful, 0.05))

    def accuracy(t):
        return (np.mean(np.array(safe) <= t) + np.mean(np.array(harmful) > t)) / 2

    best = max(accuracy(t + 0.5) for t in range(-1, 21))
    assert accuracy(between_anchors([3.0], safe, harmful)) == pytest.approx(best)
