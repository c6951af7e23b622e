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
        dual: (n ...) -> (n), the norm of gradients: how fast a linear function can grow per unit of length.
        project: (n ...), radius -> (n ...), each row's nearest point in the ball; one radius, or one a row (n).
        steepest: gradient (n ...) -> the direction of norm one that raises a linear function most (0 for a zero gradient).
        start: streams, shape, radius -> (n *shape), a random point of the ball.
    """

    name: str
    length: Callable[[Tensor], Tensor]
    dual: Callable[[Tensor], Tensor]
    project: Callable[[Tensor, float | Tensor], Tensor]
    steepest: Callable[[Tensor], Tensor]
    start: Callable[[Streams, Sequence[int], float], Tensor]

    def into(self, points: Tensor, centre: Tensor, radius: float) -> Tensor:
        """Points (n ...) projected on the ball around ``centre`` (n ...), then clipped to the box [0,1]."""
        return (centre + self.project(points - centre, radius)).clamp_(0, 1)

    def reach(self, x: Tensor, eps: float) -> Tensor:
        """The distance (1) that a point of the ball of ``eps`` around images like x (n ...) may have, in float64.

        A pixel of x + delta is rounded to the dtype, by at most half a unit in the last place below 1.
        """
        rounding = self.length(torch.full_like(x[:1], torch.finfo(x.dtype).eps / 2, dtype=torch.float64))
        return eps * (1 + 1e-6) + rounding


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Values (n), shaped so that they meet the rows of ``like`` (n ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def put(into: Tensor, rows: Tensor, values: Tensor, where: Tensor) -> None:
    """``into[rows[where]] = values[where]``, for different ``rows`` (t) and a mask (t)."""
    if into.device.type == "cpu":  # few rows are meant, as a rule
        some = where.nonzero().flatten()
        into.index_copy_(0, rows[some], values[some])
    else:  # a mask would make the host wait for its count
        into.index_copy_(0, rows, torch.where(per_row(where, values), values, into[rows]))


def _l2_length(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1)


def _linf_project(delta: Tensor, radius: float | Tensor) -> Tensor:
    if isinstance(radius, Tensor):
        radius = per_row(radius, delta)
        return torch.minimum(torch.maximum(delta, -radius), radius)
    return delta.clamp(-radius, radius)


def _l2_project(delta: Tensor, radius: float | Tensor) -> Tensor:
    length = _l2_length(delta)
    shrink = (radius / length.clamp_min(torch.finfo(delta.dtype).tiny)).clamp_max(1)
    return delta * per_row(shrink, delta)


def _l2_steepest(gradient: Tensor) -> Tensor:
    return gradient / per_row(_l2_length(gradient) + 1e-12, gradient)


def _l2_start(streams: Streams, shape: Sequence[int], radius: float) -> Tensor:
    direction = _l2_steepest(streams.child("direction").normal(shape))
    return direction * per_row(streams.child("radius").uniform((1,)).flatten() * radius, direction)


NORMS: dict[str, Norm] = {
    "linf": Norm(
        name="linf",
        length=lambda delta: delta.flatten(1).abs().amax(1),
        dual=lambda gradient: gradient.flatten(1).abs().sum(1),
        project=_linf_project,
        steepest=torch.sign,
        start=lambda streams, shape, radius: streams.uniform(shape).mul_(2).sub_(1).mul_(radius),
    ),
    "l2": Norm("l2", _l2_length, _l2_length, _l2_project, _l2_steepest, _l2_start),
}


def check_eps(eps: float) -> None:
    """Refuse a radius that is not positive and finite.

    Raises:
        ValueError: names it.
    """
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be positive and finite, got {eps}")


def norm(name: str) -> Norm:
    """The norm of that name.

    Raises:
        ValueError: for a norm that the project does not know.
    """
    if name not in NORMS:
        raise ValueError(f"unknown norm {name!r}; known are {', '.join(NORMS)}")
    return NORMS[name]
