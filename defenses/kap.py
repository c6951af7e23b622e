"""Kernel average pooling (Bashivan et al. 2022, "Learning Robust Kernel Ensembles with Kernel Average Pooling").

The kernels of a convolution lie on a sheet, and every one answers with the mean of its neighbours; trained on Gaussian noise in
image and activations. KMP takes the maximum instead of the mean, NT pools nothing. Differences from the authors' code: noise is
gated by training mode (theirs adds it in evaluation, too, unless a copy without noise is built, which is what the paper
evaluates); the mean of kernels' answers is computed as the answer of the mean kernel, which is the same function at nearly no
cost. The layers are in :mod:`defenses.kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from attacks.guided import View
from defenses.api import Classifier, Defense, Parts, Task
from defenses.kernels import PLACES, KernelNetwork, Kernels, folded, loudness, recalibrated, with_noise
from defenses.nets import Network, body, check_architectures, network
from defenses.pooling import Pool
from defenses.training import Trained
from defenses.views import views


@dataclass(frozen=True, kw_only=True)
class TrainedKernels(Trained):
    """A network with pools and noise; weights have the names of the plain network's."""

    kernels: Kernels

    def untrained(self, task: Task) -> Network:
        plain = super().untrained(task)
        assert isinstance(plain, Network)
        return KernelNetwork(plain, self.kernels)

    def checks(self, net: Classifier, task: Task) -> dict[str, float]:
        """Clean accuracy, and of the first 200 validation images the signal-to-noise ratio of every layer."""
        found = super().checks(net, task)
        if self.kernels.noise and isinstance(net, KernelNetwork):
            ratios = loudness(net, task.validation.floats(slice(0, 200)))
            found |= {f"validation_signal_to_noise_{layer}": ratio for layer, ratio in enumerate(ratios, 1)}
        return found


@dataclass(frozen=True, kw_only=True)
class Kap(Defense):
    """One network with pooled kernels, trained on noise.

    Attributes:
        pool: "average" (KAP), "max" (KMP) or "none" (NT).
        kernel, stride, dims: of the pool, see :class:`Pool`.
        noise: standard deviation of the noise in training, on the image (in pixels) and behind every convolution.
        inference_noise: where noise stays in evaluation: "none" as in the paper's attacks, or another of :data:`PLACES`.
        norm_first: BatchNorm between convolution and pool, too.
        architecture: instead of the task's.
    """

    pool: str = "average"
    kernel: int = 3
    stride: int = 1
    dims: int = 2
    noise: float = 0.0
    inference_noise: str = "none"
    norm_first: bool = False
    architecture: str = ""

    def __post_init__(self) -> None:
        self.kernels()
        if self.noise < 0:
            raise ValueError(f"noise: a standard deviation, got {self.noise}")
        if self.inference_noise not in PLACES:
            raise ValueError(f"inference_noise: unknown {self.inference_noise!r}; known are {', '.join(PLACES)}")
        if self.inference_noise != "none" and not self.noise:
            raise ValueError("inference_noise needs a level: give noise as well")
        if self.architecture:
            check_architectures([self.architecture])

    def kernels(self) -> Kernels:
        """What happens behind every convolution."""
        return Kernels(Pool(self.pool, self.kernel, self.stride, self.dims), self.noise, self.norm_first)

    def unsuited(self, task: Task) -> str:
        name = self.architecture or task.architecture
        with torch.device("meta"):
            layers = [module for module in body(name, task.shape, task.classes).modules() if isinstance(module, nn.Conv2d)]
        pool = self.kernels().pool
        if pool.kind != "none" and any(layer.groups > 1 for layer in layers):
            return f"{name}: kernels of grouped convolutions see different channels, and cannot be pooled"
        return next((f"{name}: {why}" for layer in layers if (why := pool.obstacle(layer.out_channels))), "")

    def part(self, task: Task, seed: int, member: int = 0) -> TrainedKernels:
        """The training."""
        return TrainedKernels(
            role="kernels",
            seed=seed,
            member=member,
            architecture=self.architecture or task.architecture,
            recipe=task.recipe_for("kernels"),
            kernels=self.kernels(),
        )

    def build(self, task: Task) -> KernelNetwork:
        net = KernelNetwork(network(task, architecture=self.architecture), self.kernels())
        return with_noise(net, self.inference_noise, self.noise)

    def views(self, model: Classifier, task: Task) -> dict[str, View]:
        """Also the network without its pools as layers, with statistics of quiet activations, and with its noise on."""
        assert isinstance(model, KernelNetwork)
        found = views(model)
        if self.pool == "average":
            found["folded"] = View(folded(model))
        found["recalibrated"] = View(recalibrated(with_noise(model, "none", 0.0), task.train))
        if self.noise:
            found["noise on"] = View(with_noise(model, "both", self.noise))
        return found

    def fit(self, model: Classifier, task: Task, parts: Parts, seed: int) -> None:
        model.load_state_dict(parts.get(self.part(task, seed)))


kap = Kap()
kmp = Kap(pool="max")
nt = Kap(pool="none")
nt_sigma = Kap(pool="none", noise=0.1)
