"""The nouns that every defense is written in: classifiers, images, tasks, parts, and the defense itself."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from attacks.guided import View
from attacks.oracle import ContractError
from defenses.recipe import Recipe, settings

Weights = dict[str, Tensor]
"""What a part is: named tensors, a network's state or a few numbers."""


def decided(logits: Tensor) -> Tensor:
    """argmax over classes.

    Raises:
        ContractError: for NaN, whose argmax is an arbitrary class that could even be certified.
    """
    if logits.isnan().any():
        raise ContractError(
            f"the model returned NaN, in {int(logits.isnan().any(-1).sum())} of {logits[..., 0].numel()} answers"
        )
    return logits.argmax(-1)


class Classifier(nn.Module):
    """Images (n c h w) in [0,1] -> logits (n k). Channel normalisation happens inside (methods G1).

    ``forward`` is what an attacker may differentiate; it returns logits or log-probabilities, never probabilities (G2).
    ``predict`` is the decision that is scored. ``randomized`` says that ``forward`` itself draws noise.
    """

    randomized: bool = False

    @property
    def members(self) -> Sequence[Classifier]:
        """The networks inside; a single network is its own only member."""
        return [self]

    def predict(self, x: Tensor) -> Tensor:
        """Labels (n) for images (n c h w)."""
        return decided(self(x))


@dataclass(frozen=True)
class Images:
    """A set of labelled images on one device.

    Attributes:
        pixels: uint8 (n c h w), 0 to 255.
        labels: int64 (n).
        ids: int64 (n), the position in the stored order, unique within the data set's split; randomness is keyed by it.
        source: where they came from, in words a record can show.
    """

    pixels: Tensor
    labels: Tensor
    ids: Tensor
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        c, h, w = self.pixels.shape[1:]
        return c, h, w

    @cached_property
    def hash(self) -> str:
        """sha256 over shape, pixels, labels and ids."""
        digest = hashlib.sha256(repr(tuple(self.pixels.shape)).encode())
        for tensor in (self.pixels, self.labels, self.ids):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    def take(self, rows: Tensor | slice) -> Images:
        """Some of the images, as images."""
        return Images(self.pixels[rows], self.labels[rows], self.ids[rows], self.source)

    def first(self, count: int) -> Images:
        """The first ``count`` images.

        Raises:
            ValueError: if there are fewer.
        """
        if count > len(self):
            raise ValueError(f"{count} images asked for, {self.source} has {len(self)}")
        return self.take(slice(0, count))

    def floats(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Pixels as float32 in [0,1]."""
        return self.pixels[rows].float().div_(255)

    def to(self, device: str | torch.device) -> Images:
        """The same images on another device."""
        return Images(self.pixels.to(device), self.labels.to(device), self.ids.to(device), self.source)


@dataclass(frozen=True)
class Task:
    """What a defense is fitted to: data, normalisation, network and recipe. The suite and its budget decide them.

    Attributes:
        recipe: training of every network whose role has none of its own.
        roles: recipes by the role of the part, e.g. "teacher", where a protocol trains its networks differently.
        test: the test images, None but in suites that reproduce protocols which tune on them. No part depends on them unless
            its identity says so.
    """

    dataset: str
    train: Images
    validation: Images
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    architecture: str
    recipe: Recipe
    roles: Mapping[str, Recipe] = field(default_factory=dict)
    test: Images | None = None

    def recipe_for(self, role: str) -> Recipe:
        """How the networks of a role are trained."""
        return self.roles.get(role, self.recipe)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.train.shape

    @property
    def device(self) -> torch.device:
        return self.train.pixels.device

    def identity(self) -> dict[str, Any]:
        """Everything of the task that a trained part depends on, as JSON data."""
        return {
            "dataset": self.dataset,
            "train": self.train.hash,
            "validation": self.validation.hash,
            "classes": self.classes,
            "mean": list(self.mean),
            "std": list(self.std),
        }


class Workshop(Protocol):
    """What a part is given while it is made: a place for checkpoints and an ear for progress."""

    def load(self) -> tuple[Weights, dict[str, Any]] | None:
        """The last checkpoint of this part, if there is one."""

    def save(self, weights: Weights, state: dict[str, Any]) -> None:
        """Keep a checkpoint, atomically."""

    def report(self, done: int, total: int, facts: dict[str, float]) -> None:
        """Tell of progress in steps of the part's own kind."""


@dataclass(frozen=True, kw_only=True)
class Part(ABC):
    """Something that is made once and shared by whoever needs it: a trained network, learned weights.

    Attributes:
        role: what it is for, e.g. "teacher"; together with seed and member it keys all randomness of its making.
        seed: training seed.
        member: index among parts of the same role.
        needs: other parts that must exist first.
    """

    role: str
    seed: int
    member: int = 0
    needs: tuple[Part, ...] = ()

    version: ClassVar[int] = 1
    """Raised when the making changes what comes out."""

    @abstractmethod
    def make(self, task: Task, needs: Sequence[Weights], workshop: Workshop) -> Weights:
        """Make it, from the weights of ``needs`` in their order."""

    def outline(self, task: Task) -> Weights | None:
        """Tensors of the names and shapes that come out, before it is made; None if that cannot be told.

        With them a defense can be asked what else it needs, while nothing is trained yet.
        """
        return None

    def identity(self, task: Task) -> dict[str, Any]:
        """Everything that decides the result, as JSON data; its hash is the part's key."""
        own = {name: _plain(value) for name, value in settings(self).items() if name != "needs"}
        return {
            **_kind(self),
            "version": self.version,
            "fields": own,
            "needs": [need.key(task) for need in self.needs],
            "task": task.identity(),
        }

    def key(self, task: Task) -> str:
        """Content key, 16 hexadecimal digits."""
        text = json.dumps(self.identity(task), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _kind(value: Any) -> dict[str, str]:
    """What a value is an instance of; with the hash of the user's file that the class is in, as no version tells of edits."""
    found = {"kind": type(value).__name__}
    return {**found, "file_hash": value.__file_hash__} if hasattr(value, "__file_hash__") else found


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {**_kind(value), **{name: _plain(own) for name, own in settings(value).items()}}
    return list(value) if isinstance(value, tuple) else value


class Parts(Protocol):
    """Where a defense gets its parts: made on first request, read from disk afterwards."""

    def get(self, part: Part) -> Weights:
        """The weights of a part on the task's device."""


@dataclass(frozen=True, kw_only=True)
class Defense(ABC):
    """A way to obtain a classifier; fields are its hyper-parameters, with units in their documentation.

    An instance at the top level of a module registers itself under its variable's name. A file a user hands in needs no more.
    """

    unsound: ClassVar[str] = ""
    """Why its numbers must not be trusted, if they exist for comparison only; a finding in every record."""

    @abstractmethod
    def build(self, task: Task) -> Classifier:
        """The untrained model, on the task's device."""

    @abstractmethod
    def fit(self, model: Classifier, task: Task, parts: Parts, seed: int) -> None:
        """Load trained weights into ``model``, taking every expensive piece from ``parts``."""

    def unsuited(self, task: Task) -> str:
        """Why the method makes no sense on this task, in words; empty if it does."""
        return ""

    def views(self, model: Classifier, task: Task) -> Mapping[str, View] | None:
        """What an adaptive attacker differentiates instead of the fitted model, by name.

        :func:`defenses.views.views` has those that suit most. None: nobody has thought about it, and records call the defense
        unreviewed.
        """
        return None

    def facts(self, model: Classifier) -> dict[str, float]:
        """Numbers of the fitted model worth showing, e.g. how far learned weights are from uniform."""
        return {}


class Wrapped(Classifier):
    """Any module from images in [0,1] to logits, as a classifier."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


@dataclass(frozen=True, kw_only=True)
class Pretrained(Defense):
    """A finished model of somebody: ``load()`` returns a module from images in [0,1] to logits (n k)."""

    load: Callable[[], nn.Module] = field(repr=False)

    def build(self, task: Task) -> Classifier:
        module = self.load()
        model = module if isinstance(module, Classifier) else Wrapped(module)
        return model.to(task.device).eval()

    def fit(self, model: Classifier, task: Task, parts: Parts, seed: int) -> None:
        """Nothing to fit."""
