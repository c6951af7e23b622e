"""Attacks that look through other eyes: gradients of a view of the model, success by the model's own decision (methods 12.3).

Whatever hides a model's gradients (saturated softmax, noise, a vote) can be left out of the view, because what is found there
counts only where it fools the model itself (Athalye et al. 2018; Tramer et al. 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from attacks.apgd import Apgd
from attacks.api import Around, Attack, Search
from attacks.gradient import Pgd
from attacks.input_diversity import DiverseMim
from attacks.losses import Loss
from attacks.oracle import Model, Oracle
from attacks.streams import Streams


@dataclass(frozen=True)
class View:
    """What an attacker may differentiate instead of a model.

    Attributes:
        model: images (n c h w) -> scores (n k), or those of several networks (m n k); may draw noise (``randomized``).
        losses: by name, of those scores; names of :data:`attacks.losses.LOSSES`, averaged over networks, or losses.
    """

    model: Model
    losses: Mapping[str, str | Loss] = field(default_factory=lambda: {"ce": "ce", "dlr": "dlr"})


@dataclass(frozen=True)
class Guided(Around):
    """``inner`` with the gradients of another model.

    Attributes:
        inner: gradient attack of our own; its loss is that of the guide's scores. Input diversity looks at the guide alone, as
            transfer attacks do: its last point is judged by the model.
        guide: images (n c h w) -> scores (n k) or (m n k).
        draws: noise draws per gradient, where the guide draws noise.
    """

    inner: Pgd | Apgd | DiverseMim
    guide: Model
    draws: int = 20

    def run(self, oracle: Oracle, x: Tensor, y: Tensor, streams: Streams | None) -> Search:
        if isinstance(self.guide, nn.Module) and any(module.training for module in self.guide.modules()):
            raise ValueError("the guide is in training mode: call guide.eval() before an attack")
        noise = streams.child("guide") if streams and getattr(self.guide, "randomized", False) else None
        return self.inner.search(replace(oracle, guide=Oracle(self.guide, noise, self.draws)), x, y, streams)


@dataclass(frozen=True, kw_only=True)
class ApgdAfter(Apgd):
    """Auto-PGD from the best points of another attack, which may need no gradients.

    Attributes:
        first: that attack.
    """

    first: Attack

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets:
            raise ValueError(f"another attack has one best point an image, so there is no room for {self.targets} targets")

    def begin(self, oracle: Oracle, centre: Tensor, y: Tensor, noise: Sequence[Streams]) -> Tensor:
        return self.first.search(oracle, centre, y, noise[0].child("first")).x_adv
