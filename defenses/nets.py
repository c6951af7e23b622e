"""Networks of the literature, normalisation inside, initialised from a generator (methods 2.2).

LeNet-5 (LeCun et al. 1998), CIFAR ResNets and ResNet-18 (He et al. 2016). Differences from other code bases: every depth of the
CIFAR family uses basic blocks, shortcuts that change shape are 1x1 convolution + BatchNorm ("option B").
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.streams import generator
from defenses.api import Classifier, Task


class Normalise(nn.Module):
    """(x - mean) / std per channel; the first layer of every network, so that attacks and radii live in pixel space."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Network(Classifier):
    """One network: normalisation, then a body that ends in logits; ``architecture`` names the body's layers."""

    def __init__(self, normalise: Normalise, body: nn.Module, architecture: str) -> None:
        super().__init__()
        self.normalise = normalise
        self.body = body
        self.architecture = architecture

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.normalise(x).contiguous(memory_format=torch.channels_last))


def lenet5(shape: Sequence[int], classes: int) -> nn.Module:
    """LeNet-5 with ReLU and max pooling; side 28 or larger, a multiple of 4."""
    channels, side, _ = shape
    flat = 16 * ((side // 2 - 4) // 2) ** 2
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(flat, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def residual(shape: Sequence[int], classes: int, *, widths: Sequence[int], blocks: int) -> nn.Module:
    """3x3 stem, one stage per width with ``blocks`` basic blocks, stride 2 from the second stage on, average pool, linear."""
    width = widths[0]
    layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for stage, out in enumerate(widths):
        for block in range(blocks):
            layers.append(BasicBlock(width, out, 2 if stage and not block else 1))
            width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


ARCHITECTURES: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "lenet5": lenet5,
    **{f"resnet{6 * n + 2}": partial(residual, widths=(16, 32, 64), blocks=n) for n in (3, 4, 5, 18)},
    "resnet18": partial(residual, widths=(64, 128, 256, 512), blocks=2),
}
"""(shape (c h w), classes) -> the body of a network, by name."""


TORCHVISION = "torchvision/"
"""Prefix of the names of torchvision's models, e.g. "torchvision/resnet50"."""


def body(name: str, shape: Sequence[int], classes: int) -> nn.Module:
    """The body of a network, from :data:`ARCHITECTURES` or from torchvision, with weights of torch's choice.

    Raises:
        ValueError: for an unknown architecture; names the nearest.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name](shape, classes)
    if name.startswith(TORCHVISION):
        from torchvision.models import get_model, list_models

        if name.removeprefix(TORCHVISION) in list_models():
            return get_model(name.removeprefix(TORCHVISION), weights=None, num_classes=classes)
    near = difflib.get_close_matches(name, ARCHITECTURES, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown architecture {name!r}; {hint}Known are {', '.join(ARCHITECTURES)} and {TORCHVISION}NAME")


def network(task: Task, gen: torch.Generator | None = None, architecture: str | None = None) -> Network:
    """A network for the task, in eval mode on its device.

    Args:
        task: gives shape, classes, normalisation and, unless overridden, the architecture.
        gen: initialisation; Kaiming normal (fan-out) for convolutions, PyTorch's uniform for linear layers. Without it a
            fixed generator is used, for networks whose weights are loaded afterwards.
        architecture: a name of :data:`ARCHITECTURES`.

    Raises:
        ValueError: for an unknown architecture.
    """
    name = architecture or task.architecture
    with torch.random.fork_rng(devices=[]):  # constructors draw their own weights, which are replaced below
        net = Network(Normalise(task.mean, task.std), body(name, task.shape, task.classes), name)
    initialise(net, gen or generator(0, "unfitted"))
    # Convolutions are faster with channels last, on CPU (measured: 1.3 times for LeNet-5) and on tensor cores.
    return net.to(task.device).to(memory_format=torch.channels_last).eval()


def initialise(net: nn.Module, gen: torch.Generator) -> None:
    """Draw all weights anew from a CPU generator."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=gen)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound, generator=gen)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound, generator=gen)
