"""A recipe's optimiser, and everything that a training needs to go on as named tensors, so that no pickle is ever written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from defenses.api import Weights
from defenses.recipe import Recipe


def optimizer_of(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimiser that a recipe names.

    Raises:
        ValueError: for an unknown one.
    """
    if recipe.optimizer == "adam":
        return torch.optim.Adam(net.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            net.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
        )
    raise ValueError(f"unknown optimizer {recipe.optimizer!r}; known are adam, sgd")


def checkpoint(net: nn.Module, optimizer: torch.optim.Optimizer, kept: Weights) -> Weights:
    """Network, optimiser, and weights of an earlier epoch, if any were kept."""
    weights = {f"net/{name}": tensor for name, tensor in net.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        weights |= {f"optimizer/{index}/{name}": value for name, value in state.items() if value is not None}
    return weights | {f"kept/{name}": tensor for name, tensor in kept.items()}


def restore(net: nn.Module, optimizer: torch.optim.Optimizer, weights: Weights) -> Weights:
    """Load network and optimiser from a :func:`checkpoint`; returns the weights that were kept."""
    state: dict[int, dict[str, Tensor]] = {}
    own: dict[str, Weights] = {"net": {}, "kept": {}}
    for name, tensor in weights.items():
        kind, _, rest = name.partition("/")
        if kind in own:
            own[kind][rest] = tensor
        else:
            index, _, key = rest.partition("/")
            state.setdefault(int(index), {})[key] = tensor.clone()
    net.load_state_dict(own["net"])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return own["kept"]
