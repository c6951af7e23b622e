"""Estimators with numbers of draws that are chosen in advance: Clopper-Pearson, its randomised form, and phases."""

from __future__ import annotations

import numpy as np

from defenses.bounds import Bools, Floats, lower, randomised_lower, upper
from defenses.estimators.api import FUTILITY, Estimator, Question, Tally, largest, proven


class Fixed(Estimator):
    """Clopper-Pearson on n draws, n chosen in advance (Cohen et al. 2019, CERTIFY).

    Proof: one exact binomial bound at level alpha, so P(radius too large) <= alpha.
    """

    def trials(self, question: Question) -> list[list[int]]:
        return [[question.n]]

    def look(self, question: Question, trial: int, index: int, tally: Tally) -> tuple[Floats, Bools]:
        return lower(tally.count, question.n, question.alpha), np.ones(len(tally.count), bool)


class Randomised(Fixed):
    """Randomised Clopper-Pearson on n draws (Voracek 2024): a little more radius from the same draws, for a logged coin.

    Proof: the coin makes the binomial test's level exactly alpha instead of at most alpha. It is drawn before the votes, once
    an image, and stored; whoever draws again until it pleases has no certificate. A coin below alpha proves anything if all
    votes agree: one sure image in 1/alpha has an absurd radius, so prefer another estimator where ACR is the question.
    """

    def look(self, question: Question, trial: int, index: int, tally: Tally) -> tuple[Floats, Bools]:
        bound = randomised_lower(tally.count, question.n, question.alpha, tally.chance)
        return bound, np.ones(len(tally.count), bool)


class Phases(Estimator):
    """Staged adaptive sampling for one radius (Horvath et al. 2022, section 5): a few draws decide the clear cases.

    Every phase selects the class anew and counts fresh draws; nothing is carried over.

    Proof: s phases, each an exact binomial bound at level alpha / s for the class it selected before its count; by the union
    bound none is wrong with probability 1 - alpha. Upper bounds at beta / (s - 1) give up early on a probable enough class
    with probability at most beta.

    Attributes:
        shares: draws of each phase as shares of n; 1,000, 10,000 and 125,000 for n = 100,000, as in the paper (the last makes
            up for alpha / 3). In whole hundreds, one at least: so few draws are all that can go beyond n.
    """

    preset = True

    def __init__(self, shares: tuple[float, ...] = (0.01, 0.1, 1.25)) -> None:
        self.shares = shares

    def trials(self, question: Question) -> list[list[int]]:
        return [[max(100, round(share * question.n / 100) * 100)] for share in self.shares]

    def look(self, question: Question, trial: int, index: int, tally: Tally) -> tuple[Floats, Bools]:
        trials = self.trials(question)
        bound = lower(tally.count, trials[trial][0], question.alpha / len(trials))
        if trial == len(trials) - 1:
            return bound, np.ones(len(bound), bool)
        hopeless = upper(tally.count, trials[trial][0], FUTILITY / (len(trials) - 1)) < question.wanted[0]
        return bound, proven(question.wanted, bound)[:, 0] | hopeless

    def radius(self, question: Question, bound: Floats) -> Floats:
        return largest(question, np.asarray(question.radii), bound)
