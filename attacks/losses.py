"""Losses that an attack maximises: logits (... n k) and labels (n) -> (... n). Larger is worse for the defender.

Leading axes are noise draws (see :mod:`attacks.eot`); nothing is reduced over images, so samples never interact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def _of_label(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(-1, y.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def _best_other(logits: Tensor, y: Tensor) -> Tensor:
    own = F.one_hot(y, logits.shape[-1]).bool()
    return logits.masked_fill(own, -torch.inf).amax(-1)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(z)_y."""
    return -_of_label(logits.log_softmax(-1), y)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The untargeted margin max_{i != y} z_i - z_y (Carlini & Wagner 2017, without its clamp): above 0 if misclassified."""
    return _best_other(logits, y) - _of_label(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020): the margin over z_(1) - z_(3), free of shift and scale.

    Raises:
        ValueError: with fewer than three classes, where z_(3) does not exist.
    """
    if logits.shape[-1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, the model has {logits.shape[-1]}; use 'margin'")
    top = logits.topk(3, dim=-1).values
    return margin(logits, y) / (top[..., 0] - top[..., 2] + 1e-12)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def margin_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """z_t - z_y, the margin of one class."""
    return _of_label(logits, target) - _of_label(logits, y)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference of logits ratio (Croce & Hein 2020): (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2).

    Raises:
        ValueError: with fewer than four classes, where z_(4) does not exist.
    """
    if logits.shape[-1] < 4:
        raise ValueError(f"the targeted DLR loss needs at least 4 classes, the model has {logits.shape[-1]}; use 'margin'")
    top = logits.topk(4, dim=-1).values
    return margin_targeted(logits, y, target) / (top[..., 0] - (top[..., 2] + top[..., 3]) / 2 + 1e-12)


def cross_entropy_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """log softmax(z)_t."""
    return _of_label(logits.log_softmax(-1), target)


Targeted = Callable[[Tensor, Tensor, Tensor], Tensor]

TARGETED: dict[str, Targeted] = {"ce": cross_entropy_targeted, "margin": margin_targeted, "dlr": dlr_targeted}

CLASSES_NEEDED = {"dlr": 3}
"""Losses that too few classes do not define; "margin" takes their place."""

CLASSES_NEEDED_TARGETED = {"dlr": 4}


def targeted(name: str | Loss) -> Targeted:
    """The targeted loss of that name.

    Raises:
        ValueError: for a loss that the project does not know.
    """
    if not isinstance(name, str) or name not in TARGETED:
        raise ValueError(f"unknown targeted loss {name!r}; known are {', '.join(TARGETED)}")
    return TARGETED[name]


def half_margin(logits: Tensor, y: Tensor) -> Tensor:
    """The mean margin of those ceil(m/2) networks of (... m n k) that are the closest to being wrong: (... n).

    A vote that leaves out a minority, such as a median, falls when they do.
    """
    margins = margin(logits, y)
    return margins.topk(-(-margins.shape[-2] // 2), dim=-2).values.mean(-2)


def loss(name: str | Loss) -> Loss:
    """The loss of that name; a function is taken as it is.

    Raises:
        ValueError: for a loss that the project does not know.
    """
    if callable(name):
        return name
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; known are {', '.join(LOSSES)}")
    return LOSSES[name]
