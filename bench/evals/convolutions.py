"""What evaluations of one network's convolutions share: which models have them, and what they answer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from attacks import ATTACKS
from attacks.minimum_norm import MinimumNorm
from bench.evals.api import Skipped, Subject
from defenses.kernels import KernelConv2d
from defenses.nets import Network


def one_network(subject: Subject) -> Network:
    """The subject's network.

    Raises:
        Skipped: if the classifier is not a single network of :mod:`defenses.nets`, or has no convolution.
    """
    model = subject.model
    if len(model.members) > 1:
        raise Skipped(f"this looks into the convolutions of one network, the defense has {len(model.members)}")
    if not isinstance(model, Network):
        raise Skipped(f"this looks into the convolutions of a network of the project's own, not into a {type(model).__name__}")
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise Skipped(f"{model.architecture} has no convolution to look into")
    return model


def quiet_network(subject: Subject) -> Network:
    """The subject's network, which draws no noise.

    Raises:
        Skipped: also if it does.
    """
    net = one_network(subject)
    if net.randomized:
        raise Skipped("the network draws noise of its own in evaluation; its variant with inference_noise=none can be asked")
    return net


def check_uses_budget(place: str, attack: str) -> None:
    """Refuse attacks that stop at the nearest adversarial point: next to the boundary any change repairs.

    Raises:
        ValueError: names the key.
    """
    if issubclass(ATTACKS[attack], MinimumNorm):
        raise ValueError(
            f"{place}.attack: {attack} looks for the nearest point, where any change makes the network right again; "
            "give an attack that uses its budget, such as autoattack or pgd"
        )


def answers(net: Network, x: Tensor) -> dict[str, Tensor]:
    """What every convolution answers to images x (n c h w), behind its pool and before its noise: name -> (n channels rows
    columns), in the order in which they are asked."""
    seen: dict[str, Tensor] = {}

    def before(name: str, module: nn.Module, given: tuple[Tensor]) -> None:
        seen[name] = given[0]

    def after(name: str, module: nn.Module, given: tuple[Tensor], answer: Tensor) -> None:
        seen[name] = answer

    hooks = []
    for name, layer in net.named_modules():
        if isinstance(layer, KernelConv2d):
            hooks.append(layer.noise.register_forward_pre_hook(partial(before, name)))
        elif isinstance(layer, nn.Conv2d):
            hooks.append(layer.register_forward_hook(partial(after, name)))
    try:
        with torch.no_grad():
            net(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
