"""The geometry of a threat model: length, projection, steepest ascent and random start of each norm, as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.streams import Streams


@dataclass(frozen=True)
class Norm:
    """What an attack needs to know of an l_p ball.

    Attributes:
        name: "linf" or "l2".
        length: (n ...) -> (n), the norm of each row.
        project: (n ...), radius -> (n ...), each row's nearest point in the ball.
        steepest: gradient (n ...) -> the direction of norm one that raises a linear function most (0 for a zero gradient).
        start: streams, shape, radius -> (n *shape), a random point of the ball.
    """

    name: str
    length: Callable[[Tensor], Tensor]
    project: Callable[[Tensor, float], Tensor]
    steepest: Callable[[Tensor], Tensor]
    start: Callable[[Streams, Sequence[int], float], Tensor]


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _l2_length(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1)


def _l2_project(delta: Tensor, radius: float) -> Tensor:
    length = _l2_length(delta)
    shrink = (radius / length.clamp_min(torch.finfo(delta.dtype).tiny)).clamp_max(1)
    return delta * _per_row(shrink, delta)


def _l2_steepest(gradient: Tensor) -> Tensor:
    return gradient / _per_row(_l2_length(gradient) + 1e-12, gradient)


def _l2_start(streams: Streams, shape: Sequence[int], radius: float) -> Tensor:
    direction = _l2_steepest(streams.child("direction").normal(shape))
    return direction * _per_row(streams.child("radius").uniform((1,)).flatten() * radius, direction)


NORMS: dict[str, Norm] = {
    "linf": Norm(
        name="linf",
        length=lambda delta: delta.flatten(1).abs().amax(1),
        project=lambda delta, radius: delta.clamp(-radius, radius),
        steepest=torch.sign,
        start=lambda streams, shape, radius: streams.uniform(shape).mul_(2).sub_(1).mul_(radius),
    ),
    "l2": Norm("l2", _l2_length, _l2_project, _l2_steepest, _l2_start),
}


def norm(name: str) -> Norm:
    """The norm of that name.

    Raises:
        ValueError: for a norm that the project does not know.
    """
    if name not in NORMS:
        raise ValueError(f"unknown norm {name!r}; known are {', '.join(NORMS)}")
    return NORMS[name]
