"""FAB, the fast adaptive boundary attack (Croce & Hein 2020, "Minimally distorted adversarial examples..."; methods 8.8).

Each step projects the present point and the image on the linearised decision boundary, inside the box, and mixes the two.
Known differences from the authors' code: with a finite ``eps`` an image leaves as soon as it is broken within it; parameters
are never differentiated; the projections are Newton iterations on a concave piecewise-linear function instead of a sort.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.apgd import likely_classes
from attacks.api import Attack, Best, Search
from attacks.norms import norm as norm_named
from attacks.norms import per_row
from attacks.oracle import Oracle
from attacks.streams import Streams

NEWTON = 40
"""Newton steps at most; the function has a kink per pixel, and all but freak cases need under ten."""


@dataclass(frozen=True, kw_only=True)
class Fab(Attack):
    """Fast adaptive boundary attack (Croce & Hein 2020): the nearest point on a decision boundary, by projections.

    Attributes:
        norm: "linf" or "l2".
        eps: radius within which an adversarial point ends the search; infinite: look for the nearest one.
        steps, restarts: iterations of a run; runs after the first start at random within half the distance found so far.
        targets: aim at each of this many most likely wrong classes, all at once; 0: at whichever boundary is nearest.
        bias: largest share of the projection of the image itself (the paper's alpha_max).
        overshoot: how far beyond the boundary a step goes (eta).
        backward: where to go on between the image and an adversarial point (beta).
        engine: "native", "autoattack" for the authors' code, or "advertorch" for its older version.
    """

    norm: str
    eps: float = math.inf
    steps: int = 100
    restarts: int = 1
    targets: int = 0
    bias: float = 0.1
    overshoot: float = 1.05
    backward: float = 0.9
    engine: str = "native"

    def __post_init__(self) -> None:
        norm_named(self.norm)
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}")
        if self.steps < 1 or self.restarts < 1 or self.targets < 0:
            raise ValueError(
                f"needed: steps and restarts >= 1, targets >= 0; got {self.steps}, {self.restarts}, {self.targets}"
            )

    def run(self, oracle: Oracle, x: Tensor, y: Tensor, streams: Streams | None) -> Search:
        if self.restarts > 1 and streams is None:
            raise ValueError("restarts of FAB are random: pass streams")
        targets = likely_classes(oracle, x, y, self.targets)
        tracks = max(1, targets.shape[1])
        best = Best(x, tracks)
        for restart in range(self.restarts):
            rows = best.standing()
            who = rows.repeat_interleave(tracks)
            start = x[who]
            if restart and streams is not None:
                noise = [streams.take(rows).child("restart", restart, "turn", turn) for turn in range(tracks)]
                start = torch.stack([self._near(x[rows], -best.score[rows], one) for one in noise], 1).flatten(0, 1)
            aim = targets[rows].flatten() if self.targets else None
            self._descend(_Boundary(oracle.take(who), y[who], aim, self.norm), x[who], start, who, best)
        # What lies outside the ball is no answer; its direction is the best guess.
        delta = best.x_adv - x
        return Search((x + (norm_named(self.norm).project(delta, self.eps) if math.isfinite(self.eps) else delta)).clamp(0, 1))

    def batch(self, device: torch.device) -> int:
        return max(1, super().batch(device) // max(1, self.targets))

    def _near(self, x: Tensor, distance: Tensor, streams: Streams) -> Tensor:
        """A random point around each image, within half the distance that is known or allowed."""
        reach = torch.where(distance.isinf(), min(self.eps, 1.0), distance.clamp_max(self.eps)) / 2
        return (x + per_row(reach, x) * norm_named(self.norm).start(streams, x.shape[1:], 1.0).to(x)).clamp(0, 1)

    def _descend(self, boundary: _Boundary, x: Tensor, here: Tensor, rows: Tensor, best: Best) -> None:
        """One run of all tracks, around ``x`` from ``here``; they belong to images ``rows`` of ``best``."""
        ball = norm_named(self.norm)
        for _ in range(self.steps):
            affords = boundary.oracle.affords(boundary.rows, 2 * best.tracks)
            if affords is not None:
                boundary, x, here, rows = boundary.take(affords), x[affords], here[affords], rows[affords]
            if len(rows) == 0:
                break
            there, normal = boundary.linear(here)
            both = torch.cat([here, x]), torch.cat([normal, normal])
            gap = torch.cat([there, there + (normal * (here - x)).flatten(1).sum(1)])
            step, pull = onto_plane(*both, gap, self.norm).chunk(2)
            far, close = ball.length(pull).clamp_min(1e-8), ball.length(step).clamp_min(1e-8)
            mix = per_row((close / (close + far)).clamp_max(self.bias), x)
            here = ((here + self.overshoot * step) * (1 - mix) + (x + self.overshoot * pull) * mix).clamp(0, 1)
            wrong = boundary.crossed(here)
            length = ball.length(here - x)
            won = wrong & (length <= self.eps) if math.isfinite(self.eps) else torch.zeros_like(wrong)
            best.offer(rows, here, torch.where(wrong, -length, -torch.inf), won)
            here = torch.where(per_row(wrong, x), x + self.backward * (here - x), here)
            if won.any():
                going = (~best.won[rows]).nonzero().flatten()
                boundary, x, here, rows = boundary.take(going), x[going], here[going], rows[going]


@dataclass(frozen=True, kw_only=True)
class FabT(Fab):
    """Targeted FAB: towards the nine most likely wrong classes, one gradient a step for each."""

    targets: int = 9


@dataclass(frozen=True)
class _Boundary:
    """Decision boundaries of the images that are still in a run: ``rows`` of the oracle, their labels and targets."""

    oracle: Oracle
    y: Tensor
    aim: Tensor | None
    norm: str

    @property
    def rows(self) -> Tensor:
        return torch.arange(len(self.y), device=self.y.device)

    def take(self, keep: Tensor) -> _Boundary:
        """Some of the rows: a mask or indices."""
        rows = self.rows[keep]
        return _Boundary(self.oracle.take(rows), self.y[rows], None if self.aim is None else self.aim[rows], self.norm)

    def crossed(self, points: Tensor) -> Tensor:
        """Whether points are misclassified, as anything."""
        with torch.no_grad():
            return self.oracle.scores(points, self.rows).argmax(1) != self.y

    def linear(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest boundary, linearised: how far the label leads (n), and the gradient of that lead's loss (n *shape)."""
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            scores = self.oracle.scores(points, self.rows)
            others = self._others(scores.shape[1]) if self.aim is None else self.aim[:, None]
            leads = scores.gather(1, self.y[:, None]) - scores.gather(1, others)
        slopes = []
        for turn in range(others.shape[1]):
            more = turn + 1 < others.shape[1]
            slopes.append(-self.oracle.gradient(leads[:, turn], points, self.rows, keep=more))
        leads = leads.detach()
        if len(slopes) == 1:
            return leads[:, 0], slopes[0]
        dual = norm_named(self.norm).dual
        distance = torch.stack([leads[:, turn].abs() / (dual(slope) + 1e-12) for turn, slope in enumerate(slopes)], 1)
        nearest = distance.argmin(1)
        pick = torch.arange(len(nearest), device=nearest.device)
        return leads[pick, nearest], torch.stack(slopes, 1)[pick, nearest]

    def _others(self, classes: int) -> Tensor:
        every = torch.arange(classes, device=self.y.device).expand(len(self.y), classes)
        return every[every != self.y[:, None]].view(len(self.y), classes - 1)


def onto_plane(points: Tensor, normal: Tensor, gap: Tensor, norm: str) -> Tensor:
    """The shortest step from each point to a hyperplane that does not leave the box [0,1].

    Minimises the norm of d under normal . d = gap. Pixels move by min(t * speed, room) towards the plane, with the same t
    for all; the gain is concave and piecewise linear in t, so that Newton's method from t = 0 rises to the solution.

    Args:
        points, normal: (n *shape).
        gap: (n), how much the linear function has to grow.
        norm: "linf" or "l2".

    Returns:
        d, (n *shape); the furthest corner where the plane misses the box.
    """
    at, slope, sign = points.flatten(1), normal.flatten(1), gap.sign()[:, None] * normal.flatten(1).sign()
    weight = slope.abs()
    speed = torch.ones_like(weight) if norm == "linf" else weight
    room = torch.where(sign > 0, 1 - at, at) * (sign != 0)
    rate = weight * speed
    t = torch.zeros_like(gap)[:, None]
    for _ in range(NEWTON):
        step = t * speed
        free = step < room
        missing = gap.abs()[:, None] - (weight * torch.where(free, step, room)).sum(1, keepdim=True)
        growth = (rate * free).sum(1, keepdim=True)
        new = torch.where(growth > 0, t + missing / growth, t)
        # A row rests once rounding is all that moves it (the overshoot that follows is far larger), whatever the others do.
        moves = new > t * (1 + 1e-6)
        t = torch.where(moves, new, t)
        if t.device.type == "cpu" and not moves.any():
            break
    return (sign * torch.minimum(t * speed, room)).view_as(points)
