"""Expectation over transformation (Athalye et al. 2018) around any attack, for models that draw noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from attacks.api import Around, Search
from attacks.oracle import Oracle
from attacks.streams import Streams

AVERAGES = ("loss", "probability")


@dataclass(frozen=True)
class Eot(Around):
    """Run ``inner`` on the average over fixed noise draws; success is judged on fresh ones (methods 8.9, 9.2).

    Attributes:
        inner: the attack; norm and eps are its own.
        draws: noise draws per gradient, the same in every step.
        average: "loss" averages losses, and so gradients; "probability" attacks the log of the mean softmax, which for
            input noise is the soft score of the smoothed classifier (SmoothAdv, Salman et al. 2019).
    """

    draws: int = 20
    average: str = "loss"

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"EOT needs at least one draw, got {self.draws}")
        if self.average not in AVERAGES:
            raise ValueError(f"unknown average {self.average!r}; known are {', '.join(AVERAGES)}")

    def run(self, oracle: Oracle, x: Tensor, y: Tensor, streams: Streams | None) -> Search:
        return self.inner.search(replace(oracle, draws=self.draws, average=self.average), x, y, streams)
