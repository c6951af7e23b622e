"""Confidence bounds, radii, and the estimators that stop early (methods 7.1 to 7.5, 3.1, 3.4)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from defenses.bounds import ESTIMATORS, FUTILITY, LOOKS, Question, ceiling, grid_up_to, lower, radius, two_sided, upper

GRID, FIXED = ESTIMATORS["grid"], ESTIMATORS["fixed"]
counts = st.integers(1, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
levels = st.floats(1e-7, 0.4)


# --- Clopper-Pearson


@pytest.mark.parametrize(
    "k, n, bound, r",
    [
        (99, 100, 0.9113731, 0.3373148),
        (100, 100, 0.9332543, 0.3751188),
        (1000, 1000, 0.9931160, 0.6158),
        (99_000, 100_000, 0.9889893, 0.5725000),
        (80_000, 100_000, 0.7960661, 0.2069129),
        (100_000, 100_000, 0.99993092, 0.9528641),
    ],
)
def test_lower_bounds_and_radii_are_those_of_the_table(k, n, bound, r):
    assert lower(k, n, 0.001) == pytest.approx(bound, abs=6e-8)
    assert radius(lower(k, n, 0.001), 0.25) == pytest.approx(r, abs=1e-4 if r == 0.6158 else 6e-8)


def test_half_alpha_and_twice_sigma_give_their_rows_of_the_table():
    assert lower(99, 100, 0.0005) == pytest.approx(0.9043899, abs=6e-8)
    assert radius(lower(99, 100, 0.0005), 0.25) == pytest.approx(0.3267445, abs=6e-8)
    assert radius(lower(80_000, 100_000, 0.001), 0.5) == pytest.approx(0.4138258, abs=6e-8)


@pytest.mark.parametrize("smallest, n", [(66, 100), (550, 1000), (5156, 10_000), (50_490, 100_000)])
def test_the_smallest_count_that_does_not_abstain(smallest, n):
    question = Question(0.25, 0.001, n)
    bound, finished = FIXED.look(question, 0, np.array([smallest - 1.0, smallest]), np.zeros(2))
    assert finished.all()
    np.testing.assert_array_equal(np.isnan(FIXED.radius(question, bound)), [True, False])


def test_no_success_bounds_by_zero_and_no_failure_by_one():
    assert lower(0, 1000, 0.001) == 0 and upper(1000, 1000, 0.001) == 1
    np.testing.assert_array_equal(lower(np.array([0, 0]), np.array([1, 100_000]), 0.001), [0, 0])


def test_a_bound_of_exactly_one_half_certifies_radius_zero():
    np.testing.assert_array_equal(FIXED.radius(Question(0.25, 0.001, 100), np.array([0.5, np.nextafter(0.5, 0)])), [0, np.nan])


@given(counts, levels)
def test_bounds_are_scipys_quantiles_of_the_beta_distribution(kn, alpha):
    k, n = kn
    below = stats.beta.ppf(alpha, k, n - k + 1) if k else 0.0
    above = stats.beta.ppf(1 - alpha, k + 1, n - k) if k < n else 1.0
    assert lower(k, n, alpha) == pytest.approx(below, rel=1e-9)
    assert upper(k, n, alpha) == pytest.approx(above, abs=1e-9)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))), st.floats(1e-4, 0.2))
def test_the_lower_bound_is_where_the_exact_binomial_test_turns(kn, alpha):
    bound = float(lower(*kn, alpha))
    assert stats.binomtest(*kn, bound, alternative="greater").pvalue == pytest.approx(alpha, rel=1e-6)


@given(counts, levels)
def test_the_upper_bound_mirrors_the_lower_one(kn, alpha):
    k, n = kn
    assert upper(k, n, alpha) == pytest.approx(1 - lower(n - k, n, alpha), abs=1e-15)
    assert lower(k, n, alpha) <= k / n <= upper(k, n, alpha)


# --- radii and ceilings


def test_probability_nine_tenths_at_sigma_one_half():
    assert radius(0.9, 0.5) == pytest.approx(0.640776, abs=5e-7)
    assert radius(0.9, 0.25) - radius(0.1, 0.25) == pytest.approx(0.640776, abs=5e-7)  # Cohen's form with both classes


@pytest.mark.parametrize("sigma, r", [(0.125, 0.47643), (0.25, 0.95286), (0.5, 1.90573), (1.0, 3.81146)])
def test_draws_that_all_agree_reach_the_ceiling(sigma, r):
    assert ceiling(sigma, 100_000, 0.001) == pytest.approx(r, abs=5e-6)
    assert ceiling(sigma, 100_000, 0.001) == pytest.approx(3.8114566 * sigma, abs=1e-7)
    assert ceiling(sigma, 100_000, 0.001) == pytest.approx(float(radius(lower(100_000, 100_000, 0.001), sigma)), rel=1e-12)


def test_a_thousand_draws_reach_less():
    assert ceiling(1.0, 1000, 0.001) == pytest.approx(2.46326, abs=5e-6)


@pytest.mark.parametrize("step, sigma", [(0.01, 0.25), (0.05, 0.5), (0.1, 1.0)])
def test_the_grid_ends_at_the_last_step_below_the_ceiling(step, sigma):
    radii = grid_up_to(step, sigma, 1000, 0.001)
    assert radii[0] == 0 and radii[-1] <= ceiling(sigma, 1000, 0.001) < radii[-1] + step
    np.testing.assert_allclose(np.diff(radii), step)


def test_pooling_the_members_votes_would_certify_too_much():
    one_vote_a_draw, pooled = lower(900, 1000, 0.001), lower(4500, 5000, 0.001)
    assert one_vote_a_draw == pytest.approx(0.867464, abs=5e-7)
    assert radius(one_vote_a_draw, 0.25) == pytest.approx(0.278621, abs=5e-7)
    assert pooled == pytest.approx(0.886249, abs=5e-7)
    assert radius(pooled, 0.25) == pytest.approx(0.301705, abs=5e-7)
    # Five members that always agree, p = .9: the bound from 5n votes is wrong 92 times as often as alpha allows.
    k = np.arange(1001)
    wrong = stats.binom.pmf(k, 1000, 0.9)[lower(5 * k, 5000, 0.001) > 0.9].sum()
    assert wrong == pytest.approx(0.0919, abs=5e-5)
    assert stats.binom.pmf(k, 1000, 0.9)[lower(k, 1000, 0.001) > 0.9].sum() <= 0.001


# --- PREDICT


@pytest.mark.parametrize("first, second, p", [(60, 40, 0.0568879), (66, 34, 0.0017899), (67, 33, 0.0008737)])
def test_the_two_sided_test_has_the_published_p_values(first, second, p):
    assert two_sided(first, second) == pytest.approx(p, abs=5e-8)


@given(st.integers(0, 500), st.integers(0, 500))
def test_the_two_sided_test_is_scipys(a, b):
    first, second = max(a, b), min(a, b)
    expected = stats.binomtest(first, first + second, 0.5).pvalue if first else 1.0
    assert two_sided(first, second) == pytest.approx(expected, rel=1e-9, abs=1e-300)


# --- questions


@pytest.mark.parametrize(
    "sigma, alpha, n", [(0, 0.001, 9), (-1, 0.001, 9), (float("nan"), 0.001, 9), (1, 0, 9), (1, 0.5, 9), (1, 0.1, 0)]
)
def test_a_question_out_of_range_is_refused(sigma, alpha, n):
    with pytest.raises(ValueError, match=r"sigma > 0, 0 < alpha < 0.5 and n >= 1; got sigma="):
        Question(sigma, alpha, n)


def test_the_fixed_estimator_looks_once():
    assert list(FIXED.looks(Question(0.25, 0.001, 777))) == [777]


# --- the grid estimator


def race(question, p, images, *, stopping=True, seed=0):
    """Radii, bounds and draws of many images whose class has probability p; stopping or not, the votes are the same."""
    rng, looks = np.random.default_rng(seed), GRID.looks(question)
    steps = rng.binomial(np.diff([0, *looks])[:, None], p, (len(looks), images)).cumsum(0).astype(float)
    bound, draws, going = np.zeros(images), np.zeros(images, int), np.arange(images)
    for index, now in enumerate(looks):
        draws[going] = now
        # Equal (count, bound) have equal answers; asking once for each is what makes this fast.
        pairs, inverse = np.unique(np.stack([steps[index, going], bound[going]]), axis=1, return_inverse=True)
        answers, finished = GRID.look(question, index, pairs[0], pairs[1])
        bound[going] = answers[inverse]
        going = going[~finished[inverse]] if stopping or index == len(looks) - 1 else going
    assert len(going) == 0
    return GRID.radius(question, bound), bound, draws


@pytest.mark.parametrize(
    "n, looks",
    [
        (1000, [100, 200, 400, 700, 1000]),
        (10_000, [100, 200, 400, 700, 1000, 1500, 2000, 3000, 4000, 6000, 8000, 10_000]),
        (100_000, list(LOOKS)),
        (100, [100]),
        (150, [100, 150]),
    ],
)
def test_looks_above_n_are_dropped_and_the_last_is_n(n, looks):
    assert GRID.looks(Question(0.25, 0.001, n, (0.0,))) == looks


@pytest.mark.parametrize("n", [50, 100, 1000, 10_000, 100_000, 250_000])
def test_the_levels_of_all_looks_sum_to_alpha(n):
    question = Question(0.25, 0.001, n, (0.0,))
    assert len(GRID.levels(question)) == len(GRID.looks(question))
    assert GRID.levels(question).sum() == pytest.approx(0.001, rel=1e-12)


def test_levels_and_last_bound_are_those_of_the_methods():
    question = Question(0.25, 0.001, 100_000, (0.0,))
    assert len(LOOKS) == 18
    np.testing.assert_allclose(GRID.levels(question), [5.882353e-06] * 17 + [9e-4], rtol=1e-7)
    bound, finished = GRID.look(question, 17, np.array([100_000.0]), np.zeros(1))
    assert finished.all() and bound[0] == pytest.approx(9e-4**1e-5, rel=1e-12) == pytest.approx(0.9999299, abs=5e-8)


def test_the_bound_never_falls_from_look_to_look():
    question = Question(0.25, 0.001, 1000, (0.0, 0.5))
    first, _ = GRID.look(question, 0, np.array([100.0]), np.zeros(1))
    second, _ = GRID.look(question, 1, np.array([150.0]), first)
    assert first[0] == lower(100, 100, 0.000025) and second[0] == first[0]


@pytest.mark.parametrize("alpha, n", [(0.001, 1000), (0.05, 1000), (0.05, 10_000)])
@pytest.mark.parametrize("r", [0.0, 0.25])
def test_false_certificates_are_no_more_frequent_than_alpha(alpha, n, r):
    question, edge, images = Question(0.25, alpha, n, (0.0, 0.25, 0.5)), stats.norm.cdf(r / 0.25), 20_000
    allowed = stats.binom.ppf(1 - 1e-5, images, alpha)
    just_below, _, _ = race(question, edge - 1e-9, images)
    assert np.sum(np.nan_to_num(just_below, nan=-1) >= r) <= allowed
    _, bound, _ = race(question, edge, images, stopping=False, seed=1)
    assert np.sum(bound > edge) <= allowed


def test_false_certificates_do_occur_so_that_the_test_above_can_fail():
    found, _, _ = race(Question(0.25, 0.05, 1000, (0.0, 0.25, 0.5)), stats.norm.cdf(1) - 1e-9, 20_000)
    assert np.sum(np.nan_to_num(found, nan=-1) >= 0.25) > 20_000 * 0.05 * 0.5


@pytest.mark.parametrize("p", [0.3, 0.5, 0.7, 0.85, 0.97, 0.999, 1.0])
def test_stopping_early_never_raises_a_radius_and_hardly_ever_lowers_one(p):
    question = Question(0.25, 0.001, 4000, tuple(np.arange(20) * 0.05))
    stopped, _, draws = race(question, p, 2000)
    patient, _, _ = race(question, p, 2000, stopping=False)
    stopped, patient = np.nan_to_num(stopped, nan=-1), np.nan_to_num(patient, nan=-1)
    assert (stopped <= patient).all()
    assert np.sum(stopped < patient) <= stats.binom.ppf(1 - 1e-6, 2000, FUTILITY) + 1
    assert draws.max() <= 4000


def test_hopeless_images_stop_at_the_first_look_and_open_ones_do_not():
    question = Question(0.25, 0.001, 100_000, (0.0, 0.25, 0.5))
    bound, finished = GRID.look(question, 0, np.array([10.0, 55, 100]), np.zeros(3))
    np.testing.assert_array_equal(finished, [True, False, False])
    np.testing.assert_array_equal(np.isnan(GRID.radius(question, bound)), [True, True, False])


def test_futility_is_judged_at_its_share_of_one_in_ten_thousand():
    question = Question(0.25, 0.001, 100_000, (0.0,))
    count = np.arange(101.0)
    _, finished = GRID.look(question, 0, count, np.zeros(101))
    futile = stats.beta.ppf(1 - 1e-4 / 17, count + 1, np.maximum(100 - count, 1e-9)) < 0.5
    certified = lower(count, 100, 1e-4 / 17) > 0.5
    np.testing.assert_array_equal(finished, futile | certified)


def test_an_image_stops_once_every_radius_is_proven():
    _, finished = GRID.look(Question(0.25, 0.001, 1000, (0.0,)), 0, np.array([100.0, 70]), np.zeros(2))
    np.testing.assert_array_equal(finished, [True, False])


def test_an_image_stops_when_all_further_successes_would_not_reach_the_next_radius():
    reach = radius(9e-4 ** (1 / 1000), 0.25)
    for r, out in [(reach + 1e-6, True), (reach - 1e-6, False)]:
        bound, finished = GRID.look(Question(0.25, 0.001, 1000, (0.0, float(r))), 0, np.array([100.0, 99]), np.zeros(2))
        np.testing.assert_array_equal(finished, [out, True])  # one failure is enough to miss the ceiling
        assert (bound > 0.5).all()


def test_the_grid_certifies_the_largest_radius_whose_probability_is_proven():
    question = Question(0.5, 0.001, 1000, (0.25, 0.5, 0.75))
    edges = stats.norm.cdf(np.array([0.25, 0.5, 0.75]) / 0.5)
    bound = np.array([0.6, edges[0] - 1e-12, edges[0] + 1e-12, edges[1] + 1e-12, edges[2] - 1e-12, 0.9999])
    np.testing.assert_array_equal(GRID.radius(question, bound), [np.nan, np.nan, 0.25, 0.5, 0.5, 0.75])


def test_the_grid_abstains_at_radius_zero_unless_the_bound_exceeds_one_half():
    question = Question(0.5, 0.001, 1000, (0.0, 0.5))
    np.testing.assert_array_equal(GRID.radius(question, np.array([0.5, 0.5 + 1e-12])), [np.nan, 0.0])


@given(st.integers(1, 5000), st.floats(1e-4, 0.2))
def test_no_estimator_passes_the_ceiling(n, alpha):
    top = ceiling(0.25, n, alpha)
    for name, rule in ESTIMATORS.items():
        question = Question(0.25, alpha, n, tuple(np.linspace(0, 1.5, 200)))
        bound = np.zeros(1)
        for index, now in enumerate(rule.looks(question)):
            bound, _ = rule.look(question, index, np.array([float(now)]), bound)
        assert np.nan_to_num(rule.radius(question, bound))[0] <= top * (1 + 1e-9) + 1e-12, name
