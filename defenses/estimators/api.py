"""What an estimator is: it looks at vote counts at preset times, and says what is proven and who needs no more draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from defenses.bounds import Bools, Floats, radius

FUTILITY = 1e-4
"""Probability of giving up on a radius that could have been proven. It costs power, never soundness."""


@dataclass(frozen=True)
class Question:
    """What is to be certified: noise ``sigma`` in pixels, error probability ``alpha`` per image, at most ``n`` draws, and the
    increasing radii that matter (for estimators that decide radii)."""

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
        if list(self.radii) != sorted(set(self.radii)) or not all(r >= 0 for r in self.radii):
            raise ValueError(f"radii must be non-negative and increasing, got {self.radii}")

    @property
    def wanted(self) -> Floats:
        """Probability of the top class that each radius needs."""
        return special.ndtr(np.asarray(self.radii, float) / self.sigma)


@dataclass(frozen=True)
class Tally:
    """What is known of some images at a look, a number an image.

    Attributes:
        count: votes for the selected class so far in this trial.
        bound: proven lower bound on the class's probability before this look.
        chance: a number of U[0, 1] that was drawn before any vote.
    """

    count: Floats
    bound: Floats
    chance: Floats


class Estimator(ABC):
    """Looks at counts at preset times.

    Attributes:
        preset: decides one radius; the radii of a curve need a run each.
    """

    preset: bool = False

    @abstractmethod
    def trials(self, question: Question) -> list[list[int]]:
        """Numbers of draws at which counts are looked at. Each trial selects its class anew and counts fresh draws."""

    @abstractmethod
    def look(self, question: Question, trial: int, index: int, tally: Tally) -> tuple[Floats, Bools]:
        """Look ``index`` of a trial: the bound on the top class's probability, and who is finished (all, at the very last)."""

    def radius(self, question: Question, bound: Floats) -> Floats:
        """Certified radius for each bound, by default the whole of it; NaN where the answer is to abstain."""
        return np.where(bound < 0.5, np.nan, radius(np.maximum(bound, 0.5), question.sigma))

    def ceiling(self, question: Question, chance: float = 1.0) -> float:
        """The largest radius that can come out: that of draws which all agree (invariant I7); 0 if even then none."""
        if self.preset and not question.radii:
            question = replace(question, radii=(0.0,))
        best = np.zeros(1)
        for trial, looks in enumerate(self.trials(question)):
            bound = np.zeros(1)
            for index, now in enumerate(looks):
                bound, _ = self.look(question, trial, index, Tally(np.array([float(now)]), bound, np.array([chance])))
            best = np.maximum(best, bound)
        return max(0.0, float(radius(best, question.sigma)[0]))

    def check(self, question: Question) -> None:
        """Refuse a question that this estimator cannot answer."""
        if self.preset and len(question.radii) != 1:
            raise ValueError(f"{type(self).__name__} decides one radius a run, got radii {question.radii}")


def largest(question: Question, radii: Floats, bound: Floats) -> Floats:
    """The largest of the question's radii that each bound proves, NaN where it proves none."""
    return np.append(radii, np.nan)[np.sum(proven(question.wanted, bound), axis=1) - 1]


def proven(wanted: Floats, bound: Floats) -> Bools:
    """(images, radii): a prefix of every row, because wanted probabilities rise along the grid."""
    return (bound[:, None] >= wanted) & (bound[:, None] > 0.5)
