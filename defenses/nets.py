"""Networks of the literature, normalisation inside, initialised from a generator (methods 2.2).

CIFAR ResNets, ResNet-18 and -34 (He et al. 2016a), pre-activation ResNet-18 (He et al. 2016b), DenseNet-BC (Huang et al. 2017),
and those without shortcuts of :mod:`defenses.plain_nets`. Differences from other code bases: every depth of the CIFAR family
uses basic blocks, shortcuts that change shape are 1x1 convolution + BatchNorm ("option B"), and every network of this file ends
in an average pool, so that it takes any side.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from attacks.streams import generator
from defenses.api import Classifier, Task
from defenses.foreign import TORCHVISION, classifiers, untrained
from defenses.plain_nets import alexnet, cear_cnn, lenet5, lenet_wide, small_cnn, vgg


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
        self.layout = torch.channels_last

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.entering(x))

    def entering(self, x: Tensor) -> Tensor:
        """Images (n c h w) as the body takes them."""
        return self.normalise(x).contiguous(memory_format=self.layout)


def lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """Put the weights of a model, and what its networks compute, into a memory layout; results change by rounding only."""
    model.to(memory_format=layout)
    for module in model.modules():
        if isinstance(module, Network):
            module.layout = layout


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions; a shortcut that changes shape starts after the first ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.relu = nn.ReLU()
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(self.relu(self.bn2(self.conv1(out)))) + shortcut


def residual(
    shape: Sequence[int], classes: int, *, widths: Sequence[int], blocks: Sequence[int], dropout: float = 0.0
) -> nn.Module:
    """3x3 stem, one stage of basic blocks per width, stride 2 from the second stage on, average pool, linear.

    ``dropout`` follows every block, and the pool.
    """
    width = widths[0]
    layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    drop = [nn.Dropout(dropout)] if dropout else []
    for stage, (out, count) in enumerate(zip(widths, blocks, strict=True)):
        for block in range(count):
            layers += [BasicBlock(width, out, 2 if stage and not block else 1), *drop]
            width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *drop, nn.Linear(width, classes))


def preactivated(shape: Sequence[int], classes: int, *, widths: Sequence[int], blocks: Sequence[int]) -> nn.Module:
    """As :func:`residual`, of pre-activation blocks, with BatchNorm and ReLU before the pool."""
    width = widths[0]
    layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, 1, 1, bias=False)]
    for stage, (out, count) in enumerate(zip(widths, blocks, strict=True)):
        for block in range(count):
            layers.append(PreActBlock(width, out, 2 if stage and not block else 1))
            width = out
    return nn.Sequential(
        *layers, nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
    )


class DenseLayer(nn.Module):
    """A bottleneck of four times the growth, then ``growth`` new channels beside the old ones."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(self.relu(self.bn2(out)))], 1)


def densenet(shape: Sequence[int], classes: int, *, depth: int, growth: int) -> nn.Module:
    """DenseNet-BC: three blocks of (depth - 4) / 6 bottleneck layers, transitions halve channels and side."""
    width = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, padding=1, bias=False)]
    for block in range(3):
        for _ in range((depth - 4) // 6):
            layers.append(DenseLayer(width, growth))
            width += growth
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        if block < 2:
            layers += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


_WIDE = (64, 128, 256, 512)

ARCHITECTURES: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "lenet5": lenet5,
    "lenet_wide": lenet_wide,
    "cear_cnn": cear_cnn,
    **{f"cnn{depth}": partial(small_cnn, depth=depth, width=144) for depth in (1, 2, 3)},
    **{f"cnn2_{width}": partial(small_cnn, depth=2, width=width) for width in (16, 400)},
    "alexnet": alexnet,
    "vgg16": partial(vgg, blocks=(2, 2, 3, 3, 3)),
    "vgg19": partial(vgg, blocks=(2, 2, 4, 4, 4)),
    **{f"resnet{6 * n + 2}": partial(residual, widths=(16, 32, 64), blocks=(n, n, n)) for n in (3, 4, 5, 18)},
    "resnet18": partial(residual, widths=_WIDE, blocks=(2, 2, 2, 2)),
    "resnet18_squares": partial(residual, widths=(64, 144, 256, 529), blocks=(2, 2, 2, 2)),
    "resnet18_x4": partial(residual, widths=(256, 512, 1024, 2048), blocks=(2, 2, 2, 2)),
    "resnet18_dropout": partial(residual, widths=_WIDE, blocks=(2, 2, 2, 2), dropout=0.025),
    "resnet34": partial(residual, widths=_WIDE, blocks=(3, 4, 6, 3)),
    "preactresnet18": partial(preactivated, widths=_WIDE, blocks=(2, 2, 2, 2)),
    "densenet100": partial(densenet, depth=100, growth=12),
}
"""(shape (c h w), classes) -> the body of a network, by name."""


def check_architectures(names: Sequence[str]) -> None:
    """Refuse names that are neither in :data:`ARCHITECTURES` nor among torchvision's classifiers.

    Raises:
        ValueError: for an unknown architecture; names the nearest.
    """
    for name in names:
        known = list(ARCHITECTURES)
        if "/" in name:
            known = [TORCHVISION + model for model in classifiers()]
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}? Known" if near else "known"
            raise ValueError(f"unknown architecture {name!r}; {hint} are {', '.join(ARCHITECTURES)} and {TORCHVISION}NAME")


def body(name: str, shape: Sequence[int], classes: int) -> nn.Module:
    """The body of a network, from :data:`ARCHITECTURES` or torchvision's classifiers, with weights of torch's choice."""
    check_architectures([name])
    if name in ARCHITECTURES:
        return ARCHITECTURES[name](shape, classes)
    return untrained(name.removeprefix(TORCHVISION), shape, classes)


def network(task: Task, gen: torch.Generator | None = None, architecture: str | None = None) -> Network:
    """A network for the task, in eval mode on its device.

    Args:
        task: gives shape, classes, normalisation and, unless overridden, the architecture.
        gen: initialisation; Kaiming normal (fan-out) for convolutions, PyTorch's uniform for linear layers. Without it a
            fixed generator is used, for networks whose weights are loaded afterwards.
        architecture: a name of :data:`ARCHITECTURES`, or "torchvision/NAME".

    Raises:
        ValueError: for an unknown architecture.
    """
    name = architecture or task.architecture
    gen = gen or generator(0, "unfitted")
    with torch.random.fork_rng(devices=[]):  # constructors draw their own weights, which are replaced below
        if name.startswith(TORCHVISION):  # but for kinds that `initialise` does not know, e.g. position embeddings
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=gen)))
        net = Network(Normalise(task.mean, task.std), body(name, task.shape, task.classes), name)
    initialise(net, gen)
    # Convolutions are faster with channels last, on CPU (measured: 1.3 times for LeNet-5) and on tensor cores.
    return net.to(task.device).to(memory_format=torch.channels_last).eval()


def leaky(net: nn.Module, slope: float) -> None:
    """Replace every ReLU of a network by a leaky one; 0 leaves it alone."""
    for name, module in list(net.named_children()):
        if isinstance(module, nn.ReLU) and slope:
            setattr(net, name, nn.LeakyReLU(slope))
        else:
            leaky(module, slope)


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
