"""Votes of base classifiers on noisy copies of images: noise keyed by image and draw, networks asked in full batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from attacks.streams import Streams
from defenses.api import Classifier
from defenses.ensemble import Panel

BLOCK = 100
"""Noise draws of an image that come from one generator."""

Base = Classifier | Callable[[Tensor], Tensor]


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
        for pick, _, labels in self.ballots(streams, wanted, (0, n)):
            classes = max(counts[0].shape[1], int(labels.max()) + 1)
            for base, own in enumerate(labels):
                wider = torch.nn.functional.pad(counts[base], (0, classes - counts[base].shape[1]))
                flat = (pick.unsqueeze(1) * classes + own)[own >= 0]
                counts[base] = wider + torch.bincount(flat, minlength=wider.numel()).view_as(wider)
        return counts

    def ballots(self, streams: Streams, wanted: Tensor, span: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Votes on noise draws span[0] to span[1], in pieces of bounded memory.

        Args:
            streams: a row an image.
            wanted: bool (bases, images), who votes on which images.
            span: first draw, and the one after the last.

        Yields:
            image rows (p) and numbers (p) of their blocks; labels (bases, p, draws) with -1 where a base was not wanted. Blocks
            of all images and of the whole span fill a piece together, so that networks see full batches however few images
            are left.
        """
        first, last = span
        rows = wanted.any(0).nonzero().flatten().tolist()
        # A block of noise comes from one generator; only the ends of the span may use a part of theirs.
        shares: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for block in range(first // BLOCK, -(-last // BLOCK)):
            own = max(first - block * BLOCK, 0), min(last - block * BLOCK, BLOCK)
            shares.setdefault(own, []).extend((row, block) for row in rows)
        packed = max(1, min(_ROWS, _NUMBERS // self.x[0].numel()) // BLOCK, self.batch // BLOCK)
        most = max((len(blocks) for blocks in shares.values()), default=0)
        buffer = torch.empty(min(packed, most), BLOCK, *self.x.shape[1:], device=self.x.device)
        for own, blocks in shares.items():
            for start in range(0, len(blocks), packed):
                pack = blocks[start : start + packed]
                pick = torch.tensor([row for row, _ in pack], device=self.x.device)
                with torch.inference_mode():
                    noisy = buffer[: len(pack)]
                    for place, (row, block) in zip(noisy, pack, strict=True):
                        place.normal_(generator=streams.one(row, block)).mul_(self.sigma).add_(self.x[row])
                    labels = self._vote(noisy[:, slice(*own)], pick, wanted[:, pick])
                yield pick, torch.tensor([block for _, block in pack], device=self.x.device), labels

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
