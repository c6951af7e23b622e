"""Accuracy under an attack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

import pandas as pd
from pydantic import Field

from attacks import ATTACKS, Attack, Eot, Streams
from attacks.norms import NORMS
from bench.evals.api import Base, Number, Outcome, Piece, Skipped, Subject, share
from bench.store import Metric
from defenses.api import Images
from defenses.smoothing import Smoothed


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

    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        return [self._measure(subject, images, piece) for subject in subjects]

    def _measure(self, subject: Subject, images: Images, piece: Piece) -> pd.DataFrame:
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
            numbers.append(share("robust_accuracy", stands, eps=eps, denominator="all"))
            if part.clean_correct.any():
                numbers.append(share("robust_accuracy", stands[part.clean_correct], eps=eps, denominator="clean_correct"))
            spent = float((part.forwards + part.backwards).mean())
            numbers.append(Metric(metric="evaluations_per_image", value=spent, n=len(part), unit="evaluations", eps=eps))
        return Outcome(numbers, [])
