"""Accuracy under an attack."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import Field
from torch import Tensor

from attacks import Attack, AutoAttack, Eot, Streams
from attacks.api import verdicts
from attacks.checks import CHECKS, inspect
from attacks.minimum_norm import MinimumNorm
from attacks.norms import NORMS
from attacks.oracle import Oracle, decide
from attacks.reference import check as check_engine
from attacks.reference import installed
from bench.evals.api import Base, Number, Outcome, Piece, Skipped, Subject, check_radii, share
from bench.plugins import attack_classes
from bench.store import Finding, Metric, as_json
from bench.verdicts import HELPS, MASKED, NAMED, within
from defenses.api import Classifier, Images
from defenses.smoothing import Smoothed

OPTIONS = (
    "steps", "step", "restarts", "loss", "start", "targets", "proposals", "version", "attacks", "first", "engine",
)  # fmt: skip
"""Settings of attacks that a suite may give; an attack has some of them."""


class Attacking(Base, ABC):
    """Common to evaluations that attack at several budgets.

    Attributes:
        kind: the evaluation's own; here so that it stays first in records.
        attack, norm, eps: the threat; ``eps`` may be fractions such as "8/255".
        steps, step, restarts, loss, start, targets, proposals, version, attacks, first, engine: settings of the attack, its
            own defaults where absent; one that it does not have is an error.
    """

    kind: str
    attack: str
    norm: str
    eps: tuple[Number, ...] = Field(min_length=1)
    steps: int | None = None
    step: str | float | None = None
    restarts: int | None = None
    loss: str | None = None
    start: str | None = None
    targets: int | None = None
    proposals: int | None = None
    version: str | None = None
    attacks: tuple[str, ...] | None = None
    first: float | None = None
    engine: str | None = None

    def check(self, place: str, shape: tuple[int, int, int]) -> None:
        if self.attack not in attack_classes():
            raise ValueError(f"{place}.attack: unknown {self.attack!r}; known are {', '.join(attack_classes())}")
        if self.norm not in NORMS:
            raise ValueError(f"{place}.norm: unknown {self.norm!r}; known are {', '.join(NORMS)}")
        has = [f.name for f in fields(attack_classes()[self.attack])]  # type: ignore[arg-type]
        for name in OPTIONS:
            if getattr(self, name) is not None and name not in has:
                own = ", ".join(option for option in OPTIONS if option in has)
                raise ValueError(f"{place}.{name}: {self.attack} has no such setting; it has {own}")
        check_radii(place, self.norm, self.eps, shape)
        check_engine(self._plain(self.eps[0]))

    def _plain(self, eps: float) -> Attack:
        """The attack at one budget, as it is."""
        kind = attack_classes()[self.attack]
        has = {f.name for f in fields(kind)}  # type: ignore[arg-type]
        options = {name: value for name in OPTIONS if name in has and (value := getattr(self, name)) is not None}
        return kind(norm=self.norm, eps=eps, **options)  # type: ignore[call-arg]

    def attacker(self, eps: float, scratch: Path | None = None) -> Attack:
        """The attack at one budget; a cascade keeps its unfinished work in a folder, if there is one."""
        attack = self._plain(eps)
        return replace(attack, state=scratch) if isinstance(attack, AutoAttack) and scratch else attack

    def resolved(self, subject: Subject) -> dict[str, Any]:
        plain = self._plain(self.eps[0])
        skip = ("eps", "state", "pieces")
        defaults = {f.name: getattr(plain, f.name) for f in fields(plain) if f.name not in skip}  # type: ignore[arg-type]
        engine = {"engine_version": installed()[self.engine]} if self.engine in installed() else {}
        given = {name: value for name, value in self.model_dump(mode="json").items() if value is not None}
        resolved: dict[str, Any] = as_json({**given, **defaults, **engine})
        return resolved


class Robust(Attacking):
    """Accuracy under an attack, at several budgets.

    Attributes:
        queries: forward passes allowed per image.
        nearest: look once for the nearest adversarial point, and read the accuracy at every eps off its distance; so do the
            minimum-norm attacks, and "fab" if asked to.
        noise: standard deviation of Gaussian noise added to the input at inference ("noisy logits"), or "sigma" for the
            defense's own: then the smoothed classifier is attacked, and judged by its mean prediction.
        eot: noise draws per gradient.
        average: "loss" or "probability" over those draws; "probability" is the smoothed classifier's soft score.
    """

    kind: Literal["robust"] = "robust"
    queries: int | None = Field(None, ge=1)
    nearest: bool | None = None
    noise: Number | Literal["sigma"] = 0.0
    eot: int = Field(1, ge=1)
    average: Literal["loss", "probability"] = "loss"

    def check(self, place: str, shape: tuple[int, int, int]) -> None:
        super().check(place, shape)
        kind = attack_classes()[self.attack]
        if self.nearest is not None and self.nearest != issubclass(kind, MinimumNorm) and not self.attack.startswith("fab"):
            does = "always" if issubclass(kind, MinimumNorm) else "never"
            raise ValueError(f"{place}.nearest: {self.attack} {does} looks for the nearest point, got {self.nearest}")

    @property
    def looks_for_nearest(self) -> bool:
        """Whether one search serves all eps."""
        return issubclass(attack_classes()[self.attack], MinimumNorm) if self.nearest is None else self.nearest

    def attacker(self, eps: float, scratch: Path | None = None) -> Attack:
        """The attack at one budget, under noise as its expectation."""
        attack = super().attacker(eps, scratch)
        return Eot(attack, self.eot, self.average) if self.noise else attack

    def resolved(self, subject: Subject) -> dict[str, Any]:
        return {**super().resolved(subject), "noise": self._sigma(subject), "nearest": self.looks_for_nearest}

    def _sigma(self, subject: Subject) -> float:
        if self.noise != "sigma":
            return self.noise
        if subject.sigma is None:
            raise Skipped("the defense has no noise level of its own, so there is no smoothed classifier to attack")
        return subject.sigma

    def pieces(self, subject: Subject) -> list[Piece]:
        self._sigma(subject)
        budgets = (math.inf,) if self.looks_for_nearest else self.eps
        return [Piece(rows, {"eps": eps}) for eps in budgets for rows in self._slices(100)]

    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        return [self._measure(subject, images, piece) for subject in subjects]

    def _asked(self, subject: Subject, images: Images) -> tuple[Classifier, Streams]:
        """What is attacked, and the randomness of it."""
        sigma = self._sigma(subject)
        model = Smoothed(subject.model, sigma).eval() if sigma else subject.model
        return model, Streams(subject.seed, self.attack, self.norm, ids=images.ids, device=images.pixels.device)

    def judged(self, subject: Subject, images: Images, rows: pd.DataFrame, points: Tensor) -> pd.DataFrame:
        model, streams = self._asked(subject, images)
        wrong, broken = verdicts(model, images.floats(), points, images.labels, streams)
        broken_8bit = decide(model, rounded(points), streams.child("8 bit")) != images.labels
        columns = {"clean_correct": ~wrong, "broken": broken, "broken_8bit": broken_8bit}
        return pd.DataFrame({name: mask.cpu() for name, mask in columns.items()})

    def _measure(self, subject: Subject, images: Images, piece: Piece) -> pd.DataFrame:
        model, streams = self._asked(subject, images)
        eps = piece.setting["eps"]
        x, y = images.floats(), images.labels
        result = self.attacker(eps, subject.scratch)(model, x, y, streams, self.queries)
        columns: dict[str, Any] = {
            "id": images.ids.cpu(),
            "label": y.cpu(),
            "eps": eps,
            # The contract of attacks: an image that was wrong before costs nothing, any other at least one forward.
            "clean_correct": (result.forwards > 0).cpu(),
            "broken": result.broken.cpu(),
            "broken_8bit": (decide(model, rounded(result.x_adv), streams.child("8 bit")) != y).cpu(),
            "distance": result.distance.double().cpu(),
            **{name: getattr(result, name).cpu() for name in ("forwards", "backwards", "zeros")},
            **{name: values.cpu() for name, values in result.details.items()},
            "x_adv": [point.numpy().tobytes() for point in result.x_adv.float().cpu()],
        }
        if attack_classes()[self.attack] is AutoAttack:
            columns |= {name: mask.cpu() for name, mask in inspect(model, x, y, streams).items()}
            # What the plan of the cascade depends on.
            columns["classes"] = Oracle(model, streams if model.randomized else None).classes(x)
            columns["declared"] = model.randomized
        return pd.DataFrame(columns)

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        numbers: list[Metric] = []
        for eps in self.eps:
            part, near = within(rows, eps, self.looks_for_nearest)
            stands, right = ~(part.broken & near), part.clean_correct
            numbers.append(share("robust_accuracy", stands, eps=eps, denominator="all"))
            if right.any():
                numbers.append(share("robust_accuracy", stands[right], eps=eps, denominator="clean_correct"))
            if "broken_8bit" in part:  # records from before it was asked do not have it
                numbers.append(share("robust_accuracy_8bit", ~(part.broken_8bit & near), eps=eps, denominator="all"))
            if "broken_by" in part:
                numbers += self._after_each(part, eps)
            if not self.looks_for_nearest:
                numbers.append(_spent(part, eps))
        if self.looks_for_nearest:
            numbers.append(_spent(rows, None))
            found = rows[rows.clean_correct & rows.broken].distance
            if len(found):
                middle = float(found.median())
                numbers.append(Metric(metric="median_distance", value=middle, n=len(found), unit=f"pixels, {self.norm}"))
        return Outcome(numbers, self._findings(rows))

    @property
    def _cascade(self) -> AutoAttack | None:
        """The attack, if it is AutoAttack. Numbers follow from the rows of others even where those are not known."""
        attack = self._plain(self.eps[0]) if self.attack in attack_classes() else None
        return attack if isinstance(attack, AutoAttack) else None

    def _components(self, classes: int, randomized: bool) -> list[str]:
        attack = self._cascade
        return [name for name, _ in attack.plan(classes, randomized).components] if attack else []

    def _after_each(self, part: pd.DataFrame, eps: float) -> list[Metric]:
        """Accuracy after each component of a cascade."""
        names = self._components(int(part.classes.iloc[0]), bool(self.noise) or bool(part.declared.iloc[0]))
        wrong = ~part.clean_correct
        return [
            share("robust_accuracy_after", ~(wrong | part.broken_by.between(0, number)), eps=eps, source=name)
            for number, name in enumerate(names)
        ]

    def _findings(self, rows: pd.DataFrame) -> list[Finding]:
        """What the attack itself noticed of masking."""
        found = []
        steps = int(rows.backwards.sum()) if "zeros" in rows else 0  # records from before they were counted say nothing
        if steps and rows.zeros.sum() / steps > MASKED:
            part = float(rows.zeros.sum() / steps)
            detail = (
                f"{part:.1%} of the gradients were zero in every pixel: gradient attacks are blind, and their numbers too high"
            )
            images = rows[rows.zeros > 0].id.unique()[:NAMED].tolist()
            found.append(Finding(kind="zero_gradients", detail=detail, evidence={"share": part, "images": images}))
        for name, text in CHECKS.items():
            if name in rows and rows[name].any():
                hit = rows[rows[name]].id.unique()
                evidence = {"images": hit[:NAMED].tolist(), "count": len(hit)}
                found.append(Finding(kind=name, detail=f"{len(hit)} images: {text}", evidence=evidence))
        return found + self._of_cascade(rows)

    def _of_cascade(self, rows: pd.DataFrame) -> list[Finding]:
        attack = self._cascade
        if attack is None:
            return []
        plan = attack.plan(int(rows.classes.iloc[0]), bool(self.noise) or bool(rows.declared.iloc[0]))
        found = [Finding(kind="changed_attack", detail=note) for note in plan.notes]
        names = [name for name, _ in plan.components]
        if "square" not in names or "broken_by" not in rows:  # no image was right, so that none was attacked
            return found
        for eps, part in rows.groupby("eps"):
            hit = part[part.broken_by == names.index("square")]
            if len(hit) / len(part) > HELPS:
                detail = f"Square broke {len(hit)} of {len(part)} images at eps {eps:g} that gradient attacks had left standing"
                evidence = {"eps": float(eps), "images": hit.id.tolist()[:NAMED], "count": len(hit)}  # type: ignore[arg-type]
                found.append(Finding(kind="square_helps", detail=detail, evidence=evidence))
        return found


def rounded(points: Tensor) -> Tensor:
    """Images in [0,1] as 8 bits hold them."""
    return (points * 255).round() / 255


def _spent(part: pd.DataFrame, eps: float | None) -> Metric:
    spent = float((part.forwards + part.backwards).mean())
    return Metric(metric="evaluations_per_image", value=spent, n=len(part), unit="evaluations", eps=eps)
