"""Auto-PGD (Croce & Hein 2020, "Reliable evaluation of adversarial..."): PGD that chooses its own steps (methods 8.7).

Known differences from the authors' code: an image leaves the batch as soon as it is misclassified, the last iterate is not
differentiated, and the first checkpoint compares with the starting loss instead of a loss of zero.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from attacks.api import Attack, Best, Search
from attacks.gradient import Objective, classification
from attacks.losses import CLASSES_NEEDED, CLASSES_NEEDED_TARGETED
from attacks.losses import loss as loss_named
from attacks.losses import targeted as targeted_named
from attacks.norms import norm as norm_named
from attacks.norms import per_row
from attacks.oracle import Oracle
from attacks.streams import Streams

MOMENTUM = 0.75
FIRST, LEAST, SHORTER = 0.22, 0.06, 0.03
"""Lengths of the intervals between checkpoints, as shares of all steps: the first, the least, and by how much each shrinks."""


@dataclass(frozen=True, kw_only=True)
class Apgd(Attack):
    """Auto-PGD (Croce & Hein 2020): steps halve, and the search goes back to its best point, when the loss stops rising.

    Attributes:
        norm: "linf" or "l2".
        eps: radius in pixel space.
        loss: a name of :data:`attacks.losses.LOSSES`; "margin" takes its place where the classes are too few for it.
        steps, restarts: iterations of a run, and runs from other starting points.
        targets: aim at each of this many most likely wrong classes in turn (all wrong ones, if there are fewer); 0: at none.
        rho: share of an interval's steps that must raise the loss, or the step is halved.
        engine: "native", or "autoattack" for the authors' code.
    """

    norm: str
    eps: float
    loss: str = "ce"
    steps: int = 100
    restarts: int = 1
    targets: int = 0
    rho: float = 0.75
    engine: str = "native"

    def __post_init__(self) -> None:
        norm_named(self.norm), (targeted_named if self.targets else loss_named)(self.loss)
        if not 0 < self.eps < float("inf"):
            raise ValueError(f"eps must be positive and finite, got {self.eps}")
        if self.steps < 1 or self.restarts < 1 or self.targets < 0:
            raise ValueError(
                f"needed: steps and restarts >= 1, targets >= 0; got {self.steps}, {self.restarts}, {self.targets}"
            )

    def loss_for(self, classes: int) -> str:
        """The loss that is used with so many classes."""
        needed = CLASSES_NEEDED_TARGETED if self.targets else CLASSES_NEEDED
        return self.loss if classes >= needed.get(self.loss, 2) else "margin"

    def run(self, oracle: Oracle, x: Tensor, y: Tensor, streams: Streams | None) -> Search:
        if streams is None:
            raise ValueError(f"{type(self).__name__} starts at random: pass streams")
        best = Best(x)
        loss = self.loss_for(oracle.classes(x))
        targets = likely_classes(oracle, x, y, self.targets)
        for restart in range(self.restarts):
            for turn in range(max(1, targets.shape[1])):
                rows = best.standing()
                if len(rows) == 0:
                    return Search(best.x_adv)
                ask = oracle.take(rows)
                aim = targets[rows, turn] if self.targets else None
                noise = streams.take(rows).child("restart", restart, "turn", turn)
                self._climb(ask, classification(ask, y[rows], loss, aim), x[rows], rows, best, noise)
        return Search(best.x_adv)

    def _climb(self, oracle: Oracle, objective: Objective, x: Tensor, rows: Tensor, best: Best, streams: Streams) -> None:
        """One run around images ``x``, which are numbers ``rows`` of ``best``."""
        ball = norm_named(self.norm)

        def inside(points: Tensor, centre: Tensor) -> Tensor:
            return (centre + ball.project(points - centre, self.eps)).clamp(0, 1)

        at = _Climb.begin(x, inside(x + _edge(self, streams, x), x), self.eps)
        interval, since = max(int(FIRST * self.steps), 1), 0
        for step in range(self.steps + 1):
            affords = oracle.affords(at.rows)
            at = at if affords is None else at.take(affords)
            if len(at.rows) == 0:
                break
            last = step == self.steps
            here = at.here.detach().requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                loss, won = objective(here, at.rows)
            best.offer(rows[at.rows], here.detach(), loss.detach().to(x.dtype), won)
            going = slice(None) if won is None else (~won).nonzero().flatten()
            if last or len(at.rows[going]) == 0:
                break
            gradient = oracle.gradient(loss, here, at.rows, going)
            at, loss = at if isinstance(going, slice) else at.take(going), loss[going]
            at.learn(loss.detach(), gradient)
            since += 1 if step else 0
            if since == interval:
                at.checkpoint(interval * self.rho)
                interval, since = max(interval - max(int(SHORTER * self.steps), 1), int(LEAST * self.steps), 1), 0
            moved = inside(at.here + per_row(at.step, x) * ball.steepest(at.gradient), at.x)
            if step:
                moved = inside(at.here + MOMENTUM * (moved - at.here) + (1 - MOMENTUM) * (at.here - at.before), at.x)
            at.before, at.here = at.here, moved


@dataclass
class _Climb:
    """The state of a run, a row for each image that is still in it."""

    rows: Tensor
    x: Tensor
    here: Tensor
    before: Tensor
    gradient: Tensor
    step: Tensor
    loss: Tensor
    rises: Tensor
    top: Tensor
    top_here: Tensor
    top_gradient: Tensor
    top_checked: Tensor
    halved: Tensor

    @classmethod
    def begin(cls, x: Tensor, start: Tensor, eps: float) -> _Climb:
        """All images at their starting points, with steps of twice the radius."""
        low = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        return cls(
            rows=torch.arange(len(x), device=x.device),
            x=x,
            here=start,
            before=start,
            gradient=torch.zeros_like(x),
            step=torch.full_like(low, 2 * eps),
            loss=-low,
            rises=torch.zeros_like(low),
            top=low,
            top_here=start,
            top_gradient=torch.zeros_like(x),
            top_checked=low,
            halved=torch.ones_like(low, dtype=torch.bool),
        )

    def take(self, keep: Tensor) -> _Climb:
        """Some of the rows: a mask or indices."""
        return _Climb(*(getattr(self, f.name)[keep] for f in fields(self)))

    def learn(self, loss: Tensor, gradient: Tensor) -> None:
        """Note loss and gradient of the present points."""
        self.rises = self.rises + (loss > self.loss)
        better = loss > self.top
        # The start is what the first checkpoint compares with.
        self.top_checked = torch.where(self.top_checked.isinf(), loss, self.top_checked)
        wide = per_row(better, self.here)
        self.top = torch.where(better, loss, self.top)
        self.top_here = torch.where(wide, self.here, self.top_here)
        self.top_gradient = torch.where(wide, gradient, self.top_gradient)
        self.loss, self.gradient = loss, gradient

    def checkpoint(self, enough: float) -> None:
        """Halve the step, and go back to the best point, where too few steps rose or a whole interval brought nothing."""
        halve = (self.rises <= enough) | (~self.halved & (self.top_checked >= self.top))
        wide = per_row(halve, self.here)
        self.step = torch.where(halve, self.step / 2, self.step)
        self.here = torch.where(wide, self.top_here, self.here)
        self.gradient = torch.where(wide, self.top_gradient, self.gradient)
        self.halved, self.top_checked, self.rises = halve, self.top, torch.zeros_like(self.rises)


def _edge(attack: Apgd, streams: Streams, x: Tensor) -> Tensor:
    """A random displacement to the edge of the ball."""
    if attack.norm == "linf":
        noise = streams.uniform(x.shape[1:]).to(x).mul_(2).sub_(1)
    else:
        noise = streams.normal(x.shape[1:]).to(x)
    return attack.eps * noise / per_row(norm_named(attack.norm).length(noise), x)


def likely_classes(oracle: Oracle, x: Tensor, y: Tensor, count: int) -> Tensor:
    """The most likely wrong classes of each image, likeliest first: (n, count), fewer columns if there are fewer."""
    rows = torch.arange(len(x), device=x.device)
    if count == 0:
        return torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    with torch.no_grad():
        scores = oracle.scores(x, rows)
    wrong = scores.scatter(1, y[:, None], -torch.inf)
    return wrong.sort(dim=1, descending=True, stable=True).indices[:, : min(count, scores.shape[1] - 1)]


@dataclass(frozen=True, kw_only=True)
class ApgdT(Apgd):
    """Targeted Auto-PGD: the targeted DLR loss, towards the nine most likely wrong classes in turn."""

    loss: str = "dlr"
    targets: int = 9
