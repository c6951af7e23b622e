"""Formulas for accuracies and radii, each with an interval. Pure numpy; no experiment is computed here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
"""Of every interval in a record or a table."""


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson score interval for a proportion (Wilson 1927).

    Raises:
        ValueError: if n is 0 or successes are not between 0 and n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a proportion needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the bound is 0 or 1 exactly; rounding must not move it past the value.
    return (0.0 if successes == 0 else (centre - half) / scale), (1.0 if successes == n else (centre + half) / scale)


def bootstrap_mean(values: Floats, confidence: float = CONFIDENCE, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over images (Efron 1979)."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def certified_accuracy(radius: Floats, correct: NDArray[np.bool_], at: float) -> float:
    """CA(r): share of all images whose certified class is right and whose unrounded radius is at least r."""
    return float(np.mean(correct & (radius >= at)))


def average_certified_radius(radius: Floats, correct: NDArray[np.bool_]) -> float:
    """ACR: mean radius over all images, wrong and abstained ones counting 0 (Zhai et al. 2020)."""
    return float(np.mean(np.where(correct, radius, 0.0)))


def whole_set_bound(accuracy: float, n: int, alpha: float, rho: float | None = None) -> float:
    """Certified accuracy that holds for the whole set with probability 1 - rho, although each certificate may fail with
    probability alpha (Cohen et al. 2019, appendix; Bernstein's inequality). rho is alpha unless given."""
    rho = alpha if rho is None else rho
    slack = alpha + math.sqrt(2 * alpha * (1 - alpha) * math.log(1 / rho) / n) + math.log(1 / rho) / (3 * n)
    return max(0.0, accuracy - slack)


def variance_ratio(k: float, correlation: float) -> float:
    """Variance of the mean of k equally correlated variables, as a share of one's (Horvath et al. 2022)."""
    return (1 + correlation * (k - 1)) / k


def fit_correlation(ratios: Sequence[float]) -> float:
    """The zeta whose :func:`variance_ratio` comes closest, in least squares, to ratios measured at k = 1, 2, ...

    Raises:
        ValueError: for fewer than two ratios.
    """
    if len(ratios) < 2:
        raise ValueError("a correlation needs the ratios of k = 1 and k = 2 at least")
    k = np.arange(1, len(ratios) + 1)
    # The model is linear in zeta: ratio - 1/k = zeta (1 - 1/k).
    slope, rest = 1 - 1 / k, np.asarray(ratios, float) - 1 / k
    return float(slope @ rest / (slope @ slope))


def mcnemar(first: int, second: int) -> float:
    """Exact two-sided p that two classifiers are equally often right, where ``first`` images were right by the first alone and
    ``second`` by the second alone (McNemar 1947): a fair coin decides each of them."""
    if first + second == 0:
        return 1.0
    return float(stats.binomtest(first, first + second, 0.5).pvalue)


def paired_difference(
    first: NDArray[np.bool_], second: NDArray[np.bool_], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Interval of the difference of two proportions of the same images, from Wilson's of each and their correlation (Newcombe
    1998, method 10); it has a width even where no image tells the two apart.

    Raises:
        ValueError: if there are no images.
    """
    n, both, neither = len(first), int((first & second).sum()), int((~first & ~second).sum())
    alone = int((first & ~second).sum()), int((~first & second).sum())
    counts = both + alone[0], both + alone[1]
    ends = [wilson(count, n, confidence) for count in counts]
    down, up = ([abs(count / n - end[side]) for count, end in zip(counts, ends, strict=True)] for side in (0, 1))
    margins = math.prod((*counts, *(n - count for count in counts)))
    covariance = float(both * neither - alone[0] * alone[1])
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)  # for continuity
    phi = covariance / math.sqrt(margins) if margins else 0.0

    def width(one: float, other: float) -> float:
        return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))

    difference = (counts[0] - counts[1]) / n
    return difference - width(down[0], up[1]), difference + width(up[0], down[1])


def beyond_chance(first: int, second: int) -> bool:
    """Whether ``first`` images against ``second`` are more by over two standard errors, were a fair coin to decide each."""
    return first - second > 2 * math.sqrt(first + second)


FLIPS = 9999
"""Random signs of :func:`sign_flip`, whose p is never below 1 / (flips + 1)."""


def sign_flip(differences: Floats, flips: int = FLIPS, seed: int = 0) -> float:
    """Two-sided p that paired differences are symmetric about 0, by random signs; never below 1 / (flips + 1)."""
    rng, total, reached = np.random.default_rng(seed), abs(float(differences.sum())), 0
    live = differences[differences != 0]
    for start in range(0, flips, 1000):
        signs = rng.integers(0, 2, (min(1000, flips - start), len(live))) * 2 - 1
        reached += int((np.abs(signs @ live) >= total * (1 - 1e-12)).sum())
    return (1 + reached) / (1 + flips)


def over_images(first: Floats, second: Floats) -> float:
    """Two-sided p that two classifiers are equally good, for the networks as they are, from values of the same images:
    :func:`mcnemar` for verdicts, else :func:`sign_flip`."""
    apart = first - second
    if are_verdicts(first, second):
        return mcnemar(int((apart > 0).sum()), int((apart < 0).sum()))
    return sign_flip(apart)


def are_verdicts(*values: Floats) -> bool:
    """Whether all values are right or wrong, 1 or 0."""
    return bool(np.isin(np.stack(values), (0.0, 1.0)).all())


def over_trainings(differences: Floats, step: float) -> float:
    """Two-sided p that differences, one a training seed, have mean 0 over trainings (Student's paired t).

    Args:
        differences: of two seeds at least.
        step: the smallest amount by which a difference can change. A deviation below it counts as it: accuracies move by
            whole images, so that a few seeds agree exactly by coincidence, which would prove anything.
    """
    mean, deviation = abs(float(differences.mean())), max(float(differences.std(ddof=1)), step)
    if mean == 0:
        return 1.0
    return 2 * float(stats.t.sf(mean * math.sqrt(len(differences)) / deviation, len(differences) - 1)) if deviation else 0.0


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for their number, so that all verdicts together err with the level's probability (Holm 1979)."""
    found, highest = [0.0] * len(ps), 0.0
    for place, index in enumerate(np.argsort(ps, kind="stable")):
        highest = max(highest, min(1.0, (len(ps) - place) * ps[index]))
        found[index] = highest
    return found
