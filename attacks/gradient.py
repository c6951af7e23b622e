"""One loop of projected gradient ascent; FGSM, R-FGSM, BIM, PGD and MIM are settings of it (methods 8.1 to 8.6).

Goodfellow et al. 2015 (FGSM), Tramer et al. 2018 (R-FGSM), Kurakin et al. 2017 (BIM), Madry et al. 2018 (PGD), Dong et al.
2018 (MIM). All sum the loss over the batch, never average it, and treat sign(0) as 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from attacks.api import Attack, Best, Search
from attacks.losses import Loss
from attacks.losses import loss as loss_named
from attacks.losses import targeted as targeted_named
from attacks.norms import check_eps, per_row
from attacks.norms import norm as norm_named
from attacks.oracle import Oracle
from attacks.streams import Streams

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(points (n *shape), rows (n)) -> (loss (n), finished (n) bool, or None if no image ever finishes early)."""


@dataclass(frozen=True)
class Convention:
    """A published step-size convention (methods 8.6): step rule, number of steps and restarts, and who uses it."""

    step: str
    steps: int
    restarts: int
    source: str


CONVENTIONS: dict[str, Convention] = {
    "eps/10": Convention("eps/10", 10, 1, "ADP, PDD, DEG, EDLCM, TRS"),
    "eps/5": Convention("eps/5", 50, 5, "DVERGE evaluation"),
    "2.5eps/T": Convention("2.5eps/T", 50, 5, "Madry et al. 2018; default of this harness"),
    "kap": Convention("4/255", 100, 1, "KAP, l2, eps 1"),
}

_RULES: dict[str, Callable[[float, int], float]] = {
    "eps": lambda eps, steps: eps,
    "eps/10": lambda eps, steps: eps / 10,
    "eps/5": lambda eps, steps: eps / 5,
    "eps/2": lambda eps, steps: eps / 2,
    "2.5eps/T": lambda eps, steps: 2.5 * eps / steps,
}


def step_size(rule: str | float, eps: float, steps: int) -> float:
    """The step of a rule such as "eps/5", "2.5eps/T", "4/255" or 0.01.

    Raises:
        ValueError: for a rule that is neither known nor a number.
    """
    if isinstance(rule, str) and rule in _RULES:
        return _RULES[rule](eps, steps)
    try:
        return float(Fraction(rule)) if isinstance(rule, str) else float(rule)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"unknown step {rule!r}; allowed are {', '.join(_RULES)} or a number such as 4/255") from None


@dataclass(frozen=True)
class Walk:
    """How far and in which norm to ascend. ``momentum`` is MIM's decay of the l1-normalised gradients; 0 is plain ascent."""

    norm: str
    eps: float
    step: float
    steps: int
    momentum: float = 0.0


@dataclass
class Ascent:
    """Result of :func:`ascend`: the best point of each image, its loss, whether it finished the search, and the last point."""

    best: Tensor
    loss: Tensor
    finished: Tensor
    last: Tensor


def ascend(objective: Objective, x: Tensor, walk: Walk, start: Tensor | None = None, oracle: Oracle | None = None) -> Ascent:
    """Raise a per-image objective inside the ball around ``x`` and the box [0,1].

    Images that the objective calls finished leave the batch at once. Each step goes along the steepest direction, is clipped
    to the box, projected on the ball, and clipped again.

    Args:
        objective: see :data:`Objective`; must not couple images.
        x: centres (n *shape) in [0,1].
        walk: norm, radius, step and number of steps.
        start: first points, inside ball and box; ``x`` itself by default.
        oracle: whom the objective asks, if it asks one: gradients are counted there, and its limit is kept.
    """
    ball = norm_named(walk.norm)
    ask = oracle or Oracle(lambda points: points)
    rows = torch.arange(len(x), device=x.device)
    here = x if start is None else start
    best, last = Best(x), here.detach().clone()
    best.x_adv = last.clone()
    velocity = torch.zeros_like(x)
    for step in range(walk.steps + 1):
        affords = ask.affords(rows)
        if affords is not None:
            rows, here, velocity = rows[affords], here[affords], velocity[affords]
        if len(rows) == 0:
            break
        differentiate = step < walk.steps
        here = here.detach().requires_grad_(differentiate)
        with torch.set_grad_enabled(differentiate):
            loss, finished = objective(here, rows)
        best.offer(rows, here.detach(), loss.detach().to(x.dtype), finished)
        last[rows] = here.detach()
        if not differentiate:
            break
        going = slice(None) if finished is None else (~finished).nonzero().flatten()
        if len(rows[going]) == 0:
            break
        gradient = ask.gradient(loss, here, rows, going)
        rows, here, velocity = rows[going], here.detach()[going], velocity[going]
        if walk.momentum:
            velocity = walk.momentum * velocity + _l1_normalised(gradient)
            gradient = velocity
        centre = x[rows]
        moved = (here + walk.step * ball.steepest(gradient)).clamp(0, 1)
        here = ball.into(moved, centre, walk.eps)
    return Ascent(best.x_adv, best.score, best.won, last)


def _l1_normalised(gradient: Tensor) -> Tensor:
    length = gradient.flatten(1).abs().sum(1).clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient / per_row(length, gradient)


def classification(oracle: Oracle, y: Tensor, loss: str | Loss, targets: Tensor | None = None) -> Objective:
    """The objective of misclassification: finished when the argmax is wrong.

    For a randomised model no image finishes early: a wrong argmax under the attack's own draws proves nothing (methods 9.2).
    With a guide the loss is the guide's, and the argmax the model's own.

    Args:
        oracle: whom to ask.
        y: true labels (n).
        loss: a name of :data:`attacks.losses.LOSSES`, or of ``TARGETED`` with targets; or a loss.
        targets: classes (n) to be taken for; None: any wrong one.
    """
    function = targeted_named(loss) if targets is not None else loss_named(loss)

    def objective(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and oracle.guide is None):
            logits = oracle(points, rows)
        scores = oracle.guide(points, rows) if oracle.guide else logits
        losses = function(scores, y[rows], *([] if targets is None else [targets[rows]]))
        if losses.ndim > 1:
            losses = losses.flatten(0, -2).mean(0)
        return losses, None if oracle.randomized else logits.argmax(-1) != y[rows]

    return objective


@dataclass(frozen=True, kw_only=True)
class Pgd(Attack):
    """Projected gradient descent (Madry et al. 2018) with random start and restarts.

    Attributes:
        norm: "linf" or "l2".
        eps: radius in pixel space.
        loss: a name of :data:`attacks.losses.LOSSES`.
        steps, step, restarts: see :data:`CONVENTIONS`.
        start: a name of :data:`STARTS`.
        momentum: MIM's decay; 0 is plain gradient ascent.
        engine: "native", or "advertorch" for AdverTorch's attack of the same settings.
    """

    norm: str
    eps: float
    loss: str | Loss = "ce"
    steps: int = 50
    step: str | float = "2.5eps/T"
    restarts: int = 5
    start: str = "random"
    momentum: float = 0.0
    engine: str = "native"

    def __post_init__(self) -> None:
        norm_named(self.norm), loss_named(self.loss)
        check_eps(self.eps)
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"steps and restarts must be at least 1, got {self.steps} and {self.restarts}")
        if self.start not in STARTS:
            raise ValueError(f"unknown start {self.start!r}; known are {', '.join(STARTS)}")
        step = step_size(self.step, self.eps, self.steps)
        if not step > 0 or (self.start == "signs" and step > self.eps):
            raise ValueError(f"step must be positive, and at most eps after a start by signs, got {step} at eps {self.eps}")

    def walk(self) -> Walk:
        """The geometry of one restart."""
        return Walk(self.norm, self.eps, step_size(self.step, self.eps, self.steps), self.steps, self.momentum)

    def run(self, oracle: Oracle, x: Tensor, y: Tensor, streams: Streams | None) -> Search:
        best = Best(x)
        for restart in range(self.restarts):
            rows = best.standing()
            if len(rows) == 0:
                break
            noise = streams.take(rows).child("restart", restart) if streams else None
            ask = oracle.take(rows)
            start = STARTS[self.start](self, x[rows], noise)
            found = ascend(classification(ask, y[rows], self.loss), x[rows], self.walk(), start, ask)
            best.offer(rows, found.best, found.loss, found.finished)
        return Search(best.x_adv)


def _needed(attack: Pgd, streams: Streams | None) -> Streams:
    if streams is None:
        raise ValueError(f"start {attack.start!r} of {type(attack).__name__} is random: pass streams")
    return streams


def _start_random(attack: Pgd, x: Tensor, streams: Streams | None) -> Tensor:
    noise = norm_named(attack.norm).start(_needed(attack, streams).child("start"), x.shape[1:], attack.eps)
    return (x + noise.to(x)).clamp(0, 1)


def _start_images(attack: Pgd, x: Tensor, streams: Streams | None) -> Tensor:
    images = _needed(attack, streams).child("start").uniform(x.shape[1:]).to(x)
    return (x + norm_named(attack.norm).project(images - x, attack.eps)).clamp(0, 1)


def _start_signs(attack: Pgd, x: Tensor, streams: Streams | None) -> Tensor:
    signs = _needed(attack, streams).child("start").normal(x.shape[1:]).sign().to(x)
    far = attack.eps - step_size(attack.step, attack.eps, attack.steps)
    direction = norm_named(attack.norm).steepest(signs)
    return (x + far * direction).clamp(0, 1)


STARTS: dict[str, Callable[[Pgd, Tensor, Streams | None], Tensor]] = {
    "clean": lambda attack, x, streams: x,
    "random": _start_random,  # uniform in the l_inf cube; l2: Gaussian direction, radius uniform in [0, eps]
    "random_images": _start_images,  # AdverTorch's l2 start: uniform images, projected
    "signs": _start_signs,  # R-FGSM: a = eps - step away along random signs
}


@dataclass(frozen=True, kw_only=True)
class Fgsm(Pgd):
    """Fast gradient (sign) method (Goodfellow et al. 2015): one step of length eps from the clean image."""

    steps: int = 1
    step: str | float = "eps"
    restarts: int = 1
    start: str = "clean"


@dataclass(frozen=True, kw_only=True)
class RFgsm(Fgsm):
    """RAND+FGSM (Tramer et al. 2018): a step of a = eps - step along random signs, then one gradient step.

    With the usual a = eps/2 a pixel whose random sign opposes the gradient ends where it began, so that it is far weaker
    than FGSM; it is there for parity with tables that report it.
    """

    step: str | float = "eps/2"
    start: str = "signs"


@dataclass(frozen=True, kw_only=True)
class Bim(Pgd):
    """Basic iterative method (Kurakin et al. 2017): PGD from the clean image, step eps/10."""

    steps: int = 10
    step: str | float = "eps/10"
    restarts: int = 1
    start: str = "clean"


@dataclass(frozen=True, kw_only=True)
class Mim(Bim):
    """Momentum iterative method (Dong et al. 2018), decay 1."""

    momentum: float = 1.0
