"""Adaptive sampling for one preset radius (Horvath et al. 2022, section 5): a few draws decide the clear cases.

Every phase selects the class anew and counts fresh draws; nothing is carried over. The lower bounds share alpha, the upper
bounds that give up early share beta: a class that is not robust at the radius is certified with probability at most alpha, one
whose probability suffices is given up with probability at most beta.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attacks.streams import Streams
from defenses.bounds import lower, radius, upper
from defenses.smoothing import BLOCK, Base, Voting


@dataclass(frozen=True)
class Phases:
    """What is to be decided, and how.

    Attributes:
        sigma: standard deviation of the noise in pixels.
        radius: l2 radius at which robustness is asked for.
        n: estimation draws of each phase.
        n0: selection draws of each phase.
        alpha: probability of a wrong certificate, per image.
        beta: probability of giving up early although the class is probable enough.
    """

    sigma: float
    radius: float
    n: tuple[int, ...] = (1_000, 10_000, 125_000)
    n0: int = 100
    alpha: float = 0.001
    beta: float = 0.0001

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and self.radius >= 0 and self.n and self.n0 >= 1 and 0 < self.alpha < 0.5 and 0 < self.beta < 1):
            raise ValueError(
                f"phases need sigma > 0, radius >= 0, draws, n0 >= 1, 0 < alpha < 0.5 and 0 < beta < 1; got {self}"
            )
        if list(self.n) != sorted(set(self.n)) or self.n[0] < 1:
            raise ValueError(f"phases need increasing numbers of draws, got {self.n}")

    def certified(self, phase: int, count: np.ndarray) -> np.ndarray:
        """Whether so many votes in a phase prove the radius."""
        bound = lower(count, self.n[phase], self.alpha / len(self.n))
        return (bound > 0.5) & (radius(np.maximum(bound, 0.5), self.sigma) >= self.radius)

    def hopeless(self, phase: int, count: np.ndarray) -> np.ndarray:
        """Whether so few votes in a phase exclude the radius; the last phase needs no such verdict."""
        if phase == len(self.n) - 1:
            return np.zeros(np.shape(count), bool)
        bound = upper(count, self.n[phase], self.beta / (len(self.n) - 1))
        return (bound <= 0.5) | (radius(np.maximum(bound, 0.5), self.sigma) < self.radius)


@dataclass(frozen=True)
class Decisions:
    """One row per image.

    Attributes:
        label: int64 (n), the class that is constant within the radius, -1 where the answer is to abstain.
        phase: int64 (n), counted from 0, in which it was decided.
        draws, evaluations: int64 (n), noise draws and networks asked, selection counted.
    """

    label: Tensor
    phase: Tensor
    draws: Tensor
    evaluations: Tensor


def decide_radius(base: Base, x: Tensor, phases: Phases, streams: Streams, batch: int = BLOCK) -> Decisions:
    """Decide for every image (n c h w) whether the smoothed classifier is constant within the radius.

    Args:
        base: a Classifier, whose ``predict`` votes, or any callable from images to labels.
        x: images in [0,1].
        phases: the question.
        streams: randomness, a row an image.
        batch: noisy images per forward pass; no result depends on it.
    """
    voting = Voting([base], x, phases.sigma, batch)
    label = torch.full((len(x),), -1, device=x.device)
    phase, draws = torch.zeros_like(label), torch.zeros_like(label)
    going = torch.ones(1, len(x), dtype=torch.bool, device=x.device)
    for number, n in enumerate(phases.n):
        own = streams.child("phase", number)
        chosen = voting.count(own.child("selection"), phases.n0, going)[0].argmax(1)
        count = torch.zeros_like(label)
        for pick, labels in voting.ballots(own.child("estimation"), going, (0, n)):
            count.index_add_(0, pick, (labels[0] == chosen[pick].unsqueeze(1)).sum(1))
        rows = going[0].nonzero().flatten()
        phase[rows] = number
        draws[rows] += n + phases.n0
        seen = count[rows].cpu().numpy()
        proven = torch.from_numpy(phases.certified(number, seen)).to(x.device)
        label[rows[proven]] = chosen[rows[proven]]
        going[0, rows] = ~(proven | torch.from_numpy(phases.hopeless(number, seen)).to(x.device))
        if not going.any():
            break
    return Decisions(label, phase, draws, voting.evaluations[0])
