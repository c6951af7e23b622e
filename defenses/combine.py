"""Vote rules: member logits (m n k) -> log-probabilities (n k), computed in log space (methods G2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attacks.api import mean_log_softmax


class Rule(nn.Module):
    """How an ensemble turns its members' logits into one answer."""

    def decide(self, logits: Tensor) -> Tensor:
        """Labels (n) for member logits (m n k)."""
        return self(logits).argmax(-1)


class Mean(Rule):
    """log of the mean softmax."""

    def forward(self, logits: Tensor) -> Tensor:
        return mean_log_softmax(logits)


class Weighted(Rule):
    """log sum_i w_i softmax(z_i); the weights are a buffer on the simplex, uniform until set.

    Raises:
        ValueError: when weights are set that are negative or do not sum to one.
    """

    weights: Tensor

    def __init__(self, members: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.full((members,), 1 / members))

    def set(self, weights: Tensor) -> None:
        """Use these weights (m)."""
        if weights.shape != self.weights.shape or not (weights >= 0).all() or not abs(weights.sum().item() - 1) <= 1e-5:
            raise ValueError(f"weights must be {len(self.weights)} non-negative numbers of sum 1, got {weights.tolist()}")
        self.weights.copy_(weights)

    def forward(self, logits: Tensor) -> Tensor:
        return (logits.log_softmax(-1) + self.weights.log().view(-1, 1, 1)).logsumexp(0)


class MeanLogits(Rule):
    """Mean of the logits (Horvath et al. 2022, soft voting)."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.mean(0)


class LogMean(Rule):
    """Normalised geometric mean of the members' probabilities, a product of experts; an ablation, not robust."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).mean(0).log_softmax(-1)


class GeometricMedian(Rule):
    """The point of the simplex with the least sum of Euclidean distances to the members' probabilities (CEAR eq. 2.5).

    The median is a convex combination sum_i w_i p_i, and log sum_i w_i p_i is returned. Gradients treat the final weights as
    constants. Members that all agree leave no choice of class, so :meth:`decide` solves for the others only.
    """

    def forward(self, logits: Tensor) -> Tensor:
        logp = logits.log_softmax(-1)
        weights = median_weights(logp.detach().exp())
        return (logp + weights.to(logp).log().unsqueeze(-1)).logsumexp(0)

    def decide(self, logits: Tensor) -> Tensor:
        votes = logits.argmax(-1)
        decision = votes[0].clone()
        split = (votes != votes[0]).any(0).nonzero().flatten()
        if len(split):
            decision[split] = self(logits[:, split]).argmax(-1)
        return decision


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
