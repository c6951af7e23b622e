"""The naive ensemble, baseline of all others: members trained alone that differ in initialisation and order of images."""

from __future__ import annotations

from dataclasses import dataclass

from defenses.api import Classifier, Defense, Parts, Task
from defenses.combine import Mean
from defenses.ensemble import Ensemble
from defenses.nets import network
from defenses.training import Trained


@dataclass(frozen=True, kw_only=True)
class Naive(Defense):
    """Mean softmax of ``members`` plain networks."""

    members: int = 3

    def build(self, task: Task) -> Ensemble:
        return Ensemble([network(task) for _ in range(self.members)], Mean()).to(task.device).eval()

    def fit(self, model: Classifier, task: Task, parts: Parts, seed: int) -> None:
        recipe = task.recipe_for("plain")
        for member, net in enumerate(model.members):
            part = Trained(role="plain", seed=seed, member=member, architecture=task.architecture, recipe=recipe)
            net.load_state_dict(parts.get(part))


naive = Naive()
