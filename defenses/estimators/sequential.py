"""Estimators that look at cumulative counts and stop as soon as the answer is certain."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from defenses.bounds import Bools, Floats, anytime_lower, anytime_upper, lower, upper
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


DENSE = tuple(sorted({round(1.25**step) * 100 for step in range(42)}))
"""100, ..., 941,000 draws, each 1.25 times the last, in whole hundreds."""


class GroupSequential(Sequential):
    """Clopper-Pearson at looks at cumulative counts (methods 7.5 f).

    Proof: interim looks share a part of alpha equally, the last has the rest; by the union bound all hold together with
    probability 1 - alpha.

    Attributes:
        interim: the part of alpha that interim looks share. For a grid, 0.1 leaves the last look nearly the power of fixed n;
            for one radius, most images are decided long before, and 0.5 saves draws (0.002 of accuracy at most).
        times: at which cumulative draws it looks, where these are below n.
    """

    def __init__(self, preset: bool = False, interim: float = 0.1, times: Sequence[int] = LOOKS) -> None:
        super().__init__(preset)
        self.interim = interim
        self.times = times

    def check(self, question: Question) -> None:
        super().check(question)
        if not question.radii:
            raise ValueError("the grid estimator needs radii")

    def looks(self, question: Question) -> Sequence[int]:
        return [*(t for t in self.times if t < question.n), question.n]

    def levels(self, question: Question) -> Floats:
        """Error probability of each look; they sum to alpha."""
        interim = len(self.looks(question)) - 1
        if not interim:
            return np.array([question.alpha])
        return np.array([self.interim * question.alpha / interim] * interim + [(1 - self.interim) * question.alpha])

    def lower(self, question: Question, index: int, count: Floats) -> Floats:
        return lower(count, self.looks(question)[index], self.levels(question)[index])

    def upper(self, question: Question, index: int, count: Floats) -> Floats:
        looks = self.looks(question)
        return upper(count, looks[index], FUTILITY / (len(looks) - 1))


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
