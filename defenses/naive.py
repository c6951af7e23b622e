"""The naive ensemble, baseline of all others: members trained alone on the same batches, that differ in initialisation."""

from __future__ import annotations

from dataclasses import dataclass

from defenses.api import Classifier, Defense, Parts, Task
from defenses.combine import Mean
from defenses.ensemble import Ensemble
from defenses.nets import network
from defenses.training import Trained


@dataclass(frozen=True, kw_only=True)
class Plain(Trained):
    """A member that sees the images in the order in which all members do."""

    @property
    def order(self) -> tuple[str, int]:
        return self.role, 0


def plain(task: Task, seed: int, member: int) -> Plain:
    """Member number ``member`` of the naive ensemble."""
    recipe = task.recipe_for("plain")
    return Plain(role="plain", seed=seed, member=member, architecture=task.architecture, recipe=recipe)


@dataclass(frozen=True, kw_only=True)
class Naive(Defense):
    """Mean softmax of ``members`` plain networks."""

    members: int = 3

    def __post_init__(self) -> None:
        if self.members < 1:
            raise ValueError(f"members: at least 1, got {self.members}")

    def build(self, task: Task) -> Ensemble:
        return Ensemble([network(task) for _ in range(self.members)], Mean()).to(task.device).eval()

    def fit(self, model: Classifier, task: Task, parts: Parts, seed: int) -> None:
        for member, net in enumerate(model.members):
            net.load_state_dict(parts.get(plain(task, seed, member)))


naive = Naive()
