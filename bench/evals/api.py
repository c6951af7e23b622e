"""What an evaluation is: a question asked of fitted models, in pieces whose rows per image are the only source of numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import BeforeValidator, Field

from bench import metrics
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
    """

    model: Classifier
    sigma: float | None
    seed: int
    scratch: Path | None = None
    epoch_seconds: float | None = None


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
    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        """Rows per image of a piece, for each subject what it would get alone; ``images`` are the piece's."""

    def company(self, subject: Subject) -> Hashable | None:
        """Subjects of equal company are cheaper to measure together; None: this one is measured alone."""
        return None

    @abstractmethod
    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        """Numbers from all rows."""

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
