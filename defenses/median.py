"""The geometric median of a few points, solved per sample (Weiszfeld 1937, with the step of Vardi & Zhang 2000)."""

from __future__ import annotations

import torch
from torch import Tensor


def median_weights(points: Tensor, tolerance: float = 1e-7, iterations: int = 200) -> Tensor:
    """Convex weights (m n) of the geometric median of ``points`` (m n k), per sample, in float64.

    A data point k with multiplicity eta is the median iff ||R_k|| <= eta, R_k the sum of unit vectors towards the other points
    (Vardi & Zhang 2000); those samples are answered exactly. The others are iterated by Weiszfeld's method with the
    Vardi-Zhang step where an iterate hits a data point, until a step is shorter than ``tolerance``. Where the sum of distances
    is almost flat (two close pairs) 200 iterations end within about 1e-4 of its minimum.
    """
    points = points.double()
    weights = torch.full(points.shape[:2], 1 / len(points), dtype=torch.float64, device=points.device)
    going = torch.ones(points.shape[1], dtype=torch.bool, device=points.device)
    for k in range(len(points)):
        pull, same = _pull(points, points[k])
        optimal = (pull.norm(dim=-1) <= same.sum(0)) & going
        weights[:, optimal] = (same[:, optimal].double() / same[:, optimal].sum(0)).double()
        going &= ~optimal
    rows = going.nonzero().flatten()
    median = points.mean(0)[rows]
    for _ in range(iterations):
        if len(rows) == 0:
            break
        weights[:, rows] = _weiszfeld(points[:, rows], median)
        moved = torch.einsum("mn,mnk->nk", weights[:, rows], points[:, rows])
        far = (moved - median).norm(dim=-1) >= tolerance
        rows, median = rows[far], moved[far]
    return weights


def unrolled_median(points: Tensor, steps: int = 20) -> Tensor:
    """About the geometric median (n k) of ``points`` (m n k), in float64: so many steps of Weiszfeld's method from their mean.

    Gradients flow through every step, and so through the weights. Distances are rounded up by 1e-6, so that a step that lands
    on a point has a gradient.
    """
    points = points.double()
    median = points.mean(0)
    for _ in range(steps):
        inverse = ((points - median).square().sum(-1, keepdim=True) + 1e-12).rsqrt()
        median = (inverse * points).sum(0) / inverse.sum(0)
    return median


_COINCIDE = 1e-12


def _pull(points: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of unit vectors from ``centre`` (n k) to the points that are elsewhere, and which points (m n) are at it."""
    difference = points - centre
    distance = difference.norm(dim=-1)
    same = distance < _COINCIDE
    unit = difference / distance.clamp_min(_COINCIDE).unsqueeze(-1)
    return unit.masked_fill(same.unsqueeze(-1), 0).sum(0), same


def _weiszfeld(points: Tensor, median: Tensor) -> Tensor:
    pull, same = _pull(points, median)
    inverse = (1 / (points - median).norm(dim=-1).clamp_min(_COINCIDE)).masked_fill(same, 0)
    elsewhere = inverse / inverse.sum(0)
    stay = (same.sum(0) / pull.norm(dim=-1).clamp_min(_COINCIDE)).clamp_max(1)
    here = same.double() / same.sum(0).clamp_min(1)
    return (1 - stay) * elsewhere + stay * here
