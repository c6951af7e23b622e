"""What an attacker may differentiate instead of a classifier, by what the classifier is made of (methods 12.1, 12.2)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.guided import View
from attacks.losses import Loss, half_margin
from attacks.oracle import Model
from defenses.api import Classifier
from defenses.ensemble import Ensemble

COOLER = (10.0,)
"""By what logits are divided: a saturated softmax has no gradient in float32, its logits have."""


def views(model: Classifier, temperatures: tuple[float, ...] = COOLER) -> dict[str, View]:
    """Views that suit a classifier, by name.

    Of any: its logits divided by each temperature, and a copy without kinks. Of an ensemble also its members' own losses, the
    margins of the half that is closest to falling, and the mean of their logits.
    """
    found = {f"logits/{t:g}": View(Through(model, partial(_divided, model, t)), {"ce": "ce"}) for t in temperatures}
    found["smooth"] = View(smooth(model), {"margin": "margin"})
    if isinstance(model, Ensemble):
        losses: dict[str, str | Loss] = {"ce": "ce", "margin": "margin", "half": half_margin}
        found["members"] = View(Through(model, model.member_logits), losses)
        found["mean logits"] = View(through_members(model, lambda logits: logits.mean(0)), {"margin": "margin"})
    return found


class Through(Classifier):
    """What an attacker makes of a classifier's answers. Noise that it draws is drawn here, too."""

    def __init__(self, model: Classifier, scores: Model) -> None:
        super().__init__()
        self.model, self.scores, self.randomized = model, scores, model.randomized
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x)


def through_members(model: Ensemble, rule: Callable[[Tensor], Tensor]) -> Through:
    """An ensemble whose members' logits (m n k) are put together by another rule."""
    return Through(model, lambda x: rule(model.member_logits(x)))


def _divided(model: Classifier, temperature: float, x: Tensor) -> Tensor:
    scores: Tensor = model(x) / temperature
    return scores


def smooth(model: Classifier, sharpness: float = 10.0) -> Classifier:
    """A copy with softplus in place of ReLU and a soft maximum in place of max pooling, both of this sharpness."""
    own = copy.deepcopy(model)
    for parent in list(own.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.ReLU | nn.LeakyReLU):
                setattr(parent, name, SoftReLU(sharpness, getattr(module, "negative_slope", 0.0)))
            elif isinstance(module, nn.MaxPool2d):
                setattr(parent, name, SoftMaxPool2d(module, sharpness))
    return own.eval()


class SoftReLU(nn.Module):
    """slope x + (1 - slope) softplus(sharpness x) / sharpness."""

    def __init__(self, sharpness: float, slope: float = 0.0) -> None:
        super().__init__()
        self.sharpness, self.slope = sharpness, slope

    def forward(self, x: Tensor) -> Tensor:
        soft = F.softplus(x, beta=self.sharpness)
        return soft if self.slope == 0 else self.slope * x + (1 - self.slope) * soft


class SoftMaxPool2d(nn.Module):
    """log of the mean of exp(sharpness x) over each window, over sharpness: between the mean and the maximum."""

    def __init__(self, hard: nn.MaxPool2d, sharpness: float) -> None:
        super().__init__()
        self.size, self.stride, self.padding = (_pair(n) for n in (hard.kernel_size, hard.stride, hard.padding))
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        (down, across), (height, width) = self.padding, self.size
        padded = F.pad(x, (across, across, down, down), value=-torch.inf)
        windows = padded.unfold(2, height, self.stride[0]).unfold(3, width, self.stride[1]).flatten(-2)
        return ((windows * self.sharpness).logsumexp(-1) - math.log(height * width)) / self.sharpness


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
