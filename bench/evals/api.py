"""What an evaluation is: a question asked of fitted models, in pieces whose rows per image are the only source of numbers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd
from pydantic import BeforeValidator, Field
from torch import Tensor

from attacks.guided import View
from attacks.minimum_norm import MinimumNorm
from bench import metrics
from bench.plugins import attack_classes
from bench.store import Finding, Metric, Strict
from defenses.api import Classifier, Images


class Skipped(Exception):
    """The question makes no sense for this defense; the text says why."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        model: fitted, in eval mode.
        sigma: its own noise level, if it has one.
        seed: of the evaluation.
        scratch: folder for the unfinished work of one piece.
        epoch_seconds: what an epoch of its training took, if it was trained in epochs.
        ended: which of its trainings ended before their recipe did, and why.
        views: makes what its defense says that an adaptive attacker differentiates; None if it says nothing.
        other: the fitted model of another variant, by its name and fields as on the command line, of another training seed.
    """

    model: Classifier
    sigma: float | None
    seed: int
    scratch: Path | None = None
    epoch_seconds: float | None = None
    ended: Sequence[str] = ()
    views: Callable[[], Mapping[str, View] | None] = lambda: None
    other: Callable[[str], Classifier] | None = None


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

    divides: ClassVar[bool] = True
    """Whether the rows of a piece are those of its halves, one after the other."""

    def check(self, place: str, shape: tuple[int, int, int]) -> None:
        """Refuse values that fit no image of this shape (c h w); ``place`` names the key in the error."""

    @abstractmethod
    def pieces(self, subject: Subject) -> list[Piece]:
        """The work, in order."""

    @abstractmethod
    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        """Rows per image of a piece, for each subject what it would get alone; ``images`` are the piece's."""

    @property
    def others(self) -> tuple[str, ...]:
        """Variants whose fitted models it needs beside the subject."""
        return ()

    def company(self, subject: Subject) -> Hashable | None:
        """Subjects of equal company are cheaper to measure together; None: this one is measured alone."""
        return None

    @abstractmethod
    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        """Numbers from all rows."""

    def judged(self, subject: Subject, images: Images, rows: pd.DataFrame, points: Tensor) -> pd.DataFrame | None:
        """What of a piece's ``rows`` follows from its stored points (n c h w) and the model, decided anew under the same noise.

        A row an image of ``images``, in their order. None: this evaluation stores no points.
        """
        return None

    def resolved(self, subject: Subject) -> dict[str, Any]:
        """The fields with everything that the subject decides filled in, as the record shows them."""
        return self.model_dump(mode="json")

    def _slices(self, size: int) -> list[slice]:
        return [slice(start, min(start + size, self.images)) for start in range(0, self.images, size)]


class Smoothing(Base, ABC):
    """Common to evaluations of the smoothed classifier.

    Attributes:
        n0, alpha: draws to select the class, error probability per image.
        sigma: noise; the defense's own unless given.
    """

    n0: int = Field(100, ge=1)
    alpha: float = Field(0.001, gt=0, lt=0.5)
    sigma: float | None = Field(None, gt=0)

    def noise(self, subject: Subject) -> float:
        """Standard deviation of the noise in pixels.

        Raises:
            Skipped: if neither the evaluation nor the defense has one.
        """
        sigma = self.sigma or subject.sigma
        if sigma is None:
            raise Skipped("the defense has no noise level of its own; give evals.<name>.sigma to smooth it all the same")
        return sigma


def largest(norm: str, shape: Sequence[int]) -> float:
    """The radius that holds the whole box [0,1] of images of a shape, in pixels."""
    return 1.0 if norm == "linf" else math.sqrt(math.prod(shape))


def check_threat(place: str, norm: str, eps: Sequence[float], shape: tuple[int, int, int]) -> None:
    """Refuse a norm or radii that no image of this shape (c h w) has; ``place`` names the key in the error."""
    if norm not in ("linf", "l2"):
        raise ValueError(f"{place}.norm: unknown {norm!r}; known are linf, l2")
    check_radii(place, norm, eps, shape)


def check_radii(place: str, norm: str, eps: Sequence[float], shape: tuple[int, int, int]) -> None:
    """Refuse radii that no image of this shape (c h w) has in a known norm; ``place`` names the key in the error."""
    for one in eps:
        if not 0 < one <= largest(norm, shape):
            limit = largest(norm, shape)
            raise ValueError(f"{place}.eps: {one:g} is out of range; in {norm} 0 < eps <= {limit:g} (pixels in [0,1])")


def refuse_nearest(place: str, attack: str, reason: str, instead: str) -> None:
    """Refuse attacks that stop at the nearest adversarial point.

    Args:
        place: names the key in the error.
        attack: a name of :func:`bench.plugins.attack_classes`.
        reason: why that point is of no use.
        instead: an attack to give.

    Raises:
        ValueError: names the key.
    """
    if issubclass(attack_classes()[attack], MinimumNorm):
        raise ValueError(
            f"{place}.attack: {attack} looks for the nearest point, {reason}; "
            f"give an attack that uses its budget, such as {instead}"
        )


def share(name: str, hits: pd.Series | np.ndarray, **facts: Any) -> Metric:
    """A proportion of images with its Wilson interval."""
    hits = np.asarray(hits, bool)
    low, high = metrics.wilson(int(hits.sum()), len(hits))
    return Metric(metric=name, value=float(hits.mean()), n=len(hits), lower=low, upper=high, **facts)


def mean_of(name: str, values: pd.Series | np.ndarray, **facts: Any) -> Metric:
    """A mean over images with its bootstrap interval."""
    values = np.asarray(values, float)
    low, high = metrics.bootstrap_mean(values)
    return Metric(metric=name, value=float(values.mean()), n=len(values), lower=low, upper=high, **facts)
