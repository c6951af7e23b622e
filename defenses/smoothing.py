"""Randomised smoothing (Cohen, Rosenfeld & Kolter 2019): the smoothed classifier, CERTIFY and PREDICT.

Differences from the released code: votes are counted on the device, random numbers are keyed by image and draw so that no
result depends on packing, several estimators, and radii in full precision. Noise is added in float32 and never clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attacks.oracle import Oracle
from attacks.streams import Draws, Streams
from defenses.api import Classifier
from defenses.bounds import ESTIMATORS, Question, two_sided
from defenses.ensemble import Panel

BLOCK = 100
"""Noise draws of an image that come from one generator: every look of every estimator is a multiple of it."""

Base = Classifier | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Certificates:
    """One row per image.

    Attributes:
        label: int64 (n), the certified class, -1 where the answer is to abstain.
        radius: float64 (n), l2 radius in pixel space, 0 where abstained.
        count: int64 (n), votes for the selected class among ``draws``.
        draws: int64 (n), noise draws spent on the estimate (selection not counted).
        evaluations: int64 (n), networks asked, selection counted: at most (n0 + draws) times the members, fewer where a vote
            was settled before all of them had answered. Answers shared with other classifiers count for each.
        estimator: how counts became radii.
        question: sigma, alpha, n and radii.
    """

    label: Tensor
    radius: Tensor
    count: Tensor
    draws: Tensor
    evaluations: Tensor
    estimator: str
    question: Question


class Smoothed(Classifier, Draws):
    """x -> base(x + N(0, sigma^2 I)): one noisy answer per forward pass, under :func:`attacks.streams.drawing`.

    With several draws averaged it is the soft smoothed classifier; :meth:`predict` is the hard one.
    """

    randomized = True

    def __init__(self, base: Classifier, sigma: float) -> None:
        super().__init__()
        self.base = base
        self.sigma = sigma

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}"  # what names a model by its text must tell one noise from another

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x + self.sigma * self.drawn().normal(x.shape[1:]).to(x))

    def soft(self, x: Tensor, draws: int, streams: Streams) -> Tensor:
        """log of the mean softmax over noise draws (n k); differentiable."""
        return Oracle(self, streams, draws, "probability")(x, torch.arange(len(x)))

    def predict(self, x: Tensor, n: int = 1000, alpha: float = 0.001, streams: Streams | None = None) -> Tensor:
        """PREDICT: labels (n), -1 where the two top counts of ``n`` draws do not differ significantly at ``alpha``."""
        counts = count_votes(self.base, x, self.sigma, n, _streams(streams, x).child("prediction"))
        first, second = counts.topk(2, dim=1).values.cpu().numpy().T
        label = counts.argmax(1)
        label[torch.from_numpy(two_sided(first, second) > alpha).to(label.device)] = -1
        return label


def certify(  # noqa: PLR0913 (a public contract; everything after sigma has a default)
    base: Base,
    x: Tensor,
    sigma: float,
    *,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    estimator: str = "fixed",
    radii: tuple[float, ...] = (),
    streams: Streams | None = None,
    batch: int = BLOCK,
) -> Certificates:
    """Certify the smoothed classifier at every image.

    With probability at least 1 - alpha per image, the class returned is constant within the radius returned.

    Args:
        base: a Classifier, whose ``predict`` votes, or any callable from images (b c h w) to labels (b).
        x: images (n c h w) in [0,1].
        sigma: standard deviation of the noise in pixels.
        n0, n: draws to select the class, at most this many draws to estimate its probability.
        alpha: probability of a wrong certificate, per image.
        estimator: a name of :data:`defenses.bounds.ESTIMATORS`.
        radii: increasing radii that the "grid" estimator decides; the others ignore it.
        streams: randomness, a row an image; seed 0 and ids 0, 1, ... by default.
        batch: noisy images per forward pass; no result depends on it.

    Raises:
        ValueError: for an unknown estimator, an empty grid where one is needed, or parameters out of range.
    """
    question = Question(sigma, alpha, n, tuple(radii))
    return certify_together([base], x, question, n0=n0, estimator=estimator, streams=streams, batch=batch)[0]


def certify_together(  # noqa: PLR0913 (as certify)
    bases: Sequence[Base],
    x: Tensor,
    question: Question,
    *,
    n0: int = 100,
    estimator: str = "fixed",
    streams: Streams | None = None,
    batch: int = BLOCK,
) -> list[Certificates]:
    """:func:`certify` for several base classifiers under the same noise: one certificate set each, as if certified alone.

    Networks that the classifiers have in common (see :func:`defenses.ensemble.share`) answer once per noise draw, and noise is
    drawn once for all. Each certificate holds with its own probability 1 - alpha; they are not independent of each other.
    """
    _check(question, n0, estimator, batch)
    rule = ESTIMATORS[estimator]
    voting = Voting(bases, x, question.sigma, batch)
    streams = _streams(streams, x)
    chosen = torch.stack([counts.argmax(1) for counts in voting.count(streams.child("selection"), n0)])

    estimation = streams.child("estimation")
    count = torch.zeros_like(chosen)
    draws, bound = np.zeros(chosen.shape, np.int64), np.zeros(chosen.shape)
    going, before = np.ones(chosen.shape, bool), 0
    for index, now in enumerate(rule.looks(question)):
        for pick, labels in voting.ballots(estimation, torch.from_numpy(going).to(x.device), (before, now)):
            count.index_add_(1, pick, (labels == chosen[:, pick].unsqueeze(2)).sum(2))
        draws[going] = now
        bound[going], finished = rule.look(question, index, count.cpu().numpy()[going].astype(float), bound[going])
        going[going] = ~finished
        before = now
        if not going.any():
            break
    found = torch.from_numpy(rule.radius(question, bound.ravel()).reshape(bound.shape)).to(x.device)
    abstain, spent = found.isnan(), torch.from_numpy(draws).to(x.device)
    label, radius = chosen.masked_fill(abstain, -1), found.masked_fill(abstain, 0.0)
    columns = zip(label, radius, count, spent, voting.evaluations, strict=True)
    return [Certificates(*column, estimator=estimator, question=question) for column in columns]


def _check(question: Question, n0: int, estimator: str, batch: int) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; known are {', '.join(ESTIMATORS)}")
    if estimator == "grid" and not question.radii:
        raise ValueError("the grid estimator needs radii")
    if n0 < 1 or batch < 1:
        raise ValueError(f"certification needs n0 >= 1 and batch >= 1, got n0={n0}, batch={batch}")
    radii = question.radii
    if list(radii) != sorted(set(radii)) or not all(r >= 0 for r in radii):
        raise ValueError(f"radii must be non-negative and increasing, got {radii}")


def count_votes(base: Base, x: Tensor, sigma: float, n: int, streams: Streams, batch: int = BLOCK) -> Tensor:
    """Votes for each class among n noise draws, int64 (images, classes); as many columns as classes were seen, at least two."""
    return Voting([base], x, sigma, batch).count(streams, n)[0]


class Voting:
    """Base classifiers that vote on the same noisy copies of images.

    Attributes:
        evaluations: int64 (bases, images), networks asked so far.

    Args:
        bases: what votes; classifiers must be in eval mode.
        x: images (n c h w).
        sigma: standard deviation of the noise in pixels.
        batch: noisy images per forward pass.
    """

    def __init__(self, bases: Sequence[Base], x: Tensor, sigma: float, batch: int) -> None:
        for base in bases:
            if isinstance(base, Classifier) and any(module.training for module in base.modules()):
                raise ValueError("the base classifier is in training mode: call eval() before it votes")
        self.models = [base if isinstance(base, Classifier) else Called(base) for base in bases]
        self.x, self.sigma, self.batch = x, sigma, batch
        self.evaluations = torch.zeros(len(bases), len(x), dtype=torch.int64, device=x.device)

    def count(self, streams: Streams, n: int, wanted: Tensor | None = None) -> list[Tensor]:
        """Votes for each class among the first n noise draws, int64 (images, classes), for every base.

        ``wanted`` is as for :meth:`ballots`, everybody by default; rows that were not wanted stay 0.
        """
        if wanted is None:
            wanted = torch.ones(len(self.models), len(self.x), dtype=torch.bool, device=self.x.device)
        counts = [torch.zeros(len(self.x), 2, dtype=torch.int64, device=self.x.device) for _ in self.models]
        for pick, labels in self.ballots(streams, wanted, (0, n)):
            classes = max(counts[0].shape[1], int(labels.max()) + 1)
            for base, own in enumerate(labels):
                wider = torch.nn.functional.pad(counts[base], (0, classes - counts[base].shape[1]))
                flat = (pick.unsqueeze(1) * classes + own)[own >= 0]
                counts[base] = wider + torch.bincount(flat, minlength=wider.numel()).view_as(wider)
        return counts

    def ballots(self, streams: Streams, wanted: Tensor, span: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Votes on noise draws span[0] to span[1], in pieces of bounded memory.

        Args:
            streams: a row an image.
            wanted: bool (bases, images), who votes on which images.
            span: first draw, and the one after the last.

        Yields:
            image rows (p), labels (bases, p, draws) with -1 where a base was not wanted. Blocks of many images are worked on
            together, so that networks asked about a few noisy images only, still see full batches.
        """
        first, last = span
        rows = wanted.any(0).nonzero().flatten().tolist()
        # A block of noise comes from one generator; only blocks of the same number have the same share in the span.
        packed = max(1, min(_ROWS, _NUMBERS // self.x[0].numel()) // BLOCK, self.batch // BLOCK)
        buffer = torch.empty(min(packed, len(rows)), BLOCK, *self.x.shape[1:], device=self.x.device)
        for block in range(first // BLOCK, -(-last // BLOCK)):
            own = slice(max(first - block * BLOCK, 0), min(last - block * BLOCK, BLOCK))
            for start in range(0, len(rows), packed):
                pack = rows[start : start + packed]
                pick = torch.tensor(pack, device=self.x.device)
                with torch.inference_mode():
                    noisy = buffer[: len(pack)]
                    for place, row in zip(noisy, pack, strict=True):
                        place.normal_(generator=streams.one(row, block)).mul_(self.sigma).add_(self.x[row])
                    labels = self._vote(noisy[:, own], pick, wanted[:, pick])
                yield pick, labels

    def _vote(self, noisy: Tensor, pick: Tensor, wanted: Tensor) -> Tensor:
        """Labels (bases, p, draws) for noisy images (p draws c h w)."""
        images, draws = noisy.shape[:2]
        panel = Panel(noisy.flatten(0, 1), self.batch)
        labels = torch.full((len(self.models), images * draws), -1, device=noisy.device)
        for base, model in enumerate(self.models):
            rows = wanted[base].repeat_interleave(draws).nonzero().flatten()
            if len(rows):
                labels[base, rows], asked = panel.vote(model, rows)
                self.evaluations[base].index_add_(0, pick[rows // draws], asked)
        return labels.view(-1, images, draws)


_ROWS, _NUMBERS = 1000, 2**24
"""Noisy images that are held at a time: enough to keep batches full when few of them need another member, within 64 MB."""


class Called(Classifier):
    """Any callable from images (b c h w) to labels (b), as something that votes."""

    def __init__(self, labels: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._labels = labels

    def predict(self, x: Tensor) -> Tensor:
        return self._labels(x)


def _streams(streams: Streams | None, x: Tensor) -> Streams:
    if streams is None:
        return Streams(0, "certify", ids=range(len(x)), device=x.device)
    if len(streams) != len(x):
        raise ValueError(f"streams have {len(streams)} rows for {len(x)} images")
    return streams
