"""The weakest attack that is one: a little more light, or less."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks import Attack, Streams
from attacks.api import Best, Search
from attacks.norms import norm
from attacks.oracle import Oracle


@dataclass(frozen=True, kw_only=True)
class Brightness(Attack):
    """Every pixel brighter or darker, as far as the ball reaches.

    Attributes:
        norm: "linf" or "l2".
        eps: radius in pixel space.
    """

    norm: str
    eps: float

    def run(self, oracle: Oracle, x: Tensor, y: Tensor, streams: Streams | None) -> Search:
        """Look at both, and keep the better one."""
        ball, best, rows = norm(self.norm), Best(x), torch.arange(len(x), device=x.device)
        for sign in (1.0, -1.0):
            step = self.eps * ball.steepest(torch.full_like(x, sign))
            points = ball.into((x + step).clamp(0, 1), x, self.eps)
            with torch.no_grad():
                logits = oracle(points, rows)
            own = logits.gather(1, y[:, None]).squeeze(1)
            others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
            best.offer(rows, points, others - own)
        return Search(best.x_adv)
