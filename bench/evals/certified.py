"""Certified accuracy of the smoothed classifier."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from attacks import Streams
from bench import metrics
from bench.evals.api import Outcome, Piece, Smoothing, Subject, share
from bench.store import Finding, Metric, Strict
from defenses.api import Classifier, Images
from defenses.estimators import ESTIMATORS, WHOLE, Question, grid_up_to, recount
from defenses.numerics import NUMERICS, under
from defenses.smoothing import POOLED, certify_together


class Step(Strict):
    """Radii 0, step, 2 step, ... up to what n draws can certify."""

    step: float = Field(gt=0)


def check_radii(place: str, radii: Step | tuple[float, ...]) -> None:
    """Refuse a list of radii that is empty, negative or not increasing."""
    if not isinstance(radii, Step) and (not radii or list(radii) != sorted(set(radii)) or not radii[0] >= 0):
        raise ValueError(f"{place}.radii: must be non-negative and increasing, at least one, got {list(radii)}")


class Certified(Smoothing):
    """Certified accuracy of the smoothed classifier, by Cohen's CERTIFY with a choice of estimator.

    Attributes:
        estimator: a name of :data:`defenses.estimators.ESTIMATORS`, or "pooled (unsound)". One that decides a single radius is
            run once for each.
        radii: a step or a list, l2 in pixels.
        n: draws to estimate.
        numerics: a name of :data:`defenses.numerics.NUMERICS`; what votes, and what is certified.
        skip_wrong: spend no draws where the selected class is wrong. Certified accuracies and ACR stay what they are;
            abstentions are not told.
    """

    kind: Literal["certified"] = "certified"
    estimator: str = "grid"
    radii: Step | tuple[float, ...]
    n: int = Field(100_000, ge=1)
    numerics: str | None = None
    skip_wrong: bool | None = None

    def check(self, place: str, shape: tuple[int, int, int]) -> None:
        known = [*ESTIMATORS, POOLED]
        if self.estimator not in known:
            raise ValueError(f"{place}.estimator: unknown {self.estimator!r}; known are {', '.join(known)}")
        if self.numerics is not None and self.numerics not in NUMERICS:
            raise ValueError(f"{place}.numerics: unknown {self.numerics!r}; known are {', '.join(NUMERICS)}")
        check_radii(place, self.radii)

    def _ceiling(self, subject: Subject, chance: float = 1.0) -> float:
        """The largest radius that may come out."""
        rule, sigma = ESTIMATORS["fixed" if self.estimator == POOLED else self.estimator], self.noise(subject)
        members = len(subject.model.members) if self.estimator == POOLED else 1
        return rule.ceiling(Question(sigma, self.alpha, self.n * members), chance)

    def grid(self, subject: Subject) -> tuple[float, ...]:
        """The radii at which accuracies are reported."""
        return grid_up_to(self.radii.step, self._ceiling(subject)) if isinstance(self.radii, Step) else self.radii

    def resolved(self, subject: Subject) -> dict[str, Any]:
        given = {name: value for name, value in self.model_dump(mode="json").items() if value is not None or name == "sigma"}
        return {**given, "sigma": self.noise(subject), "radii": list(self.grid(subject))}

    @property
    def preset(self) -> bool:
        """Whether every radius is a run of its own."""
        return self.estimator in ESTIMATORS and ESTIMATORS[self.estimator].preset

    @property
    def whole(self) -> bool:
        """Whether radii are whole, not members of a grid, so that there is an average of them."""
        return self.estimator in (*WHOLE, POOLED)

    def pieces(self, subject: Subject) -> list[Piece]:
        self.noise(subject)
        if not self.preset:
            return [Piece(rows, {}) for rows in self._slices(10)]
        return [Piece(rows, {"radius": radius}) for radius in self.grid(subject) for rows in self._slices(10)]

    def company(self, subject: Subject) -> Hashable | None:
        return "certified", self.noise(subject)

    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        found = certify_together(
            [self.voter(subject, images) for subject in subjects],
            images.floats(),
            self._question(subjects[0], piece.setting.get("radius")),
            n0=self.n0,
            estimator=self.estimator,
            labels=images.labels if self.skip_wrong else None,
            streams=Streams(subjects[0].seed, "certified", ids=images.ids, device=images.pixels.device),
            batch=_batch(images),
        )
        tables = []
        for own in found:
            columns: dict[str, Any] = {
                "id": images.ids,
                "label": images.labels,
                "prediction": own.label,
                "radius": own.radius,
                "count": own.count,
                "draws": own.draws,
                "evaluations": own.evaluations,
            }
            if self.estimator == "randomised":
                columns["chance"] = own.chance
            table = pd.DataFrame({name: values.cpu() for name, values in columns.items()})
            tables.append(table.assign(asked=piece.setting["radius"]) if self.preset else table)
        return tables

    def _question(self, subject: Subject, radius: float | None) -> Question:
        """What the estimator is asked in a run, for one radius if it decides one."""
        radii = () if self.whole else self.grid(subject) if radius is None else (radius,)
        return Question(self.noise(subject), self.alpha, self.n, radii)

    def recounted(self, rows: pd.DataFrame, subject: Subject, error: float) -> pd.DataFrame:
        """What the votes of each row prove: the smallest and the largest radius that the estimator can have said, ``low`` and
        ``high``, -1 for an abstention, and whether it can have stopped with them, ``ended``.

        ``error`` is the probability that an honest row is above ``high``, see :func:`defenses.estimators.recount`.
        """
        pooled = self.estimator == POOLED
        rule, times = ESTIMATORS["fixed" if pooled else self.estimator], len(subject.model.members) if pooled else 1
        chances = rows.chance if "chance" in rows else pd.Series(1.0, index=rows.index)
        found = pd.DataFrame({"low": -1.0, "high": -1.0, "ended": False}, index=rows.index)
        for radius in rows.asked.unique().tolist() if self.preset else [None]:
            asked = np.full(len(rows), True) if radius is None else (rows.asked == radius).to_numpy()
            question = self._question(subject, radius)
            # Every member's vote counts as a draw where votes are pooled.
            count, draws, chance = (np.asarray(own[asked], float) for own in (rows["count"], times * rows.draws, chances))
            low, high, ended = recount(rule, replace(question, n=times * question.n), count, draws, chance, error)
            found.loc[asked, "low"], found.loc[asked, "high"] = np.nan_to_num(low, nan=-1.0), np.nan_to_num(high, nan=-1.0)
            # A class that is wrong got no draws, if it was to be left alone.
            found.loc[asked, "ended"] = ended | (bool(self.skip_wrong) & (draws == 0))
        return found

    def voter(self, subject: Subject, images: Images) -> Classifier:
        """What votes: the model under the numerics."""
        return under(subject.model, self.numerics or "float32", _batch(images))

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        self.check_ceiling(rows, subject)
        numbers = []
        for radius in self.grid(subject):
            part = rows[rows.asked == radius] if self.preset else rows
            certified = share("certified_accuracy", _right(part) & (part.radius >= radius), radius=radius)
            bound = metrics.whole_set_bound(certified.value, len(part), self.alpha)
            numbers += [certified, Metric(metric="certified_accuracy_whole_set", value=bound, n=len(part), radius=radius)]
            if self.preset:
                numbers += self._spent(part, radius)
        if not self.skip_wrong:
            # Of a rule for one radius, abstentions at the smallest: there they mean what they mean everywhere.
            part = rows[rows.asked == self.grid(subject)[0]] if self.preset else rows
            numbers.append(share("abstention", part.prediction == -1))
        if self.whole:
            numbers += self._average(rows)
        if not self.preset:
            numbers += self._spent(rows, None)
        findings = []
        if self.estimator == POOLED:
            detail = "members' votes on one draw are counted as draws of their own: the radii are not proven"
            findings.append(Finding(kind="unsound", detail=detail))
        return Outcome(numbers, findings)

    def check_ceiling(self, rows: pd.DataFrame, subject: Subject) -> None:
        """Refuse rows with a radius that no votes can prove (invariant I7)."""
        chances = rows.chance if "chance" in rows else pd.Series(1.0, index=rows.index)
        for chance, part in rows.groupby(chances):
            top = self._ceiling(subject, float(chance))
            if (part.radius > top * (1 + 1e-12)).any():
                raise ArithmeticError(
                    f"a certified radius {part.radius.max()} exceeds the ceiling {top}: the certificate is wrong"
                )

    def _average(self, rows: pd.DataFrame) -> list[Metric]:
        """ACR with its interval, and the median radius."""
        right = _right(rows)
        radii = np.where(right, rows.radius, 0.0)
        low, high = metrics.bootstrap_mean(radii)
        acr = metrics.average_certified_radius(rows.radius.to_numpy(), right)
        return [
            Metric(metric="acr", value=acr, n=len(rows), lower=low, upper=high, unit="l2"),
            Metric(metric="median_radius", value=float(np.median(radii)), n=len(rows), unit="l2"),
        ]

    def _spent(self, rows: pd.DataFrame, radius: float | None) -> list[Metric]:
        spent, asked = float(rows.draws.mean()) + self.n0, float(rows.evaluations.mean())
        return [
            Metric(metric="draws_per_image", value=spent, n=len(rows), unit="draws", radius=radius),
            Metric(metric="evaluations_per_image", value=asked, n=len(rows), unit="network evaluations", radius=radius),
        ]


def _batch(images: Images) -> int:
    """Noisy images per forward pass: caches are small, GPUs are wide."""
    return 100 if images.pixels.device.type == "cpu" else 1000


def _right(rows: pd.DataFrame) -> np.ndarray:
    return (rows.prediction == rows.label).to_numpy()
