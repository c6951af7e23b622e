"""Formulas against worked values (methods 7.2, 7.4, 9.1)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import metrics

RADIUS = np.array([0.5, 0.3, 0.0, 0.8, 0.2])
CORRECT = np.array([True, False, False, True, True])


def test_wilson_interval() -> None:
    assert metrics.wilson(290, 500) == pytest.approx((0.5363, 0.6225), abs=5e-5)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share_and_stays_a_probability(kn: tuple[int, int]) -> None:
    low, high = metrics.wilson(*kn)
    assert 0 <= low <= kn[0] / kn[1] <= high <= 1


@pytest.mark.parametrize(("k", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_no_proportion_no_interval(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="a proportion needs"):
        metrics.wilson(k, n)


def test_average_certified_radius_and_certified_accuracy() -> None:
    assert metrics.average_certified_radius(RADIUS, CORRECT) == pytest.approx(0.3)
    assert metrics.certified_accuracy(RADIUS, CORRECT, 0.25) == pytest.approx(0.4)
    assert metrics.certified_accuracy(RADIUS, CORRECT, 0.0) == pytest.approx(0.6)
    assert metrics.certified_accuracy(RADIUS, CORRECT, 0.5) == pytest.approx(0.4)  # a radius equal to r counts


def test_the_bound_for_the_whole_set() -> None:
    assert metrics.whole_set_bound(0.6, 500, 0.001) == pytest.approx(0.589141, abs=1e-6)
    assert metrics.whole_set_bound(0.0, 500, 0.001) == 0.0


def test_the_bootstrap_is_repeatable_and_covers_the_mean() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(100):
        low, high = metrics.bootstrap_mean(rng.exponential(size=200), resamples=400)
        inside += low <= 1 <= high
    assert inside >= 85
    assert metrics.bootstrap_mean(RADIUS) == metrics.bootstrap_mean(RADIUS)
