"""Estimators that look at cumulative counts and stop as soon as the answer is certain."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from defenses.bounds import Bools, Floats, anytime_lower, anytime_upper, ceiling, lower, upper
from defenses.estimators.api import FUTILITY, Estimator, Question, Tally, largest, proven


class Sequential(Estimator):
    """Lower bounds that hold at all looks together, so that their running maximum holds whatever rule stops the looking.

    With radii, stops when the largest one is proven, or the next one is out of reach of all draws that remain, or an upper
    bound excludes it (futility, which can only make radii smaller). Without, goes on to n and gives the whole radius.

    Attributes:
        preset: one radius a run, which needs far fewer draws than a grid.
    """

    def __init__(self, preset: bool = False) -> None:
        self.preset = preset

    @abstractmethod
    def looks(self, question: Question) -> Sequence[int]:
        """Cumulative draws at each look."""

    @abstractmethod
    def lower(self, question: Question, index: int, count: Floats) -> Floats:
        """The bound from the count at one look."""

    @abstractmethod
    def upper(self, question: Question, index: int, count: Floats) -> Floats:
        """An upper bound; at all looks together it fails with probability :data:`FUTILITY` at most."""

    def reach(self, question: Question, index: int, count: Floats) -> Floats:
        """The highest bound that is possible if all remaining draws are successes."""
        looks = self.looks(question)
        after = range(index + 1, len(looks))
        return np.max([self.lower(question, then, count + looks[then] - looks[index]) for then in after], axis=0)

    def trials(self, question: Question) -> list[list[int]]:
        return [list(self.looks(question))]

    def look(self, question: Question, trial: int, index: int, tally: Tally) -> tuple[Floats, Bools]:
        bound = np.maximum(tally.bound, self.lower(question, index, tally.count))
        if index == len(self.looks(question)) - 1:
            return bound, np.ones(len(bound), bool)
        if not question.radii:
            return bound, np.zeros(len(bound), bool)
        following = np.append(question.wanted, 2.0)[np.sum(proven(question.wanted, bound), axis=1)]
        finished = self.upper(question, index, tally.count) < following
        still = ~finished & (following <= 1)
        finished |= following > 1
        finished[still] = self.reach(question, index, tally.count[still]) < following[still]
        return bound, finished

    def radius(self, question: Question, bound: Floats) -> Floats:
        if not question.radii:
            return super().radius(question, bound)
        return largest(question, np.asarray(question.radii), bound)


LOOKS = (
    100, 200, 400, 700, 1_000, 1_500, 2_000, 3_000, 4_000,
    6_000, 8_000, 11_000, 16_000, 23_000, 32_000, 45_000, 64_000, 100_000,
)  # fmt: skip


class GroupSequential(Sequential):
    """Clopper-Pearson at up to 18 looks at cumulative counts (methods 7.5 f).

    Proof: interim looks share 0.1 alpha equally, the last has 0.9 alpha; by the union bound all hold together with probability
    1 - alpha.
    """

    def check(self, question: Question) -> None:
        super().check(question)
        if not question.radii:
            raise ValueError("the grid estimator needs radii")

    def looks(self, question: Question) -> Sequence[int]:
        return [*(t for t in LOOKS if t < question.n), question.n]

    def levels(self, question: Question) -> Floats:
        """Error probability of each look; they sum to alpha."""
        interim = len(self.looks(question)) - 1
        if not interim:
            return np.array([question.alpha])
        return np.array([0.1 * question.alpha / interim] * interim + [0.9 * question.alpha])

    def lower(self, question: Question, index: int, count: Floats) -> Floats:
        return lower(count, self.looks(question)[index], self.levels(question)[index])

    def upper(self, question: Question, index: int, count: Floats) -> Floats:
        looks = self.looks(question)
        return upper(count, looks[index], FUTILITY / (len(looks) - 1))


class OneRadius(GroupSequential):
    """Clopper-Pearson at several looks for one radius, which lie where they can decide (methods 7.5 f).

    Votes that all agree prove the radius at some number of draws and not before: there is the first look that may certify, and
    further ones each 1.15 times as late. Before it only futility is looked for, which takes nothing from alpha.

    Proof: looks and levels follow from the question alone; 0.3 alpha for the first, 0.4 alpha shared equally by those after it,
    0.3 alpha for n. They sum to alpha, so by the union bound all hold together with probability 1 - alpha.
    """

    def looks(self, question: Question) -> Sequence[int]:
        return _plan(question)[0]

    def levels(self, question: Question) -> Floats:
        return _plan(question)[1]

    def ceiling(self, question: Question, chance: float = 1.0) -> float:
        # Asked for so large a radius that only n draws can prove it, the last look has all of alpha.
        return ceiling(question.sigma, question.n, question.alpha)

    def lower(self, question: Question, index: int, count: Floats) -> Floats:
        return super().lower(question, index, count) if self.levels(question)[index] else np.zeros(len(count))


EARLY = tuple(sorted({round(1.25**step) * 100 for step in range(42)}))
"""Looks for futility: 100, ..., 941,000 draws, each 1.25 times the last, in whole hundreds."""


@lru_cache(maxsize=256)
def _plan(question: Question) -> tuple[list[int], Floats]:
    """Looks of :class:`OneRadius`, and their levels."""
    alpha, n = question.alpha, question.n
    with np.errstate(divide="ignore"):
        unanimous = np.log(0.3 * alpha) / np.log(question.wanted[0])  # draws at which all agreeing prove the radius
    times, t = [], max(100.0, 100 * np.ceil(unanimous / 100))
    early = [time for time in EARLY if time < min(t, n)]
    while t < n:
        times.append(-(-int(t) // 100) * 100)
        t *= 1.15
    times = sorted({time for time in times if time < n})
    if not times:
        return [*early, n], np.array([0.0] * len(early) + [alpha])
    after = len(times) - 1
    shares = [0.3, *[0.4 / max(after, 1)] * after, 0.3]
    shares[-1] = 1 - sum(shares[:-1])  # all of alpha is spent, however few looks there are
    return [*early, *times, n], alpha * np.array([0.0] * len(early) + shares)


class UnionBound(Sequential):
    """Clopper-Pearson at geometric times, each 1.1 times the last, in whole hundreds (Voracek 2024; methods 7.5 c).

    Proof: look t has level 5 alpha / ((t + 4)(t + 5)), t = 1, 2, ..., which sums to alpha over all t, however many there are;
    by the union bound all hold together with probability 1 - alpha.
    """

    def looks(self, question: Question) -> Sequence[int]:
        times, t = [], 100.0
        while t < question.n:
            times.append(-(-int(t) // 100) * 100)
            t *= 1.1
        return [*sorted({time for time in times if time < question.n}), question.n]

    def level(self, error: float, index: int) -> float:
        """The share of an error probability that look ``index``, from 0, has."""
        return 5 * error / ((index + 5) * (index + 6))

    def lower(self, question: Question, index: int, count: Floats) -> Floats:
        return lower(count, self.looks(question)[index], self.level(question.alpha, index))

    def upper(self, question: Question, index: int, count: Floats) -> Floats:
        return upper(count, self.looks(question)[index], self.level(FUTILITY, index))


class Betting(Sequential):
    """A confidence sequence by betting: may stop at any time, for any reason (Voracek 2024; methods 7.5 b).

    Proof: the Krichevsky-Trofimov bettor's wealth against the true p is a non-negative martingale that starts at 1, and
    exceeds 1/alpha at any time with probability at most alpha (Ville); the bound is above p only then. The released code's
    threshold ln(1/(2 alpha)) has no proof; ours is ln(1/alpha). Looks every hundred draws, later every twentieth part.
    """

    def looks(self, question: Question) -> Sequence[int]:
        times, t = [], 100
        while t < question.n:
            times.append(t)
            t += max(100, t // 2000 * 100)
        return [*times, question.n]

    def lower(self, question: Question, index: int, count: Floats) -> Floats:
        return anytime_lower(count, self.looks(question)[index], question.alpha)

    def upper(self, question: Question, index: int, count: Floats) -> Floats:
        return anytime_upper(count, self.looks(question)[index], FUTILITY)

    def reach(self, question: Question, index: int, count: Floats) -> Floats:
        # Successes only add to the wealth against any p below the frequency: the last look is the best one.
        looks = self.looks(question)
        return self.lower(question, len(looks) - 1, count + looks[-1] - looks[index])
