"""How networks are trained, whatever the defense; and what of a dataclass identifies what was made by it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

LATER = {"later": True}
"""Metadata of a field that came after results existed: it identifies them only where it differs from its default, so that a
new field leaves old keys and records as they are."""

MODIFIER = {**LATER, "modifier": True}
"""Metadata of a yes or no that is written NAME+field, where a defense has it."""


def settings(instance: Any) -> dict[str, Any]:
    """Names and values of a dataclass's fields, without those of :data:`LATER` that have their default."""
    found = {own.name: (getattr(instance, own.name), own) for own in fields(instance)}
    return {name: value for name, (value, own) in found.items() if not (own.metadata.get("later") and value == own.default)}


SCHEDULES = ("steps", "cosine", "cyclic")

PEAK = 0.4
"""The share of a "cyclic" training after which its rate is highest."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How networks are trained, whatever the defense.

    Attributes:
        epochs, batch: passes over the training images, images per step.
        optimizer: "sgd" or "adam".
        lr, momentum, nesterov, weight_decay: the optimiser's own.
        schedule: "steps", or "cosine" from ``lr`` in the first epoch to ``final_lr`` after the last (Loshchilov & Hutter 2017),
            both constant within an epoch, or "cyclic", in a line from 0 up to ``lr`` after 2/5 of all steps and in a line back
            to 0 (Wong et al. 2020).
        decay_at: shares of the epochs after which the rate of "steps" is multiplied by ``decay``; shares, so that a shorter
            budget keeps the schedule's shape.
        augment: "none" or "crop_flip" (pad by 4, random crop, horizontal flip).
        label_smoothing: share of the target that cross-entropy on hard labels spreads evenly over all classes.
    """

    epochs: int
    batch: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_at: tuple[float, ...] = ()
    decay: float = 0.1
    augment: str = "none"
    label_smoothing: float = 0.0
    schedule: str = field(default="steps", metadata=LATER)
    final_lr: float = field(default=0.0, metadata=LATER)

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: unknown {self.schedule!r}; known are {', '.join(SCHEDULES)}")
        if self.schedule != "steps" and self.decay_at:
            raise ValueError(
                f"decay_at: steps belong to the schedule 'steps', not to {self.schedule!r}; got {list(self.decay_at)}"
            )
        if self.schedule != "cosine" and self.final_lr:
            raise ValueError(f"final_lr: where the schedule 'cosine' ends; {self.schedule!r} has none, got {self.final_lr:g}")

    def rate(self, at: float) -> float:
        """Learning rate after ``at`` epochs; only "cyclic" looks at the fraction."""
        if self.schedule == "cyclic":
            done = at / self.epochs
            return self.lr * (done / PEAK if done < PEAK else (1 - done) / (1 - PEAK))
        epoch = int(at)
        if self.schedule == "cosine":
            return self.final_lr + (self.lr - self.final_lr) * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return self.lr * self.decay ** sum(epoch >= round(share * self.epochs) for share in self.decay_at)
