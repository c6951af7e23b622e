"""Certified against attacked: attacks on the smoothed classifier at the radii that were certified (methods, invariant I8)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from attacks import Eot, Pgd, Streams
from bench.evals.api import Outcome, Piece, Subject, share
from bench.evals.certified import Certified
from bench.store import Metric
from defenses.api import Images
from defenses.smoothing import POOLED, Smoothed

JUDGE = {"n": 100_000, "alpha": 1e-6}
"""PREDICT at the adversarial point, whose answer decides."""

FIRST = {"n": 1_000, "alpha": 1e-6}
"""A look that spares most points the hundred thousand: the certified class already leads significantly."""


class Challenge(Certified):
    """The certificates of :class:`Certified`, each attacked with l2 PGD on the soft smoothed classifier (SmoothAdv) at its own
    radius. One that is beaten fails the evaluation and names the image.

    Attributes:
        steps, eot: steps, and noise draws per gradient.
    """

    kind: Literal["challenge"] = "challenge"  # type: ignore[assignment]
    steps: int = Field(20, ge=1)
    eot: int = Field(20, ge=1)

    def check(self, place: str, shape: tuple[int, int, int]) -> None:
        super().check(place, shape)
        if self.preset or self.estimator == POOLED or self.skip_wrong:
            raise ValueError(f"{place}: attacks sound certificates of all radii, got estimator {self.estimator!r}")

    def company(self, subject: Subject) -> Hashable | None:
        return None  # the attacks are the work, and they have nothing in common

    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        return [
            table.assign(beaten=self.attack(subject, images, table).cpu().numpy())
            for subject, table in zip(subjects, super().measure(subjects, images, piece), strict=True)
        ]

    def attack(self, subject: Subject, images: Images, certificates: pd.DataFrame) -> Tensor:
        """bool (n): whether PREDICT at the adversarial point returns another class than the certified one.

        Every certificate with a radius is attacked, whatever the true class; under numerics the gradient is that of the
        original networks, and PREDICT asks what was certified.
        """
        beaten = torch.zeros(len(images), dtype=torch.bool, device=images.pixels.device)
        streams = Streams(subject.seed, "challenge", ids=images.ids, device=images.pixels.device)
        sigma, voter = self.noise(subject), self.voter(subject, images)
        for row, (label, radius) in enumerate(zip(certificates.prediction, certificates.radius, strict=True)):
            if radius > 0:
                pick = torch.tensor([row], device=images.pixels.device)
                attack = Eot(
                    Pgd(norm="l2", eps=float(radius), steps=self.steps, step="2.5eps/T", restarts=1), self.eot, "probability"
                )
                claimed = torch.tensor([label], device=images.pixels.device)
                own = streams.take(pick)
                point = attack(Smoothed(subject.model, sigma).eval(), images.floats(pick), claimed, own).x_adv
                beaten[row] = beats(Smoothed(voter, sigma).eval(), point, int(label), own)
        return beaten

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        self.check_ceiling(rows, subject)
        images = sorted(set(rows.id[rows.beaten]))
        if images:
            raise ArithmeticError(
                f"an attack within the certified radius beats the certificates of images {images}: "
                f"PREDICT with n = {JUDGE['n']} and alpha = {JUDGE['alpha']:g} returns another class there"
            )
        attacked = rows.radius > 0
        numbers = [Metric(metric="certificates_attacked", value=float(attacked.sum()), n=len(rows), unit="images")]
        if attacked.any():
            numbers.append(share("certificates_beaten", rows.beaten[attacked]))
        return Outcome(numbers, [])


def beats(smoothed: Smoothed, point: Tensor, label: int, streams: Streams) -> bool:
    """Whether PREDICT at a point (1 c h w) returns another class than ``label``; an abstention is none."""
    first = int(smoothed.predict(point, **FIRST, streams=streams.child("first")))  # type: ignore[arg-type]
    if first == label:
        return False
    return int(smoothed.predict(point, **JUDGE, streams=streams.child("judge"))) not in (label, -1)  # type: ignore[arg-type]
