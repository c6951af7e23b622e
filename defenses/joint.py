"""Ensembles whose members are trained together: the same images for all, one loss over all members.

What the losses have in common: member cross-entropies, and per-sample input gradients of every member, from one forward and one
backward pass (methods 4).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks import Pgd, Streams
from attacks.streams import generator
from defenses.api import Classifier, Defense, Parts, Task, Weights, Workshop
from defenses.combine import Mean
from defenses.ensemble import Ensemble
from defenses.nets import leaky, network
from defenses.training import Trained, train

QUICK = {1: 0.1, 3: 2 / 255}
"""Radius in l_inf, by channels, of the quick look at robustness after every epoch."""


@dataclass(frozen=True, kw_only=True)
class Together(Trained):
    """All members of an ensemble, trained by one loss ``(ensemble, batch, needs) -> parts``.

    Members begin with the weights of the naive ensemble's and see the images in its order, so that only the loss makes the
    difference; its own randomness is drawn elsewhere.

    Attributes:
        members: how many.
        slope: of leaky ReLUs instead of ReLUs; 0 for ReLUs.
        needs: finished members to begin with (their number must be ``members``), or none.
    """

    members: int
    slope: float = 0.0

    @property
    def order(self) -> tuple[str, int]:
        return "plain", 0

    def generators(self, epoch: int, device: torch.device) -> tuple[torch.Generator, torch.Generator]:
        own = generator(self.seed, "loss", self.role, epoch, device=device)
        return super().generators(epoch, device)[0], own

    def checks(self, net: Classifier, task: Task) -> dict[str, float]:
        """Clean accuracy, and accuracy of the first 200 validation images under a short PGD."""
        images = task.validation.take(slice(0, 200))
        attack = Pgd(norm="linf", eps=QUICK[task.shape[0]], steps=5, restarts=1)
        streams = Streams(self.seed, "quick look", ids=images.ids, device=task.device)
        found = super().checks(net, task)
        with torch.inference_mode():
            if not net(images.floats()).isfinite().all():  # the last step broke the weights: no attack can look at that
                return {**found, "validation_robust": float("nan")}
        broken = attack(net, images.floats(), images.labels, streams).broken
        return {**found, "validation_robust": float((~broken).double().mean())}

    def make(self, task: Task, needs: Sequence[Weights], workshop: Workshop) -> Weights:
        ensemble = assembled(task, self.members, self.slope, self.seed, self.architecture)
        for net, weights in zip(ensemble.members, needs, strict=bool(needs)):
            net.load_state_dict(weights)
        train(ensemble, task, self, [], workshop)
        return ensemble.state_dict()


def assembled(task: Task, members: int, slope: float = 0.0, seed: int = 0, architecture: str | None = None) -> Ensemble:
    """An ensemble by mean softmax, initialised as the naive ensemble of this seed."""
    nets = [network(task, generator(seed, "init", "plain", member), architecture) for member in range(members)]
    for net in nets:
        leaky(net, slope)
    return Ensemble(nets, Mean()).to(task.device).eval()


@dataclass(frozen=True, kw_only=True)
class TrainedTogether(Defense):
    """A defense that is a loss over all members: mean softmax of ``members`` networks.

    Attributes:
        members: number of networks.
    """

    members: int = 3

    def __post_init__(self) -> None:
        if self.members < 1:
            raise ValueError(f"members: at least 1, got {self.members}")

    @property
    def slope(self) -> float:
        """Of leaky ReLUs in the members; 0 for ReLUs."""
        return 0.0

    @abstractmethod
    def loss(self, task: Task) -> Any:
        """The loss, a frozen dataclass whose fields are the method's hyper-parameters."""

    def part(self, task: Task, seed: int) -> Together:
        """What is trained."""
        return Together(
            role=type(self).__name__.lower(),
            seed=seed,
            architecture=task.architecture,
            recipe=task.recipe_for("plain"),
            loss=self.loss(task),
            members=self.members,
            slope=self.slope,
        )

    def build(self, task: Task) -> Ensemble:
        return assembled(task, self.members, self.slope)

    def fit(self, model: Classifier, task: Task, parts: Parts, seed: int) -> None:
        model.load_state_dict(parts.get(self.part(task, seed)))


def cross_entropies(logits: Sequence[Tensor], y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of every member (m), means over the batch."""
    return torch.stack([F.cross_entropy(own, y, label_smoothing=label_smoothing) for own in logits])


def input_gradients(members: Sequence[Classifier], x: Tensor, score: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], Tensor]:
    """Every member's logits, and the gradient of its own score with respect to the image, with a graph behind both.

    Args:
        members: networks, in the mode in which they are.
        x: images (n c h w).
        score: logits (n k) -> a number for each image (n).

    Returns:
        logits (n k) of each member; gradients (m n d). Each member sees a leaf of its own, so that one backward pass of the
        summed scores gives all gradients, and none is divided by the batch (methods G5).
    """
    leaves = [x.clone().requires_grad_() for _ in members]
    logits = [net(leaf) for net, leaf in zip(members, leaves, strict=True)]
    total = torch.stack([score(own).sum() for own in logits]).sum()
    found = torch.autograd.grad(total, leaves, create_graph=True)
    return logits, torch.stack([gradient.flatten(1) for gradient in found])


def pair_cosines(vectors: Tensor, eps: float = 1e-8) -> Tensor:
    """Cosines (p n) of all pairs a < b of vectors (m n d); 0 where one of them is 0."""
    unit = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(eps)
    gram = torch.einsum("and,bnd->abn", unit, unit)
    a, b = torch.triu_indices(len(vectors), len(vectors), 1, device=vectors.device)
    return gram[a, b]
