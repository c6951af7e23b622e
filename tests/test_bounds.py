"""Confidence bounds for vote counts, and the radii that they prove (methods 7.1, 7.3, 7.5, 3.1, 3.4)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from defenses.bounds import (
    anytime_lower,
    anytime_upper,
    ceiling,
    log_wealth,
    lower,
    radius,
    randomised_lower,
    two_sided,
    upper,
    wald,
)

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


def test_no_success_bounds_by_zero_and_no_failure_by_one():
    assert lower(0, 1000, 0.001) == 0 and upper(1000, 1000, 0.001) == 1
    np.testing.assert_array_equal(lower(np.array([0, 0]), np.array([1, 100_000]), 0.001), [0, 0])


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


# --- randomised Clopper-Pearson

coins = st.floats(0, 1)
small = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    "k, chance, bound", [(99, 0.5, 0.9174848), (100, 0.5, 0.9397456), (99, 1.0, 0.9113731), (100, 1.0, 0.9332543)]
)
def test_randomised_bounds_are_those_of_the_methods(k, chance, bound):
    assert randomised_lower(k, 100, 0.001, chance) == pytest.approx(bound, abs=6e-8)


@given(counts, levels)
def test_a_coin_of_one_gives_clopper_and_pearson(kn, alpha):
    assert randomised_lower(*kn, alpha, 1.0) == pytest.approx(lower(*kn, alpha), rel=1e-9, abs=1e-15)


@given(counts, levels, coins, coins)
def test_a_smaller_coin_never_gives_a_smaller_bound(kn, alpha, one, other):
    k, n = kn
    high, low = randomised_lower(k, n, alpha, sorted([one, other]))
    assert high >= low >= lower(k, n, alpha) * (1 - 1e-12)
    if k < n:
        assert high <= lower(k + 1, n, alpha) * (1 + 1e-9) + 1e-15  # a coin is worth one vote at most


@given(small, st.floats(1e-4, 0.2), coins)
def test_the_randomised_test_has_the_level_alpha_exactly(kn, alpha, chance):
    k, n = kn
    bound = float(randomised_lower(k, n, alpha, chance))
    excess = stats.binom.sf(k, n, bound) + chance * stats.binom.pmf(k, n, bound)
    if k == 0 and chance >= alpha:
        assert bound == 0  # even p = 0 gives more than alpha
    elif k == n and chance <= alpha:
        assert bound >= 1 - 1e-12 or bound == pytest.approx(min(1.0, (alpha / max(chance, alpha)) ** (1 / n)))
    else:
        assert excess == pytest.approx(alpha, rel=1e-6)


def test_the_randomised_bound_takes_a_coin_for_each_count():
    k, chance = np.array([99, 100, 0]), np.array([0.5, 1.0, 0.3])
    found = randomised_lower(k, 100, 0.001, chance)
    assert found.tolist() == [float(randomised_lower(a, 100, 0.001, b)) for a, b in zip(k, chance)]


@pytest.mark.parametrize("n", [1, 100, 100_000])
def test_the_luckiest_coin_still_gives_a_finite_radius(n):
    bound = randomised_lower(n, n, 0.001, np.array([0, 0.0005, 0.001]))
    assert (bound < 1).all() and np.isfinite(radius(bound, 0.25)).all()


# --- betting


def test_the_bettor_owns_the_mixtures_share_of_the_likelihood():
    # Against p = 1/2 every sequence of n draws has probability 2^-n.
    assert np.exp(log_wealth(3, 3, 0.5)) / 2**3 == pytest.approx(0.3125, rel=1e-12)
    assert np.exp(log_wealth(2, 3, 0.5)) / 2**3 == pytest.approx(0.0625, rel=1e-12)
    assert log_wealth(0, 0, 0.3) == 0


@given(st.lists(st.booleans(), max_size=60), st.floats(0.01, 0.99))
def test_wealth_is_the_product_of_bets_in_any_order(draws, p):
    wealth, k = 0.0, 0
    for n, success in enumerate(draws):
        guess = (k + 0.5) / (n + 1)
        wealth += np.log(guess / p if success else (1 - guess) / (1 - p))
        k += success
    assert log_wealth(k, len(draws), p) == pytest.approx(wealth, rel=1e-9, abs=1e-9)


@given(small, st.floats(0.001, 0.999))
def test_no_bet_wins_on_average_against_the_truth(kn, p):
    k, n = kn
    won, lost = np.exp(log_wealth([k + 1, k], n + 1, p) - log_wealth(k, n, p))
    assert p * won + (1 - p) * lost == pytest.approx(1, rel=1e-7)


@pytest.mark.parametrize("r, betting, fixed", [(0.0, 13, 10), (0.5, 25, 19), (1.0, 55, 40), (2.0, 459, 301)])
def test_draws_that_all_succeed_prove_a_probability_after_so_many(r, betting, fixed):
    n, wanted = np.arange(1, 600), stats.norm.cdf(r)
    assert n[log_wealth(n, n, wanted) >= np.log(1000)][0] == betting
    assert n[anytime_lower(n, n, 0.001) >= wanted][0] == betting
    assert n[lower(n, n, 0.001) >= wanted][0] == fixed


@pytest.mark.parametrize(
    "k, n, bound", [(99, 100, 0.877114), (990, 1000, 0.968035), (99_000, 100_000, 0.988317), (100_000, 100_000, 0.999868)]
)
def test_anytime_bounds_are_those_of_the_methods(k, n, bound):
    assert anytime_lower(k, n, 0.001) == pytest.approx(bound, abs=5e-7)


def test_the_largest_anytime_radius_is_smaller_than_the_fixed_one():
    assert radius(anytime_lower(100_000, 100_000, 0.001), 0.25) == pytest.approx(0.911897, abs=5e-7)


@given(counts, levels)
def test_an_anytime_bound_is_where_the_wealth_reaches_one_over_alpha(kn, alpha):
    k, n = kn
    bound = float(anytime_lower(k, n, alpha))
    if k == 0:
        assert bound == 0
    else:
        assert 0 < bound < k / n
        assert log_wealth(k, n, bound) == pytest.approx(-np.log(alpha), rel=1e-6, abs=1e-6)
        assert (log_wealth(k, n, np.linspace(bound, k / n, 9)[1:]) < -np.log(alpha)).all()
    assert anytime_upper(n - k, n, alpha) == 1 - bound
    assert bound <= lower(k, n, alpha)  # what holds at all times is never better than what holds at one


def test_without_draws_betting_knows_nothing():
    assert (anytime_lower(0, 0, 0.001), anytime_upper(0, 0, 0.001)) == (0, 1)


# --- the oracle


def test_no_test_can_do_with_fewer_draws_than_walds():
    information = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    assert wald(0.9, 0.5, 0.001, 1e-4) == pytest.approx(np.log(1000) / information, rel=1e-12)
    assert wald(0.1, 0.5, 0.001, 1e-4) == pytest.approx(np.log(10_000) / information, rel=1e-12)
    assert wald(0.5, 0.5, 0.001, 1e-4) == np.inf


@pytest.mark.parametrize("r, fixed", [(0.0, 10), (0.5, 19), (1.0, 40), (2.0, 301)])
def test_of_a_sure_class_the_oracle_needs_the_draws_that_prove_it(r, fixed):
    assert np.ceil(wald(1.0, stats.norm.cdf(r), 0.001, 1e-4)) == fixed


def test_the_oracle_needs_more_the_nearer_the_truth_is():
    p = np.linspace(0, 1, 101)
    needed = wald(p, 0.8, 0.001, 0.001)
    assert (np.diff(needed[p < 0.8]) > 0).all() and (np.diff(needed[p > 0.8]) < 0).all()


# --- PREDICT


@pytest.mark.parametrize("first, second, p", [(60, 40, 0.0568879), (66, 34, 0.0017899), (67, 33, 0.0008737)])
def test_the_two_sided_test_has_the_published_p_values(first, second, p):
    assert two_sided(first, second) == pytest.approx(p, abs=5e-8)


@given(st.integers(0, 500), st.integers(0, 500))
def test_the_two_sided_test_is_scipys(a, b):
    first, second = max(a, b), min(a, b)
    expected = stats.binomtest(first, first + second, 0.5).pvalue if first else 1.0
    assert two_sided(first, second) == pytest.approx(expected, rel=1e-9, abs=1e-300)
