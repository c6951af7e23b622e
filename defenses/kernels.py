"""Convolutions whose kernels are pooled over the sheet on which they lie, then noise; :mod:`defenses.kap` trains them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.streams import Draws
from defenses.api import Images
from defenses.nets import Network


def sheet(channels: int) -> tuple[int, int]:
    """Rows and columns of the sheet on which channels lie, row by row: the closest pair of factors, the smaller first."""
    rows = next(rows for rows in range(math.isqrt(channels), 0, -1) if channels % rows == 0)
    return rows, channels // rows


@dataclass(frozen=True)
class Pool:
    """Pooling over neighbouring channels, of everything that lies behind them.

    Attributes:
        kind: a name of :data:`POOLS`.
        kernel: side of the window, odd; cells outside the sheet do not count.
        stride: between windows. A sheet that a stride above 1 has made smaller is padded with zeros to its old size. The
            maximum has stride 1.
        dims: 2: the sheet of :func:`sheet`; 1: all channels in one row.
    """

    kind: str
    kernel: int = 3
    stride: int = 1
    dims: int = 2

    def __post_init__(self) -> None:
        if self.kind not in POOLS:
            raise ValueError(f"pool: unknown {self.kind!r}; known are {', '.join(POOLS)}")
        if self.kernel < 1 or self.kernel % 2 == 0 or self.stride < 1:
            raise ValueError(f"kernel: an odd number, and stride: at least 1; got {self.kernel} and {self.stride}")
        if self.kind == "max" and self.stride > 1:
            raise ValueError(f"stride: the maximum is pooled with stride 1, got {self.stride}")
        if self.dims not in (1, 2):
            raise ValueError(f"dims: 1 or 2, got {self.dims}")

    @property
    def linear(self) -> bool:
        """Whether pooling answers is the same as pooling weights."""
        return self.kind != "max"

    def lies(self, channels: int) -> tuple[int, int]:
        """Rows and columns of the channels."""
        return (1, channels) if self.dims == 1 else sheet(channels)

    def obstacle(self, channels: int) -> str:
        """Why so many channels cannot be pooled, in words; empty if they can."""
        if self.kind == "none":
            return ""
        sides = self.lies(channels)[2 - self.dims :]
        if min(sides) < self.kernel:
            return f"a sheet of {' x '.join(map(str, sides))} channels is smaller than a kernel of {self.kernel}"
        lost = [side - ((side - 1) // self.stride + 1) for side in sides]
        if any(less % 2 for less in lost):
            return f"a stride of {self.stride} leaves {' x '.join(map(str, sides))} channels an odd number short"
        return ""

    def __call__(self, z: Tensor) -> Tensor:
        """Pool (c ...) over its first axis."""
        if self.kind == "none":
            return z
        rows, columns = self.lies(len(z))
        pooled = POOLS[self.kind](z.reshape(rows, columns, -1).permute(2, 0, 1).unsqueeze(0), self)
        down, across = ((side - left) // 2 for side, left in zip((rows, columns), pooled.shape[2:], strict=True))
        return F.pad(pooled, (across, across, down, down)).squeeze(0).permute(1, 2, 0).reshape(z.shape)

    def _windows(self) -> dict[str, Any]:
        flat = self.dims == 1
        return {
            "kernel_size": (1 if flat else self.kernel, self.kernel),
            "stride": (1 if flat else self.stride, self.stride),
            "padding": (0 if flat else self.kernel // 2, self.kernel // 2),
        }


POOLS: dict[str, Callable[[Tensor, Pool], Tensor]] = {
    "average": lambda z, pool: F.avg_pool2d(z, **pool._windows(), count_include_pad=False),
    "max": lambda z, pool: F.max_pool2d(z, **pool._windows()),
    "none": lambda z, pool: z,
}
"""(channels on their sheet (1 d rows columns), pool) -> the pooled sheet."""


class Noise(Draws):
    """x -> x + N(0, sigma^2) in training, and in evaluation while ``inference`` is set."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma
        self.inference = False

    @property
    def on(self) -> bool:
        return self.sigma > 0 and (self.training or self.inference)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sigma * self.normal_like(x) if self.on else x

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}, inference={self.inference}"


class KernelConv2d(nn.Conv2d):
    """A convolution, its answers pooled over the sheet of its kernels, then noise.

    Weights have the names and shapes of the plain convolution's.

    Args:
        plain: gives weights and settings.
        pool: over the kernels.
        sigma: standard deviation of the noise.
        norm_first: BatchNorm between convolution and pool, as the authors do for larger images.
    """

    def __init__(self, plain: nn.Conv2d, pool: Pool, sigma: float, norm_first: bool = False) -> None:
        super().__init__(bias=plain.bias is not None, device="meta", **_settings(plain))
        self.weight, self.bias = plain.weight, plain.bias
        self.pool = pool
        self.norm = nn.BatchNorm2d(plain.out_channels).to(plain.weight.device) if norm_first else None
        self.noise = Noise(sigma)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool.linear and self.norm is None:  # the mean of answers is the answer of the mean kernel
            return self.noise(self._conv_forward(x, self.pool(self.weight), self._pooled(self.bias)))
        answers = self._conv_forward(x, self.weight, self.bias)
        if self.norm is not None:
            answers = self.norm(answers)
        return self.noise(self.pool(answers.transpose(0, 1)).transpose(0, 1))

    def _pooled(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else self.pool(bias)

    def plain(self) -> nn.Conv2d:
        """The convolution that gives, in eval mode, the same answers without a pool.

        Raises:
            ValueError: for the maximum, which no convolution gives.
        """
        if not self.pool.linear:
            raise ValueError(f"pooling by {self.pool.kind} is not linear, so it cannot be folded into the convolution")
        weight, bias = self.weight, self.bias
        if self.norm is not None:
            mean, variance = self.norm.running_mean, self.norm.running_var
            assert mean is not None and variance is not None
            scale = self.norm.weight / (variance + self.norm.eps).sqrt()
            bias = self.norm.bias + scale * ((0 if bias is None else bias) - mean)
            weight = weight * scale.view(-1, 1, 1, 1)
        made = nn.Conv2d(bias=bias is not None, device="meta", **_settings(self))
        made.weight = nn.Parameter(self.pool(weight).detach().contiguous(memory_format=torch.channels_last))
        made.bias = None if bias is None else nn.Parameter(self.pool(bias).detach())
        return made


def _settings(layer: nn.Conv2d) -> dict[str, Any]:
    """Arguments that make a convolution of the same shape."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
    return {name: getattr(layer, name) for name in names}


@dataclass(frozen=True)
class Kernels:
    """What happens to the answers of every convolution of a network."""

    pool: Pool
    noise: float = 0.0
    norm_first: bool = False

    def put(self, parent: nn.Module) -> None:
        """Change all convolutions inside a module."""
        for name, module in list(parent.named_children()):
            if type(module) is nn.Conv2d:
                setattr(parent, name, KernelConv2d(module, self.pool, self.noise, self.norm_first))
            else:
                self.put(module)


class KernelNetwork(Network):
    """A network whose convolutions are :class:`KernelConv2d`, with the same noise on its images; ``plain`` is used up."""

    def __init__(self, plain: Network, kernels: Kernels) -> None:
        super().__init__(plain.normalise, plain.body, plain.architecture)
        self.noise = Noise(kernels.noise)
        kernels.put(self.body)
        self.train(plain.training)

    @property
    def randomized(self) -> bool:  # type: ignore[override]
        return any(module.on for module in self.modules() if isinstance(module, Noise))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.noise(x))

    def convolutions(self) -> list[KernelConv2d]:
        """In the order of the layers."""
        return [module for module in self.modules() if isinstance(module, KernelConv2d)]


def folded(net: KernelNetwork) -> Network:
    """A plain network, without noise, that gives the same answers in eval mode.

    Raises:
        ValueError: for pools that are not linear.
    """
    own = copy.deepcopy(net)

    def fold(parent: nn.Module) -> None:
        for name, module in list(parent.named_children()):
            if isinstance(module, KernelConv2d):
                setattr(parent, name, module.plain())
            else:
                fold(module)

    fold(own.body)
    return Network(own.normalise, own.body, own.architecture).eval()


def with_noise(net: Network, place: str, sigma: float) -> KernelNetwork:
    """A copy that adds noise in evaluation, too.

    Args:
        net: stays as it is; may be plain.
        place: a name of :data:`PLACES`.
        sigma: standard deviation in pixels, and in units of the activations.

    Raises:
        ValueError: for an unknown place.
    """
    if place not in PLACES:
        raise ValueError(f"inference_noise: unknown {place!r}; known are {', '.join(PLACES)}")
    own = copy.deepcopy(net)
    noisy = own if isinstance(own, KernelNetwork) else KernelNetwork(own, Kernels(Pool("none"), sigma))
    for name, module in noisy.named_modules():
        if isinstance(module, Noise):
            module.sigma = sigma
            module.inference = ("input" if name == "noise" else "activations") in PLACES[place]
    return noisy


PLACES = {"none": (), "input": ("input",), "activations": ("activations",), "both": ("input", "activations")}
"""Where noise is added in evaluation: to the image, behind every convolution."""


def recalibrated(net: Network, images: Images, batch: int = 200) -> Network:
    """A copy whose BatchNorm has the mean statistics of these images without noise, one pass over them.

    A network trained on noise has statistics of noisy activations, which are wrong for the noise-free ones it is asked about.
    """
    own = copy.deepcopy(net).eval()
    norms = [module for module in own.modules() if isinstance(module, nn.BatchNorm2d)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.training = True
    with torch.no_grad():
        for start in range(0, len(images), batch):
            own(images.floats(slice(start, start + batch)))
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    return own.eval()


def loudness(net: KernelNetwork, x: Tensor) -> list[float]:
    """Of every convolution, the standard deviation of its pooled answers to images (n c h w) over that of its noise.

    Noise comes before BatchNorm, so that training may drown it in large answers.
    """
    found: list[float] = []
    layers = net.convolutions()
    hooks = [
        layer.noise.register_forward_pre_hook(lambda module, seen: found.append(float(seen[0].std()) / module.sigma))
        for layer in layers
    ]
    try:
        with torch.no_grad():
            net(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found
