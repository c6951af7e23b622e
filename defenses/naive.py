"""The naive ensemble, baseline of all others: members trained alone on the same batches, that differ in initialisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from defenses.api import Classifier, Parts, Task
from defenses.joint import SummedLoss, TrainedTogether, plain
from defenses.training import Batch


@dataclass(frozen=True)
class Separate(SummedLoss):
    """sum_m CE_m, which no member shares with another."""

    def __call__(self, net: Any, batch: Batch, needs: Sequence[Classifier]) -> dict[str, Tensor]:
        return {"ce": self.errors(net, batch.x, batch)}


@dataclass(frozen=True, kw_only=True)
class Naive(TrainedTogether):
    """Mean softmax of plain networks. Each is a part of its own, so that others can begin with them or take some of them."""

    def loss(self, task: Task) -> Separate:
        return Separate()

    def fit(self, model: Classifier, task: Task, parts: Parts, seed: int) -> None:
        if self.eat:
            super().fit(model, task, parts, seed)
            return
        for member, net in enumerate(model.members):
            net.load_state_dict(parts.get(plain(task, seed, member)))


naive = Naive()
