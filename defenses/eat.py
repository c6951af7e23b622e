"""Ensemble adversarial training (Tramer et al., ICLR 2018), for any ensemble defense: ``NAME+eat``.

Half of the cross-entropy is that of adversarial images. They are made for a source that is drawn for every batch, uniformly
among held-out naive ensembles, which never change, and the ensemble in training; a regulariser still sees clean images.
Sources are attacked by their own decision, not by the label, so that no label leaks. Differences from the paper: PGD in 10
steps from a random start instead of one step (so arXiv 2112.03615 hardens ensembles, with 3 sources of the same size and
architecture), and a source is asked in eval mode. Every image is met once an epoch, with new adversarial images in every one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.gradient import Walk, ascend
from defenses.api import Classifier
from defenses.training import Batch, evaluating

EPS = {1: 0.1, 3: 8 / 255}
"""Radius in l_inf by channels where a defense gives none; the paper of SMD is read as 0.1 on MNIST."""


@dataclass(frozen=True)
class EnsembleAdversarial:
    """Another loss, its cross-entropy half on clean and half on adversarial images.

    Attributes:
        loss: the defense's own, a :class:`defenses.joint.EnsembleLoss`.
        eps: radius in l_inf, in pixels.
        steps: of PGD, each 2.5 eps / steps long.
    """

    loss: Any
    eps: float
    steps: int

    @property
    def second_order(self) -> bool:
        """Whether the defense's own loss is."""
        return bool(self.loss.second_order)

    def __call__(self, net: Classifier, batch: Batch, needs: Sequence[Classifier]) -> dict[str, Tensor]:
        source = [*needs, net][int(torch.randint(len(needs) + 1, (), generator=batch.gen, device=batch.gen.device))]
        x = crafted(source, batch.x, self.eps, self.steps, batch.gen)
        parts = self.loss(net, batch, [])
        return {**parts, "ce": parts["ce"] / 2, "ce_adversarial": self.loss.errors(net, x, batch) / 2}

    def watch(self, net: Classifier, x: Tensor, gen: torch.Generator) -> dict[str, float]:
        """What the defense's own loss watches."""
        found: dict[str, float] = self.loss.watch(net, x, gen)
        return found


def crafted(source: Classifier, x: Tensor, eps: float, steps: int, gen: torch.Generator) -> Tensor:
    """Images (n c h w) in the l_inf ball around x that raise the cross-entropy of what ``source`` says of x, by PGD.

    Args:
        source: asked in eval mode; its modes and weights stay.
        x: images (n c h w) in [0,1].
        eps: radius in pixels.
        steps: each 2.5 eps / steps long, from a start uniform in the ball.
        gen: generator of the start.
    """
    start = (x + eps * (2 * torch.rand(x.shape, generator=gen, device=x.device) - 1)).clamp(0, 1)
    with evaluating(source):
        with torch.no_grad():
            said = source(x).argmax(-1)

        def error(points: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            return F.cross_entropy(source(points), said[rows], reduction="none"), None

        return ascend(error, x, Walk("linf", eps, 2.5 * eps / steps, steps), start).last
