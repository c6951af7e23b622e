"""Auto-PGD (Croce & Hein 2020, "Reliable evaluation of adversarial..."): PGD that chooses its own steps (methods 8.7).

Known differences from the authors' code: an image leaves the batch as soon as it is misclassified, the last iterate is not
differentiated, and the first checkpoint compares with the starting loss instead of a loss of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from attacks.api import Attack, Best, Search
from attacks.gradient import Objective, classification
from attacks.losses import CLASSES_NEEDED, CLASSES_NEEDED_TARGETED, Loss
from attacks.losses import loss as loss_named
from attacks.losses import targeted as targeted_named
from attacks.norms import check_eps, per_row, put
from attacks.norms import norm as norm_named
from attacks.oracle import Oracle
from attacks.streams import Streams

MOMENTUM = 0.75
COMPACT = 10
"""Steps between which images that are done stay in a batch on a GPU."""

FIRST, LEAST, SHORTER = 0.22, 0.06, 0.03
"""Lengths of the intervals between checkpoints, as shares of all steps: the first, the least, and by how much each shrinks."""


@dataclass(frozen=True, kw_only=True)
class Apgd(Attack):
    """Auto-PGD (Croce & Hein 2020): steps halve, and the search goes back to its best point, when the loss stops rising.

    Attributes:
        norm: "linf" or "l2".
        eps: radius in pixel space.
        loss: a name of :data:`attacks.losses.LOSSES`, or a loss; "margin" takes its place where the classes are too few for it.
        steps, restarts: iterations of a run, and runs from other starting points.
        targets: aim at each of this many most likely wrong classes, all at once (at all wrong ones, if there are fewer), until
            one is reached; 0: at none.
        rho: share of an interval's steps that must raise the loss, or the step is halved.
        engine: "native", or "autoattack" for the authors' code.
    """

    norm: str
    eps: float
    loss: str | Loss = "ce"
    steps: int = 100
    restarts: int = 1
    targets: int = 0
    rho: float = 0.75
    engine: str = "native"

    def __post_init__(self) -> None:
        norm_named(self.norm), (targeted_named if self.targets else loss_named)(self.loss)
        check_eps(self.eps)
        if self.steps < 1 or self.restarts < 1 or self.targets < 0:
            raise ValueError(
                f"needed: steps and restarts >= 1, targets >= 0; got {self.steps}, {self.restarts}, {self.targets}"
            )

    def loss_for(self, classes: int) -> str | Loss:
        """The loss that is used with so many classes."""
        needed = CLASSES_NEEDED_TARGETED if self.targets else CLASSES_NEEDED
        return self.loss if callable(self.loss) or classes >= needed.get(self.loss, 2) else "margin"

    def run(self, oracle: Oracle, x: Tensor, y: Tensor, streams: Streams | None) -> Search:
        if streams is None:
            raise ValueError(f"{type(self).__name__} starts at random: pass streams")
        loss = self.loss_for(oracle.classes(x))
        targets = likely_classes(oracle, x, y, self.targets)
        tracks = max(1, targets.shape[1])
        best = Best(x, tracks)
        for restart in range(self.restarts):
            rows = best.standing()
            if len(rows) == 0:
                break
            who = rows.repeat_interleave(tracks)
            noise = [streams.take(rows).child("restart", restart, "turn", turn) for turn in range(tracks)]
            ask, centre = oracle.take(who), x[who]
            goal = classification(ask, y[who], loss, targets[rows].flatten() if self.targets else None)
            begin = self.begin(ask, centre, y[who], noise)
            self._climb(ask, goal, _Climb.begin(centre, begin, self.eps), who, best)
        return Search(best.x_adv)

    def begin(self, oracle: Oracle, centre: Tensor, y: Tensor, noise: Sequence[Streams]) -> Tensor:
        """First points of all tracks (t *shape), a random displacement to the edge of the ball; ``noise`` is one a turn."""
        edge = torch.stack([_edge(self, one, centre) for one in noise], 1).flatten(0, 1)
        return norm_named(self.norm).into(centre + edge, centre, self.eps)

    def batch(self, device: torch.device) -> int:
        return max(1, super().batch(device) // max(1, self.targets))

    def _climb(self, oracle: Oracle, objective: Objective, at: _Climb, who: Tensor, best: Best) -> None:
        """One run of all tracks, which belong to images ``who`` of ``best``; an image leaves when one of its tracks wins."""
        ball = norm_named(self.norm)
        interval, since = max(int(FIRST * self.steps), 1), 0
        for step in range(self.steps + 1):
            affords = oracle.affords(at.rows, best.tracks)
            if affords is not None and not affords.all():
                best.offer(who[at.rows], at.top_here, at.top)
                at = at.take(affords)
            last = step == self.steps
            if len(at.rows) == 0:
                return
            here = at.here.detach().requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                loss, won = objective(here, at.rows)
            value = loss.detach().to(at.x.dtype)
            if last:
                break
            going: Tensor | slice = slice(None)
            # Elsewhere than on a CPU the host would have to wait for each count: there, images leave only now and then.
            if won is not None and (at.x.device.type != "cpu" or won.any()):
                best.offer(who[at.rows], here.detach(), torch.where(won, value, -torch.inf), won)
                if at.x.device.type == "cpu" or step % COMPACT == 0:
                    going = (~best.won[who[at.rows]]).nonzero().flatten()
                    if len(going) == 0:
                        return
            gradient = oracle.gradient(loss, here, at.rows, going)
            if not isinstance(going, slice):
                at, value = at.take(going), value[going]
            at.learn(value, gradient)
            since += 1 if step else 0
            if since == interval:
                at.checkpoint(interval * self.rho)
                interval, since = max(interval - max(int(SHORTER * self.steps), 1), int(LEAST * self.steps), 1), 0
            moved = ball.into(torch.addcmul(at.here, per_row(at.step, at.x), ball.steepest(at.gradient)), at.x, self.eps)
            if step:
                moved = at.here + MOMENTUM * (moved - at.here) + (1 - MOMENTUM) * (at.here - at.before)
                moved = ball.into(moved, at.x, self.eps)
            at.before, at.here = at.here, moved
        best.offer(who[at.rows], at.top_here, at.top)
        best.offer(who[at.rows], here, value, won)


@dataclass
class _Climb:
    """The state of a run, a row for each track that is still in it: an image, and a target if the run has any."""

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
            top_here=start.clone(),
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
        own = torch.arange(len(loss), device=loss.device)
        self.top = torch.where(better, loss, self.top)
        put(self.top_here, own, self.here, better)
        put(self.top_gradient, own, gradient, better)
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
    affords = oracle.affords(rows)
    rows = rows if affords is None else rows[affords]
    order = torch.zeros(len(x), min(count, oracle.classes(x) - 1), dtype=torch.int64, device=x.device)
    if len(rows):
        with torch.no_grad():
            scores = oracle.scores(x[rows], rows)
        wrong = scores.scatter(1, y[rows, None], -torch.inf)
        order[rows] = wrong.sort(dim=1, descending=True, stable=True).indices[:, : order.shape[1]]
    return order


@dataclass(frozen=True, kw_only=True)
class ApgdT(Apgd):
    """Targeted Auto-PGD: the targeted DLR loss, towards the nine most likely wrong classes."""

    loss: str = "dlr"
    targets: int = 9
