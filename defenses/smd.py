"""Saliency map diversity (arXiv 2112.03615): the pixels that raise the true class differ from member to member.

The paper leaves open whether a saliency is the gradient of a logit or of a probability. Those of probabilities are parallel to
gradients of the cross-entropy, which would make the method that of :mod:`defenses.gal`, from which the paper sets it apart; so
the logit is the default. The mean of the members' cross-entropies is ours, too: the paper could mean their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from defenses.api import Classifier, Task
from defenses.ensemble import Ensemble
from defenses.gal import alignment
from defenses.joint import EnsembleLoss, TrainedTogether, cross_entropies, input_gradients
from defenses.training import Batch


def _true(scores: Tensor, y: Tensor) -> Tensor:
    """The scores (n k) of the true classes: (n)."""
    return scores.gather(1, y.unsqueeze(1)).squeeze(1)


SALIENCIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logit": _true,
    "prob": lambda logits, y: _true(logits.softmax(-1), y),
}
"""(logits (n k), labels (n)) -> the number of each image (n) whose gradient is its saliency map."""


@dataclass(frozen=True)
class SaliencyDiversity(EnsembleLoss):
    """mean_m CE_m + weight ln sum_{a<b} exp cos(s_a, s_b), s the gradient of the true class with respect to the image.

    Attributes:
        weight: lambda of the diversity.
        saliency: a name of :data:`SALIENCIES`.
    """

    weight: float
    saliency: str
    second_order = True

    def __call__(self, net: Ensemble, batch: Batch, needs: Sequence[Classifier]) -> dict[str, Tensor]:
        score = SALIENCIES[self.saliency]
        logits, saliencies = input_gradients(net.members, batch.x, lambda own: score(own, batch.y))
        return {
            "ce": cross_entropies(logits, batch.y, batch.label_smoothing).mean(),
            "diversity": self.weight * alignment(saliencies).mean(),
        }


def check_saliency(name: str) -> None:
    """Refuse a name that is not in :data:`SALIENCIES`.

    Raises:
        ValueError: names those that are.
    """
    if name not in SALIENCIES:
        raise ValueError(f"unknown saliency {name!r}; known are {', '.join(SALIENCIES)}")


@dataclass(frozen=True, kw_only=True)
class Smd(TrainedTogether):
    """Saliency map diversity.

    Attributes:
        weight: of the diversity.
        saliency: "logit", or "prob", which is gradient alignment without its noise and its leaky ReLUs.
    """

    weight: float = 1.0
    saliency: str = "logit"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_saliency(self.saliency)
        if self.members < 2:
            raise ValueError(f"members: saliency maps are compared in pairs, so at least 2, got {self.members}")

    def loss(self, task: Task) -> SaliencyDiversity:
        return SaliencyDiversity(self.weight, self.saliency)


smd = Smd()
