"""Randomised smoothing (Cohen, Rosenfeld & Kolter 2019): the smoothed classifier, CERTIFY and PREDICT.

Differences from the released code: votes are counted on the device, random numbers are keyed by image and draw so that no
result depends on packing, several estimators, and radii in full precision. Noise is added in float32 and never clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attacks.oracle import Oracle
from attacks.streams import Draws, Streams
from defenses.api import Classifier
from defenses.bounds import lower, radius, two_sided
from defenses.estimators import ESTIMATORS, Question, Tally
from defenses.voting import BLOCK, Base, Voting, count_votes

POOLED = "pooled (unsound)"
"""Label of the certificate that counts every member's vote as a draw of its own, as released ensemble code does. The votes of
members on one noise draw depend on each other, so the bound fails more often than alpha, and what it certifies is a random
member, not the ensemble (methods 3.4). For comparison only."""


@dataclass(frozen=True)
class Certificates:
    """One row per image.

    Attributes:
        label: int64 (n), the certified class, -1 where the answer is to abstain.
        radius: float64 (n), l2 radius in pixel space, 0 where abstained.
        count: int64 (n), votes for the selected class among the draws of the last trial.
        draws: int64 (n), noise draws spent on the estimate (selection not counted).
        evaluations: int64 (n), networks asked, selection counted: at most (n0 + draws) times the members, fewer where a vote
            was settled before all of them had answered. Answers shared with other classifiers count for each.
        chance: float64 (n), a number of U[0, 1] drawn before the votes; the "randomised" estimator uses it.
        estimator: how counts became radii.
        question: sigma, alpha, n and radii.
    """

    label: Tensor
    radius: Tensor
    count: Tensor
    draws: Tensor
    evaluations: Tensor
    chance: Tensor
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
        return self.base(x + self.sigma * self.normal_like(x))

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
    labels: Tensor | None = None,
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
        estimator: a name of :data:`defenses.estimators.ESTIMATORS`, or :data:`POOLED`.
        radii: increasing radii to decide; one for an estimator that decides one, none for whole radii.
        labels: int64 (n), true classes, if wrong images may be left alone: an image whose selected class is wrong gets no
            draws and abstains, which changes no certified accuracy and no ACR.
        streams: randomness, a row an image; seed 0 and ids 0, 1, ... by default.
        batch: noisy images per forward pass; no result depends on it.

    Raises:
        ValueError: for an unknown estimator, an empty grid where one is needed, or parameters out of range.
    """
    question = Question(sigma, alpha, n, tuple(radii))
    return certify_together([base], x, question, n0=n0, estimator=estimator, labels=labels, streams=streams, batch=batch)[0]


def certify_together(  # noqa: PLR0913 (as certify)
    bases: Sequence[Base],
    x: Tensor,
    question: Question,
    *,
    n0: int = 100,
    estimator: str = "fixed",
    labels: Tensor | None = None,
    streams: Streams | None = None,
    batch: int = BLOCK,
) -> list[Certificates]:
    """:func:`certify` for several base classifiers under the same noise: one certificate set each, as if certified alone.

    Networks that the classifiers have in common (see :func:`defenses.ensemble.share`) answer once per noise draw, and noise is
    drawn once for all. Each certificate holds with its own probability 1 - alpha; they are not independent of each other.
    """
    if n0 < 1 or batch < 1:
        raise ValueError(f"certification needs n0 >= 1 and batch >= 1, got n0={n0}, batch={batch}")
    streams = _streams(streams, x)
    if estimator == POOLED:
        return [_pooled(base, x, question, n0, streams, batch) for base in bases]
    rule = ESTIMATORS.get(estimator)
    if rule is None:
        raise ValueError(f"unknown estimator {estimator!r}; known are {', '.join([*ESTIMATORS, POOLED])}")
    rule.check(question)
    voting = Voting(bases, x, question.sigma, batch)
    chance = streams.child("chance").uniform((1,))[:, 0].double().cpu().numpy()
    chances = np.broadcast_to(chance, (len(bases), len(x)))
    draws, bound, going = (np.zeros(chances.shape, kind) for kind in (np.int64, np.float64, bool))
    going[:] = True
    chosen = torch.zeros(chances.shape, dtype=torch.int64, device=x.device)
    count = torch.zeros_like(chosen)
    for trial, looks in enumerate(rule.trials(question)):
        own = streams.child("trial", trial) if trial else streams
        wanted = torch.from_numpy(going).to(x.device)
        selected = torch.stack([votes.argmax(1) for votes in voting.count(own.child("selection"), n0, wanted)])
        chosen, count = torch.where(wanted, selected, chosen), count.masked_fill(wanted, 0)
        if labels is not None:
            going &= (chosen == labels).cpu().numpy()
        before = 0
        for index, now in enumerate(looks):
            if not going.any():
                break
            for pick, _, votes in voting.ballots(own.child("estimation"), torch.from_numpy(going).to(x.device), (before, now)):
                count.index_add_(1, pick, (votes == chosen[:, pick].unsqueeze(2)).sum(2))
            draws[going] += now - before
            tally = Tally(count.cpu().numpy()[going].astype(float), bound[going], chances[going])
            bound[going], finished = rule.look(question, trial, index, tally)
            going[going] = ~finished
            before = now
    found = torch.from_numpy(rule.radius(question, bound.ravel()).reshape(bound.shape)).to(x.device)
    abstain = found.isnan() | (torch.from_numpy(draws).to(x.device) == 0)  # without draws nothing is proven
    label, radii, spent = chosen.masked_fill(abstain, -1), found.masked_fill(abstain, 0.0), torch.from_numpy(draws).to(x.device)
    coins = torch.tensor(chances, device=x.device)
    return [
        Certificates(label[i], radii[i], count[i], spent[i], voting.evaluations[i], coins[i], estimator, question)
        for i in range(len(bases))
    ]


def _pooled(base: Base, x: Tensor, question: Question, n0: int, streams: Streams, batch: int) -> Certificates:
    """The certificate :data:`POOLED`: class and bound from the votes of all members together, as if they were M n draws."""
    members = list(base.members) if isinstance(base, Classifier) else [base]
    voting = Voting(members, x, question.sigma, batch)

    def pool(name: str, n: int) -> Tensor:
        votes = voting.count(streams.child(name), n)
        classes = max(own.shape[1] for own in votes)
        return sum(torch.nn.functional.pad(own, (0, classes - own.shape[1])) for own in votes)  # type: ignore[return-value]

    chosen, votes = pool("selection", n0).argmax(1), pool("estimation", question.n)
    known = chosen < votes.shape[1]
    count = torch.where(known, votes.gather(1, (chosen * known).unsqueeze(1))[:, 0], 0)
    bound = lower(count.cpu().numpy(), len(members) * question.n, question.alpha)
    found = torch.from_numpy(np.where(bound < 0.5, np.nan, radius(np.maximum(bound, 0.5), question.sigma))).to(x.device)
    abstain, spent = found.isnan(), torch.full_like(count, question.n)
    label, radii = chosen.masked_fill(abstain, -1), found.masked_fill(abstain, 0.0)
    asked = voting.evaluations.sum(0)
    return Certificates(label, radii, count, spent, asked, torch.ones_like(found), POOLED, question)


def _streams(streams: Streams | None, x: Tensor) -> Streams:
    if streams is None:
        return Streams(0, "certify", ids=range(len(x)), device=x.device)
    if len(streams) != len(x):
        raise ValueError(f"streams have {len(streams)} rows for {len(x)} images")
    return streams
