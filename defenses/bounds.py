"""Confidence bounds for vote counts, and estimators that turn counts into certified radii (methods 7.1 to 7.5). Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def lower(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Floats:
    """One-sided Clopper-Pearson bound: P(lower > p) <= alpha for k successes in n draws; 0 at k = 0."""
    k, n = np.asarray(k, float), np.asarray(n, float)
    bound = special.betaincinv(np.maximum(k, 1), n - np.maximum(k, 1) + 1, alpha)
    return np.where(k == 0, 0.0, bound)


def upper(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Floats:
    """One-sided Clopper-Pearson bound: P(upper < p) <= alpha; 1 at k = n."""
    return 1 - lower(np.asarray(n, float) - np.asarray(k, float), n, alpha)


def radius(p: ArrayLike, sigma: float) -> Floats:
    """sigma * Phi^-1(p), the l2 radius within which a class of noise probability at least p > 1/2 stays (Cohen et al. 2019)."""
    return sigma * special.ndtri(np.asarray(p, float))


def ceiling(sigma: float, n: int, alpha: float) -> float:
    """The largest radius that n draws can certify at level alpha: all of them agree (invariant I7); 0 if even then none."""
    return max(0.0, float(radius(alpha ** (1 / n), sigma)))


def two_sided(first: ArrayLike, second: ArrayLike) -> Floats:
    """p-value of the exact two-sided binomial test that two counts, first >= second, have equal probability."""
    first, second = np.asarray(first, float), np.asarray(second, float)
    tail = special.betainc(np.maximum(first, 1), second + 1, 0.5)  # P(Bin(first + second, 1/2) >= first)
    return np.where(first <= 0, 1.0, np.minimum(1.0, 2 * tail))


@dataclass(frozen=True)
class Question:
    """What is to be certified: noise ``sigma`` in pixels, error probability ``alpha`` per image, at most ``n`` draws, and the
    radii that matter (for estimators that decide a grid)."""

    sigma: float
    alpha: float
    n: int
    radii: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.sigma > 0 or not 0 < self.alpha < 0.5 or self.n < 1:
            raise ValueError(
                "certification needs sigma > 0, 0 < alpha < 0.5 and n >= 1; "
                f"got sigma={self.sigma}, alpha={self.alpha}, n={self.n}"
            )


class Estimator(Protocol):
    """Looks at cumulative counts at preset times and says what is proven and who needs no more draws."""

    def looks(self, question: Question) -> Sequence[int]:
        """Cumulative numbers of draws at which counts are looked at; the last is n."""

    def look(self, question: Question, index: int, count: Floats, bound: Floats) -> tuple[Floats, Bools]:
        """Counts at look ``index`` and the bound so far -> the bound on the top class's probability, and who is finished."""

    def radius(self, question: Question, bound: Floats) -> Floats:
        """Certified radius for each bound; NaN where the answer is to abstain."""


class Fixed:
    """Clopper-Pearson on n draws, n chosen in advance (Cohen et al. 2019, CERTIFY).

    Proof: one exact binomial bound at level alpha, so P(radius too large) <= alpha.
    """

    def looks(self, question: Question) -> Sequence[int]:
        return [question.n]

    def look(self, question: Question, index: int, count: Floats, bound: Floats) -> tuple[Floats, Bools]:
        return lower(count, question.n, question.alpha), np.ones(len(count), bool)

    def radius(self, question: Question, bound: Floats) -> Floats:
        return np.where(bound < 0.5, np.nan, radius(bound, question.sigma))


LOOKS = (
    100, 200, 400, 700, 1_000, 1_500, 2_000, 3_000, 4_000,
    6_000, 8_000, 11_000, 16_000, 23_000, 32_000, 45_000, 64_000, 100_000,
)  # fmt: skip
FUTILITY = 1e-4


class Grid:
    """Decides a whole grid of radii in one run, with as few draws as group-sequential looks allow (methods 7.5 f).

    Proof: interim looks share 0.1 alpha equally, the last has 0.9 alpha. By the union bound all Clopper-Pearson bounds hold
    together with probability 1 - alpha, and so does their running maximum, whatever rule stops the looking. Futility (giving up
    on the next radius when an upper bound excludes it) only makes radii smaller: it costs at most 1e-4 of power.
    """

    def looks(self, question: Question) -> Sequence[int]:
        return [*(t for t in LOOKS if t < question.n), question.n]

    def levels(self, question: Question) -> Floats:
        """Error probability of each look; they sum to alpha."""
        interim = len(self.looks(question)) - 1
        if not interim:
            return np.array([question.alpha])
        return np.array([0.1 * question.alpha / interim] * interim + [0.9 * question.alpha])

    def look(self, question: Question, index: int, count: Floats, bound: Floats) -> tuple[Floats, Bools]:
        looks, levels = self.looks(question), self.levels(question)
        now = looks[index]
        bound = np.maximum(bound, lower(count, now, levels[index]))
        if index == len(looks) - 1:
            return bound, np.ones(len(count), bool)
        wanted = np.append(special.ndtr(np.asarray(question.radii) / question.sigma), 2.0)
        following = wanted[np.sum(self._proven(wanted, bound), axis=1)]
        at_best = np.max(
            [
                lower(count + then - now, then, level)
                for then, level in zip(looks[index + 1 :], levels[index + 1 :], strict=True)
            ],
            axis=0,
        )
        out_of_reach = at_best < following
        futile = upper(count, now, FUTILITY / (len(looks) - 1)) < following
        return bound, out_of_reach | futile

    def radius(self, question: Question, bound: Floats) -> Floats:
        wanted = special.ndtr(np.asarray(question.radii) / question.sigma)
        proven = np.sum(self._proven(wanted, bound), axis=1)
        return np.append(question.radii, np.nan)[proven - 1]

    @staticmethod
    def _proven(wanted: Floats, bound: Floats) -> Bools:
        """(images, radii): a prefix of every row, because wanted probabilities rise along the grid."""
        return (bound[:, None] >= wanted) & (bound[:, None] > 0.5)


ESTIMATORS: dict[str, Estimator] = {"fixed": Fixed(), "grid": Grid()}


def grid_up_to(step: float, sigma: float, n: int, alpha: float) -> tuple[float, ...]:
    """Radii 0, step, 2 step, ... that n draws can certify at level alpha."""
    top = ceiling(sigma, n, alpha)
    return tuple(i * step for i in range(int(top / step) + 1))
