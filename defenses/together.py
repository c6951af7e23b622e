"""Members of equal layers run as one network: grouped convolutions, and one batched product for their linear layers.

The members' channels lie side by side (n, m c, h, w), so that a layer is one call whatever the number of members. The weights
stay the members' own: they are put together anew in every pass, inside the graph, and gradients of any order flow back to each
member. BatchNorm works channel by channel, so that members do not mix, and moves each member's running statistics as alone.
Whether this pays is a matter of measurement (tests.speed.ensembles); :func:`run` knows what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.api import Classifier
from defenses.nets import BasicBlock, Network
from defenses.plain_nets import MaxPool2x2

Seen = Tensor | Sequence[Tensor]
"""Images (n c h w) that all members see, or one such batch for each: a sequence of m, or a tensor (m n c h w)."""


NARROW = 16
"""Channels of the widest convolution up to which grouping was measured to pay: LeNet-5 has 16, the wide LeNet 50."""

KEPT = 2**25
"""Bytes of the largest block that glibc's allocator keeps once it is freed. A larger tensor is given back to the system at
once, and getting it again costs more than grouping saves."""


def run(members: Sequence[Classifier], images: Seen) -> Tensor:
    """Logits (m n k) of every member, in the arrangement that was measured to be the faster one. Both give the same numbers but
    for rounding.

    Args:
        members: networks, in the mode in which they are.
        images: what they see.
    """
    if not isinstance(images, Tensor) or not _shared(images) or not pays(members, images.device) or obstacle(members):
        return one_by_one(members, images)
    # In pieces: which arrangement is chosen must not depend on the batch.
    return torch.cat([grouped(members, piece) for piece in images.split(_room(members, images))], 1)


def pays(members: Sequence[Classifier], device: torch.device) -> bool:
    """Whether grouping was measured to be faster: on the CPU, for several tiny members in eval mode, that see the same images.

    Measured on AVX2 with 3 to 8 LeNet-5 and batches of 32 and 128: a forward pass is 1.5 to 2.2 times as fast, with gradients
    of weights 1.1 to 1.3 times, with those of the shared images 1.2 to 1.3 times. GAL, where every member has images of its
    own, is 0.86 to 1.03 times as fast; ResNet-20 0.7 to 0.95 times, whatever is asked of it. Training stays with the loop: the
    gain is small there, and batches in train mode cannot be cut into pieces.
    """
    if len(members) < 2 or device.type != "cpu":
        return False
    layers = [module for member in members for module in member.modules()]
    widths = [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)]
    return 0 < max(widths, default=0) <= NARROW and not any(layer.training for layer in layers)


def _room(members: Sequence[Classifier], images: Tensor) -> int:
    """How many images fit into the largest block that the allocator keeps."""
    first = next(module for module in members[0].modules() if isinstance(module, nn.Conv2d))
    each = len(members) * first.out_channels * images[0, 0].numel() * images.element_size()
    return max(1, KEPT // each)


def one_by_one(members: Sequence[Classifier], images: Seen) -> Tensor:
    """Logits (m n k): each member by itself."""
    own = [images] * len(members) if _shared(images) else images
    return torch.stack([member(x) for member, x in zip(members, own, strict=True)])


def grouped(members: Sequence[Classifier], images: Seen) -> Tensor:
    """Logits (m n k): all members as one network.

    Raises:
        ValueError: for members that :func:`obstacle` names a reason for, and for another number of batches than of members.
    """
    reason = obstacle(members)
    if reason:
        raise ValueError(f"these members cannot be run as one network: {reason}. Run them one by one")
    nets: Sequence[Any] = members
    if _shared(images) and type(nets[0].body[0]) is nn.Conv2d:
        x = nets[0].normalise(images)  # the first convolution sees it once for all members
    else:
        own = [images] * len(nets) if _shared(images) else images
        x = torch.cat([net.normalise(seen) for net, seen in zip(nets, own, strict=True)], 1)
    return _layer([net.body for net in nets], x.contiguous(memory_format=torch.channels_last))


def obstacle(members: Sequence[Classifier]) -> str:
    """Why members cannot be run as one network, in words; empty if they can."""
    if not members or any(type(member) is not Network for member in members):
        return f"known are one or more networks of this project, got {[type(member).__name__ for member in members]}"
    nets: Sequence[Any] = members
    first = nets[0]
    if not isinstance(first.body, nn.Sequential) or type(first.body[-1]) is not nn.Linear:
        return f"{first.architecture} is no sequence of layers that ends in a linear one"
    for module in first.body.modules():
        if _unknown(module):
            return f"{first.architecture} holds {module}, known are plain {', '.join(kind.__name__ for kind in LAYERS)}"
    for number, net in enumerate(nets[1:], start=2):
        if not _alike([*first.body.modules()], [*net.body.modules()]):
            return f"member {number} has other layers than the first, or has them in another mode"
        if not all(torch.equal(*pair) for pair in zip(first.normalise.buffers(), net.normalise.buffers(), strict=True)):
            return f"member {number} normalises its images in another way than the first"
    return ""


def _shared(images: Seen) -> bool:
    return isinstance(images, Tensor) and images.dim() == 4


def _unknown(module: Any) -> bool:
    """Whether a layer is of a kind, or has settings, that are not known here."""
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    if type(module) is nn.Conv2d:
        return module.groups != 1 or module.padding_mode != "zeros"
    if type(module) is nn.BatchNorm2d:
        return not module.affine or module.running_mean is None or module.momentum is None
    if type(module) is nn.Flatten:
        return (module.start_dim, module.end_dim) != (1, -1)
    return type(module) not in LAYERS


def _alike(ones: Sequence[nn.Module], others: Sequence[nn.Module]) -> bool:
    """Whether layers are of equal kinds and settings, the mode among them."""
    if len(ones) != len(others):
        return False
    return all(type(a) is type(b) and _settings(a) == _settings(b) for a, b in zip(ones, others, strict=True))


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a layer was made with; weights and what it contains have names of their own, with underscores."""
    return {name: value for name, value in vars(module).items() if name[0] != "_"}


# Layers: the same layer of all members, and what enters it -> what leaves it.


def _layer(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    return LAYERS[type(layers[0])](layers, x)


def _sequence(layers: Sequence[Any], x: Tensor) -> Tensor:
    for step in zip(*layers, strict=True):
        x = _layer(step, x)
    return x


def _block(layers: Sequence[Any], x: Tensor) -> Tensor:
    """As ``BasicBlock.forward``."""

    def step(name: str, x: Tensor) -> Tensor:
        return _layer([getattr(layer, name) for layer in layers], x)

    out = step("relu", step("bn1", step("conv1", x)))
    return step("relu", step("bn2", step("conv2", out)) + step("shortcut", x))


def _each_number(layers: Sequence[Any], x: Tensor) -> Tensor:
    """Layers without weights that know no members: activations and pools."""
    return layers[0](x)


def _convolution(layers: Sequence[Any], x: Tensor) -> Tensor:
    first = layers[0]
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if first.bias is None else torch.cat([layer.bias for layer in layers])
    groups = 1 if x.shape[1] == first.in_channels else len(layers)  # 1: the images themselves, the same for all members
    return F.conv2d(x, weight, bias, first.stride, first.padding, first.dilation, groups)


def _normalisation(layers: Sequence[Any], x: Tensor) -> Tensor:
    first = layers[0]
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    if first.training and not first.track_running_stats:
        return F.batch_norm(x, None, None, weight, bias, True, first.momentum, first.eps)
    mean, var = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("running_mean", "running_var"))
    x = F.batch_norm(x, mean, var, weight, bias, first.training, first.momentum, first.eps)
    if first.training:  # torch has moved the statistics that were put together, not the members' own
        for layer, own_mean, own_var in zip(layers, mean.chunk(len(layers)), var.chunk(len(layers)), strict=True):
            layer.running_mean.copy_(own_mean)
            layer.running_var.copy_(own_var)
            layer.num_batches_tracked.add_(1)
    return x


def _flatten(layers: Sequence[Any], x: Tensor) -> Tensor:
    """(n, m c, h, w) -> (m, n, c h w)."""
    return x.unflatten(1, (len(layers), -1)).transpose(0, 1).flatten(2)


def _linear(layers: Sequence[Any], x: Tensor) -> Tensor:
    """(m n d) -> (m n k)."""
    weight = torch.stack([layer.weight for layer in layers]).transpose(1, 2)
    if layers[0].bias is None:
        return torch.bmm(x, weight)
    return torch.baddbmm(torch.stack([layer.bias for layer in layers]).unsqueeze(1), x, weight)


LAYERS: dict[type[nn.Module], Callable[[Sequence[Any], Tensor], Tensor]] = {
    nn.Sequential: _sequence,
    BasicBlock: _block,
    nn.Conv2d: _convolution,
    nn.BatchNorm2d: _normalisation,
    nn.ReLU: _each_number,
    nn.LeakyReLU: _each_number,
    nn.MaxPool2d: _each_number,
    MaxPool2x2: _each_number,
    nn.AdaptiveAvgPool2d: _each_number,
    nn.Flatten: _flatten,
    nn.Linear: _linear,
}
"""Known layers, by their exact class."""
