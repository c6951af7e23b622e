"""DVERGE (Yang et al., NeurIPS 2020): members learn to resist the non-robust features that the others see; and SMD+, the same
with saliency map diversity (arXiv 2112.03615).

Differences from the released code: images are distilled in eval mode, while the code does it in train mode and so moves running
statistics (``craft_bn`` "train" normalises by the batch as it does, but moves nothing either). One optimiser steps all members
instead of one for each: once the images are distilled a member's loss depends on no other's weights, and SGD and Adam treat
every number by itself, so that the steps are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from attacks.gradient import Walk, ascend
from attacks.streams import generator
from defenses.api import Classifier, Task
from defenses.ensemble import Ensemble
from defenses.features import features, layers
from defenses.joint import SummedLoss, Together, TrainedTogether, cross_entropies, plain
from defenses.nets import ARCHITECTURES, Network
from defenses.smd import SaliencyDiversity, check_saliency
from defenses.training import Batch

EPS = {3: 0.07, 5: 0.07, 8: 0.05}
"""Radius of the distillation by members; between two entries the one before holds, below the first the first."""

CRAFT_BN = ("eval", "train")


@contextmanager
def crafting(net: nn.Module, craft_bn: str = "eval") -> Iterator[None]:
    """The modes in which images are crafted for a network; afterwards every module has its own again.

    All is in eval mode, but BatchNorm normalises by the batch if ``craft_bn`` is "train". Running statistics are never moved.
    """
    modes = [(module, module.training) for module in net.modules()]
    norms = [(module, module.track_running_stats) for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    net.eval()
    if craft_bn == "train":
        for norm, _ in norms:
            norm.train()
            norm.track_running_stats = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for norm, tracks in norms:
            norm.track_running_stats = tracks


def distil(feature: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, eps: float, steps: int = 10) -> Tensor:
    """Images in the l_inf ball around x (n c h w) whose features are near those of ``target`` (n c h w).

    Descent on the mean squared distance by signs of l1-normalised gradients with momentum 1, from x, in steps of eps / 10.

    Args:
        feature: images (n c h w) -> features (n ...).
        x, target: images in [0,1].
        eps: radius in pixels.
        steps: how many.
    """
    with torch.no_grad():
        wanted = feature(target)

    def nearness(points: Tensor, _: Tensor) -> tuple[Tensor, None]:
        return -(feature(points) - wanted).square().flatten(1).mean(1), None

    return ascend(nearness, x, Walk("linf", eps, eps / 10, steps, momentum=1.0)).last


@dataclass(frozen=True)
class VulnerabilityDiversity(SummedLoss):
    """sum_i sum_{j != i} CE(f_i(x'_j), y): x'_j looks like x, but member j sees another image in it.

    Attributes:
        eps: radius of the distillation in pixels.
        steps: of the distillation, each eps / 10 long.
        craft_bn: by what BatchNorm normalises meanwhile, see :func:`crafting`.
        seed: of the layers, one an epoch.
    """

    eps: float
    steps: int = 10
    craft_bn: str = "eval"
    seed: int = 0

    def __call__(self, net: Ensemble, batch: Batch, needs: Sequence[Classifier]) -> dict[str, Tensor]:
        return {"ce": transferred(net.members, self.distilled(net, batch), batch).sum()}

    def distilled(self, net: Ensemble, batch: Batch) -> list[Tensor]:
        """For every member the batch's images (n c h w), changed until it sees their partners."""
        assert batch.partner is not None, "train() gives every batch a partner"
        target, _ = batch.partner()
        members = cast("Sequence[Network]", net.members)
        seen = partial(features, layer=self.layer(members[0], batch.epoch))
        with crafting(net, self.craft_bn):
            return [distil(partial(seen, member), batch.x, target, self.eps, self.steps) for member in members]

    def layer(self, member: Network, epoch: int) -> int:
        """The layer whose features are distilled in an epoch, uniform over all."""
        gen = generator(self.seed, "distilled layer", epoch)
        return int(torch.randint(1, layers(member) + 1, (), generator=gen))


def transferred(members: Sequence[Classifier], images: Sequence[Tensor], batch: Batch) -> Tensor:
    """Every member's cross-entropy (m), summed over the images (m times n c h w) that were distilled from the others.

    BatchNorm sees each of these batches by itself.
    """
    losses = []
    for i, member in enumerate(members):
        logits = [member(x) for j, x in enumerate(images) if j != i]
        losses.append(cross_entropies(logits, batch.y, batch.label_smoothing).sum())
    return torch.stack(losses)


@dataclass(frozen=True)
class VulnerabilityAndSaliency(VulnerabilityDiversity):
    """(1/M) sum_i sum_{j != i} CE(f_i(x'_j), y) + weight ln sum_{a<b} exp cos(s_a, s_b), s the saliency maps of clean images.

    Attributes:
        weight: of the saliency map diversity.
        saliency: a name of :data:`defenses.smd.SALIENCIES`.
    """

    weight: float = 1.0
    saliency: str = "logit"

    def __call__(self, net: Ensemble, batch: Batch, needs: Sequence[Classifier]) -> dict[str, Tensor]:
        ce = super().__call__(net, batch, needs)["ce"] / len(net.members)
        return {"ce": ce, "diversity": SaliencyDiversity(self.weight, self.saliency)(net, batch, needs)["diversity"]}

    def errors(self, net: Ensemble, x: Tensor, batch: Batch) -> Tensor:
        return super().errors(net, x, batch) / len(net.members)


@dataclass(frozen=True, kw_only=True)
class Dverge(TrainedTogether):
    """Vulnerability diversity; members begin as those of the naive ensemble, trained.

    Attributes:
        eps: radius of the distillation in pixels; 0 means that of :data:`EPS` for the number of members.
        craft_bn: "eval" or "train", by what BatchNorm normalises during the distillation: running statistics or the batch.
    """

    eps: float = 0.0
    craft_bn: str = "eval"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.members < 2:
            raise ValueError(f"members: each learns from images of the others, so at least 2, got {self.members}")
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps: a positive radius, or 0 for the one of so many members, got {self.eps}")
        if self.craft_bn not in CRAFT_BN:
            raise ValueError(f"unknown craft_bn {self.craft_bn!r}; known are {', '.join(CRAFT_BN)}")

    @property
    def radius(self) -> float:
        """The radius that is used, in pixels."""
        return self.eps or EPS[max((size for size in EPS if size <= self.members), default=min(EPS))]

    def unsuited(self, task: Task) -> str:
        if task.architecture not in ARCHITECTURES:
            return f"features are known of the layers of {', '.join(ARCHITECTURES)}, not of {task.architecture}"
        return ""

    def loss(self, task: Task) -> VulnerabilityDiversity:
        return VulnerabilityDiversity(self.radius, craft_bn=self.craft_bn)

    def draft(self, task: Task, seed: int) -> Together:
        begin = tuple(plain(task, seed, member) for member in range(self.members))
        return replace(super().draft(task, seed), needs=begin, loss=replace(self.loss(task), seed=seed))

    def facts(self, model: Classifier) -> dict[str, float]:
        return {"distillation_eps": self.radius}


@dataclass(frozen=True, kw_only=True)
class SmdPlus(Dverge):
    """DVERGE with the diversity of SMD on clean images.

    Attributes:
        weight: of the saliency map diversity.
        saliency: "logit" or "prob", as for SMD.
    """

    weight: float = 1.0
    saliency: str = "logit"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_saliency(self.saliency)

    def loss(self, task: Task) -> VulnerabilityAndSaliency:
        return VulnerabilityAndSaliency(self.radius, craft_bn=self.craft_bn, weight=self.weight, saliency=self.saliency)


dverge = Dverge()
smd_plus = SmdPlus()
