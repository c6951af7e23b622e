"""Momentum ascent through random resizing, for points that fool other models (M-DI2-FGSM, Xie et al. 2019).

Every step looks at the image as it is, or, with probability ``chance``, shrunk to a random side and padded with zeros to where
it was. Differences from the paper: sides are at least 0.9 of the image's, because images here are small; l2 as well as l_inf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.api import Attack, Search
from attacks.gradient import Walk, ascend, classification, step_size
from attacks.losses import loss as loss_named
from attacks.norms import check_eps, per_row
from attacks.norms import norm as norm_named
from attacks.oracle import Oracle
from attacks.streams import Streams

SMALLEST = 0.9
"""Share of the side to which an image shrinks at most."""


@dataclass(frozen=True, kw_only=True)
class DiverseMim(Attack):
    """MIM whose gradients are those of randomly resized images; takes all its steps, and returns the last point.

    Attributes:
        norm: "linf" or "l2".
        eps: radius in pixel space.
        loss: a name of :data:`attacks.losses.LOSSES`.
        steps, step: as in :class:`attacks.gradient.Pgd`.
        momentum: decay of the l1-normalised gradients.
        chance: probability of resizing, per step and image.
    """

    norm: str
    eps: float
    loss: str = "ce"
    steps: int = 100
    step: str | float = "2.5eps/T"
    momentum: float = 1.0
    chance: float = 0.5

    def __post_init__(self) -> None:
        norm_named(self.norm), loss_named(self.loss)
        check_eps(self.eps)
        if self.steps < 1 or not 0 <= self.chance <= 1 or not step_size(self.step, self.eps, self.steps) > 0:
            raise ValueError(f"needed: steps >= 1, step > 0, 0 <= chance <= 1; got {self.steps}, {self.step}, {self.chance}")

    def run(self, oracle: Oracle, x: Tensor, y: Tensor, streams: Streams | None) -> Search:
        if streams is None:
            raise ValueError("input diversity is random: pass streams")
        goal, step = classification(oracle, y, self.loss), 0

        def seen(points: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            nonlocal step
            numbers = streams.take(rows).child("diversity", step).uniform((4,)).to(points)
            step += 1
            return goal(diverse(points, numbers, self.chance), rows)[0], None

        walk = Walk(self.norm, self.eps, step_size(self.step, self.eps, self.steps), self.steps, self.momentum)
        return Search(ascend(seen, x, walk, oracle=oracle).last)


def diverse(x: Tensor, numbers: Tensor, chance: float) -> Tensor:
    """Images (n *shape), each left alone or shrunk bilinearly and padded with zeros, by uniform numbers (n 4).

    Images of any shape are pictures (c h w): what is missing has length one.
    """
    if x.ndim != 4:
        return diverse(x.view(len(x), *[1] * (4 - x.ndim), *x.shape[1:]), numbers, chance).view(x.shape)
    n, _, height, width = x.shape
    least = math.ceil(SMALLEST * height)
    side = least + (numbers[:, 1] * (height - least + 1)).floor().clamp_max(height - least)
    across = (side * (width / height)).round().clamp_min(1)
    top, left = (numbers[:, 2] * (height - side + 1)).floor(), (numbers[:, 3] * (width - across + 1)).floor()
    rows = torch.arange(height, device=x.device, dtype=x.dtype) - top[:, None]
    columns = torch.arange(width, device=x.device, dtype=x.dtype) - left[:, None]
    # Where in [-1, 1] of the image each pixel of the small one comes from.
    down, over = 2 * (rows + 0.5) / side[:, None] - 1, 2 * (columns + 0.5) / across[:, None] - 1
    grid = torch.stack([over[:, None, :].expand(n, height, width), down[:, :, None].expand(n, height, width)], -1)
    small = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = (down.abs() < 1)[:, None, :, None] & (over.abs() < 1)[:, None, None, :]
    return torch.where(per_row(numbers[:, 0] < chance, x), small * inside, x)
