"""Fast adversarial training (Wong et al., ICLR 2020): a single step of 1.25 eps from a random start in the ball.

It may overfit catastrophically: within an epoch accuracy under PGD falls to nothing while that under the single step rises.
Training then ends, and the epoch before is kept. Differences from the paper: PGD has 10 steps, on validation images and after
every epoch (there a few, on a batch of training images); BatchNorm is in eval mode while images are crafted (there in train
mode: ``craft_bn=train``); full precision. In l2, which the paper has not, the start is a random direction with a radius uniform
up to eps. Unless the suite has a ``[roles.fast_at]``, the rate rises to the suite's and falls again, in the suite's number of
epochs (there to 0.2 in 15 to 30 on CIFAR-10).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from defenses.adversarial_training import AdversarialTraining
from defenses.api import Recipe, Task


@dataclass(frozen=True, kw_only=True)
class FastAt(AdversarialTraining):
    """Networks trained on single steps, until they overfit to them."""

    steps: int = 1
    keep: str = "good"

    role: ClassVar[str] = "fast_at"
    travel: ClassVar[Mapping[str, float]] = {"linf": 1.25, "l2": 1.25}

    def recipe(self, task: Task) -> Recipe:
        """The suite's for this role, or else its general one with the cyclic rate."""
        given = super().recipe(task)
        return given if self.role in task.roles else replace(given, schedule="cyclic", decay_at=(), final_lr=0.0)


fast_at = FastAt()
