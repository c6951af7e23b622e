"""Randomised smoothing (Cohen, Rosenfeld & Kolter 2019): the smoothed classifier, CERTIFY and PREDICT.

Differences from the released code: votes are counted on the device, random numbers are keyed by image and draw so that no
result depends on packing, several estimators, and radii in full precision. Noise is added in float32 and never clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attacks.api import Oracle
from attacks.streams import Draws, Streams
from defenses.api import Classifier
from defenses.bounds import ESTIMATORS, Question, two_sided

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
        estimator: how counts became radii.
        question: sigma, alpha, n and radii.
    """

    label: Tensor
    radius: Tensor
    count: Tensor
    draws: Tensor
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
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; known are {', '.join(ESTIMATORS)}")
    if estimator == "grid" and not radii:
        raise ValueError("the grid estimator needs radii")
    if n0 < 1 or batch < 1:
        raise ValueError(f"certification needs n0 >= 1 and batch >= 1, got n0={n0}, batch={batch}")
    if list(radii) != sorted(set(radii)) or not all(r >= 0 for r in radii):
        raise ValueError(f"radii must be non-negative and increasing, got {radii}")
    question, rule = Question(sigma, alpha, n, tuple(radii)), ESTIMATORS[estimator]
    streams = _streams(streams, x)
    chosen = count_votes(base, x, sigma, n0, streams.child("selection"), batch).argmax(1)

    estimation = streams.child("estimation")
    count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    draws, bound = np.zeros(len(x), np.int64), np.zeros(len(x))
    going, before = np.arange(len(x)), 0
    for index, now in enumerate(rule.looks(question)):
        rows = torch.from_numpy(going).to(x.device)
        for pick, labels in ballots(base, x, sigma, estimation, rows=going.tolist(), span=(before, now), batch=batch):
            count.index_add_(0, pick, (labels == chosen[pick].unsqueeze(1)).sum(1))
        draws[going] = now
        seen = count[rows].cpu().numpy().astype(float)
        bound[going], finished = rule.look(question, index, seen, bound[going])
        going, before = going[~finished], now
        if len(going) == 0:
            break
    found = torch.from_numpy(rule.radius(question, bound)).to(x.device)
    abstain = found.isnan()
    return Certificates(
        label=chosen.masked_fill(abstain, -1),
        radius=found.masked_fill(abstain, 0.0),
        count=count,
        draws=torch.from_numpy(draws).to(x.device),
        estimator=estimator,
        question=question,
    )


def count_votes(base: Base, x: Tensor, sigma: float, n: int, streams: Streams, batch: int = BLOCK) -> Tensor:
    """Votes for each class among n noise draws, int64 (images, classes); as many columns as classes were seen, at least two."""
    counts = torch.zeros(len(x), 2, dtype=torch.int64, device=x.device)
    for pick, labels in ballots(base, x, sigma, streams, rows=range(len(x)), span=(0, n), batch=batch):
        classes = max(counts.shape[1], int(labels.max()) + 1)
        counts = torch.nn.functional.pad(counts, (0, classes - counts.shape[1]))
        flat = (pick.unsqueeze(1) * classes + labels).flatten()
        counts += torch.bincount(flat, minlength=counts.numel()).view_as(counts)
    return counts


def ballots(  # noqa: PLR0913 (the certification loop's inner call)
    base: Base, x: Tensor, sigma: float, streams: Streams, *, rows: range | list[int], span: tuple[int, int], batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Votes of the base classifier on noise draws span[0] to span[1] of some images, in pieces of bounded memory.

    Yields:
        image rows (p), labels (p, draws): blocks of many images are packed into one forward pass where ``batch`` allows; a
        block larger than ``batch`` is voted on in pieces.
    """
    if isinstance(base, Classifier) and any(module.training for module in base.modules()):
        raise ValueError("the base classifier is in training mode: call eval() before it votes")
    vote = base.predict if isinstance(base, Classifier) else base
    ask = Oracle(vote)
    first, last = span
    blocks = range(first // BLOCK, -(-last // BLOCK))
    work = [(row, block) for block in blocks for row in rows]
    packed = max(1, batch // BLOCK)
    buffer = torch.empty(min(packed, len(work)), BLOCK, *x.shape[1:], device=x.device)
    start = 0
    while start < len(work):
        block = work[start][1]
        # Only blocks of the same number, and so of the same share in the span, are packed together.
        pack = [row for row, other in work[start : start + packed] if other == block]
        start += len(pack)
        own = slice(max(first - block * BLOCK, 0), min(last - block * BLOCK, BLOCK))
        with torch.inference_mode():
            noisy = buffer[: len(pack)]
            for place, row in zip(noisy, pack, strict=True):
                place.normal_(generator=streams.one(row, block)).mul_(sigma).add_(x[row])
            flat = noisy[:, own].flatten(0, 1)
            labels = torch.cat([ask(piece, torch.arange(len(piece))) for piece in flat.split(batch)])
        yield torch.tensor(pack, device=x.device), labels.view(len(pack), -1)


def _streams(streams: Streams | None, x: Tensor) -> Streams:
    if streams is None:
        return Streams(0, "certify", ids=range(len(x)), device=x.device)
    if len(streams) != len(x):
        raise ValueError(f"streams have {len(streams)} rows for {len(x)} images")
    return streams
