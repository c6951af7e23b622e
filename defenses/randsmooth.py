"""Randomised smoothing (Cohen, Rosenfeld & Kolter 2019): one network trained on noise, certified with the same sigma.

Cohen's recipe: fresh noise in every batch, added before the normalisation, not clipped. (CEAR's version of this baseline
freezes one noisy copy of the data and clips it.)
"""

from __future__ import annotations

from dataclasses import dataclass

from attacks.guided import View
from defenses.api import Classifier, Defense, Parts, Task
from defenses.nets import Network, network
from defenses.training import CrossEntropy, Trained
from defenses.views import views


@dataclass(frozen=True, kw_only=True)
class RandSmooth(Defense):
    """``sigma``: standard deviation of the noise in pixels, in training and certification."""

    sigma: float = 0.25

    def build(self, task: Task) -> Network:
        return network(task)

    def views(self, model: Classifier, task: Task) -> dict[str, View]:
        return views(model)

    def fit(self, model: Classifier, task: Task, parts: Parts, seed: int) -> None:
        model.load_state_dict(parts.get(gaussian(task, seed, 0, self.sigma)))


def gaussian(task: Task, seed: int, member: int, sigma: float, architecture: str = "") -> Trained:
    """A network trained on Gaussian noise; member 0 is RandSmooth, further ones belong to smoothed ensembles."""
    return Trained(
        role="gaussian",
        seed=seed,
        member=member,
        architecture=architecture or task.architecture,
        recipe=task.recipe_for("gaussian"),
        loss=CrossEntropy(sigma),
    )


randsmooth = RandSmooth()
