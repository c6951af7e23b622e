"""Certified accuracy of the smoothed classifier."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from attacks import Streams
from bench import metrics
from bench.evals.api import Outcome, Piece, Smoothing, Subject, share
from bench.store import Metric, Strict
from defenses.api import Images
from defenses.bounds import ESTIMATORS, Question, ceiling, grid_up_to
from defenses.smoothing import certify_together


class Step(Strict):
    """Radii 0, step, 2 step, ... up to what n draws can certify."""

    step: float = Field(gt=0)


class Certified(Smoothing):
    """Certified accuracy of the smoothed classifier, by Cohen's CERTIFY with a choice of estimator.

    Attributes:
        estimator: a name of :data:`defenses.bounds.ESTIMATORS`.
        radii: a step or a list, l2 in pixels.
        n: draws to estimate.
    """

    kind: Literal["certified"] = "certified"
    estimator: str = "grid"
    radii: Step | tuple[float, ...]
    n: int = Field(100_000, ge=1)

    def check(self, place: str, shape: tuple[int, int, int]) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"{place}.estimator: unknown {self.estimator!r}; known are {', '.join(ESTIMATORS)}")
        if not isinstance(self.radii, Step) and (list(self.radii) != sorted(set(self.radii)) or self.radii[0] < 0):
            raise ValueError(f"{place}.radii: must be non-negative and increasing, got {self.radii}")

    def _last_alpha(self) -> float:
        """The level at which the last look is made, which sets the ceiling."""
        return self.alpha * (0.9 if self.estimator == "grid" and self.n > 100 else 1.0)

    def grid(self, subject: Subject) -> tuple[float, ...]:
        """The radii at which accuracies are reported."""
        if isinstance(self.radii, Step):
            return grid_up_to(self.radii.step, self.noise(subject), self.n, self._last_alpha())
        return self.radii

    def resolved(self, subject: Subject) -> dict[str, Any]:
        return {**self.model_dump(mode="json"), "sigma": self.noise(subject), "radii": list(self.grid(subject))}

    def pieces(self, subject: Subject) -> list[Piece]:
        self.noise(subject)
        return [Piece(rows, {}) for rows in self._slices(10)]

    def company(self, subject: Subject) -> Hashable | None:
        return "certified", self.noise(subject)

    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        found = certify_together(
            [subject.model for subject in subjects],
            images.floats(),
            Question(self.noise(subjects[0]), self.alpha, self.n, self.grid(subjects[0])),
            n0=self.n0,
            estimator=self.estimator,
            streams=Streams(subjects[0].seed, "certified", ids=images.ids, device=images.pixels.device),
            batch=100 if images.pixels.device.type == "cpu" else 1000,
        )
        return [
            pd.DataFrame(
                {
                    "id": images.ids.cpu(),
                    "label": images.labels.cpu(),
                    "prediction": own.label.cpu(),
                    "radius": own.radius.cpu(),
                    "count": own.count.cpu(),
                    "draws": own.draws.cpu(),
                    "evaluations": own.evaluations.cpu(),
                }
            )
            for own in found
        ]

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        top = ceiling(self.noise(subject), self.n, self._last_alpha())
        if (rows.radius > top * (1 + 1e-12)).any():
            raise ArithmeticError(f"a certified radius {rows.radius.max()} exceeds the ceiling {top}: the certificate is wrong")
        correct = (rows.prediction == rows.label).to_numpy()
        numbers = []
        for radius in self.grid(subject):
            certified = share("certified_accuracy", correct & (rows.radius >= radius), radius=radius)
            bound = metrics.whole_set_bound(certified.value, len(rows), self.alpha)
            numbers += [certified, Metric(metric="certified_accuracy_whole_set", value=bound, n=len(rows), radius=radius)]
        numbers.append(share("abstention", rows.prediction == -1))
        if self.estimator == "fixed":
            radii = np.where(correct, rows.radius, 0.0)
            low, high = metrics.bootstrap_mean(radii)
            acr = metrics.average_certified_radius(rows.radius.to_numpy(), correct)
            numbers.append(Metric(metric="acr", value=acr, n=len(rows), lower=low, upper=high, unit="l2"))
            numbers.append(Metric(metric="median_radius", value=float(np.median(radii)), n=len(rows), unit="l2"))
        spent = float(rows.draws.mean()) + self.n0
        numbers.append(Metric(metric="draws_per_image", value=spent, n=len(rows), unit="draws"))
        asked = float(rows.evaluations.mean())
        numbers.append(Metric(metric="evaluations_per_image", value=asked, n=len(rows), unit="network evaluations"))
        return Outcome(numbers, [])
