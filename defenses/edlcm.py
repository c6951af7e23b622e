"""EDLCM, diversity of local curvatures: the members' losses are flat along the steepest sign direction, and bend in different
directions where they are not. Its ablations keep one of the two terms.

The paper gives no code and leaves things open (methods 4.9). Decided here: the step h (in pixels, see :class:`Edlcm`); each
member has a direction of its own; the direction is a constant, both gradients of the difference keep their graph; gradients are
of single images, never divided by the batch; the regulariser sees every layer in eval mode, as in CURE's code (Moosavi-Dezfooli
et al. 2019), the cross-entropy in train mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.api import Classifier, Task
from defenses.ensemble import Ensemble
from defenses.joint import SummedLoss, TrainedTogether, cross_entropies, input_gradients, pair_cosines
from defenses.nets import Network, Normalise
from defenses.plain_nets import MaxPool2x2
from defenses.training import Batch, evaluating

Score = Callable[[Tensor], Tensor]
"""Logits (n k) of a member -> its loss of every image (n)."""


@dataclass(frozen=True)
class LocalCurvature(SummedLoss):
    """sum_m CE_m + alpha sum_m |D_m|^p + beta sum_{i<j} cos(D_i, D_j), means over the batch (eqs. 9, 10).

    D_m is the change of member m's input gradient over a step h along its own sign direction, see :func:`changes`.

    Attributes:
        alpha: weight of the curvatures; 0 leaves them out.
        beta: weight of their alignment; 0 leaves it out.
        h: length of the step, l2 in pixels.
        ramp: epochs over which the step grows to h, in equal parts.
        norm_power: p, 2 as the paper writes it or 1 as in CURE's code.
    """

    alpha: float
    beta: float
    h: float
    ramp: int
    norm_power: int

    def __call__(self, net: Ensemble, batch: Batch, needs: Sequence[Classifier]) -> dict[str, Tensor]:
        if not self.alpha and not self.beta:
            return {"ce": self.errors(net, batch.x, batch)}
        # In layers without modes one forward pass is both the ordinary one and the regulariser's first.
        shared = all(modeless(member) for member in net.members)
        logits = [] if shared else [member(batch.x) for member in net.members]
        with evaluating(net):
            first, change = changes(net.members, batch.x, partial(cross_entropy, y=batch.y), self.step(batch.epoch))
        parts = {"ce": cross_entropies(first if shared else logits, batch.y, batch.label_smoothing).sum()}
        if self.alpha:
            parts["curvature"] = self.alpha * sizes(change, self.norm_power).sum(0).mean()
        if self.beta:
            parts["alignment"] = self.beta * cosines(change).sum(0).mean()
        return parts

    def step(self, epoch: int) -> float:
        """Length of the step in an epoch, counted from 0: h / ramp in the first, h from number ``ramp`` on."""
        return self.h * min(1.0, (epoch + 1) / max(1, self.ramp))


def changes(members: Sequence[Classifier], x: Tensor, score: Score, h: float) -> tuple[list[Tensor], Tensor]:
    """How every member's input gradient changes over a step h along the direction of its signs.

    Args:
        members: networks, in the mode in which they are. BatchNorm in train mode would mix the images.
        x: images (n c h w); the points x + h g are not clipped to [0,1].
        score: a member's loss of every image.
        h: length of the step, l2 in pixels.

    Returns:
        logits (n k) of each member at x; D_m = gradient at x + h g_m less gradient at x (m n d), with the graph of both, but
        not of g_m = sign(gradient at x), scaled to length 1 (0 where the gradient is 0).
    """
    logits, here = input_gradients(members, x, score)
    signs = here.detach().sign()
    ways = h * signs / signs.norm(dim=-1, keepdim=True).clamp_min(1)
    there = [input_gradients([net], x + way.view_as(x), score)[1] for net, way in zip(members, ways, strict=True)]
    return logits, torch.cat(there) - here


def sizes(change: Tensor, power: int = 2) -> Tensor:
    """|D|^power of changes (m n d): (m n)."""
    return change.square().sum(-1) if power == 2 else change.norm(dim=-1)


def cosines(change: Tensor, least: float = 1e-12) -> Tensor:
    """Cosines (p n) of all pairs of changes (m n d). Of a change shorter than ``least`` it is 0, and so is its derivative:
    dividing by a tiny constant instead would turn rounding errors into steps of any size."""
    live = change.detach().norm(dim=-1, keepdim=True) > least
    return pair_cosines(torch.where(live, change, 0.0), least)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of every image (n). Its gradient is exact also where p_y rounds to 1 and p_y - 1 to 0: images that are
    fitted well, whose gradients' directions and differences would else be noise."""
    return F.softplus(odds_against(logits, y))


def odds_against(logits: Tensor, y: Tensor) -> Tensor:
    """ln((1 - p_y) / p_y) of logits (n k): (n), without cancellation. Its gradient is parallel to that of cross-entropy."""
    others = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, y.unsqueeze(1), True)
    return logits.masked_fill(others, -torch.inf).logsumexp(-1) - logits.gather(1, y.unsqueeze(1)).squeeze(1)


MODELESS = (
    *(nn.Conv2d, nn.Linear, nn.ReLU, nn.LeakyReLU, nn.MaxPool2d, MaxPool2x2, nn.AdaptiveAvgPool2d, nn.Flatten),
    *(nn.Sequential, Normalise, Network),
)
"""Layers that are the same functions in train and in eval mode."""


def modeless(net: nn.Module) -> bool:
    """Whether a network surely does the same in both modes: it has none but known layers, so no BatchNorm and no dropout."""
    return all(type(module) in MODELESS for module in net.modules())


@dataclass(frozen=True, kw_only=True)
class Edlcm(TrainedTogether):
    """Ensemble diversity by local curvatures.

    Attributes:
        alpha, beta: weights of curvatures and of their alignment.
        h: length of the step, l2 in pixels. The paper gives none; CURE's paper takes 1.5 in coordinates divided by the standard
            deviation of a channel, about 0.2 in CIFAR, so 0.30 in pixels; there every pixel moves by 0.30 / sqrt(3072) =
            1.38/255.
        ramp: epochs over which the step grows to h.
        norm_power: 2 for squared lengths of changes, 1 for lengths.
    """

    alpha: float = 1.0
    beta: float = 0.01
    h: float = 0.30
    ramp: int = 5
    norm_power: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta and self.members < 2:
            raise ValueError(f"members: curvatures are aligned in pairs, so at least 2 unless beta is 0, got {self.members}")
        if not self.h > 0:
            raise ValueError(f"h: a length in pixels above 0, got {self.h}")
        if self.ramp < 0:
            raise ValueError(f"ramp: a number of epochs, 0 for none, got {self.ramp}")
        if self.norm_power not in (1, 2):
            raise ValueError(f"norm_power: 1 or 2, got {self.norm_power}")

    def loss(self, task: Task) -> LocalCurvature:
        return LocalCurvature(self.alpha, self.beta, self.h, self.ramp, self.norm_power)


edlcm = Edlcm()
edlcm_lr = Edlcm(beta=0.0)
edlcm_lg = Edlcm(alpha=0.0)
