"""The one ensemble class, and the panel that lets several classifiers share their networks' answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attacks.oracle import Oracle
from defenses.api import Classifier, decided
from defenses.combine import Rule
from defenses.nets import Network
from defenses.together import run


class Ensemble(Classifier):
    """Members that see the same image, combined by a :class:`~defenses.combine.Rule` into log-probabilities (n k)."""

    def __init__(self, members: Sequence[Classifier], rule: Rule) -> None:
        super().__init__()
        self.networks = nn.ModuleList(members)
        self.rule = rule

    @property
    def members(self) -> Sequence[Classifier]:
        return list(self.networks)  # type: ignore[arg-type]

    def member_logits(self, x: Tensor) -> Tensor:
        """Logits of every member: (m n k)."""
        return run(self.members, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self.member_logits(x))

    def predict(self, x: Tensor) -> Tensor:
        logits = self.member_logits(x)
        decided(logits)  # a NaN of one member must not vanish in the vote
        return self.rule.decide(logits)


class Panel:
    """A batch of images and what networks said about it: a network is asked about an image once, whoever wants to know.

    Args:
        x: images (n c h w).
        batch: images per forward pass.
    """

    def __init__(self, x: Tensor, batch: int) -> None:
        self.x = x
        self._batch = batch
        self._answers: dict[Classifier, tuple[Tensor, Tensor]] = {}

    def logits(self, network: Classifier, rows: Tensor) -> Tensor:
        """The network's logits (r k) for images number ``rows``."""
        known, answers = self._answers.get(network, (None, None))
        new = rows if known is None else rows[~known[rows]]
        if len(new):
            ask = Oracle(network)
            found = torch.cat([ask(self.x[piece], piece) for piece in new.split(self._batch)])
            if known is None or answers is None:
                known = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)
                answers = found.new_empty(len(self.x), found.shape[1])
                self._answers[network] = known, answers
            known[new] = True
            answers[new] = found
        assert answers is not None, "nobody asks about no image"
        return answers[rows]

    def vote(self, model: Classifier, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``model.predict`` for images number ``rows``: labels (r), and how many networks each image needed (r).

        Ensembles are taken apart, and where a decision is the argmax of logits these are shared; a class that decides in its
        own way is asked as a whole.
        """
        asked = torch.zeros(len(rows), dtype=torch.int64, device=self.x.device)
        if type(model) is Ensemble:
            ensemble: Ensemble = model

            def ask(member: int, some: Tensor) -> Tensor:
                asked[some] += 1
                return self.logits(ensemble.members[member], rows[some])

            return ensemble.rule.elect(ask, len(ensemble.members), len(rows), self.x.device), asked
        if type(model).predict is Classifier.predict:
            return self.logits(model, rows).argmax(-1), asked + len(model.members)
        ask_whole = Oracle(model.predict)
        labels = torch.cat([ask_whole(self.x[piece], piece) for piece in rows.split(self._batch)])
        return labels, asked + len(model.members)


def share(models: Sequence[Classifier]) -> list[Classifier]:
    """The same models, with equal networks replaced by one object, so that a :class:`Panel` asks it once for all of them."""
    pool: dict[tuple[str, str], Network] = {}

    def one(model: Classifier) -> Classifier:
        return pool.setdefault((model.architecture, _content(model)), model) if type(model) is Network else model

    for model in models:
        if isinstance(model, Ensemble):
            for place, member in enumerate(model.members):
                model.networks[place] = one(member)
    return [one(model) for model in models]


def in_common(one: Classifier, other: Classifier) -> list[str]:
    """Names of the weights of one classifier that the other has, too, wherever in it they are.

    Compared are single tensors: whole networks differ as soon as somebody puts them into a class of his own, or trains a new
    head on old layers. Weights that began alike and were trained apart have nothing in common. Buffers do not count, which hold
    what comes with an architecture, such as normalisations; nor can weights be found that are no parameters of a module.
    """
    found = _by_hash(other)
    return [name for key, (name, weights) in _by_hash(one).items() if key in found and len(weights.unique()) >= DISTINCT]


DISTINCT = 16
"""Different numbers of a tensor that is not the same by accident. Zeros, ones, identities, signs and what people write down
(deviations of channels, a blur, shares of members) have fewer; a layer that sees an image has more."""


def _by_hash(model: Classifier) -> dict[str, tuple[str, Tensor]]:
    """Names and values of all weights, by a hash of the values; shapes and double precision change nothing."""
    found = {}
    for weights, name in _weights(model).items():
        values = weights.detach().cpu().float().flatten()
        found[hashlib.sha256(values.numpy().tobytes()).hexdigest()] = name, values
    return found


def _weights(model: Classifier) -> dict[Tensor, str]:
    """The parameters of a classifier and of its members, which a class may keep where torch does not see them."""
    found: dict[Tensor, str] = {weights: name for name, weights in model.named_parameters()}
    for place, member in enumerate(model.members):
        if member is not model:
            found = {weights: f"members.{place}.{name}" for weights, name in _weights(member).items()} | found
    return found


def _content(net: nn.Module) -> str:
    digest = hashlib.sha256(repr(net).encode())  # layers without weights count, too
    for name, tensor in net.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
