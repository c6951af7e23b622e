"""What an attack is: a frozen value that is called on (model, x, y), with its contract checked in one place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from attacks.norms import norm, put
from attacks.oracle import ContractError, Meter, Model, Oracle, decide
from attacks.streams import Streams

ROWS = {"cpu": 100}
"""Points asked about at once: a CPU is fastest while a layer's numbers stay in its cache; other devices take 2,048."""


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, per image.

    Attributes:
        x_adv: (n *shape), the image itself where it was already misclassified, else the adversarial or highest-loss point.
        broken: (n) bool, whether the model decides wrongly at ``x_adv``, judged by a fresh evaluation.
        forwards, backwards: (n) int64, model evaluations that the search spent on the image.
        zeros: (n) int64, gradients among them that were zero in every pixel: a sign of masking.
        distance: (n), length of ``x_adv - x`` in the attack's norm.
        details: further (n) int64 that only some attacks have, by name; -1 where there is nothing to say.
    """

    x_adv: Tensor
    broken: Tensor
    forwards: Tensor
    backwards: Tensor
    zeros: Tensor
    distance: Tensor
    details: Mapping[str, Tensor]


@dataclass(frozen=True)
class Search:
    """What a subclass's :meth:`Attack.run` returns.

    Attributes:
        x_adv: (n *shape), a point for each image.
        details: what else it can tell, (n) int64 by name.
        broken: (n) bool, the verdicts on ``x_adv``, where :func:`attacks.oracle.decide` has already been asked for them.
    """

    x_adv: Tensor
    details: Mapping[str, Tensor] = field(default_factory=dict)
    broken: Tensor | None = None


class Best:
    """The best point of each image so far: an adversarial one where there is any, else the one of the highest score.

    Attributes:
        x_adv: (n *shape), the images themselves at first.
        score: (n), what the points are compared by; larger is better for the attacker.
        won: (n) bool, images whose search is over.
        tracks: searches that go on at once for each image.
    """

    def __init__(self, x: Tensor, tracks: int = 1) -> None:
        self.tracks = tracks
        self.x_adv = x.clone()
        self.score = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        self.won = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def standing(self) -> Tensor:
        """Numbers of the images whose search goes on."""
        return (~self.won).nonzero().flatten()

    def offer(self, rows: Tensor, points: Tensor, score: Tensor, won: Tensor | None = None) -> None:
        """Keep what is better; what has won is not changed any more.

        Args:
            rows: (t), numbers of images; they differ, but that every track of an image is there, one after the other.
            points: (t *shape).
            score: (t); of several tracks the best counts, of several that won the first.
            won: (t) bool, whether a point ends the search.
        """
        if self.tracks > 1:
            rank = (score if won is None else torch.where(won, torch.inf, score)).view(-1, self.tracks)
            pick = rank.argmax(1) + torch.arange(0, len(score), self.tracks, device=score.device)
            rows, points, score = rows[pick], points[pick], score[pick]
            won = None if won is None else won.view(-1, self.tracks).any(1)
        better = score > self.score[rows]
        if won is not None:
            better = better | won
        better = better & ~self.won[rows]
        put(self.x_adv, rows, points, better)
        put(self.score, rows, score, better)
        if won is not None:
            self.won[rows] |= won


class Attack(ABC):
    """An attack. Subclasses are frozen dataclasses with a ``norm`` and an ``eps`` that implement :meth:`run`.

    With ``eps`` infinite an attack looks for the nearest adversarial point. Attacks that another library has too have a field
    ``engine``; what is not "native" is asked of :mod:`attacks.reference`.
    """

    norm: Any
    eps: Any

    @property
    def foreign(self) -> bool:
        """Whether another library searches."""
        return getattr(self, "engine", "native") != "native"

    @abstractmethod
    def run(self, oracle: Oracle, x: Tensor, y: Tensor, streams: Streams | None) -> Search:
        """Search around images (n *shape) that the model decides rightly; points must lie in ball and box."""

    def batch(self, device: torch.device) -> int:
        """How many images are attacked at once; changes no result."""
        return ROWS.get(device.type, 2048)

    @final
    def search(self, oracle: Oracle, x: Tensor, y: Tensor, streams: Streams | None) -> Search:
        """:meth:`run`, batch by batch, or the same attack of another engine."""
        if not self.foreign:
            parts = []
            for rows in torch.arange(len(x), device=x.device).split(self.batch(x.device)):
                noise = streams.take(rows) if streams else None
                parts.append(self.run(oracle.take(rows), x[rows], y[rows], noise))
            if len(parts) == 1:
                return parts[0]
            details = {name: torch.cat([part.details[name] for part in parts]) for name in parts[0].details}
            return Search(torch.cat([part.x_adv for part in parts]), details)
        from attacks import reference

        return reference.search(self, oracle, x, y, streams)

    @final
    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        streams: Streams | None = None,
        queries: int | None = None,
        *,
        everything: bool = False,
    ) -> AttackResult:
        """Attack a batch of images.

        Args:
            model: images (n *shape) in [0,1] -> logits (n k), in eval mode; may have ``predict`` and ``randomized``.
            x: images (n *shape), floating point in [0,1].
            y: true labels (n), int64.
            streams: randomness, one row an image; needed by random starts and by randomised models.
            queries: forward passes that the search may spend on an image; None is no limit. A verdict costs none.
            everything: search around images that the model gets wrong as they are, too, for points that other models will meet.

        Raises:
            ValueError: for inputs outside their contract.
            ContractError: if the attack leaves ball or box, returns something non-finite, or changes the model.
        """
        _check_input(model, x, y, streams)
        if queries is not None and queries < 1:
            raise ValueError(f"queries must be at least 1, got {queries}")
        before = _fingerprint(model)
        x = x.detach()
        randomized = getattr(model, "randomized", False)
        broken = decide(model, x, streams.child("before") if streams else None) != y
        rest = (~broken | everything).nonzero().flatten()
        x_adv, details = x.clone(), {}
        meter = Meter(len(x), x.device, queries)
        if len(rest):
            noise = streams.take(rest) if streams else None
            oracle = Oracle(model, noise.child("oracle") if noise and randomized else None, meter=meter, places=rest)
            found = self.search(oracle, x[rest], y[rest], noise)
            meter.check()
            if found.x_adv.shape != x[rest].shape:
                raise ContractError(f"{self} returned shape {tuple(found.x_adv.shape)} for {tuple(x[rest].shape)}")
            x_adv[rest] = found.x_adv.detach()
            for name, values in found.details.items():
                details[name] = torch.full_like(y, -1).index_copy_(0, rest, values)
            fresh = noise.child("verdict") if noise else None
            broken[rest] = decide(model, x_adv[rest], fresh) != y[rest] if found.broken is None else found.broken
        distance = norm(self.norm).length(x_adv.double() - x.double()).to(x.dtype)
        self._check_output(x, x_adv)
        if _fingerprint(model) != before:
            raise ContractError(f"{self} changed the model (parameters, gradients or mode)")
        return AttackResult(x_adv, broken, meter.forwards, meter.backwards, meter.zeros, distance, details)

    def _check_output(self, x: Tensor, x_adv: Tensor) -> None:
        if not torch.isfinite(x_adv).all():
            rows = (~torch.isfinite(x_adv).flatten(1).all(1)).nonzero().flatten().tolist()
            raise ContractError(f"{self} returned non-finite pixels for images {rows[:10]}: does the model output NaN?")
        if x_adv.min() < 0 or x_adv.max() > 1:
            raise ContractError(f"{self} left the box [0,1]: {x_adv.min():.6g} to {x_adv.max():.6g}")
        ball = norm(self.norm)
        length = ball.length(x_adv.double() - x.double())
        if (length > ball.reach(x, self.eps)).any():
            raise ContractError(f"{self} left the {self.norm} ball of {self.eps}: distance {length.max():.9g}")


def verdicts(model: Model, x: Tensor, x_adv: Tensor, y: Tensor, streams: Streams | None) -> tuple[Tensor, Tensor]:
    """Whether the model was wrong at images (n *shape), and is at their points, (n) bool each.

    As :meth:`Attack.__call__` decides: ``streams`` are those that the attack had, and a randomised model gets the same noise.
    """
    wrong = decide(model, x, streams.child("before") if streams else None) != y
    broken, rest = wrong.clone(), (~wrong).nonzero().flatten()
    if len(rest):
        broken[rest] = decide(model, x_adv[rest], streams.take(rest).child("verdict") if streams else None) != y[rest]
    return wrong, broken


def _check_input(model: Model, x: Tensor, y: Tensor, streams: Streams | None) -> None:
    if x.dtype not in (torch.float32, torch.float64) or x.ndim < 2:
        raise ValueError(
            f"images must be float32 or float64 (n, *shape), got {x.dtype} {tuple(x.shape)}; a model of another dtype "
            "has to cast inside, because 16 bits are too coarse for a point near the edge of a ball"
        )
    if len(x) == 0:
        raise ValueError("there are no images to attack")
    if y.shape != (len(x),) or y.dtype != torch.int64:
        raise ValueError(f"labels must be int64 ({len(x)},), got {y.dtype} {tuple(y.shape)}")
    if not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"images must lie in [0,1], got {x.min():.6g} to {x.max():.6g}")
    if streams is not None and len(streams) != len(x):
        raise ValueError(f"streams have {len(streams)} rows for {len(x)} images")
    if isinstance(model, nn.Module) and any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode: call model.eval() before an attack")


def _fingerprint(model: Model) -> list[Any]:
    if not isinstance(model, nn.Module):
        return []
    modes = [module.training for module in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    grads = [(id(t.grad), t.grad._version) if t.grad is not None else None for t in tensors]
    return [modes, [(t._version, t.requires_grad) for t in tensors], grads]


@dataclass(frozen=True)
class Around(Attack):
    """An attack that lets another one search in its own way; norm, eps and batch are the other's.

    Attributes:
        inner: the other.
    """

    inner: Any

    @property
    def norm(self) -> str:
        return str(self.inner.norm)

    @property
    def eps(self) -> float:
        return float(self.inner.eps)

    def batch(self, device: torch.device) -> int:
        return int(self.inner.batch(device))
