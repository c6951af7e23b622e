"""Accuracy on the images as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pandas as pd

from attacks import Streams
from attacks.oracle import decide
from bench.evals.api import Base, Outcome, Piece, Subject, share
from defenses.api import Images


class Clean(Base):
    """Accuracy on the images as they are."""

    kind: Literal["clean"] = "clean"

    def pieces(self, subject: Subject) -> list[Piece]:
        return [Piece(rows, {}) for rows in self._slices(1000)]

    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        return [self._measure(subject, images) for subject in subjects]

    def _measure(self, subject: Subject, images: Images) -> pd.DataFrame:
        streams = Streams(subject.seed, "clean", ids=images.ids, device=images.pixels.device)
        label = decide(subject.model, images.floats(), streams)
        return pd.DataFrame({"id": images.ids.cpu(), "label": images.labels.cpu(), "prediction": label.cpu()})

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        return Outcome([share("clean_accuracy", rows.prediction == rows.label)], [])
