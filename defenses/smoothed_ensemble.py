"""Smoothed ensembles: averaging networks that differ by their seed lowers the variance of the vote under noise (Horvath,
Mueller, Fischer & Vechev, ICLR 2022, "Boosting randomized smoothing with variance reduced classifiers").

All members see the same noise; their vote, not their votes, is counted once per draw. The default averages logits, as the paper
does. Differences from the released code: ties of hard votes go to the lowest class instead of accumulating noise, and all
members are trained by the suite's recipe, so that a comparison with RandSmooth compares equal schedules.
"""

from __future__ import annotations

from dataclasses import dataclass

from attacks.guided import View
from defenses.api import Classifier, Defense, Part, Parts, Task
from defenses.combine import Consensus, Majority, Mean, MeanLogits, Rule
from defenses.ensemble import Ensemble
from defenses.foreign import TORCHVISION
from defenses.nets import check_architectures, network
from defenses.pretrained import TorchvisionWeights
from defenses.randsmooth import gaussian
from defenses.views import views

VOTES = {"logits": MeanLogits, "hard": Majority, "softmax": Mean}


@dataclass(frozen=True, kw_only=True)
class SmoothedEnsemble(Defense):
    """An ensemble of networks trained on Gaussian noise with different seeds.

    Attributes:
        sigma: standard deviation of the noise in pixels, in training and certification.
        members: number of networks; member 0 is RandSmooth's.
        vote: "logits" (mean logits), "hard" (majority) or "softmax" (mean probabilities).
        consensus: K of K-consensus: where the first K members agree, the others are not asked; 0 asks all. It is another
            classifier than the full vote, and predicts with the same rule that is certified.
        architectures: networks of the members; empty means ``members`` times the suite's. "torchvision/NAME" is not trained:
            its finished ImageNet weights are used.
    """

    sigma: float = 0.25
    members: int = 5
    vote: str = "logits"
    consensus: int = 0
    architectures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.vote not in VOTES:
            raise ValueError(f"unknown vote {self.vote!r}; known are {', '.join(VOTES)}")
        check_architectures(self.architectures)
        count = len(self.architectures) or self.members
        if not 0 <= self.consensus <= count or count < 1:
            raise ValueError(f"needs members >= 1 and 0 <= consensus <= members, got {count} and {self.consensus}")

    def build(self, task: Task) -> Ensemble:
        rule = VOTES[self.vote]()
        return assemble(task, self.members, self.architectures, Consensus(rule, self.consensus) if self.consensus else rule)

    def views(self, model: Classifier, task: Task) -> dict[str, View]:
        return views(model)

    def fit(self, model: Classifier, task: Task, parts: Parts, seed: int) -> None:
        for net, part in zip(model.members, candidates(task, seed, self.sigma, self.members, self.architectures), strict=True):
            net.load_state_dict(parts.get(part))


def assemble(task: Task, members: int, architectures: tuple[str, ...], rule: Rule) -> Ensemble:
    """An ensemble of unfitted networks, ``members`` times the task's or one of each architecture."""
    nets = [network(task, architecture=name) for name in architectures or (task.architecture,) * members]
    return Ensemble(nets, rule).to(task.device).eval()


def candidates(task: Task, seed: int, sigma: float, members: int, architectures: tuple[str, ...]) -> tuple[Part, ...]:
    """The members' parts: trained on noise, or finished where the architecture is torchvision's."""
    return tuple(
        TorchvisionWeights(role="pretrained", seed=seed, member=member, architecture=name)
        if name.startswith(TORCHVISION) and architectures
        else gaussian(task, seed, member, sigma, name)
        for member, name in enumerate(architectures or (task.architecture,) * members)
    )


smoothed_ensemble = SmoothedEnsemble()
