"""CEAR: a certified ensemble of students distilled from a clean teacher, with variable Gaussian augmentation.

Variants CEAR(RW), CEAR(GM) and, without variable augmentation, CEAR-(RW), CEAR-(GM). What is done here where the paper and its
released code differ:

- each student's noise deviates by beta ~ U(-sigma/2, sigma/2), drawn once per student; noise is fresh in every batch;
- teacher and student both at temperature t, loss t^2 KL, t = 1 at inference, temperatures 2 to 6;
- robust weights are certified accuracies on validation data (the code uses noisy accuracy on test data);
- the geometric median is solved per sample and never sticks at a data point (the code's Weiszfeld iteration does);
- one vote per noise draw is counted (the code pools the members' votes, which is unsound).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.guided import View
from attacks.streams import Streams, generator
from defenses.api import Classifier, Defense, Images, Part, Parts, Task, Weights, Workshop
from defenses.combine import GeometricMedian, Mean, Weighted
from defenses.ensemble import Ensemble
from defenses.median import unrolled_median
from defenses.nets import Network, network
from defenses.smoothing import certify
from defenses.training import Batch, Trained
from defenses.views import through_members, views


@dataclass(frozen=True)
class Distillation:
    """t^2 KL(softmax(teacher(x)/t) || softmax(student(x + noise)/t)): soft labels of the clean image for the noisy one.

    Attributes:
        sigma: standard deviation of the student's noise in pixels.
        temperature: t of teacher and student.
    """

    sigma: float
    temperature: float

    def __call__(self, net: Network, batch: Batch, needs: Sequence[Network]) -> dict[str, Tensor]:
        with torch.no_grad():
            target = (needs[0](batch.x) / self.temperature).log_softmax(-1)
        answer = (net(batch.x + self.sigma * batch.noise()) / self.temperature).log_softmax(-1)
        return {"kl": self.temperature**2 * F.kl_div(answer, target, log_target=True, reduction="batchmean")}


@dataclass(frozen=True, kw_only=True)
class CertifiedAccuracies(Part):
    """Certified accuracy at radius 0 of each needed network on validation images; the basis of CEAR's robust weights.

    Decided by the grid estimator with the one radius 0, which needs about 100 draws for most images instead of n.

    Attributes:
        sigma: standard deviation of the noise in pixels.
        images: validation images used, the first of the split, or all if there are fewer.
        n0, n, alpha: as in :func:`defenses.smoothing.certify`.
    """

    sigma: float
    images: int = 1000
    n0: int = 100
    n: int = 1000
    alpha: float = 0.001

    def shown(self, task: Task) -> Images:
        """The images on which accuracies are measured."""
        return task.validation.take(slice(0, self.images))

    def make(self, task: Task, needs: Sequence[Weights], workshop: Workshop) -> Weights:
        shown = self.shown(task)
        # The same noise for every member, so that accuracies differ by the members alone.
        streams = Streams(self.seed, "robust weights", ids=shown.ids, device=task.device)
        found = []
        for member, weights in enumerate(needs):
            net = network(task, architecture=getattr(self.needs[member], "architecture", None))
            net.load_state_dict(weights)
            ask = partial(certify, n0=self.n0, n=self.n, alpha=self.alpha, estimator="grid", radii=(0.0,), streams=streams)
            result = ask(net, shown.floats(), self.sigma)
            found.append((result.label == shown.labels).float().mean())
            workshop.report(member + 1, len(needs), {"certified_accuracy": float(found[-1])})
        return {"accuracy": torch.stack(found)}


@dataclass(frozen=True, kw_only=True)
class LeakedAccuracies(CertifiedAccuracies):
    """The same on test images, on which released code measures its weights (methods 3.4)."""

    def shown(self, task: Task) -> Images:
        assert task.test is not None, "LeakedWeights.unsuited refuses such tasks"
        return task.test.take(slice(0, self.images))

    def identity(self, task: Task) -> dict[str, Any]:
        return {**super().identity(task), "test": self.shown(task).hash}


@dataclass(frozen=True, kw_only=True)
class Cear(Defense):
    """CEAR and its variants; the same students serve both aggregations.

    Attributes:
        aggregate: "rw", weights proportional to certified accuracy, or "gm", the geometric median.
        vga: variable Gaussian augmentation; without it every student trains at ``sigma``.
        sigma: standard deviation of the noise in pixels, in training and certification.
        members: number of students.
        temperatures: of the students, in turn.
        spread: half width of the students' deviation, as a share of sigma.
        weight_images: validation images for the robust weights, at most.
    """

    aggregate: str
    vga: bool
    sigma: float = 0.25
    members: int = 5
    temperatures: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0, 6.0)
    spread: float = 0.5
    weight_images: int = 1000

    accuracies: ClassVar[type[CertifiedAccuracies]] = CertifiedAccuracies
    """What robust weights are made from."""

    def __post_init__(self) -> None:
        if self.aggregate not in ("rw", "gm"):
            raise ValueError(f"unknown aggregate {self.aggregate!r}; known are rw, gm")

    def build(self, task: Task) -> Ensemble:
        rule = Weighted(self.members) if self.aggregate == "rw" else GeometricMedian()
        return Ensemble([network(task) for _ in range(self.members)], rule).to(task.device).eval()

    def views(self, model: Classifier, task: Task) -> dict[str, View]:
        """Of a geometric median also what its frozen weights hide: its iteration, and the mean in its place (methods 12.2)."""
        found, own = views(model), cast(Ensemble, model)
        if self.aggregate == "gm":
            found["unrolled median"] = View(through_members(own, _unrolled), {"ce": "ce", "margin": "margin"})
            found["mean"] = View(through_members(own, Mean()), {"ce": "ce", "margin": "margin"})
        return found

    def fit(self, model: Classifier, task: Task, parts: Parts, seed: int) -> None:
        students = [self.student(task, seed, member) for member in range(self.members)]
        for net, part in zip(model.members, students, strict=True):
            net.load_state_dict(parts.get(part))
        if self.aggregate == "rw":
            accuracies = self.accuracies(
                role="robust weights", seed=seed, needs=tuple(students), sigma=self.sigma, images=self.weight_images
            )
            cast(Weighted, cast(Ensemble, model).rule).set(robust_weights(parts.get(accuracies)["accuracy"]))

    def student(self, task: Task, seed: int, member: int) -> Trained:
        """Student number ``member``: its own noise and temperature, the common teacher."""
        teacher = Trained(role="teacher", seed=seed, architecture=task.architecture, recipe=task.recipe_for("teacher"))
        loss = Distillation(self.student_sigma(seed, member), self.temperatures[member % len(self.temperatures)])
        return Trained(
            role="student",
            seed=seed,
            member=member,
            needs=(teacher,),
            architecture=task.architecture,
            recipe=task.recipe_for("student"),
            loss=loss,
        )

    def student_sigma(self, seed: int, member: int) -> float:
        """sigma + beta, beta ~ U(-spread sigma, spread sigma) once per student; sigma itself without VGA."""
        if not self.vga:
            return self.sigma
        share = torch.rand((), generator=generator(seed, "vga", member)).item() * 2 - 1
        return self.sigma * (1 + self.spread * share)

    def facts(self, model: Classifier) -> dict[str, float]:
        if self.aggregate != "rw":
            return {}
        weights = cast(Weighted, cast(Ensemble, model).rule).weights
        return {"largest_weight_deviation": float((weights - 1 / len(weights)).abs().max())}


def _unrolled(logits: Tensor) -> Tensor:
    """Log of the median (n k) of the members' probabilities, logits (m n k), with gradients through its iteration."""
    return unrolled_median(logits.double().softmax(-1)).clamp_min(torch.finfo(torch.float64).tiny).log().to(logits)


def robust_weights(accuracy: Tensor) -> Tensor:
    """lambda_i = a_i / sum_j a_j; uniform if nothing at all was certified."""
    total = accuracy.sum()
    return accuracy / total if total > 0 else torch.full_like(accuracy, 1 / len(accuracy))


cear_rw = Cear(aggregate="rw", vga=True)
cear_gm = Cear(aggregate="gm", vga=True)
cear_minus_rw = Cear(aggregate="rw", vga=False)
cear_minus_gm = Cear(aggregate="gm", vga=False)


@dataclass(frozen=True, kw_only=True)
class LeakedWeights(Cear):
    """CEAR(RW) with robust weights from test images, as its released code has them: to show what that changes."""

    accuracies = LeakedAccuracies
    unsound = "the ensemble's weights were chosen on the test images"

    def unsuited(self, task: Task) -> str:
        if task.test is None:
            return "weights from test images are unsound; only a suite with `unsound = true` hands test images to a defense"
        return ""


cear_rw_test_weights = LeakedWeights(aggregate="rw", vga=True)
