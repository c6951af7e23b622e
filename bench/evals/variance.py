"""The variance view of smoothed ensembles: margin variance and average certified radius against members and samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from attacks import Streams
from bench import metrics
from bench.evals.api import Outcome, Piece, Skipped, Smoothing, Subject, mean_of, share
from bench.store import Metric
from defenses.api import Images
from defenses.bounds import lower, radius
from defenses.combine import MeanLogits
from defenses.ensemble import Ensemble
from defenses.variance import Noise, prefixes


class Variance(Smoothing):
    """Margin variance, its fitted correlation, and ACR of the first k members with n samples each.

    Attributes:
        n: numbers of estimation draws, increasing; certificates by Clopper-Pearson at each (the fixed estimator).
        at: radii at which certified accuracy is reported, in units of sigma.
    """

    kind: Literal["variance"] = "variance"
    n: tuple[int, ...] = Field(min_length=1)
    at: tuple[Annotated[float, Field(ge=0)], ...] = (1.0, 2.0)

    def check(self, place: str, shape: tuple[int, int, int]) -> None:
        if list(self.n) != sorted(set(self.n)) or self.n[0] < 2:
            raise ValueError(f"{place}.n: must be increasing numbers of at least 2 draws, got {self.n}")

    def resolved(self, subject: Subject) -> dict[str, Any]:
        return {**self.model_dump(mode="json"), "sigma": self.noise(subject)}

    def pieces(self, subject: Subject) -> list[Piece]:
        self.noise(subject)
        model = subject.model
        if not isinstance(model, Ensemble) or not isinstance(model.rule, MeanLogits) or len(model.members) < 2:
            raise Skipped("the variance view is of the mean logits of two members or more (smoothed_ensemble)")
        return [Piece(rows, {}) for rows in self._slices(10)]

    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        return [self._measure(subject, images) for subject in subjects]

    def _measure(self, subject: Subject, images: Images) -> pd.DataFrame:
        streams = Streams(subject.seed, "certified", ids=images.ids, device=images.pixels.device)
        noise = Noise(self.noise(subject), self.n, self.n0, 100 if images.pixels.device.type == "cpu" else 1000)
        found = prefixes(subject.model.members, images.floats(), noise, streams)
        rows = []
        for k in range(len(subject.model.members)):
            for look, n in enumerate(self.n):
                rows.append(
                    pd.DataFrame(
                        {
                            "id": images.ids.cpu(),
                            "label": images.labels.cpu(),
                            "members": k + 1,
                            "n": n,
                            "prediction": found.label[k].cpu(),
                            "count": found.count[k, look].cpu(),
                            "margin": found.margin[k].cpu(),
                            "variance": found.variance[k].cpu(),
                            "single_variance": found.single.cpu(),
                            "covariance": found.covariance.cpu(),
                        }
                    )
                )
        return pd.concat(rows, ignore_index=True)

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        last = rows[rows.n == self.n[-1]]
        numbers, ratios = [], []
        for k in range(1, len(subject.model.members) + 1):
            part = last[last.members == k]
            numbers.append(mean_of("margin_variance_ratio", part.variance / part.single_variance, unit="ratio", members=k))
            ratios.append(numbers[-1].value)
        fitted = metrics.fit_correlation(ratios)
        numbers.append(Metric(metric="margin_correlation_fitted", value=fitted, n=self.images, unit="correlation"))
        one = last[last.members == 1]
        numbers.append(mean_of("margin_correlation", one.covariance / one.single_variance, unit="correlation"))
        for k in range(1, len(subject.model.members) + 1):
            for n in self.n:
                numbers += self._certificates(rows[(rows.members == k) & (rows.n == n)], self.noise(subject), k, n)
        return Outcome(numbers, [])

    def _certificates(self, part: pd.DataFrame, sigma: float, k: int, n: int) -> list[Metric]:
        """ACR and certified accuracies of the first k members with n draws."""
        bound = lower(part["count"], n, self.alpha)
        certified = (bound >= 0.5) & (part.prediction == part.label).to_numpy()
        radii = np.where(certified, radius(np.maximum(bound, 0.5), sigma), 0.0)
        found = [mean_of("acr", radii, unit="l2", members=k, draws=n)]
        for at in self.at:
            hits = certified & (radii >= at * sigma)
            found.append(share("certified_accuracy", hits, radius=at * sigma, members=k, draws=n))
        return found
