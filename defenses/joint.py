"""Ensembles whose members are trained together: the same images for all, one loss over all members.

What the losses have in common: member cross-entropies, and per-sample input gradients of every member, from one forward and one
backward pass (methods 4).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import Pgd, Streams
from attacks.guided import View
from attacks.streams import generator
from defenses.api import Classifier, Defense, Parts, Task, Weights, Workshop
from defenses.batch_norm import written_out
from defenses.combine import Mean
from defenses.eat import EPS, EnsembleAdversarial
from defenses.ensemble import Ensemble
from defenses.nets import lay_out, leaky, network
from defenses.recipe import LATER, MODIFIER
from defenses.training import Batch, Trained, robust_accuracy, train
from defenses.views import views

QUICK = {1: 0.1, 3: 2 / 255}
"""Radius in l_inf, by channels, of the quick look at robustness after every epoch."""


@dataclass(frozen=True, kw_only=True)
class Plain(Trained):
    """A member that sees the images in the order in which all members do."""

    @property
    def order(self) -> tuple[str, int]:
        return self.role, 0


def plain(task: Task, seed: int, member: int, role: str = "plain") -> Plain:
    """Member number ``member`` of the naive ensemble; another role makes another ensemble by the same recipe."""
    recipe = task.recipe_for("plain")
    return Plain(role=role, seed=seed, member=member, architecture=task.architecture, recipe=recipe)


class EnsembleLoss(ABC):
    """What members are trained for together; a frozen dataclass whose fields are the method's hyper-parameters.

    The part of it that is the members' cross-entropy is called "ce".
    """

    @property
    def second_order(self) -> bool:
        """Whether most of the work is gradients of gradients, taken by autograd."""
        return False

    @abstractmethod
    def __call__(self, net: Any, batch: Batch, needs: Sequence[Classifier]) -> dict[str, Tensor]:
        """Named scalars whose sum is minimised."""

    def errors(self, net: Any, x: Tensor, batch: Batch) -> Tensor:
        """What "ce" is for other images x (n c h w) of the batch's labels: the mean over members, unless a method says else."""
        return cross_entropies(list(net.member_logits(x)), batch.y, batch.label_smoothing).mean()

    def watch(self, net: Any, x: Tensor, gen: torch.Generator) -> dict[str, float]:
        """What of the method is worth knowing after every epoch, on validation images x (n c h w); ``net`` is in eval mode."""
        return {}


class SummedLoss(EnsembleLoss):
    """A loss whose cross-entropies are summed over members, as some papers have it."""

    def errors(self, net: Any, x: Tensor, batch: Batch) -> Tensor:
        return cross_entropies(list(net.member_logits(x)), batch.y, batch.label_smoothing).sum()


@dataclass(frozen=True, kw_only=True)
class Together(Trained):
    """All members of an ensemble, trained by one loss ``(ensemble, batch, needs) -> parts``.

    Members begin with the weights of the naive ensemble's and see the images in its order, so that only the loss makes the
    difference; its own randomness is drawn elsewhere.

    Attributes:
        members: how many.
        slope: of leaky ReLUs instead of ReLUs; 0 for ReLUs.
        sources: how many finished ensembles the loss is given.
        needs: finished members to begin with (``members``, or none), then those of the sources, one ensemble after the other.
    """

    members: int
    slope: float = 0.0
    sources: int = 0

    @property
    def order(self) -> tuple[str, int]:
        return "plain", 0

    def generators(self, epoch: int, device: torch.device) -> tuple[torch.Generator, torch.Generator]:
        own = generator(self.seed, "loss", self.role, epoch, device=device)
        return super().generators(epoch, device)[0], own

    def checks(self, net: Classifier, task: Task) -> dict[str, float]:
        """Clean accuracy; of the first 200 validation images accuracy under a short PGD, and what the loss watches."""
        images = task.validation.take(slice(0, 200))
        attack = Pgd(norm="linf", eps=QUICK[task.shape[0]], steps=5, restarts=1)
        streams = Streams(self.seed, "quick look", ids=images.ids, device=task.device)
        found = super().checks(net, task)
        found["validation_robust"] = robust_accuracy(net, images, attack, streams)
        if math.isnan(found["validation_robust"]):
            return found
        watched = self.loss.watch(net, images.floats(), generator(self.seed, "watch", self.role, device=task.device))
        return {**found, **{f"validation_{name}": value for name, value in watched.items()}}

    def untrained(self, task: Task) -> Ensemble:
        """The ensemble as training begins, but for what it needs.

        On CPU the double backward pass of BatchNorm is slow, and slower with channels last: with channels first, and with it
        written out, a step of GAL, SMD or DEG takes ResNet-20 and ResNet-18 1.4 to 1.5 times less (measured; LeNet-5, without
        BatchNorm, would take 1.2 times more with channels first).
        """
        ensemble = assembled(task, self.members, self.slope, self.seed, self.architecture)
        normalised = any(isinstance(module, nn.BatchNorm2d) for module in ensemble.modules())
        if self.loss.second_order and normalised and task.device.type == "cpu":
            lay_out(ensemble, torch.contiguous_format)
            written_out(ensemble)
        return ensemble

    def make(self, task: Task, needs: Sequence[Weights], workshop: Workshop) -> Weights:
        ensemble = self.untrained(task)
        begin, held_out = needs[: len(needs) - self.sources * self.members], needs[len(needs) - self.sources * self.members :]
        for net, weights in zip(ensemble.members, begin, strict=bool(begin)):
            net.load_state_dict(weights)
        sources = [assembled(task, self.members, 0.0, self.seed, self.architecture) for _ in range(self.sources)]
        for net, weights in zip([net for source in sources for net in source.members], held_out, strict=True):
            net.load_state_dict(weights)
        for source in sources:
            source.requires_grad_(False)
        train(ensemble, task, self, sources, workshop)
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
        eat: ensemble adversarial training on top, see :mod:`defenses.eat`.
        eat_eps: its radius in l_inf, in pixels; 0 means that of :data:`defenses.eat.EPS`.
        eat_steps, eat_sources: its steps of PGD, and how many held-out ensembles it attacks.
    """

    members: int = 3
    eat: bool = field(default=False, metadata=MODIFIER)
    eat_eps: float = field(default=0.0, metadata=LATER)
    eat_steps: int = field(default=10, metadata=LATER)
    eat_sources: int = field(default=3, metadata=LATER)

    def __post_init__(self) -> None:
        if self.members < 1:
            raise ValueError(f"members: at least 1, got {self.members}")
        if not self.eat and (self.eat_eps, self.eat_steps, self.eat_sources) != (0.0, 10, 3):
            raise ValueError("eat_eps, eat_steps and eat_sources belong to the modifier: write NAME+eat@eat_eps=...")
        if not 0 <= self.eat_eps <= 1:
            raise ValueError(f"eat_eps: a radius in pixels up to 1, or 0 for the usual one, got {self.eat_eps}")
        if self.eat_steps < 1 or self.eat_sources < 0:
            raise ValueError(f"eat_steps >= 1 and eat_sources >= 0 are needed, got {self.eat_steps} and {self.eat_sources}")

    @property
    def slope(self) -> float:
        """Of leaky ReLUs in the members; 0 for ReLUs."""
        return 0.0

    @abstractmethod
    def loss(self, task: Task) -> EnsembleLoss:
        """The loss, a frozen dataclass whose fields are the method's hyper-parameters."""

    def part(self, task: Task, seed: int) -> Together:
        """What is trained."""
        draft = self.draft(task, seed)
        if not self.eat:
            return draft
        loss = EnsembleAdversarial(draft.loss, self.eat_eps or EPS[task.shape[0]], self.eat_steps)
        held_out = tuple(plain(task, seed, member, "held out") for member in range(self.eat_sources * self.members))
        return replace(draft, loss=loss, sources=self.eat_sources, needs=(*draft.needs, *held_out))

    def draft(self, task: Task, seed: int) -> Together:
        """What is trained, before a modifier changes it."""
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

    def views(self, model: Classifier, task: Task) -> dict[str, View]:
        return views(model)

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
        logits (n k) of each member; gradients (m n d).
    """
    leaves = [x.clone().requires_grad_() for _ in members]
    logits = [net(leaf) for net, leaf in zip(members, leaves, strict=True)]
    return logits, gradients(logits, leaves, score)


def gradients(logits: Sequence[Tensor], leaves: Sequence[Tensor], score: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradients (m n d) of each member's score of its logits (n k) by the leaf (n c h w) that it alone has seen.

    With leaves of their own, one backward pass of the summed scores gives all gradients, and none is divided by the batch
    (methods G5).
    """
    total = torch.stack([score(own).sum() for own in logits]).sum()
    found = torch.autograd.grad(total, leaves, create_graph=True)
    return torch.stack([gradient.flatten(1) for gradient in found])


def pair_cosines(vectors: Tensor, eps: float = 1e-8) -> Tensor:
    """Cosines (p n) of all pairs a < b of vectors (m n d); 0 where one of them is 0."""
    unit = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(eps)
    gram = torch.einsum("and,bnd->abn", unit, unit)
    a, b = torch.triu_indices(len(vectors), len(vectors), 1, device=vectors.device)
    return gram[a, b]
