"""Bodies of networks without shortcuts: (shape (c h w), classes) -> layers that end in logits; :mod:`defenses.nets` names them.

LeNet-5 (LeCun et al. 1998) and its wide form, AlexNet for small images (Krizhevsky et al. 2012), VGG with BatchNorm and one
linear layer (Simonyan & Zisserman 2015), the small network of CEAR's MNIST code, small CNNs of our own. All but the LeNets and
CEAR's end in an average pool, so that they take any side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MaxPool2x2(nn.MaxPool2d):
    """Maxima of windows of 2x2. Where no gradient is asked for on a CPU, by whole rows and columns: torch's own looks at number
    after number and branches, which on noisy images takes more time than LeNet-5's convolutions. The numbers are equal."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not x.is_contiguous() or (x.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)
        height, width = (side // 2 * 2 for side in x.shape[-2:])
        rows = torch.maximum(x[..., 0:height:2, :width], x[..., 1:height:2, :width])
        return torch.maximum(rows[..., 0::2], rows[..., 1::2])


def lenet5(shape: Sequence[int], classes: int) -> nn.Module:
    """LeNet-5 with ReLU and max pooling; side 28 or larger, a multiple of 4."""
    channels, side, _ = shape
    flat = 16 * ((side // 2 - 4) // 2) ** 2
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2),
        nn.ReLU(),
        MaxPool2x2(),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        MaxPool2x2(),
        nn.Flatten(),
        nn.Linear(flat, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


def lenet_wide(shape: Sequence[int], classes: int) -> nn.Module:
    """The wide LeNet of small-image studies such as TRS: 20 and 50 filters without padding, 500 hidden units."""
    channels, side, _ = shape
    flat = 50 * (((side - 4) // 2 - 4) // 2) ** 2
    convolutions = [nn.Conv2d(channels, 20, 5), nn.ReLU(), MaxPool2x2(), nn.Conv2d(20, 50, 5), nn.ReLU(), MaxPool2x2()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(flat, 500), nn.ReLU(), nn.Linear(500, classes))


def cear_cnn(shape: Sequence[int], classes: int) -> nn.Module:
    """CEAR's MNIST network: 32-64-pool-64-64-pool filters of 3x3 with padding 1, then 128 and 64 hidden units."""
    channels, side, _ = shape
    layers: list[nn.Module] = []
    for width in (32, 64, 0, 64, 64, 0):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [MaxPool2x2()]
        channels = width or channels
    hidden = [nn.Linear(64 * (side // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), *hidden, nn.Linear(64, classes))


def small_cnn(shape: Sequence[int], classes: int, *, depth: int, width: int) -> nn.Module:
    """``depth`` 3x3 convolutions of stride 2 with BatchNorm, average pool, linear: ours, for sweeps over depth and width."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for _ in range(depth):
        layers += [nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def alexnet(shape: Sequence[int], classes: int) -> nn.Module:
    """AlexNet for 32x32: an 11x11 stem of stride 4, five convolutions, three max pools, one linear layer."""
    layers: list[nn.Module] = [nn.Conv2d(shape[0], 64, 11, 4, 5), nn.ReLU(), MaxPool2x2()]
    channels = 64
    for width, kernel, pool in ((192, 5, True), (384, 3, False), (256, 3, False), (256, 3, True)):
        layers += [nn.Conv2d(channels, width, kernel, padding=kernel // 2), nn.ReLU()]
        layers += [MaxPool2x2()] if pool else []
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def vgg(shape: Sequence[int], classes: int, *, blocks: Sequence[int]) -> nn.Module:
    """VGG for small images: blocks of 3x3 convolutions with BatchNorm, a max pool after each, one linear layer."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for width, count in zip((64, 128, 256, 512, 512), blocks, strict=True):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(MaxPool2x2())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
