"""How differently the members of an ensemble see the same images: gradients, wrong classes, errors, curvature (methods 9.7),
and whether what fools one fools the others (:mod:`bench.evals.vulnerability`).

Diagnostics, no measure of robustness.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from bench.evals.api import Base, Number, Outcome, Piece, Skipped, Subject, mean_of
from bench.evals.saliency import saliency
from bench.evals.vulnerability import BLOCK, VULNERABILITY, vulnerability
from bench.metrics import CONFIDENCE
from bench.store import Metric
from defenses.adp import log_diversity
from defenses.api import Classifier, Images, decided
from defenses.edlcm import changes, cosines, cross_entropy, odds_against, sizes
from defenses.gal import alignment
from defenses.joint import input_gradients, pair_cosines

UNITS = {
    "gradient_cosine": "cosine",
    "gradient_coherence": "cosine",
    "saliency_alignment": "nats",
    "log_diversity": "nats",
    "gradient_norm": "nats/l2",
    "curvature": "nats^2/l2^4",
    "curvature_cosine": "cosine",
}
"""Numbers that are means over images of a column of the same name."""

BATCH = 100
"""Images at a time; no number depends on it."""

PIECE = 1000
"""Images of a stored piece: whole tens, which are distilled together."""


class Diversity(Base):
    """Agreement of the members' input gradients, wrong-class probabilities and errors, with size and curvature of gradients.

    Attributes:
        h: step of the curvature, l2 in pixels.
        distilled: how many of the first images are distilled from every member for the vulnerability, whole tens of them.
        eps: radius of the distillation, l_inf in pixels.
        maps: how many of the first images keep their pixels and the members' saliency maps for the figure.
    """

    kind: Literal["diversity"] = "diversity"
    h: float = Field(default=0.3, gt=0)
    distilled: int = Field(default=100, ge=0, multiple_of=BLOCK)
    eps: Number = Field(default=0.07, gt=0, le=1)
    maps: int = Field(default=4, ge=0)

    def pieces(self, subject: Subject) -> list[Piece]:
        members = subject.model.members
        if len(members) < 2:
            raise Skipped("diversity is of two members or more, this is one network")
        if any(member.randomized for member in members):
            raise Skipped("the members draw noise, so that their gradients are no function of the image")
        return [Piece(rows, {}) for rows in self._slices(PIECE)]

    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        return [self._measure(subject, images, piece.rows.start) for subject in subjects]

    def _measure(self, subject: Subject, images: Images, start: int) -> pd.DataFrame:
        """Rows of images of which the first is number ``start`` of the evaluation."""
        found = self._look(subject, images)
        some = images.take(slice(0, max(0, self.distilled - start)))
        for name, column in vulnerability(subject.model.members, some, self.eps, subject.seed).items():
            # Rows without a number: no partner, and NaN.
            rest = column.new_full((len(images) - len(some),), -1 if name == "partner" else torch.nan)
            found[name] = torch.cat([column, rest]).cpu().numpy()
        for name, files in saliency(subject.model.members, images, max(0, self.maps - start)).items():
            found[name] = files
        return found

    def _look(self, subject: Subject, images: Images) -> pd.DataFrame:
        members, found = subject.model.members, []
        for start in range(0, len(images), BATCH):
            some = images.take(slice(start, start + BATCH))
            with torch.enable_grad():
                seen = look(members, some.floats(), some.labels, self.h)
            columns = {"id": some.ids, "label": some.labels, **seen}
            found.append(pd.DataFrame({name: column.detach().cpu().numpy() for name, column in columns.items()}))
        return pd.concat(found, ignore_index=True)

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        numbers = [mean_of(name, rows[name], unit=unit) for name, unit in UNITS.items() if name in rows]
        if "partner" in rows and (rows.partner >= 0).any():
            part = rows[rows.partner >= 0]
            numbers += [mean_of(name, part[name], unit=unit) for name, unit in VULNERABILITY.items()]
        wrong = rows[[f"wrong_{member}" for member in range(len(subject.model.members))]].to_numpy(bool)
        value = error_correlation(wrong)
        if value is not None:
            low, high = error_interval(wrong)
            found = Metric(metric="error_correlation", value=value, n=len(rows), lower=low, upper=high, unit="correlation")
            numbers.append(found)
        return Outcome(numbers, [])


def look(members: Sequence[Classifier], x: Tensor, y: Tensor, h: float) -> dict[str, Tensor]:
    """The columns of images (n c h w) with labels (n), each (n), by name.

    gradient_cosine, gradient_coherence: mean and largest cosine of input gradients of cross-entropy, over pairs of members.
    saliency_alignment: ln of the sum over pairs of exp(cosine of gradients of the label's logit) (SMD, eq. 2).
    log_diversity: ADP's; absent where there are too few classes for it.
    gradient_norm, curvature: l2 length of the gradient of cross-entropy, and squared length of its change over h along its
        sign direction, divided by h^2; means over members.
    curvature_cosine: mean cosine of those changes over pairs of members (EDLCM, eq. 10); 0 for pairs with a change of length 0.
    wrong_0, ...: whether the member is wrong.
    """
    # The odds' gradient has the direction of cross-entropy's, and a length that a sure member does not bring near 0.
    logits, ways = input_gradients(members, x, partial(odds_against, y=y))
    _, slopes = input_gradients(members, x, lambda own: own.gather(1, y.unsqueeze(1)).squeeze(1))
    _, change = changes(members, x, partial(cross_entropy, y=y), h)
    directions, answers = pair_cosines(ways), torch.stack(logits)
    odds = torch.stack([odds_against(own, y) for own in logits])
    columns = {
        "gradient_cosine": directions.mean(0),
        "gradient_coherence": directions.amax(0),
        "saliency_alignment": alignment(slopes),
        "gradient_norm": (odds.sigmoid() * ways.norm(dim=-1)).mean(0),
        "curvature": sizes(change).mean(0) / h**2,
        "curvature_cosine": cosines(change).mean(0),
    }
    if answers.shape[-1] > len(members):
        # Its lengths are divided out: the wrong classes alone have the same value, and do not all round to 0 for a sure member.
        true = torch.zeros_like(answers[0], dtype=torch.bool).scatter_(1, y.unsqueeze(1), True)
        columns["log_diversity"] = log_diversity(answers.double().masked_fill(true, -torch.inf).softmax(-1), y)
    return columns | {f"wrong_{place}": decided(own) != y for place, own in enumerate(logits)}


def error_correlation(wrong: np.ndarray) -> float | None:
    """Mean over pairs of members of the correlation of their errors (n m) over images; None if it is defined for no pair.

    A member that is always right, or always wrong, correlates with nobody: its pairs do not count.
    """
    value = float(_correlations(wrong, np.ones((1, len(wrong))))[0])
    return None if np.isnan(value) else value


def error_interval(wrong: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of :func:`error_correlation` over images, from the resamples in which it is defined."""
    rng, n = np.random.default_rng(seed), len(wrong)
    # A resample is how often it holds each image, which copies no rows; a hundred at a time, so that memory stays small.
    found = [_correlations(wrong, rng.multinomial(n, np.full(n, 1 / n), 100)) for _ in range(resamples // 100)]
    low, high = np.nanquantile(np.concatenate(found), [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return float(low), float(high)


def _correlations(wrong: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean correlation (r) over the pairs for which it is defined, NaN for none, with images counted as in each row (r n)."""
    errors, n = wrong.astype(float), counts.sum(1)
    # Counts, not means, are whole numbers: a member without errors has a variance of exactly 0.
    number = counts @ errors
    spread = number * (n[:, None] - number)
    found = []
    for a, b in combinations(range(errors.shape[1]), 2):
        both = counts @ (errors[:, a] * errors[:, b])
        scale = np.sqrt(spread[:, a] * spread[:, b])
        found.append((n * both - number[:, a] * number[:, b]) / np.where(scale > 0, scale, np.nan))
    pairs = np.stack(found)
    defined = ~np.isnan(pairs)
    return np.where(defined, pairs, 0.0).sum(0) / np.where(defined.any(0), defined.sum(0), np.nan)
