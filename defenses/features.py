"""What networks compute on the way to their logits: all that enters an activation, before the activation cuts it.

Layers are counted as DVERGE does (Yang et al., NeurIPS 2020): layer 1 enters the first activation, layer 2 the second; the last
are the logits. ResNet-20 has 20: the stem after BatchNorm; of each block the first convolution after BatchNorm, and the sum;
then the logits. LeNet-5 has 5: what its convolutions and linear layers give.
"""

from __future__ import annotations

from torch import Tensor, nn

from defenses.nets import ARCHITECTURES, BasicBlock, DenseLayer, Network, PreActBlock

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Softplus, nn.Tanh)

BLOCKS = (BasicBlock, DenseLayer, PreActBlock)
"""Modules that call their only activation, ``relu``, twice."""

OTHERS = (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout)
"""What else a body may hold."""


def layers(network: Network) -> int:
    """How many layers a network has, logits included.

    Raises:
        ValueError: for bodies whose layers are not known, such as torchvision's.
    """
    return sum(_activations(module) for module in _modules(network)) + 1


def features(network: Network, x: Tensor, layer: int) -> Tensor:
    """Layer number ``layer``, from 1 to :func:`layers`, for images x (n c h w): (n ...), with a graph back to x.

    What follows the layer, or the block that holds it, is not computed. The network stays in the mode in which it is.

    Raises:
        ValueError: for a layer that does not exist, and as :func:`layers`.
    """
    if not 1 <= layer <= layers(network):
        raise ValueError(f"layer: {network.architecture} has 1 to {layers(network)}, got {layer}")
    here = network.entering(x)
    for module in _modules(network):
        own = _activations(module)
        if layer <= own:
            return _entering(module, here, layer)
        layer -= own
        here = module(here)
    return here


def _modules(network: Network) -> nn.Sequential:
    """The modules of a body, in order, after a look at whether all are known."""
    body = network.body
    if not isinstance(body, nn.Sequential):
        body = nn.Sequential(body)
    unknown = {type(module).__name__ for module in body if not isinstance(module, (*ACTIVATIONS, *BLOCKS, *OTHERS))}
    if unknown:
        raise ValueError(
            f"the layers of {network.architecture} are not known (it holds {', '.join(sorted(unknown))}); "
            f"known are those of {', '.join(ARCHITECTURES)}"
        )
    return body


def _activations(module: nn.Module) -> int:
    """How many activations a module calls."""
    return 2 if isinstance(module, BLOCKS) else int(isinstance(module, ACTIVATIONS))


def _entering(module: nn.Module, x: Tensor, which: int) -> Tensor:
    """What enters activation number ``which`` of a module that is given x."""
    if not isinstance(module, BLOCKS):
        return x
    seen: list[Tensor] = []
    hook = module.relu.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        module(x)
    finally:
        hook.remove()
    return seen[which - 1]
