"""The paired difference of one number of two defenses: its interval, and tests over images and over trainings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bench import metrics

LEVEL = 1 - metrics.CONFIDENCE
"""Of the verdicts, for all rows of a comparison together (Holm 1979)."""


@dataclass(frozen=True)
class Difference:
    """One number of two defenses.

    Attributes:
        evaluation, number: which.
        n, seeds: images that both were asked about, and training seeds that both have.
        a, b: the means over images and seeds.
        difference, lower, upper: a - b, with its interval over images, for the networks as they are
            (:func:`bench.metrics.paired_difference` of one seed's verdicts, else by bootstrap); without one where several
            seeds or other values are all equally far apart, which a bootstrap cannot tell from certainty.
        each: the difference of every seed.
        p: over images, for the networks as they are (:func:`bench.metrics.over_images`); ``holm`` is it, corrected.
        trainings: p for networks trained again, the larger of ``p`` and :func:`bench.metrics.over_trainings`; None for one
            seed, which does not tell. ``trainings_holm`` is it, corrected.
    """

    evaluation: str
    number: str
    n: int
    seeds: int
    a: float
    b: float
    difference: float
    lower: float | None
    upper: float | None
    each: tuple[float, ...]
    p: float
    holm: float = 1.0
    trainings: float | None = None
    trainings_holm: float | None = None

    @property
    def verdict(self) -> str:
        """For the networks as they are, in words."""
        return self._direction if self.holm <= LEVEL else "no difference shown"

    @property
    def again(self) -> str:
        """For networks trained again, in words."""
        if self.trainings_holm is None:
            return "one seed"
        return self._direction if self.trainings_holm <= LEVEL else "not shown"

    @property
    def p_is_bound(self) -> bool:
        """Whether p is an upper bound: all random signs fell short of the difference."""
        return self.p == 1 / (metrics.FLIPS + 1)

    @property
    def p_in_words(self) -> str:
        """The corrected p, or its bound."""
        return ("<= " if self.p_is_bound else "") + f"{self.holm:.3g}"

    @property
    def _direction(self) -> str:
        return "higher" if self.difference > 0 else "lower"


def difference(evaluation: str, number: str, pairs: Sequence[tuple[pd.Series, pd.Series]]) -> Difference:
    """The difference of one number, from what it is the mean of image by image, a pair a training seed."""
    frames = _shared(pairs)
    means = _means(frames)
    low, high = _interval(means)
    each = tuple(_gap(frame) for frame in frames)
    a, b, mean = float(means.a.mean()), float(means.b.mean()), _gap(means)
    p, trainings = _chances(means, frames)
    return Difference(evaluation, number, len(means), len(frames), a, b, mean, low, high, each, p, trainings=trainings)


def _interval(means: pd.DataFrame) -> tuple[float, float] | tuple[None, None]:
    first, second = means.a.to_numpy(), means.b.to_numpy()
    if metrics.are_verdicts(first, second):
        return metrics.paired_difference(first == 1, second == 1)
    low, high = metrics.bootstrap_mean(first - second)
    return (low, high) if low < high else (None, None)


def chance(pairs: Sequence[tuple[pd.Series, pd.Series]]) -> float:
    """The p of :func:`difference` alone: for networks trained again where there are several seeds, else for these."""
    frames = _shared(pairs)
    p, trainings = _chances(_means(frames), frames)
    return p if trainings is None else trainings


def _gap(frame: pd.DataFrame) -> float:
    """Mean difference of a and b; 0 where rows in float32 cannot tell it from nothing."""
    gap = float((frame.a - frame.b).mean())
    return gap if abs(gap) > 2**-24 * float(frame.abs().to_numpy().mean()) else 0.0


def _shared(pairs: Sequence[tuple[pd.Series, pd.Series]]) -> list[pd.DataFrame]:
    """Values a and b of the images of both, a frame a seed."""
    return [pd.DataFrame({"a": a, "b": b}).dropna().astype(float) for a, b in pairs]


def _means(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames).groupby(level=0).mean()


def _chances(means: pd.DataFrame, frames: Sequence[pd.DataFrame]) -> tuple[float, float | None]:
    """``p`` and ``trainings`` of a :class:`Difference`."""
    p = metrics.over_images(means.a.to_numpy(), means.b.to_numpy())
    if len(frames) == 1:
        return p, None
    apart = [np.abs((frame.a - frame.b).to_numpy()) for frame in frames]
    steps = [values[values > 0].min() / len(values) for values in apart if (values > 0).any()]
    return p, max(p, metrics.over_trainings(np.array([_gap(frame) for frame in frames]), min(steps, default=0.0)))
