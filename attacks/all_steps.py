"""Gradient steps that go on after the model is fooled, for points that other models are to meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from attacks.api import Around, Attack, Best, Search
from attacks.gradient import STARTS, Pgd, ascend, classification
from attacks.norms import per_row
from attacks.oracle import Oracle
from attacks.streams import Streams


def climbs(attack: Attack) -> TypeGuard[Pgd]:
    """Whether it is our own loop of gradient steps, which :class:`AllSteps` can take."""
    return isinstance(attack, Pgd) and not attack.foreign


@dataclass(frozen=True)
class AllSteps(Around):
    """``inner`` with all its steps and restarts taken, whether the model is wrong already or not.

    Of an image's points that fool the model the one of the highest loss is returned, of an image without such a point the one
    of the highest loss: what ``inner`` breaks is broken, and nothing else.

    Attributes:
        inner: an attack by our own loop of gradient steps.
    """

    inner: Pgd

    def run(self, oracle: Oracle, x: Tensor, y: Tensor, streams: Streams | None) -> Search:
        every, fooling = Best(x), Best(x)
        objective = classification(oracle, y, self.inner.loss)

        def endless(points: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            loss, wrong = objective(points, rows)
            if wrong is not None:  # of a model that draws noise no verdict is final
                seen = loss.detach().to(x.dtype)
                fooling.offer(rows, points.detach(), torch.where(wrong, seen, -torch.inf))
            return loss, None

        rows = torch.arange(len(x), device=x.device)
        for restart in range(self.inner.restarts):
            start = STARTS[self.inner.start](self.inner, x, streams.child("restart", restart) if streams else None)
            found = ascend(endless, x, self.inner.walk(), start, oracle)
            every.offer(rows, found.best, found.loss)
        return Search(torch.where(per_row(fooling.score > -torch.inf, x), fooling.x_adv, every.x_adv))
