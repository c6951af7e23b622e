"""Adversarial training with early stopping (Madry et al., ICLR 2018; Rice et al., ICML 2020), and what its family shares.

Cross-entropy of images that PGD has moved to where the network errs most, within a ball; of all epochs the one is kept whose
accuracy under PGD is best on held-out images. TRADES and fast adversarial training have files of their own and the same frame:
another loss, or other settings. Differences from the code of Rice et al.: BatchNorm is in eval mode while images are crafted
(there in train mode: ``craft_bn=train``); the l2 step is 2.5 eps / steps (there 15/255 at eps 128/255, about half of that);
the epoch is chosen on the first 1,000 validation images alone (there also by test images). Greyscale images have the steps of
colour ones (Madry et al.: ``steps=40,step=0.01``). Rates, epochs and network are the suite's.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks import Pgd, Streams
from attacks.gradient import Walk, ascend
from attacks.guided import View
from attacks.norms import norm as norm_named
from attacks.norms import per_row
from defenses.api import Classifier, Defense, Parts, Recipe, Task
from defenses.combine import Mean
from defenses.ensemble import Ensemble
from defenses.nets import check_architectures, network
from defenses.training import Batch, Log, Trained, evaluating, robust_accuracy
from defenses.views import views

WATCHED = 1000
"""Validation images, at most, that are attacked after every epoch."""


def _in_cube(x: Tensor, gen: torch.Generator) -> Tensor:
    return 2 * torch.rand(x.shape, generator=gen, device=x.device, dtype=x.dtype) - 1


def _in_ball(x: Tensor, gen: torch.Generator) -> Tensor:
    direction = norm_named("l2").steepest(torch.randn(x.shape, generator=gen, device=x.device, dtype=x.dtype))
    return direction * per_row(torch.rand(len(x), generator=gen, device=x.device, dtype=x.dtype), x)


STARTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"linf": _in_cube, "l2": _in_ball}
"""Where PGD begins in a ball of radius 1: uniform in the cube; in l2 a random direction with radius uniform in [0, 1]."""


@dataclass(frozen=True)
class Inner:
    """The inner maximisation: projected gradient ascent of a loss's own choice.

    Attributes:
        norm: "linf" or "l2".
        eps: radius in pixels.
        steps, step: how many, and the length of each in pixels.
        craft_bn: "eval": BatchNorm's running statistics are used and stay; "train": those of the batch, and the running ones
            are updated in every step.
    """

    norm: str
    eps: float
    steps: int
    step: float
    craft_bn: str = "eval"

    def noise(self, x: Tensor, gen: torch.Generator) -> Tensor:
        """A random start in the ball (n c h w), see :data:`STARTS`."""
        return self.eps * STARTS[self.norm](x, gen)

    def mode(self, net: Classifier) -> AbstractContextManager[None]:
        """The network's mode while images are crafted."""
        return CRAFT_BN[self.craft_bn](net)

    def climb(self, x: Tensor, noise: Tensor, error: Callable[[Tensor], Tensor]) -> Tensor:
        """Where ascent ends: points (n c h w) in ball and box around images x.

        Args:
            x: images (n c h w).
            noise: (n c h w), added to them in the beginning; brought into ball and box.
            error: points (n c h w) -> what is raised (n).
        """
        start = norm_named(self.norm).into(x + noise, x, self.eps)

        def objective(points: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            wanted = points.requires_grad  # nobody wants the error of the last points: a forward pass less
            return error(points) if wanted else points.new_zeros(len(points)), None

        return ascend(objective, x, Walk(self.norm, self.eps, self.step, self.steps), start).last


CRAFT_BN: dict[str, Callable[[Classifier], AbstractContextManager[None]]] = {
    "eval": evaluating,
    "train": lambda net: nullcontext(),
}


@dataclass(frozen=True)
class AdversarialCrossEntropy:
    """Cross-entropy of images that were moved to raise it."""

    inner: Inner

    def crafted(self, net: Classifier, batch: Batch) -> Tensor:
        """The images (n c h w) that are trained on."""
        with self.inner.mode(net):
            noise = self.inner.noise(batch.x, batch.gen)
            return self.inner.climb(batch.x, noise, lambda points: F.cross_entropy(net(points), batch.y, reduction="none"))

    def __call__(self, net: Classifier, batch: Batch, needs: Sequence[Classifier]) -> dict[str, Tensor]:
        x = self.crafted(net, batch)
        return {"ce": F.cross_entropy(net(x), batch.y, label_smoothing=batch.label_smoothing)}


def overfitted(log: Log, classes: int, watched: int) -> str:
    """What happened, if the last epoch overfitted catastrophically (Wong et al. 2020); empty if it did not.

    It did if accuracy under PGD of the ``watched`` images is less than half of the best so far, the best was more than twice
    what guessing gets (before a network has learned anything its accuracy means nothing), and the fall is more than four
    standard errors of the best: of 200 classes twice a guess is 1 %, which a few images more or less can halve.
    """
    best, now = max((line["validation_robust"] for line in log), default=0.0), log[-1]["validation_robust"] if log else 0.0
    luck = 4 * math.sqrt(best * (1 - best) / watched)
    if best > 2 / classes and now < best / 2 and best - now > luck:
        return f"catastrophic overfitting: validation accuracy under PGD fell from {best:.3f} to {now:.3f}"
    return ""


def _watched(task: Task) -> int:
    return min(WATCHED, len(task.validation))


def _best(log: Log, task: Task) -> bool:
    *before, now = (line["validation_robust"] for line in log)
    return now > max(before, default=-1.0)


KEEP: dict[str, Callable[[Log, Task], bool]] = {
    "last": lambda log, task: False,
    "best": _best,
    "good": lambda log, task: not overfitted(log, task.classes, _watched(task)),
}
"""Whose weights stay: of the last epoch; of that with the best accuracy under PGD, the first of equals; or of the last before
catastrophic overfitting, which ends the training."""


@dataclass(frozen=True, kw_only=True)
class Hardened(Trained):
    """A network trained on images crafted for it, and watched under PGD with the same threat.

    Attributes:
        keep: a name of :data:`KEEP`.
    """

    keep: str

    def checks(self, net: Classifier, task: Task) -> dict[str, float]:
        """Clean accuracy, and of the first validation images that under PGD: 10 steps from a start that never changes."""
        images = task.validation.take(slice(0, WATCHED))
        attack = Pgd(norm=self.loss.inner.norm, eps=self.loss.inner.eps, steps=10, restarts=1)
        streams = Streams(self.seed, "watch", ids=images.ids, device=task.device)
        return {**super().checks(net, task), "validation_robust": robust_accuracy(net, images, attack, streams)}

    def keeps(self, log: Log, task: Task) -> bool:
        return KEEP[self.keep](log, task)

    def enough(self, log: Log, task: Task) -> str:
        return overfitted(log, task.classes, _watched(task)) if self.keep == "good" else ""


@dataclass(frozen=True, kw_only=True)
class AdversariallyTrained(Defense):
    """One adversarially trained network, or the mean softmax of several, each trained alone.

    Attributes:
        members: number of networks.
        norm: "linf" or "l2".
        eps: radius in pixels; 0 means the usual one for greyscale or colour images, :attr:`usual`.
        steps: of the ascent.
        step: length of each in pixels; 0 means :attr:`travel` eps / steps.
        craft_bn: BatchNorm while images are crafted: "eval" or "train".
        keep: a name of :data:`KEEP`.
        architecture: instead of the task's.
    """

    members: int = 1
    norm: str = "linf"
    eps: float = 0.0
    steps: int = 10
    step: float = 0.0
    craft_bn: str = "eval"
    keep: str = "last"
    architecture: str = ""

    role: ClassVar[str]
    """Of its parts; a suite may give it a recipe of its own."""

    usual: ClassVar[Mapping[str, Mapping[int, float]]] = {"linf": {1: 0.3, 3: 8 / 255}, "l2": {1: 2.0, 3: 128 / 255}}
    """Radii by norm and channels."""

    travel: ClassVar[Mapping[str, float]] = {"linf": 2.5, "l2": 2.5}
    """How far all steps lead together, in radii, by norm."""

    def __post_init__(self) -> None:
        norm_named(self.norm)
        for name, known in (("craft_bn", CRAFT_BN), ("keep", KEEP)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: unknown {getattr(self, name)!r}; known are {', '.join(known)}")
        if self.members < 1 or self.steps < 1:
            raise ValueError(f"members and steps: at least 1, got {self.members} and {self.steps}")
        if not (0 <= self.eps < float("inf") and 0 <= self.step < float("inf")):
            raise ValueError(f"eps and step: lengths in pixels, or 0 for the usual ones, got {self.eps} and {self.step}")
        if self.architecture:
            check_architectures([self.architecture])

    @abstractmethod
    def loss(self, inner: Inner) -> Any:
        """The loss, a frozen dataclass with a field ``inner``."""

    def inner(self, task: Task) -> Inner:
        """The inner maximisation on a task."""
        eps = self.eps or self.usual[self.norm][task.shape[0]]
        return Inner(self.norm, eps, self.steps, self.step or self.travel[self.norm] * eps / self.steps, self.craft_bn)

    def recipe(self, task: Task) -> Recipe:
        """How members are trained."""
        return task.recipe_for(self.role)

    def part(self, task: Task, seed: int, member: int = 0) -> Hardened:
        """The training of a member."""
        return Hardened(
            role=self.role,
            seed=seed,
            member=member,
            architecture=self.architecture or task.architecture,
            recipe=self.recipe(task),
            loss=self.loss(self.inner(task)),
            keep=self.keep,
        )

    def build(self, task: Task) -> Classifier:
        nets = [network(task, architecture=self.architecture) for _ in range(self.members)]
        return nets[0] if len(nets) == 1 else Ensemble(nets, Mean()).to(task.device).eval()

    def views(self, model: Classifier, task: Task) -> dict[str, View]:
        return views(model)

    def fit(self, model: Classifier, task: Task, parts: Parts, seed: int) -> None:
        for member, net in enumerate(model.members):
            net.load_state_dict(parts.get(self.part(task, seed, member)))


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining(AdversariallyTrained):
    """Networks trained on what raises their cross-entropy most, of the epoch that is most robust."""

    keep: str = "best"

    role: ClassVar[str] = "at"

    def loss(self, inner: Inner) -> AdversarialCrossEntropy:
        return AdversarialCrossEntropy(inner)


at_es = AdversarialTraining()
