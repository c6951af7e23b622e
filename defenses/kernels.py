"""Convolutions whose kernels are pooled over the sheet on which they lie, then noise; :mod:`defenses.kap` trains them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attacks.streams import Draws
from defenses.api import Images
from defenses.nets import Network
from defenses.pooling import Pool


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
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
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


def listen(net: Network, x: Tensor, tell: Callable[[str, nn.Conv2d, Tensor], None]) -> None:
    """Ask a network about images x (n c h w), and tell what every convolution answers as soon as it does.

    Args:
        net: stays as it is; may be plain.
        x: the images.
        tell: is given name, layer and answers (n channels rows columns), behind its pool and before its noise.
    """

    def before(name: str, layer: KernelConv2d, noise: nn.Module, given: tuple[Tensor]) -> None:
        tell(name, layer, given[0])

    def after(name: str, layer: nn.Conv2d, given: tuple[Tensor], answer: Tensor) -> None:
        tell(name, layer, answer)

    hooks = []
    for name, layer in net.named_modules():
        if isinstance(layer, KernelConv2d):
            hooks.append(layer.noise.register_forward_pre_hook(partial(before, name, layer)))
        elif isinstance(layer, nn.Conv2d):
            hooks.append(layer.register_forward_hook(partial(after, name)))
    try:
        with torch.no_grad():
            net(x)
    finally:
        for hook in hooks:
            hook.remove()


def answers(net: Network, x: Tensor) -> dict[str, Tensor]:
    """What every convolution answers to images x (n c h w), behind its pool and before its noise: name -> (n channels rows
    columns), in the order in which they are asked."""
    seen: dict[str, Tensor] = {}
    listen(net, x, lambda name, layer, answer: seen.update({name: answer}))
    return seen


def loudness(net: KernelNetwork, x: Tensor) -> list[float]:
    """Of every convolution, the standard deviation of a channel of its pooled answers to images (n c h w), in the mean over
    channels, over that of its noise.

    Noise comes before BatchNorm, so that training may drown it in large answers. What channels differ by does not count:
    BatchNorm takes it away.
    """
    found: list[float] = []

    def note(name: str, layer: nn.Conv2d, answer: Tensor) -> None:
        if isinstance(layer, KernelConv2d):
            found.append(float(answer.transpose(0, 1).flatten(1).std(1).mean()) / layer.noise.sigma)

    listen(net, x, note)
    return found
