"""What an attack is: a frozen value that is called on (model, x, y), with its contract checked in one place."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from attacks.norms import norm
from attacks.streams import Streams, drawing

Model = Callable[[Tensor], Tensor]

VERDICT_DRAWS = 100
"""Fresh noise draws whose mean softmax decides for a randomised model (methods 9.2)."""


SMALLEST_BATCH = 8
"""Fewer rows (per CPU thread) are padded to this many: products of fewer rows use other kernels, which round differently."""


class ContractError(RuntimeError):
    """An attack or a model broke a rule that every number relies on; names the rule and by how much."""


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, per image.

    Attributes:
        x_adv: (n *shape), the image itself where it was already misclassified, else the adversarial or highest-loss point.
        broken: (n) bool, whether the model decides wrongly at ``x_adv``, judged by a fresh evaluation.
        forwards, backwards: (n) int64, model evaluations that the search spent on the image.
        distance: (n), length of ``x_adv - x`` in the attack's norm.
    """

    x_adv: Tensor
    broken: Tensor
    forwards: Tensor
    backwards: Tensor
    distance: Tensor


@dataclass(frozen=True)
class Search:
    """What a subclass's :meth:`Attack.run` returns: the points and the evaluations spent on each image."""

    x_adv: Tensor
    forwards: Tensor
    backwards: Tensor


@dataclass(frozen=True)
class Oracle:
    """How an attack asks the model for logits: for a randomised model always under the same draws (common random numbers).

    Attributes:
        model: images (n *shape) -> logits (n k).
        streams: noise of all images of the attack; None for a deterministic model.
        draws: noise draws per question.
        average: "loss" returns (draws n k), so that losses are averaged; "probability" returns the log of the mean
            softmax (n k), the SmoothAdv form for smoothed classifiers (Salman et al. 2019).
    """

    model: Model
    streams: Streams | None = None
    draws: int = 1
    average: str = "loss"

    @property
    def randomized(self) -> bool:
        return self.streams is not None

    @property
    def cost(self) -> int:
        """Model evaluations per question."""
        return self.draws if self.randomized else 1

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        """Logits of ``x``, the present versions of the attack's images number ``rows``."""
        # Repeating the first image up to a small batch keeps kernels, and so every bit, independent of who else is asked.
        threads = torch.get_num_threads() if x.device.type == "cpu" else 1  # a product shares its rows out among them
        spare = max(0, SMALLEST_BATCH * threads - len(x))
        if spare:
            x, rows = torch.cat([x, x[:1].expand(spare, *x.shape[1:])]), torch.cat([rows, rows[:1].expand(spare)])
        keep = slice(0, len(x) - spare)
        if self.streams is None:
            return _no_nan(self.model(x)[keep])
        streams = self.streams.take(rows)
        answers = []
        for draw in range(self.draws):
            with drawing(self.model, streams.child("draw", draw)):
                answers.append(self.model(x)[keep])
        logits = _no_nan(torch.stack(answers))
        return logits if self.average == "loss" else mean_log_softmax(logits)


def _no_nan(answers: Tensor) -> Tensor:
    # argmax of NaN is an arbitrary class and no loss beats NaN: such a model would pass for robust.
    if answers.isnan().any():
        raise ContractError(f"the model returned NaN, in {int(answers.isnan().sum())} of {answers.numel()} numbers")
    return answers


def mean_log_softmax(logits: Tensor) -> Tensor:
    """log of the mean softmax over the first axis, in log space: (m n k) -> (n k)."""
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def decide(model: Model, x: Tensor, streams: Streams | None = None) -> Tensor:
    """The decision that is scored, labels (n): ``model.predict``, or the mean prediction of a randomised model."""
    with torch.inference_mode():
        if getattr(model, "randomized", False):
            if streams is None:
                raise ValueError("the model is randomised: pass streams, they provide its noise")
            rows = torch.arange(len(x))
            return Oracle(model, streams, VERDICT_DRAWS, "probability")(x, rows).argmax(-1)
        predict = getattr(model, "predict", None)
        return Oracle(predict or (lambda images: model(images).argmax(-1)))(x, torch.arange(len(x)))


class Attack(ABC):
    """A fixed-budget attack. Subclasses are frozen dataclasses with a ``norm`` and an ``eps`` that implement :meth:`run`."""

    norm: Any
    eps: Any

    @abstractmethod
    def run(self, oracle: Oracle, x: Tensor, y: Tensor, streams: Streams | None) -> Search:
        """Search around images (n *shape) that the model decides rightly; points must lie in ball and box."""

    @final
    def __call__(self, model: Model, x: Tensor, y: Tensor, streams: Streams | None = None) -> AttackResult:
        """Attack a batch of images.

        Args:
            model: images (n *shape) in [0,1] -> logits (n k), in eval mode; may have ``predict`` and ``randomized``.
            x: images (n *shape), floating point in [0,1].
            y: true labels (n), int64.
            streams: randomness, one row an image; needed by random starts and by randomised models.

        Raises:
            ValueError: for inputs outside their contract.
            ContractError: if the attack leaves ball or box, returns something non-finite, or changes the model.
        """
        _check_input(model, x, y, streams)
        before = _fingerprint(model)
        x = x.detach()
        randomized = getattr(model, "randomized", False)
        broken = decide(model, x, streams.child("before") if streams else None) != y
        rest = (~broken).nonzero().flatten()
        x_adv = x.clone()
        forwards = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        backwards = torch.zeros_like(forwards)
        if len(rest):
            noise = streams.take(rest) if streams else None
            oracle = Oracle(model, noise.child("oracle") if noise and randomized else None)
            found = self.run(oracle, x[rest], y[rest], noise)
            if found.x_adv.shape != x[rest].shape:
                raise ContractError(f"{self} returned shape {tuple(found.x_adv.shape)} for {tuple(x[rest].shape)}")
            x_adv[rest] = found.x_adv.detach()
            forwards[rest], backwards[rest] = found.forwards, found.backwards
            fresh = noise.child("verdict") if noise else None
            broken[rest] = decide(model, x_adv[rest], fresh) != y[rest]
        distance = norm(self.norm).length(x_adv.double() - x.double()).to(x.dtype)
        self._check_output(x, x_adv)
        if _fingerprint(model) != before:
            raise ContractError(f"{self} changed the model (parameters, gradients or mode)")
        return AttackResult(x_adv, broken, forwards, backwards, distance)

    def _check_output(self, x: Tensor, x_adv: Tensor) -> None:
        if not torch.isfinite(x_adv).all():
            rows = (~torch.isfinite(x_adv).flatten(1).all(1)).nonzero().flatten().tolist()
            raise ContractError(f"{self} returned non-finite pixels for images {rows[:10]}: does the model output NaN?")
        if x_adv.min() < 0 or x_adv.max() > 1:
            raise ContractError(f"{self} left the box [0,1]: {x_adv.min():.6g} to {x_adv.max():.6g}")
        ball = norm(self.norm)
        # A pixel of x + delta is rounded to the dtype, by at most half a unit in the last place below 1.
        rounding = ball.length(torch.full_like(x[:1], torch.finfo(x.dtype).eps / 2, dtype=torch.float64))
        length = ball.length(x_adv.double() - x.double())
        if (length > self.eps * (1 + 1e-6) + rounding).any():
            raise ContractError(f"{self} left the {self.norm} ball of {self.eps}: distance {length.max():.9g}")


def _check_input(model: Model, x: Tensor, y: Tensor, streams: Streams | None) -> None:
    if not x.is_floating_point() or x.ndim < 2:
        raise ValueError(f"images must be floating point (n, *shape), got {x.dtype} {tuple(x.shape)}")
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
