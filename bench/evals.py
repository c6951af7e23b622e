"""Evaluations: a question asked of a fitted model, in pieces whose rows per image are the only source of its numbers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BeforeValidator, Field

from attacks import ATTACKS, Attack, Eot, Streams
from attacks.api import decide
from attacks.norms import NORMS
from bench import metrics
from bench.store import Finding, Metric, Strict
from defenses.api import Classifier, Images
from defenses.bounds import ESTIMATORS, ceiling, grid_up_to
from defenses.smoothing import Smoothed, certify


class Skipped(Exception):
    """The question makes no sense for this defense; the text says why."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a fitted model in eval mode, its own noise level if it has one, and the seed of the evaluation."""

    model: Classifier
    sigma: float | None
    seed: int


@dataclass(frozen=True)
class Piece:
    """A share of the work that is stored when finished: some images, under some setting."""

    rows: slice
    setting: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """Numbers and findings of a whole evaluation."""

    metrics: list[Metric]
    findings: list[Finding]


def _number(value: Any) -> float:
    """0.1, "0.1" or "8/255"."""
    try:
        return float(Fraction(value)) if isinstance(value, str) else float(value)
    except (ValueError, TypeError, ZeroDivisionError):
        raise ValueError(f"not a number: {value!r}; write 0.1 or '8/255'") from None


Number = Annotated[float, BeforeValidator(_number)]


class Base(Strict, ABC):
    """Common to all evaluations: ``images`` is how many of the first test images are used."""

    images: int = Field(ge=1)

    def check(self, place: str, shape: tuple[int, int, int]) -> None:
        """Refuse values that fit no image of this shape (c h w); ``place`` names the key in the error."""

    @abstractmethod
    def pieces(self, subject: Subject) -> list[Piece]:
        """The work, in order."""

    @abstractmethod
    def measure(self, subject: Subject, images: Images, piece: Piece) -> pd.DataFrame:
        """Rows per image of a piece; ``images`` are the piece's."""

    @abstractmethod
    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        """Numbers from all rows."""

    def resolved(self, subject: Subject) -> dict[str, Any]:
        """The fields with everything that the subject decides filled in, as the record shows them."""
        return self.model_dump(mode="json")

    def _slices(self, size: int) -> list[slice]:
        return [slice(start, min(start + size, self.images)) for start in range(0, self.images, size)]


def _share(name: str, hits: pd.Series | np.ndarray, **facts: Any) -> Metric:
    hits = np.asarray(hits, bool)
    low, high = metrics.wilson(int(hits.sum()), len(hits))
    return Metric(metric=name, value=float(hits.mean()), n=len(hits), lower=low, upper=high, **facts)


class Clean(Base):
    """Accuracy on the images as they are."""

    kind: Literal["clean"] = "clean"

    def pieces(self, subject: Subject) -> list[Piece]:
        return [Piece(rows, {}) for rows in self._slices(1000)]

    def measure(self, subject: Subject, images: Images, piece: Piece) -> pd.DataFrame:
        streams = Streams(subject.seed, "clean", ids=images.ids, device=images.pixels.device)
        label = decide(subject.model, images.floats(), streams)
        return pd.DataFrame({"id": images.ids.cpu(), "label": images.labels.cpu(), "prediction": label.cpu()})

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        return Outcome([_share("clean_accuracy", rows.prediction == rows.label)], [])


class Robust(Base):
    """Accuracy under an attack, at several budgets.

    Attributes:
        attack, norm, eps: the threat; ``eps`` may be fractions such as "8/255".
        steps, step, restarts, loss, start: settings of the attack, its own defaults where absent.
        noise: standard deviation of Gaussian noise added to the input at inference ("noisy logits"), or "sigma" for the
            defense's own: then the smoothed classifier is attacked, and judged by its mean prediction.
        eot: noise draws per gradient.
        average: "loss" or "probability" over those draws; "probability" is the smoothed classifier's soft score.
    """

    kind: Literal["robust"] = "robust"
    attack: str
    norm: str
    eps: tuple[Number, ...] = Field(min_length=1)
    steps: int | None = None
    step: str | float | None = None
    restarts: int | None = None
    loss: str | None = None
    start: str | None = None
    noise: Number | Literal["sigma"] = 0.0
    eot: int = Field(1, ge=1)
    average: Literal["loss", "probability"] = "loss"

    def check(self, place: str, shape: tuple[int, int, int]) -> None:
        if self.attack not in ATTACKS:
            raise ValueError(f"{place}.attack: unknown {self.attack!r}; known are {', '.join(ATTACKS)}")
        if self.norm not in NORMS:
            raise ValueError(f"{place}.norm: unknown {self.norm!r}; known are {', '.join(NORMS)}")
        largest = 1.0 if self.norm == "linf" else math.sqrt(math.prod(shape))
        for eps in self.eps:
            if not 0 < eps <= largest:
                raise ValueError(
                    f"{place}.eps: {eps:g} is out of range; in {self.norm} 0 < eps <= {largest:g} (pixels in [0,1])"
                )
        self.attacker(self.eps[0])

    def attacker(self, eps: float) -> Attack:
        """The attack at one budget."""
        kind = ATTACKS[self.attack]
        given = {f.name: getattr(self, f.name, None) for f in fields(kind) if f.name not in ("norm", "eps")}  # type: ignore[arg-type]
        options = {name: value for name, value in given.items() if value is not None}
        attack = kind(norm=self.norm, eps=eps, **options)  # type: ignore[call-arg]
        return Eot(attack, self.eot, self.average) if self.noise else attack

    def resolved(self, subject: Subject) -> dict[str, Any]:
        attack = self.attacker(self.eps[0])
        inner = attack.inner if isinstance(attack, Eot) else attack
        defaults = {f.name: getattr(inner, f.name) for f in fields(inner) if f.name != "eps"}  # type: ignore[arg-type]
        return {**self.model_dump(mode="json"), **defaults, "noise": self._sigma(subject)}

    def _sigma(self, subject: Subject) -> float:
        if self.noise != "sigma":
            return self.noise
        if subject.sigma is None:
            raise Skipped("the defense has no noise level of its own, so there is no smoothed classifier to attack")
        return subject.sigma

    def pieces(self, subject: Subject) -> list[Piece]:
        self._sigma(subject)
        return [Piece(rows, {"eps": eps}) for eps in self.eps for rows in self._slices(100)]

    def measure(self, subject: Subject, images: Images, piece: Piece) -> pd.DataFrame:
        sigma = self._sigma(subject)
        model = Smoothed(subject.model, sigma).eval() if sigma else subject.model
        eps = piece.setting["eps"]
        streams = Streams(subject.seed, self.attack, self.norm, ids=images.ids, device=images.pixels.device)
        result = self.attacker(eps)(model, images.floats(), images.labels, streams)
        return pd.DataFrame(
            {
                "id": images.ids.cpu(),
                "label": images.labels.cpu(),
                "eps": eps,
                # The contract of attacks: an image that was wrong before costs nothing, any other at least one forward.
                "clean_correct": (result.forwards > 0).cpu(),
                "broken": result.broken.cpu(),
                "distance": result.distance.double().cpu(),
                "forwards": result.forwards.cpu(),
                "backwards": result.backwards.cpu(),
            }
        )

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        numbers = []
        for eps in self.eps:
            part = rows[rows.eps == eps]
            stands = ~part.broken
            numbers.append(_share("robust_accuracy", stands, eps=eps, denominator="all"))
            if part.clean_correct.any():
                numbers.append(_share("robust_accuracy", stands[part.clean_correct], eps=eps, denominator="clean_correct"))
            spent = float((part.forwards + part.backwards).mean())
            numbers.append(Metric(metric="evaluations_per_image", value=spent, n=len(part), unit="evaluations", eps=eps))
        return Outcome(numbers, [])


class Step(Strict):
    """Radii 0, step, 2 step, ... up to what n draws can certify."""

    step: float = Field(gt=0)


class Certified(Base):
    """Certified accuracy of the smoothed classifier, by Cohen's CERTIFY with a choice of estimator.

    Attributes:
        estimator: a name of :data:`defenses.bounds.ESTIMATORS`.
        radii: a step or a list, l2 in pixels.
        n0, n, alpha: draws to select, draws to estimate, error probability per image.
        sigma: noise; the defense's own unless given.
    """

    kind: Literal["certified"] = "certified"
    estimator: str = "grid"
    radii: Step | tuple[float, ...]
    n0: int = Field(100, ge=1)
    n: int = Field(100_000, ge=1)
    alpha: float = Field(0.001, gt=0, lt=0.5)
    sigma: float | None = Field(None, gt=0)

    def check(self, place: str, shape: tuple[int, int, int]) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"{place}.estimator: unknown {self.estimator!r}; known are {', '.join(ESTIMATORS)}")
        if not isinstance(self.radii, Step) and (list(self.radii) != sorted(set(self.radii)) or self.radii[0] < 0):
            raise ValueError(f"{place}.radii: must be non-negative and increasing, got {self.radii}")

    def _sigma(self, subject: Subject) -> float:
        sigma = self.sigma or subject.sigma
        if sigma is None:
            raise Skipped("the defense has no noise level of its own; give evals.<name>.sigma to smooth it all the same")
        return sigma

    def _last_alpha(self) -> float:
        """The level at which the last look is made, which sets the ceiling."""
        return self.alpha * (0.9 if self.estimator == "grid" and self.n > 100 else 1.0)

    def grid(self, subject: Subject) -> tuple[float, ...]:
        """The radii at which accuracies are reported."""
        if isinstance(self.radii, Step):
            return grid_up_to(self.radii.step, self._sigma(subject), self.n, self._last_alpha())
        return self.radii

    def resolved(self, subject: Subject) -> dict[str, Any]:
        return {**self.model_dump(mode="json"), "sigma": self._sigma(subject), "radii": list(self.grid(subject))}

    def pieces(self, subject: Subject) -> list[Piece]:
        self._sigma(subject)
        return [Piece(rows, {}) for rows in self._slices(10)]

    def measure(self, subject: Subject, images: Images, piece: Piece) -> pd.DataFrame:
        streams = Streams(subject.seed, "certified", ids=images.ids, device=images.pixels.device)
        found = certify(
            subject.model,
            images.floats(),
            self._sigma(subject),
            n0=self.n0,
            n=self.n,
            alpha=self.alpha,
            estimator=self.estimator,
            radii=self.grid(subject),
            streams=streams,
            batch=100 if images.pixels.device.type == "cpu" else 1000,
        )
        return pd.DataFrame(
            {
                "id": images.ids.cpu(),
                "label": images.labels.cpu(),
                "prediction": found.label.cpu(),
                "radius": found.radius.cpu(),
                "count": found.count.cpu(),
                "draws": found.draws.cpu(),
            }
        )

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        top = ceiling(self._sigma(subject), self.n, self._last_alpha())
        if (rows.radius > top * (1 + 1e-12)).any():
            raise ArithmeticError(f"a certified radius {rows.radius.max()} exceeds the ceiling {top}: the certificate is wrong")
        correct = (rows.prediction == rows.label).to_numpy()
        numbers = []
        for radius in self.grid(subject):
            share = _share("certified_accuracy", correct & (rows.radius >= radius), radius=radius)
            bound = metrics.whole_set_bound(share.value, len(rows), self.alpha)
            numbers += [share, Metric(metric="certified_accuracy_whole_set", value=bound, n=len(rows), radius=radius)]
        numbers.append(_share("abstention", rows.prediction == -1))
        if self.estimator == "fixed":
            radii = np.where(correct, rows.radius, 0.0)
            low, high = metrics.bootstrap_mean(radii)
            acr = metrics.average_certified_radius(rows.radius.to_numpy(), correct)
            numbers.append(Metric(metric="acr", value=acr, n=len(rows), lower=low, upper=high, unit="l2"))
            numbers.append(Metric(metric="median_radius", value=float(np.median(radii)), n=len(rows), unit="l2"))
        spent = float(rows.draws.mean()) + self.n0
        members = len(subject.model.members)
        numbers.append(Metric(metric="draws_per_image", value=spent, n=len(rows), unit="draws"))
        numbers.append(Metric(metric="evaluations_per_image", value=spent * members, n=len(rows), unit="network evaluations"))
        return Outcome(numbers, [])


Evaluation = Annotated[Clean | Robust | Certified, Field(discriminator="kind")]
KINDS = ("clean", "robust", "certified")
