"""Why ensembles certify more: the variance of the class margin under noise, and votes, of the first k members (Horvath et al.
2022, section 4).

For the mean logits of k members the margin's variance is (1 + zeta (k - 1)) / k of one member's, zeta the members' correlation
under noise. All numbers come from one pass of every member over the noise draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.oracle import Oracle
from attacks.streams import Streams
from defenses.api import Classifier
from defenses.voting import BLOCK


@dataclass(frozen=True)
class Prefixes:
    """What the first k of M members do, k = 1 to M, voting by mean logits.

    Attributes:
        label: int64 (M, images), class selected from ``n0`` draws.
        count: int64 (M, looks, images), votes for it among the first ``looks`` estimation draws.
        margin: float64 (M, images), mean over noise of logit A minus logit B: A the class all members together select, B the
            class with the next highest mean logit.
        variance: float64 (M, images), variance of that margin over noise.
        single: float64 (images), mean over members of the variance of one member's own margin.
        covariance: float64 (images), mean over pairs of members of the covariance of their margins.
    """

    label: Tensor
    count: Tensor
    margin: Tensor
    variance: Tensor
    single: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Noise:
    """How images are shown under noise.

    Attributes:
        sigma: standard deviation in pixels.
        looks: increasing numbers of estimation draws at which votes are counted.
        n0: draws to select the classes.
        batch: noisy images per forward pass.
    """

    sigma: float
    looks: tuple[int, ...]
    n0: int = 100
    batch: int = BLOCK


def prefixes(members: Sequence[Classifier], x: Tensor, noise: Noise, streams: Streams) -> Prefixes:
    """Votes and margins of the first k members under Gaussian noise, for all k.

    Args:
        members: at least two networks in eval mode.
        x: images (n c h w) in [0,1].
        noise: what they are shown under.
        streams: randomness, a row an image; the draws are those of :func:`defenses.smoothing.certify`.

    Raises:
        ValueError: for fewer than two members, or looks that do not increase.
    """
    looks = noise.looks
    if len(members) < 2 or list(looks) != sorted(set(looks)) or not looks or looks[0] < 1:
        raise ValueError(f"needs two members and increasing looks, got {len(members)} members and looks {looks}")
    found = [_image(members, x[row], noise, streams.take(torch.tensor([row]))) for row in range(len(x))]
    label, count, margin, variance, single, covariance = (torch.stack(column, -1) for column in zip(*found, strict=True))
    return Prefixes(label, count, margin, variance, single, covariance)


def _image(members: Sequence[Classifier], x: Tensor, noise: Noise, streams: Streams) -> tuple[Tensor, ...]:
    selection = torch.cat(list(_logits(members, x, noise, noise.n0, streams.child("selection"))), 1)
    k = torch.arange(1, len(members) + 1, device=x.device)
    votes = (selection.cumsum(0) / k.view(-1, 1, 1)).argmax(-1)
    chosen = torch.nn.functional.one_hot(votes, selection.shape[-1]).sum(1).argmax(-1)
    scores = selection.mean((0, 1))
    first = chosen[-1]
    second = scores.index_fill(0, first, -torch.inf).argmax()
    margins, agree = [], []
    for logits in _logits(members, x, noise, noise.looks[-1], streams.child("estimation")):
        margins.append((logits[..., first] - logits[..., second]).double())
        agree.append((logits.cumsum(0) / k.view(-1, 1, 1)).argmax(-1) == chosen.unsqueeze(1))
    count = torch.cat(agree, 1).cumsum(1)[:, torch.tensor(noise.looks, device=x.device) - 1]
    own = torch.cat(margins, 1)
    covariance = own.cov()
    total = covariance.cumsum(0).cumsum(1).diagonal() / k**2
    single = covariance.diagonal().mean()
    shared = (covariance.sum() - covariance.diagonal().sum()) / (len(members) * (len(members) - 1))
    return chosen, count, own.mean(1).cumsum(0) / k, total, single, shared


def _logits(members: Sequence[Classifier], x: Tensor, noise: Noise, n: int, streams: Streams) -> Iterator[Tensor]:
    """Logits of every member (m draws k) on n noise draws of one image, a block at a time."""
    asks = [Oracle(member) for member in members]
    for start in range(0, n, BLOCK):
        drawn = torch.empty(BLOCK, *x.shape, device=x.device).normal_(generator=streams.one(0, start // BLOCK))
        noisy = drawn.mul_(noise.sigma).add_(x)[: n - start]
        with torch.inference_mode():
            yield torch.stack([torch.cat([ask(p, torch.arange(len(p))) for p in noisy.split(noise.batch)]) for ask in asks])
