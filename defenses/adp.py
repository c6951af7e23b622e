"""Adaptive diversity promoting (Pang et al., ICML 2019): the members' wrong-class probabilities point in different directions.

Differences from the released code: probabilities and the determinant are float64, with a guard of 1e-12 in the normalisation,
so that confident members give no NaN; nothing is selected on test images. The class that is left out of a member's
probabilities is the true one, not its largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.api import Classifier, Task
from defenses.ensemble import Ensemble
from defenses.joint import SummedLoss, TrainedTogether, cross_entropies
from defenses.training import Batch


@dataclass(frozen=True)
class AdaptiveDiversity(SummedLoss):
    """sum_m CE_m - alpha H(mean p) - beta ln det(W^T W + 1e-6 I), means over the batch.

    Attributes:
        alpha: weight of the entropy of the mean probability.
        beta: weight of the ensemble diversity.
    """

    alpha: float
    beta: float

    def __call__(self, net: Ensemble, batch: Batch, needs: Sequence[Classifier]) -> dict[str, Tensor]:
        logits = net.member_logits(batch.x)
        p = logits.double().softmax(-1)
        return {
            "ce": cross_entropies(list(logits), batch.y, batch.label_smoothing).sum(),
            "entropy": -self.alpha * entropy(p.mean(0)).mean(),
            "diversity": -self.beta * log_diversity(p, batch.y).mean(),
        }


def entropy(p: Tensor) -> Tensor:
    """H(p) in nats of probabilities (n k): (n)."""
    return -(p * (p + 1e-20).log()).sum(-1)


def log_diversity(p: Tensor, y: Tensor) -> Tensor:
    """ln det(W^T W + 1e-6 I), float64 (n); W holds the members' probabilities (m n k) of the classes other than y, of length 1.

    Raises:
        ValueError: if the members outnumber the other classes, where the determinant is 0 whatever they say.
    """
    members, n, classes = p.shape
    if classes - 1 < members:
        raise ValueError(f"ensemble diversity of {members} members needs {members + 1} classes, there are {classes}")
    others = torch.ones(n, classes, dtype=torch.bool, device=p.device).scatter_(1, y.unsqueeze(1), False)
    w = p[:, others].view(members, n, classes - 1).double()
    w = w / w.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    gram = torch.einsum("ank,bnk->nab", w, w)
    return torch.logdet(gram + 1e-6 * torch.eye(members, dtype=gram.dtype, device=gram.device))


@dataclass(frozen=True, kw_only=True)
class Adp(TrainedTogether):
    """Adaptive diversity promoting.

    Attributes:
        alpha, beta: weights of entropy and diversity.
    """

    alpha: float = 2.0
    beta: float = 0.5

    def loss(self, task: Task) -> AdaptiveDiversity:
        return AdaptiveDiversity(self.alpha, self.beta)


adp = Adp()
