"""How an attack asks a model: under fixed noise, every question counted and, if wanted, limited; and what a verdict is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attacks.streams import Streams, drawing

Model = Callable[[Tensor], Tensor]

VERDICT_DRAWS = 100
"""Fresh noise draws whose mean softmax decides for a randomised model (methods 9.2)."""

SMALLEST_BATCH = 8
"""Fewer rows (per CPU thread) are padded to this many: products of fewer rows use other kernels, which round differently."""


class ContractError(RuntimeError):
    """An attack or a model broke a rule that every number relies on; names the rule and by how much."""


class Meter:
    """What a search spends on each of its images, and what it may spend.

    Args:
        images: how many.
        device: of the counts, which stay there: nothing waits for them.
        queries: forward passes allowed per image; None is no limit.

    Attributes:
        forwards, backwards: (n) int64, evaluations so far.
        zeros: (n) int64, gradients that were zero in every pixel.
    """

    def __init__(self, images: int, device: torch.device, queries: int | None = None) -> None:
        self.queries = queries
        self.forwards = torch.zeros(images, dtype=torch.int64, device=device)
        self.backwards = torch.zeros_like(self.forwards)
        self.zeros = torch.zeros_like(self.forwards)
        self._nan_logits = torch.zeros((), dtype=torch.int64, device=device)
        self._nan_gradients = torch.zeros_like(self._nan_logits)

    def asked(self, places: Tensor, cost: int, logits: Tensor) -> None:
        """Note a question about images number ``places``, and its answer."""
        self.forwards.index_add_(0, places, torch.full_like(places, cost))
        self._nan_logits += logits.isnan().sum()
        if self.queries is not None and (self.forwards > self.queries).any():
            raise ContractError(
                f"the attack asked {int(self.forwards.max())} times about an image; {self.queries} were allowed"
            )

    def differentiated(self, places: Tensor, cost: int, gradient: Tensor) -> None:
        """Note a gradient."""
        largest = gradient.flatten(1).abs().amax(1)
        self.backwards.index_add_(0, places, torch.full_like(places, cost))
        self.zeros.index_add_(0, places, (largest == 0).to(torch.int64))
        self._nan_gradients += largest.isnan().sum()

    def check(self) -> None:
        """Raise if anything was NaN: argmax of NaN is some class and sign(NaN) is 0, so the model would pass for robust.

        Raises:
            ContractError: says what was NaN, and how often.
        """
        if self._nan_logits or self._nan_gradients:
            raise ContractError(
                f"the model returned NaN, in {int(self._nan_logits)} logits and {int(self._nan_gradients)} gradients"
            )


@dataclass(frozen=True)
class Oracle:
    """How an attack asks the model for logits: for a randomised model always under the same draws (common random numbers).

    Attributes:
        model: images (n *shape) -> logits (n k).
        streams: noise of all images of the attack; None for a deterministic model.
        draws: noise draws per question; None: one, unless the attack knows better.
        average: "loss" returns (draws n k), so that losses are averaged; "probability" returns the log of the mean
            softmax (n k), the SmoothAdv form for smoothed classifiers (Salman et al. 2019).
        meter: counts; None for questions that belong to no search.
        places: (n), the meter's numbers of this oracle's images; None where they are the same.
        guide: whose scores a gradient attack climbs instead of the model's, which still decides; see :mod:`attacks.guided`.
    """

    model: Model
    streams: Streams | None = None
    draws: int | None = None
    average: str = "loss"
    meter: Meter | None = None
    places: Tensor | None = None
    guide: Oracle | None = None

    @property
    def randomized(self) -> bool:
        return self.streams is not None

    @property
    def cost(self) -> int:
        """Model evaluations per question."""
        return (self.draws or 1) if self.randomized else 1

    def take(self, rows: Tensor) -> Oracle:
        """The oracle of some of the images: integer indices."""
        streams = self.streams.take(rows) if self.streams else None
        guide = self.guide.take(rows) if self.guide else None
        return replace(self, streams=streams, places=self._place(rows), guide=guide)

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        """Logits of ``x``, the present versions of the attack's images number ``rows``; of several networks (m n k)."""
        logits = self._answer(x, rows)
        if self.meter is None:
            if logits.isnan().any():
                raise ContractError(f"the model returned NaN, in {int(logits.isnan().sum())} of {logits.numel()} numbers")
        else:
            self.meter.asked(self._place(rows), self.cost, logits)
        return logits

    def scores(self, x: Tensor, rows: Tensor) -> Tensor:
        """One row of logits an image (n k), whatever the noise: the log of the mean softmax over the draws."""
        logits = self(x, rows)
        return mean_log_softmax(logits) if logits.ndim == 3 else logits

    def gradient(self, loss: Tensor, x: Tensor, rows: Tensor, of: Tensor | slice = slice(None), keep: bool = False) -> Tensor:
        """Gradients of losses (n); they are summed, which keeps every image's gradient its own.

        Args:
            loss: (n), computed from ``x``.
            x: points (n *shape) that require a gradient.
            rows: (n), the attack's images that they belong to.
            of: which of them are wanted.
            keep: whether another gradient of the same answer will be asked.
        """
        with torch.enable_grad():  # the caller may have switched it off
            gradient = torch.autograd.grad(loss[of].sum(), x, retain_graph=keep)[0][of]
        if self.meter is not None:
            self.meter.differentiated(self._place(rows[of]), self.cost, gradient)
        return gradient

    def affords(self, rows: Tensor, questions: int = 1) -> Tensor | None:
        """Which images may be asked about so many times more (n) bool; None: all, there is no limit."""
        if self.meter is None or self.meter.queries is None:
            return None
        return self.meter.forwards[self._place(rows)] + questions * self.cost <= self.meter.queries

    def classes(self, x: Tensor) -> int:
        """How many classes the model knows; counts as no question."""
        with torch.no_grad():
            return replace(self, meter=None)(x[:1], torch.zeros(1, dtype=torch.int64, device=x.device)).shape[-1]

    def _place(self, rows: Tensor) -> Tensor:
        return rows if self.places is None else self.places[rows]

    def _answer(self, x: Tensor, rows: Tensor) -> Tensor:
        # Repeating the first image up to a small batch keeps kernels, and so every bit, independent of who else is asked.
        threads = torch.get_num_threads() if x.device.type == "cpu" else 1  # a product shares its rows out among them
        spare = max(0, SMALLEST_BATCH * threads - len(x))
        if spare:
            x, rows = torch.cat([x, x[:1].expand(spare, *x.shape[1:])]), torch.cat([rows, rows[:1].expand(spare)])

        def ask() -> Tensor:
            answer = self.model(x)
            return answer[: len(x) - spare] if answer.ndim == 1 else answer[..., : len(x) - spare, :]

        if self.streams is None:
            return ask()
        streams = self.streams.take(rows)
        answers = []
        for draw in range(self.cost):
            with drawing(self.model, streams.child("draw", draw)):
                answers.append(ask())
        logits = torch.stack(answers)
        return logits if self.average == "loss" else mean_log_softmax(logits)


def mean_log_softmax(logits: Tensor) -> Tensor:
    """log of the mean softmax over the first axis, in log space: (m n k) -> (n k)."""
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def decide(model: Model, x: Tensor, streams: Streams | None = None) -> Tensor:
    """The decision that is scored, labels (n): ``model.predict``, or the mean prediction of a randomised model."""
    rows = torch.arange(len(x), device=x.device)
    with torch.inference_mode():
        if getattr(model, "randomized", False):
            if streams is None:
                raise ValueError("the model is randomised: pass streams, they provide its noise")
            return Oracle(model, streams, VERDICT_DRAWS, "probability")(x, rows).argmax(-1)
        predict = getattr(model, "predict", None)
        return Oracle(predict or (lambda images: model(images).argmax(-1)))(x, rows)
