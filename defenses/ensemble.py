"""The one ensemble class: members, and a rule that combines their logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from defenses.api import Classifier, decided
from defenses.combine import Rule


class Ensemble(Classifier):
    """Members that see the same image, combined by a :class:`~defenses.combine.Rule` into log-probabilities (n k)."""

    def __init__(self, members: Sequence[Classifier], rule: Rule) -> None:
        super().__init__()
        self.networks = nn.ModuleList(members)
        self.rule = rule

    @property
    def members(self) -> Sequence[Classifier]:
        return list(self.networks)  # type: ignore[arg-type]

    def member_logits(self, x: Tensor) -> Tensor:
        """Logits of every member: (m n k)."""
        return torch.stack([network(x) for network in self.networks])

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self.member_logits(x))

    def predict(self, x: Tensor) -> Tensor:
        logits = self.member_logits(x)
        decided(logits)  # a NaN of one member must not vanish in the vote
        return self.rule.decide(logits)
