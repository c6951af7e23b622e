"""SWEEN: a smoothed ensemble whose weights are learned (Liu, Feng, Wang & Dong, "Enhancing certified robustness via smoothed
weighted ensembling").

The weights minimise the cross-entropy of the weighted mean of the frozen members' probabilities under noise. Differences from
the released code: the weights are learned on the suite's validation images, members and CEAR's students are trained by the same
recipe, and the members answer ``draws`` noise draws per image once, which the epochs use in turn (the code draws anew in each
of the 150 epochs; ``draws=150`` is that).

``sween_cear`` is what the CEAR paper calls SWEEN: weights proportional to accuracy under noise, here on validation images
instead of test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from attacks.guided import View
from attacks.streams import Streams, generator
from defenses.api import Classifier, Defense, Images, Part, Parts, Task, Weights, Workshop
from defenses.cear import robust_weights
from defenses.combine import Adaptive, Weighted
from defenses.ensemble import Ensemble
from defenses.nets import Network, check_architectures, network
from defenses.smoothed_ensemble import assemble, candidates
from defenses.views import views

SWEEN_3 = ("resnet20", "resnet26", "resnet32")
SWEEN_7 = ("lenet5", "alexnet", "resnet20", "resnet110", "densenet100", "vgg16", "vgg19")


@dataclass(frozen=True, kw_only=True)
class TrueClassProbabilities(Part):
    """Each needed network's probability of the true class of validation images under noise: (members, draws, images).

    Attributes:
        sigma: standard deviation of the noise in pixels.
        images: validation images used, the first of the split, or all if there are fewer.
        draws: noise draws per image, the same for all networks.
    """

    sigma: float
    images: int
    draws: int

    def make(self, task: Task, needs: Sequence[Weights], workshop: Workshop) -> Weights:
        shown = task.validation.take(slice(0, self.images))
        found, decided = [], []
        for member, weights in enumerate(needs):
            net = network(task, architecture=getattr(self.needs[member], "architecture", None))
            net.load_state_dict(weights)
            p, right = self._ask(net, shown)
            found.append(p)
            decided.append(right)
            workshop.report(member + 1, len(needs), {})
        return {"probability": torch.stack(found), "accuracy": torch.stack(decided)}

    def _ask(self, net: Network, images: Images) -> tuple[Tensor, Tensor]:
        p = torch.empty(self.draws, len(images), device=images.pixels.device)
        right = torch.zeros((), device=images.pixels.device)
        streams = Streams(self.seed, "ensemble weights", ids=images.ids, device=images.pixels.device)
        with torch.inference_mode():
            for start in range(0, len(images), 100):
                rows = torch.arange(start, min(start + 100, len(images)), device=images.pixels.device)
                x, y, own = images.floats(rows), images.labels[rows], streams.take(rows)
                for draw in range(self.draws):
                    logits = net(x + self.sigma * own.normal(x.shape[1:], block=draw))
                    p[draw, rows] = logits.softmax(-1).gather(1, y.unsqueeze(1)).squeeze(1)
                    right += (logits.argmax(-1) == y).sum()
        return p, right / p.numel()


@dataclass(frozen=True, kw_only=True)
class LearnedWeights(Part):
    """omega = softmax(w) minimising -log(sum_k omega_k p_k(y) + 1e-10): SGD as released, rate x0.1 after 40 % and 60 %.

    Attributes:
        epochs, batch, lr, momentum, weight_decay: of the optimiser; the decay pulls the weights towards uniform.
    """

    epochs: int = 150
    batch: int = 64
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def make(self, task: Task, needs: Sequence[Weights], workshop: Workshop) -> Weights:
        p = needs[0]["probability"]
        w = torch.zeros(len(p), device=p.device, requires_grad=True)
        optimizer = torch.optim.SGD([w], self.lr, self.momentum, weight_decay=self.weight_decay)
        for epoch in range(self.epochs):
            optimizer.param_groups[0]["lr"] = self.lr * 0.1 ** sum(epoch >= share * self.epochs for share in (0.4, 0.6))
            order = torch.randperm(p.shape[2], generator=generator(self.seed, "ensemble weights", epoch)).to(p.device)
            for rows in order.split(self.batch):
                loss = mixture_loss(w, p[:, epoch % p.shape[1], rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        workshop.report(self.epochs, self.epochs, {"loss": float(mixture_loss(w.detach(), p.flatten(1)))})
        return {"weights": w.detach().softmax(0)}


def mixture_loss(w: Tensor, p: Tensor) -> Tensor:
    """Mean of -log(sum_k softmax(w)_k p_k + 1e-10) for the members' probabilities p (m n) of the true class."""
    return -((w.softmax(0) @ p) + 1e-10).log().mean()


@dataclass(frozen=True, kw_only=True)
class Sween(Defense):
    """An ensemble smoothed with weights that are learned on validation images (SWEEN).

    Attributes:
        sigma: standard deviation of the noise in pixels, in training and certification.
        members: number of networks of the suite's architecture; member 0 is RandSmooth's.
        architectures: networks of the members instead, as in the paper's SWEEN-3 and SWEEN-7. "torchvision/NAME" is not
            trained: its finished ImageNet weights are used.
        weighting: "learned" (SWEEN), or "accuracy" (CEAR's reading: proportional to accuracy under noise).
        adaptive: predict and certify with SWEEN's adaptive prediction, another classifier that asks fewer members.
        weight_images, draws: validation images at most, and noise draws per image, for the weights.
    """

    sigma: float = 0.25
    members: int = 5
    architectures: tuple[str, ...] = ()
    weighting: str = "learned"
    adaptive: bool = False
    weight_images: int = 2000
    draws: int = 30

    def __post_init__(self) -> None:
        if self.weighting not in ("learned", "accuracy"):
            raise ValueError(f"unknown weighting {self.weighting!r}; known are learned, accuracy")
        check_architectures(self.architectures)
        if self.members < 1 or self.weight_images < 1 or self.draws < 1:
            raise ValueError("members, weight_images and draws must be at least 1")

    def unsuited(self, task: Task) -> str:
        if self.architectures in (SWEEN_3, SWEEN_7) and task.shape[0] != 3:
            return f"the paper's member set is made for colour images, not {task.dataset}; give architectures of your own"
        return ""

    def build(self, task: Task) -> Ensemble:
        count = len(self.architectures) or self.members
        return assemble(task, self.members, self.architectures, (Adaptive if self.adaptive else Weighted)(count))

    def views(self, model: Classifier, task: Task) -> dict[str, View]:
        return views(model)

    def fit(self, model: Classifier, task: Task, parts: Parts, seed: int) -> None:
        needs = candidates(task, seed, self.sigma, self.members, self.architectures)
        for net, part in zip(model.members, needs, strict=True):
            net.load_state_dict(parts.get(part))
        answers = TrueClassProbabilities(
            role="member probabilities", seed=seed, needs=needs, sigma=self.sigma, images=self.weight_images, draws=self.draws
        )
        if self.weighting == "learned":
            weights = parts.get(LearnedWeights(role="ensemble weights", seed=seed, needs=(answers,)))["weights"]
        else:
            weights = robust_weights(parts.get(answers)["accuracy"])
        cast(Weighted, cast(Ensemble, model).rule).set(weights)

    def facts(self, model: Classifier) -> dict[str, float]:
        weights = cast(Weighted, cast(Ensemble, model).rule).weights
        return {"largest_weight_deviation": float((weights - 1 / len(weights)).abs().max())}


sween = Sween()
sween_cear = Sween(weighting="accuracy")
sween3 = Sween(architectures=SWEEN_3)
sween7 = Sween(architectures=SWEEN_7)
