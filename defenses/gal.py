"""Gradient alignment loss (Kariyappa & Qureshi 2019): input gradients of the members point in different directions.

One forward pass serves cross-entropy and gradients, so that BatchNorm statistics move once a step (released code uses two). As
in it, the members have leaky ReLUs, and half of the batches carry Gaussian noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from defenses.api import Classifier, Task
from defenses.ensemble import Ensemble
from defenses.joint import EnsembleLoss, TrainedTogether, cross_entropies, input_gradients, pair_cosines
from defenses.training import Batch


@dataclass(frozen=True)
class GradientAlignment(EnsembleLoss):
    """mean_m CE_m + weight ln sum_{a<b} exp cos(J_a, J_b), J the input gradient of a member's cross-entropy.

    Attributes:
        weight: lambda of the alignment.
        noise: standard deviation, in pixels, of the noise that half of the batches carry.
    """

    weight: float
    noise: float
    second_order = True

    def __call__(self, net: Ensemble, batch: Batch, needs: Sequence[Classifier]) -> dict[str, Tensor]:
        x = batch.x
        if self.noise:
            noisy = torch.rand((), generator=batch.gen, device=x.device) < 0.5
            x = x + self.noise * noisy * batch.noise()
        logits, gradients = input_gradients(net.members, x, lambda own: F.cross_entropy(own, batch.y, reduction="none"))
        return {
            "ce": cross_entropies(logits, batch.y, batch.label_smoothing).mean(),
            "alignment": self.weight * alignment(gradients).mean(),
        }


def alignment(gradients: Tensor) -> Tensor:
    """ln of the sum over pairs of exp(cosine): gradients (m n d) -> (n)."""
    return pair_cosines(gradients).logsumexp(0)


@dataclass(frozen=True, kw_only=True)
class Gal(TrainedTogether):
    """Gradient alignment loss.

    Attributes:
        weight: of the alignment.
        leak: slope of the leaky ReLUs.
        noise: standard deviation, in pixels, of the noise that half of the batches carry.
    """

    weight: float = 0.5
    leak: float = 0.1
    noise: float = 0.045

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.members < 2:
            raise ValueError(f"members: gradients are aligned in pairs, so at least 2, got {self.members}")

    @property
    def slope(self) -> float:
        return self.leak

    def loss(self, task: Task) -> GradientAlignment:
        return GradientAlignment(self.weight, self.noise)


gal = Gal()
