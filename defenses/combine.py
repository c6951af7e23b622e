"""Vote rules: member logits (m n k) -> log-probabilities (n k) in log space (methods G2), and decisions from as few answers as
they need.

Early exits are exact: a member is left out only where no answer of it could change the decision. Where the paper's shortcut is
another base classifier (K-consensus, SWEEN's adaptive prediction) it is a rule of its own, and whoever certifies it predicts
with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attacks.oracle import mean_log_softmax
from defenses.median import median_weights

Ask = Callable[[int, Tensor], Tensor]
"""(member, rows (r) of a batch of images) -> that member's logits (r k) for these images."""

SLACK = 1e-5
"""By how much probability a lead must exceed what remains before it is settled: a hundred times float32's rounding."""


class Rule(nn.Module):
    """How an ensemble turns its members' logits into one answer.

    A subclass that can decide from fewer members says so in :meth:`order`, :meth:`earliest` and :meth:`settled`.
    """

    def decide(self, logits: Tensor) -> Tensor:
        """Labels (n) for the logits of all members (m n k)."""
        return self(logits).argmax(-1)

    def order(self, members: int) -> Sequence[int]:
        """In which order members are asked."""
        return range(members)

    def earliest(self, members: int) -> int:
        """How many answers are needed before :meth:`settled` can hold for any image."""
        return members

    def settled(self, logits: Tensor, members: int) -> tuple[Tensor, Tensor]:
        """From the answers (j n k) of the first j members in order: labels (n), and whether (n) they are certain."""
        raise NotImplementedError

    def elect(self, ask: Ask, members: int, n: int, device: torch.device | str = "cpu") -> Tensor:
        """The labels (n) of :meth:`decide`, asking a member only about images that are not yet settled."""
        decision = torch.empty(n, dtype=torch.int64, device=device)
        rows = torch.arange(n, device=device)
        order, earliest = list(self.order(members)), self.earliest(members)
        known: list[Tensor] = []
        for place, member in enumerate(order, 1):
            known.append(ask(member, rows))
            if not earliest <= place < members:
                continue
            label, sure = self.settled(torch.stack(known), members)
            decision[rows[sure]] = label[sure]
            rows, known = rows[~sure], [answer[~sure] for answer in known]
            if len(rows) == 0:
                return decision
        decision[rows] = self.decide(torch.stack([known[order.index(member)] for member in range(members)]))
        return decision


def _lead(score: Tensor) -> tuple[Tensor, Tensor]:
    """The class (n) with the highest score (n k), and by how much it leads."""
    best = score.topk(2, dim=-1)
    return best.indices[:, 0], best.values[:, 0] - best.values[:, 1]


class Mean(Rule):
    """log of the mean softmax. A lead larger than what the remaining members could add to a rival is settled."""

    def forward(self, logits: Tensor) -> Tensor:
        return mean_log_softmax(logits)

    def earliest(self, members: int) -> int:
        return members // 2 + 1

    def settled(self, logits: Tensor, members: int) -> tuple[Tensor, Tensor]:
        label, lead = _lead(logits.softmax(-1).sum(0))
        return label, lead > members - len(logits) + SLACK * members


class Weighted(Rule):
    """log sum_i w_i softmax(z_i); the weights are a buffer on the simplex, uniform until set.

    Members are asked by falling weight; a lead larger than the weight that remains is settled.

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

    def order(self, members: int) -> Sequence[int]:
        return self.weights.argsort(descending=True, stable=True).tolist()

    def earliest(self, members: int) -> int:
        return int((self.weights.sort(descending=True).values.cumsum(0) <= 0.5).sum()) + 1

    def settled(self, logits: Tensor, members: int) -> tuple[Tensor, Tensor]:
        weights = self.weights.sort(descending=True, stable=True).values
        own = weights[: len(logits)]
        label, lead = _lead((logits.softmax(-1) * own.view(-1, 1, 1)).sum(0))
        return label, lead > weights[len(logits) :].sum() + SLACK


class Adaptive(Weighted):
    """SWEEN's adaptive prediction (Liu et al.): stop when a confidence interval of the members' opinions says enough.

    Stops after the first member if its probability exceeds ``sure``; after the i-th if the weighted mean p of the leading class
    exceeds 1/2 by z sqrt(sum w_i^2)/(sum w_i) times the weighted deviation of the members' p. It is a deterministic
    function of the image, so smoothing it is sound, but not the same classifier as :class:`Weighted`.
    """

    sure = 0.999
    z = 1.959964

    def earliest(self, members: int) -> int:
        return 1

    def settled(self, logits: Tensor, members: int) -> tuple[Tensor, Tensor]:
        weights = self.weights.sort(descending=True, stable=True).values[: len(logits)].view(-1, 1, 1)
        p = logits.softmax(-1)
        top, label = ((p * weights).sum(0) / weights.sum()).max(-1)
        if len(logits) == 1:
            return label, top > self.sure
        return label, top > self.threshold(p.gather(-1, label.expand(len(p), -1).unsqueeze(-1)).squeeze(-1), weights.flatten())

    def threshold(self, p: Tensor, weights: Tensor) -> Tensor:
        """What the mean must exceed (n), for the members' probabilities p (j n) of the leading class and weights (j)."""
        total = weights.sum()
        share = (weights / total).unsqueeze(1)
        deviation = (share * (p - (share * p).sum(0)) ** 2).sum(0).sqrt()
        return 0.5 + self.z * weights.square().sum().sqrt() / total * deviation

    def decide(self, logits: Tensor) -> Tensor:
        decision, open_ = self(logits).argmax(-1), torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
        ordered = logits[self.order(len(logits))]
        for j in range(1, len(logits)):
            label, sure = self.settled(ordered[:j], len(logits))
            decision = torch.where(open_ & sure, label, decision)
            open_ &= ~sure
        return decision


class MeanLogits(Rule):
    """Mean of the logits (Horvath et al. 2022, soft voting). Logits have no bound, so every member is always asked."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.mean(0)


class Majority(Rule):
    """Hard voting: the class with most votes, the lowest index among equals; settled when the others cannot catch up.

    The released code of Horvath et al. adds its tie-breaking noise once per member, which can overturn a lead. For attackers,
    who need a gradient, :meth:`forward` is the log of the mean softmax.
    """

    def forward(self, logits: Tensor) -> Tensor:
        return mean_log_softmax(logits)

    def decide(self, logits: Tensor) -> Tensor:
        return self._counts(logits).argmax(-1)

    def earliest(self, members: int) -> int:
        return members // 2 + 1

    def settled(self, logits: Tensor, members: int) -> tuple[Tensor, Tensor]:
        label, lead = _lead(self._counts(logits))
        return label, lead > members - len(logits)

    @staticmethod
    def _counts(logits: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)


class Consensus(Rule):
    """K-consensus (Horvath et al. 2022): where the first K members agree their class, else the soft vote of all.

    A deterministic function of the image, so smoothing it is sound, but not the same classifier as the full vote.
    """

    def __init__(self, inner: Rule, first: int) -> None:
        super().__init__()
        self.inner = inner
        self.first = first

    def forward(self, logits: Tensor) -> Tensor:
        return self.inner(logits)

    def earliest(self, members: int) -> int:
        return min(self.first, members)

    def settled(self, logits: Tensor, members: int) -> tuple[Tensor, Tensor]:
        votes = logits[: self.first].argmax(-1)
        return votes[0], (votes == votes[0]).all(0) & (len(logits) == self.first)

    def decide(self, logits: Tensor) -> Tensor:
        label, sure = self.settled(logits[: self.first], len(logits))
        return torch.where(sure, label, self.inner.decide(logits))


class LogMean(Rule):
    """Normalised geometric mean of the members' probabilities, a product of experts; an ablation, not robust."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).mean(0).log_softmax(-1)


class GeometricMedian(Rule):
    """The point of the simplex with the least sum of Euclidean distances to the members' probabilities (CEAR eq. 2.5).

    The median is a convex combination sum_i w_i p_i, and log sum_i w_i p_i is returned. Gradients treat the final weights as
    constants.

    Decisions take two shortcuts. Members that all agree leave no choice of class. And a majority that is close together holds
    the median near it, whatever the others say: if all but a share s < 1/2 of the points lie within r of a point c, the median
    lies within (1 - s) / sqrt(1 - 2 s) * r of c (Minsker 2015, lemma 2.1), and moves a difference of two classes by at most
    sqrt(2) times that.
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

    def earliest(self, members: int) -> int:
        return members // 2 + 1

    def settled(self, logits: Tensor, members: int) -> tuple[Tensor, Tensor]:
        points = logits.softmax(-1)
        centre = points.mean(0)
        spread = (points - centre).norm(dim=-1).amax(0)
        share = 1 - len(logits) / members
        reach = math.sqrt(2) * (1 - share) / math.sqrt(1 - 2 * share) * spread
        label, lead = _lead(centre)
        return label, lead > reach + self.tolerance

    tolerance = 1e-3
    """Guard for the iteration, which may end 1e-4 from the median where the sum of distances is flat."""
