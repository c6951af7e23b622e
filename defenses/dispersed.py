"""Dispersed ensemble gradients and priority diversified dropout (Huang et al., AAAI 2021), alone and together.

DEG pushes the members' input gradients apart; PDD keeps, for every member, the features that lie where that member has most of
the ensemble's. Differences from the released code: cross-entropy from logits (there ln(softmax + 1e-64), which is ln 0 in
float32), ties between bins go to the lower one (there to the first met), equal features of all members are kept with
probability 0.9 (there 0/0), members that outnumber the bins in use share the fullest, masks are drawn on the device, nothing is
selected on test images. As there, features are not rescaled: see :func:`scale_ratio`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.guided import View
from defenses.api import Classifier, Task
from defenses.ensemble import Ensemble
from defenses.foreign import TORCHVISION
from defenses.joint import EnsembleLoss, TrainedTogether, cross_entropies, gradients, pair_cosines
from defenses.nets import Network
from defenses.training import Batch
from defenses.views import views


@dataclass(frozen=True)
class DispersedGradients(EnsembleLoss):
    """alpha mean_m CE_m + beta sum_{a<b} cos(J_a, J_b), J the input gradient of a member's cross-entropy; means over the batch.

    Cross-entropies and gradients come from one forward pass in training mode, and so from the same masks.

    Attributes:
        alpha: weight of the cross-entropy.
        beta: weight of the cosines; 0 spares the gradients.
        bins: of priority diversified dropout; 0 for none.
    """

    alpha: float
    beta: float
    bins: int = 0

    @property
    def second_order(self) -> bool:
        return self.beta != 0

    def __call__(self, net: Ensemble, batch: Batch, needs: Sequence[Classifier]) -> dict[str, Tensor]:
        # Not `joint.input_gradients`, where members are asked one by one: here a mask depends on the features of all.
        leaves = [batch.x.clone().requires_grad_(self.beta != 0) for _ in net.members]
        logits = self.logits(net.members, leaves, batch.gen)
        parts = {"ce": self.alpha * cross_entropies(logits, batch.y, batch.label_smoothing).mean()}
        if self.beta:
            ways = gradients(logits, leaves, partial(F.cross_entropy, target=batch.y, reduction="none"))
            parts["cosines"] = self.beta * dispersion(ways).mean()
        return parts

    def errors(self, net: Ensemble, x: Tensor, batch: Batch) -> Tensor:
        logits = self.logits(net.members, [x] * len(net.members), batch.gen)
        return self.alpha * cross_entropies(logits, batch.y, batch.label_smoothing).mean()

    def watch(self, net: Ensemble, x: Tensor, gen: torch.Generator) -> dict[str, float]:
        return {"scale_ratio": scale_ratio(net, x, self.bins, gen)} if self.bins else {}

    def logits(self, members: Sequence[Classifier], images: Sequence[Tensor], gen: torch.Generator) -> list[Tensor]:
        """Logits (n k) of every member for its own images (n c h w), under masks if there are any."""
        if self.bins:
            return diversified(members, images, self.bins, gen)
        return [member(x) for member, x in zip(members, images, strict=True)]


def dispersion(ways: Tensor) -> Tensor:
    """Sum over pairs of the cosine: gradients (m n d) -> (n)."""
    return pair_cosines(ways).sum(0)


def diversified(members: Sequence[Classifier], images: Sequence[Tensor], bins: int, gen: torch.Generator) -> list[Tensor]:
    """Logits (n k) of every member under priority diversified dropout.

    Args:
        members: networks of :data:`~defenses.nets.ARCHITECTURES`.
        images: what each of them sees (n c h w).
        bins: number of bins.
        gen: generator of the masks.
    """
    features = torch.stack([penultimate(net, x) for net, x in zip(members, images, strict=True)])
    kept = features * masks(features, bins, gen)
    return [head(net)(own) for net, own in zip(members, kept, strict=True)]


def head(net: Classifier) -> nn.Linear:
    """The linear layer that a network ends in.

    Raises:
        ValueError: if its layers are not a plain sequence with a linear one at the end.
    """
    if isinstance(net, Network) and isinstance(net.body, nn.Sequential) and isinstance(net.body[-1], nn.Linear):
        return net.body[-1]
    name = getattr(net, "architecture", type(net).__name__)
    raise ValueError(
        f"priority diversified dropout masks the input of a network's last linear layer, which is not known of {name!r}; "
        "use an architecture of this project"
    )


def penultimate(net: Classifier, x: Tensor) -> Tensor:
    """Images (n c h w) -> the input (n d) of a network's last linear layer.

    Raises:
        ValueError: if the network does not end in one.
    """
    head(net)
    assert isinstance(net, Network) and isinstance(net.body, nn.Sequential)
    # As `Network.forward` goes, so that features and head together give its logits to the bit.
    return net.body[:-1](net.entering(x))


def masks(features: Tensor, bins: int, gen: torch.Generator) -> Tensor:
    """Which of the features (m n d) are kept, constants for the backward pass: bool (m n d)."""
    keep = keep_probabilities(features.detach(), bins)
    return torch.rand(keep.shape, generator=gen, device=keep.device) < keep


def keep_probabilities(features: Tensor, bins: int) -> Tensor:
    """Probabilities (m n d) with which features (m n d) of an image are kept.

    The values of all members are sorted into equal bins between their least and their greatest. The fullest bin is the first
    member's, the next the second's. A member keeps what lies in its own bin with probability 0.9, and the rest with
    0.1 (1 - r / d), where r of its d features share the bin.
    """
    width = features.shape[-1]
    low, high = features.amin((0, 2), keepdim=True), features.amax((0, 2), keepdim=True)
    # The product first: bounds of bins that are whole numbers then stay exact. What is NaN goes to bin 0: equal features (0/0),
    # which so share the one bin in use, everybody's own; and those of a training that diverges, for its loss to tell.
    place = ((features - low) * bins / (high - low)).nan_to_num(0, 0, 0).long().clamp(0, bins - 1)
    counts = features.new_zeros(*features.shape[:2], bins).scatter_add_(2, place, torch.ones_like(features))
    own = own_bins(counts).unsqueeze(2)
    rest = 0.1 * (1 - counts.gather(2, place) / width)
    return torch.where(place == own, 0.9, rest)


def own_bins(counts: Tensor) -> Tensor:
    """The bin (m n) of each member from all members' counts (m n bins); among equally full bins the lower comes first.

    Members that outnumber the bins in use share the fullest.
    """
    total = counts.sum(0)
    order = total.argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(len(counts), device=counts.device).expand(len(total), -1)
    used = (total > 0).sum(1, keepdim=True)
    return order.gather(1, torch.where(rank < used, rank, 0)).T


def scale_ratio(net: Ensemble, x: Tensor, bins: int, gen: torch.Generator) -> float:
    """How many times larger logits are without masks, as attackers meet them, than with masks, as they are trained.

    Features are masked and not rescaled, so a network is more confident than it was trained to be, and a softmax that saturates
    hides the gradient of cross-entropy from attacks (methods 4.8 v). The size of logits is their mean standard deviation over
    classes.

    Args:
        net: in eval mode, so that nothing but the masks differs and BatchNorm statistics stay.
        x: images (n c h w).
        bins: number of bins.
        gen: generator of the masks.
    """
    with torch.no_grad():
        trained = torch.stack(diversified(net.members, [x] * len(net.members), bins, gen))
        return float(net.member_logits(x).std(-1).mean() / trained.std(-1).mean())


@dataclass(frozen=True, kw_only=True)
class Dispersed(TrainedTogether):
    """Dispersed ensemble gradients, priority diversified dropout, or both.

    Attributes:
        alpha: weight of the cross-entropy.
        beta: weight of the cosines; 0 for none.
        dropout: whether features are dropped.
    """

    alpha: float = 1.0
    beta: float = 0.01
    dropout: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta and self.members < 2:
            raise ValueError(f"members: gradients are dispersed in pairs, so at least 2, got {self.members}")

    @property
    def bins(self) -> int:
        """Of the dropout; 0 for none."""
        if not self.dropout:
            return 0
        return 20 if self.members >= 5 else 10

    def unsuited(self, task: Task) -> str:
        if self.dropout and task.architecture.startswith(TORCHVISION):
            return f"the features that priority diversified dropout masks are not known of {task.architecture}"
        return ""

    def views(self, model: Classifier, task: Task) -> dict[str, View]:
        # Dropout that is off at inference lets logits grow until softmax saturates.
        return views(model, (5.0, 10.0, 50.0))

    def loss(self, task: Task) -> DispersedGradients:
        return DispersedGradients(self.alpha, self.beta, self.bins)


deg = Dispersed()
pdd = Dispersed(beta=0.0, dropout=True)
pdd_deg = Dispersed(dropout=True)
