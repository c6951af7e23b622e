"""Minimum-norm attacks: one run gives each image's distance to the boundary, and so robust accuracy at every radius.

DDN (Rony et al. 2019, "Decoupling direction and norm...") and FMN (Pintor et al. 2021, "Fast minimum-norm adversarial
attacks..."); methods 8.11a. Gradients of a zero length keep the point where it is.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.api import Attack, Best, Search
from attacks.losses import cross_entropy, margin
from attacks.norms import norm as norm_named
from attacks.norms import per_row
from attacks.oracle import Oracle
from attacks.streams import Streams

OVERSHOOT = 1.01
"""A jump to where the linearised margin is zero ends this much further: rounding would decide on which side it lands."""


def cosine(first: float, last: float, step: int, steps: int) -> float:
    """From ``first`` at step 0 along half a cosine to ``last`` at the last step."""
    return last + (first - last) * (1 + math.cos(math.pi * step / max(steps - 1, 1))) / 2


@dataclass(frozen=True, kw_only=True)
class MinimumNorm(Attack):
    """What DDN and FMN share: a point and a radius per image, both of which every step changes.

    Attributes:
        norm: "linf" or "l2".
        eps: radius within which an adversarial point ends the search; infinite: look for the nearest one.
        steps: forward and backward passes per image.
        gamma: relative change of the radius in the first step.
    """

    norm: str
    eps: float = math.inf
    steps: int = 100
    gamma: float = 0.05

    def __post_init__(self) -> None:
        norm_named(self.norm)
        if not self.eps > 0 or self.steps < 1 or not 0 < self.gamma < 1:
            raise ValueError(f"needed: eps > 0, steps >= 1, 0 < gamma < 1; got {self.eps}, {self.steps}, {self.gamma}")

    @abstractmethod
    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        """What a step raises (n)."""

    @abstractmethod
    def stride(self, step: int) -> float:
        """Length of a step along the gradient, in l_2."""

    @abstractmethod
    def next_radius(self, radius: Tensor, wrong: Tensor, guess: Tensor, known: Tensor, step: int) -> Tensor:
        """The new radii (n).

        Args:
            radius: the present ones.
            wrong: whether the present points are adversarial.
            guess: distance at which the linearised loss is zero.
            known: distance of the nearest adversarial point so far, infinite if there is none.
            step: number of the step.
        """

    @abstractmethod
    def onto(self, delta: Tensor, radius: Tensor) -> Tensor:
        """Bring displacements to their radii."""

    def run(self, oracle: Oracle, x: Tensor, y: Tensor, streams: Streams | None) -> Search:
        best, ball = Best(x), norm_named(self.norm)
        rows = torch.arange(len(x), device=x.device)
        delta, radius = torch.zeros_like(x), torch.ones(len(x), dtype=x.dtype, device=x.device)
        for step in range(self.steps + 1):
            affords = oracle.affords(rows)
            if affords is not None:
                rows, delta, radius = rows[affords], delta[affords], radius[affords]
            if len(rows) == 0:
                break
            last = step == self.steps
            here = (x[rows] + delta).detach().requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                scores = oracle.scores(here, rows)
                loss = self.loss(scores, y[rows])
            wrong, length = scores.detach().argmax(1) != y[rows], ball.length(delta)
            won = wrong & (length <= self.eps) if math.isfinite(self.eps) else torch.zeros_like(wrong)
            best.offer(rows, here.detach(), torch.where(wrong, -length, -torch.inf), won)
            if last:
                break
            gradient = oracle.gradient(loss, here, rows)
            reach = loss.detach().abs() / ball.dual(gradient).clamp_min(torch.finfo(x.dtype).tiny)
            guess = length + OVERSHOOT * reach
            radius = self.next_radius(radius, wrong, guess, -best.score[rows], step)
            delta = self.onto(delta + self.stride(step) * norm_named("l2").steepest(gradient), radius)
            delta = (x[rows] + delta).clamp(0, 1) - x[rows]
            if won.any():
                rows, delta, radius = rows[~won], delta[~won], radius[~won]
        found = best.x_adv - x
        return Search((x + (ball.project(found, self.eps) if math.isfinite(self.eps) else found)).clamp(0, 1))


@dataclass(frozen=True, kw_only=True)
class Ddn(MinimumNorm):
    """Decoupled direction and norm (Rony et al. 2019), l_2: a point stays on its sphere, which shrinks while it is wrong."""

    norm: str = "l2"
    engine: str = "native"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm != "l2":
            raise ValueError(f"DDN is an l2 attack, got norm {self.norm!r}; use fmn")

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(scores, y)

    def stride(self, step: int) -> float:
        return cosine(1.0, 0.01, step, self.steps)

    def next_radius(self, radius: Tensor, wrong: Tensor, guess: Tensor, known: Tensor, step: int) -> Tensor:
        return radius * torch.where(wrong, 1 - self.gamma, 1 + self.gamma)

    def onto(self, delta: Tensor, radius: Tensor) -> Tensor:
        length = norm_named(self.norm).length(delta).clamp_min(1e-12)
        return delta * per_row(radius / length, delta)


@dataclass(frozen=True, kw_only=True)
class Fmn(MinimumNorm):
    """Fast minimum norm (Pintor et al. 2021): a ball that jumps to where the linearised margin is zero, then shrinks and grows.

    Attributes:
        first: length of the first step; 1 in l_2 and 10 in l_inf unless given. The last is a hundredth of it.
    """

    first: float | None = None

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        return margin(scores, y)

    def stride(self, step: int) -> float:
        first = self.first or {"l2": 1.0, "linf": 10.0}[self.norm]
        return cosine(first, first / 100, step, self.steps)

    def next_radius(self, radius: Tensor, wrong: Tensor, guess: Tensor, known: Tensor, step: int) -> Tensor:
        gamma = cosine(self.gamma, 0.001, step, self.steps)
        later = torch.where(wrong, torch.minimum(radius, known) * (1 - gamma), radius * (1 + gamma))
        # A jump that the box cuts short would be made again and again: the ball grows all the same.
        jump = torch.maximum(guess, radius * (1 + gamma)) if step else guess
        return torch.where(known.isinf(), jump, later)

    def onto(self, delta: Tensor, radius: Tensor) -> Tensor:
        return norm_named(self.norm).project(delta, radius)
