"""Small extra runs that tell a robust network from one whose gradients are masked (methods 12.1, invariant I5).

Athalye et al. 2018 and Carlini et al. 2019 list what such networks show: no gradient, a gradient that leads nowhere, attacks
that go on finding points with more steps and restarts, points that stand whatever the budget, and verdicts that depend on the
draw. The margin is watched beside cross-entropy, because scaling the logits cannot saturate it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from attacks import Attack, Eot, Pgd, Streams
from attacks.checks import inspect
from attacks.gradient import Walk, ascend, classification
from attacks.losses import cross_entropy, margin
from attacks.norms import NORMS
from attacks.oracle import Oracle, decide
from bench.evals.api import Base, Number, Outcome, Piece, Subject, check_threat, largest
from bench.evals.signs import findings, numbers
from defenses.api import Classifier, Images

SHORT = 0.25
"""Share of eps of the step whose promise is checked: honest networks are nearly linear that far (they deliver 0.7 to 1 of it,
also at budgets that break all images), while a full step may leave the region that the gradient is of."""

VANISHED = 1e-12
"""Length of a gradient below which a normalised l2 step shrinks (:mod:`attacks.norms` adds as much before it divides)."""


class Probe(Base):
    """Loss along gradients and random directions, gradients along PGD, PGD with more and more effort, and single noise draws.

    Attributes:
        norm, eps: the threat; ``eps`` may be fractions such as "8/255".
        steps: of PGD, increasing, each with the fewest restarts.
        restarts: of PGD, increasing, each with the most steps.
        directions: random ones, at the edge of the ball.
        eot: noise draws per gradient, and single draws that are judged, where the model draws noise.
    """

    divides: ClassVar[bool] = False
    """What is asked of an image depends on what the others of its piece show."""

    kind: Literal["probe"] = "probe"
    norm: str
    eps: tuple[Number, ...] = Field(min_length=1)
    steps: tuple[int, ...] = Field((10, 50, 200), min_length=1)
    restarts: tuple[int, ...] = Field((1, 5), min_length=1)
    directions: int = Field(10, ge=1)
    eot: int = Field(20, ge=2)

    def check(self, place: str, shape: tuple[int, int, int]) -> None:
        check_threat(place, self.norm, self.eps, shape)
        for name in ("steps", "restarts"):
            given = getattr(self, name)
            if list(given) != sorted(set(given)) or given[0] < 1:
                raise ValueError(f"{place}.{name}: increasing numbers of at least 1, got {list(given)}")

    @property
    def searches(self) -> list[tuple[int, int]]:
        """Steps and restarts of every PGD, in order: first the steps grow, then the restarts."""
        return [(steps, self.restarts[0]) for steps in self.steps] + [(self.steps[-1], again) for again in self.restarts[1:]]

    def pieces(self, subject: Subject) -> list[Piece]:
        return [Piece(rows, {}) for rows in self._slices(25)]

    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        return [self._measure(subject, images) for subject in subjects]

    def _measure(self, subject: Subject, images: Images) -> pd.DataFrame:
        """A row an image and eps; what does not depend on eps stands in each.

        clean_correct; declared: whether the model says that it draws noise; a mask for each of
        :data:`attacks.checks.CHECKS`; single, flips: share of single draws that are right, and that are not of the most
        frequent class; stands_unbounded: after PGD within the whole box, edge; for the rest see :meth:`_at`.
        """
        x, y, model = images.floats(), images.labels, subject.model
        streams = Streams(subject.seed, "probe", self.norm, ids=images.ids, device=x.device)
        with torch.random.fork_rng():  # for models that draw noise without saying so
            torch.manual_seed(subject.seed)
            right = decide(model, x, streams.child("clean")) == y
            signs = inspect(model, x, y, streams)
            if (signs["zero_gradient"] | ~right).all():
                model = Connected(model)
            case = Case(model, x, y, right, bool(signs["randomised"].any()), streams)
            edge = largest(self.norm, images.shape)
            stands, _ = case.after(self._pgd(edge, self.steps[-1], 1, start="clean"), right, self.eot)
            once = {
                "id": images.ids,
                "label": y,
                "clean_correct": right,
                **signs,
                **dict(zip(("single", "flips"), case.singles(x, self.eot), strict=True)),
                "stands_unbounded": stands,
            }
            tables = [pd.DataFrame(_plain({**once, **self._at(case, eps)})).assign(eps=eps) for eps in self.eps]
        facts = {"declared": model.randomized, "edge": edge, "classes": case.oracle(1).classes(x)}
        return pd.concat(tables, ignore_index=True).assign(**facts)

    def _pgd(self, eps: float, steps: int, restarts: int, start: str = "random") -> Pgd:
        return Pgd(norm=self.norm, eps=eps, steps=steps, restarts=restarts, start=start)

    def _at(self, case: Case, eps: float) -> dict[str, Any]:
        """Columns at one budget: those of :meth:`_slopes`; gradients along PGD, see :func:`along`; stands_<steps>_<restarts>,
        cumulative; stands_plain: after the first of them, had it differentiated a single draw; attacked_single,
        attacked_flips: single draws at the first's points."""
        columns = {**self._slopes(case, eps), "gradients": along(case, self._walk(eps), self.eot)}
        standing = case.right
        for steps, restarts in self.searches:
            standing, points = case.after(self._pgd(eps, steps, restarts), standing, self.eot)
            if (steps, restarts) == self.searches[0]:
                drawn = case.singles(points, self.eot)
                columns |= dict(zip(("attacked_single", "attacked_flips"), drawn, strict=True))
            columns[f"stands_{steps}_{restarts}"] = standing
        first = self.searches[0]
        plain = case.after(self._pgd(eps, *first), case.right, 1)[0] if case.model.randomized else None
        return {**columns, "stands_plain": columns[f"stands_{first[0]}_{first[1]}"] if plain is None else plain}

    def _walk(self, eps: float) -> Walk:
        return Walk(self.norm, eps, 2.5 * eps / self.steps[0], self.steps[0])

    def _slopes(self, case: Case, eps: float) -> dict[str, Tensor]:
        """margin_slope, ce_slope: l2 lengths of the gradients of margin and cross-entropy; margin_clean, margin_gradient,
        margin_random, margin_best: margins of the image, after a full step along the margin's gradient, and of random points at
        the ball's edge their mean and largest; promised, delivered: by how much the gradient says that :data:`SHORT` of a step
        raises the margin, and by how much it does."""
        x, ball, oracle = case.x, NORMS[self.norm], case.oracle(self.eot)
        here = x.clone().requires_grad_()
        with torch.enable_grad():
            clean, ce = case.losses(oracle, here)
            slope = torch.autograd.grad(clean.sum(), here, retain_graph=True)[0]
            ce_slope = torch.autograd.grad(ce.sum(), here)[0]
        full, short = (ball.into(x + part * eps * ball.steepest(slope), x, eps) for part in (1.0, SHORT))
        with torch.no_grad():
            random = []
            for number in range(self.directions):
                direction = ball.steepest(case.streams.child("direction", number).normal(x.shape[1:]).to(x))
                random.append(case.losses(oracle, ball.into(x + eps * direction, x, eps))[0])
            after, reached = (case.losses(oracle, points)[0] for points in (full, short))
        clean = clean.detach()
        return {
            "margin_slope": slope.flatten(1).norm(dim=1),
            "ce_slope": ce_slope.flatten(1).norm(dim=1),
            "margin_clean": clean,
            "margin_gradient": after,
            "margin_random": torch.stack(random).mean(0),
            "margin_best": torch.stack(random).amax(0),
            "promised": (slope * (short - x)).flatten(1).sum(1),
            "delivered": reached - clean,
        }

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        return Outcome(numbers(rows, self.searches), findings(rows, self.searches, self.directions))


class Connected(Classifier):
    """A model whose answers may be cut off from the image (rounded to integers, detached), with a gradient of zero there."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model, self.randomized = model, model.randomized
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        cut = torch.is_grad_enabled() and not logits.requires_grad
        return logits + 0 * x.flatten(1).sum(1, keepdim=True) if cut else logits

    def predict(self, x: Tensor) -> Tensor:
        return self.model.predict(x)


@dataclass(frozen=True)
class Case:
    """A model and the images that it is probed with.

    Attributes:
        model: in eval mode.
        x, y: images (n c h w) in [0,1], labels (n).
        right: (n) bool, whether the model is right as they are.
        noisy: whether answers to the same question differ, declared or not.
        streams: of the images.
    """

    model: Classifier
    x: Tensor
    y: Tensor
    right: Tensor
    noisy: bool
    streams: Streams

    def oracle(self, draws: int) -> Oracle:
        """Whom to ask for logits: of a randomised model always under the same draws."""
        return Oracle(self.model, self.streams.child("oracle") if self.model.randomized else None, draws)

    def losses(self, oracle: Oracle, points: Tensor) -> tuple[Tensor, Tensor]:
        """Margin and cross-entropy (n) of points (n c h w), means over draws."""
        logits = oracle(points, torch.arange(len(points), device=points.device))
        found = [loss(logits, self.y) for loss in (margin, cross_entropy)]
        return tuple(own.flatten(0, -2).mean(0) if own.ndim > 1 else own for own in found)  # type: ignore[return-value]

    def after(self, attack: Attack, standing: Tensor, draws: int) -> tuple[Tensor, Tensor]:
        """Which of the images that stood stand after an attack (n) bool, and its points (n c h w)."""
        rows, left, points = standing.nonzero().flatten(), standing.clone(), self.x.clone()
        if len(rows):
            asked = Eot(attack, draws) if self.model.randomized else attack
            found = asked(self.model, self.x[rows], self.y[rows], self.streams.take(rows).child("search"))
            left[rows], points[rows] = ~found.broken, found.x_adv
        return left, points

    def singles(self, points: Tensor, draws: int) -> tuple[Tensor, Tensor]:
        """Of single draws at points (n c h w) the shares (n) that are right, and that are not of the most frequent class."""
        with torch.inference_mode():
            labels = torch.stack(list(self._labels(points, draws if self.noisy or self.model.randomized else 1)))
        return (labels == self.y).double().mean(0), (labels != labels.mode(0).values).double().mean(0)

    def _labels(self, points: Tensor, draws: int) -> Iterator[Tensor]:
        rows = torch.arange(len(points), device=points.device)
        for draw in range(draws):
            noise = self.streams.child("single", draw) if self.model.randomized else None
            yield Oracle(self.model, noise, 1)(points, rows).flatten(0, -2).argmax(-1) if noise else decide(self.model, points)


@dataclass(frozen=True)
class Watched(Oracle):
    """Notes which gradients are zero, and which have vanished."""

    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def gradient(self, loss: Tensor, x: Tensor, rows: Tensor, of: Tensor | slice = slice(None), keep: bool = False) -> Tensor:
        found = super().gradient(loss, x, rows, of, keep)
        length = found.flatten(1).norm(dim=1)
        size = (length >= VANISHED).to(torch.int64) + (found.flatten(1) != 0).any(1).to(torch.int64)
        self.seen.append((rows[of], size))
        return found


def along(case: Case, walk: Walk, draws: int) -> list[str]:
    """Of every image a letter for each step of PGD on cross-entropy from the image itself: "0" where its gradient is zero in
    every pixel, "v" where it is shorter than :data:`VANISHED`, "1" elsewhere, "-" once the search is over."""
    oracle = Watched(**vars(case.oracle(draws)))
    ascend(classification(oracle, case.y, "ce"), case.x, walk, oracle=oracle)
    letters = [["-"] * walk.steps for _ in case.y]
    for step, (rows, sizes) in enumerate(oracle.seen):
        for row, size in zip(rows.tolist(), sizes.tolist(), strict=True):
            letters[row][step] = "0v1"[size]
    return ["".join(own) for own in letters]


def _plain(columns: dict[str, Any]) -> dict[str, Any]:
    return {name: own.cpu() if isinstance(own, Tensor) else own for name, own in columns.items()}
