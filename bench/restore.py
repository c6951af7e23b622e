"""What a stored record was made from, rebuilt out of the record alone: question, defense, images, networks from stored parts.

Nothing is trained, downloaded or written: what is not there makes a check impossible, and the reason is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load

from bench.datasets import DATASETS, DataError
from bench.evals import KINDS, Evaluation, Skipped, Subject
from bench.jobs import ITSELF, Fitted, Job, weights_hash
from bench.parts import PartStore
from bench.plugins import attack_classes
from bench.progress import Progress
from bench.registry import RegistryError, Variant, from_file, resolve
from bench.store import EXAMPLES, Record
from bench.tasks import splits
from defenses.api import Classifier, Images, Part, Task, Weights
from defenses.recipe import Recipe

T = TypeVar("T")

_RECIPE = TypeAdapter(Recipe)


class Impossible(Exception):
    """A check cannot be made; the text says why."""


class StoredParts(PartStore):
    """Parts that are only read: one that is not there is not made, and a damaged one stays where it is."""

    def _get(self, part: Part) -> Weights:
        path = self.folder / f"{part.key(self.task)}.safetensors"
        if not (path.is_file() and path.with_suffix(".json").is_file()):
            raise Impossible(f"no weights: {part.role} {part.member} is not in {self.folder}")
        try:
            weights = load(path.read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return {name: tensor.to(self.task.device) for name, tensor in weights.items()}


class Stock:
    """Images, tasks and fitted models, each kept as long as records that follow each other need the same.

    Args:
        data: folder of data sets; the environment's BENCH_DATA by default.
        file: a user's file in which defenses are looked for before the registered ones.
    """

    def __init__(self, data: Path | None = None, file: Path | None = None) -> None:
        self._data = data
        self._file = file
        self._kept: dict[str, tuple[str, Any]] = {}

    def task(self, record: Record, device: str) -> tuple[Task, Images]:
        """What the record's defense was fitted to, and all test images.

        Raises:
            Impossible: if the data set is not at hand.
            ValueError: if it has fewer images than the record says.
        """
        return self._keep("task", json.dumps([record.task, device], sort_keys=True), lambda: self._task(record, device))

    def _task(self, record: Record, device: str) -> tuple[Task, Images]:
        train, validation, test = self.splits(record, device)
        return bare(record, train.first(record.task["train_images"]), validation, test), test

    def splits(self, record: Record, device: str) -> tuple[Images, Images, Images]:
        """All images that could train, those held out, and all that test.

        Raises:
            Impossible: if the data set is not at hand.
        """
        place = (record.task["dataset"], int(record.task["validation_images"]), device)
        try:
            return self._keep("images", repr(place), lambda: splits(*place, self._data, download=False))
        except DataError as error:
            raise Impossible(f"no data: {error}") from error

    def tasks(self, folder: Path) -> list[dict[str, Any]]:
        """What the notes beside parts say of the images that those were made from; notes that cannot be read say nothing."""
        return self._keep("tasks", str(folder), lambda: list(_noted(folder)))

    def variant(self, label: str) -> Variant:
        """The variant of a label: of the user's file, or registered.

        Raises:
            Impossible: if there is none. A record never says which file to execute.
        """
        try:
            mine = self._file is not None and re.split(r"\W", label)[0] in from_file(self._file)
            (variant,) = [] if ".py" in label else resolve(f"{self._file}:{label}" if mine else label, {})
        except (RegistryError, ValueError) as error:
            raise Impossible(f"the defense {label!r} is not registered here") from error
        return variant

    def fitted(self, case: Case) -> Subject:
        """The fitted model of a record.

        Raises:
            Impossible: if a part of it is not stored.
            Exception: whatever goes wrong with what is stored.
        """
        folder = case.parts
        key = json.dumps([str(folder), case.record.task, case.device, case.variant.label, case.record.seed], sort_keys=True)
        return self._keep("model", key, lambda: self._fitted(case, folder))

    def _fitted(self, case: Case, folder: Path) -> Subject:
        fitted = Fitted(case.task, folder, Progress(None), [], StoredParts)
        (found,) = fitted.take([Job(case.variant, case.evaluation, case.record)])
        if isinstance(found, Skipped | OSError):  # such as a pretrained model whose file is somewhere else
            raise Impossible(f"no weights: {found}") from found
        if isinstance(found, Exception):
            raise found
        return found

    def _keep(self, what: str, key: str, make: Callable[[], T]) -> T:
        """What was made last under the same key, or made now."""
        if what not in self._kept or self._kept[what][0] != key:
            self._kept[what] = (key, make())
        kept: T = self._kept[what][1]
        return kept


def _noted(folder: Path) -> Iterator[dict[str, Any]]:
    """The task in every note that can be read."""
    for path in sorted(folder.glob("*.json")):
        with suppress(ValueError, KeyError, TypeError):
            yield dict(json.loads(path.read_bytes())["part"]["task"])


def bare(record: Record, train: Images, validation: Images, test: Images) -> Task:
    """The record's task with some images."""
    facts, asked = DATASETS[record.task["dataset"]], record.task
    return Task(
        dataset=asked["dataset"],
        train=train,
        validation=validation,
        classes=facts.classes,
        mean=facts.mean,
        std=facts.std,
        architecture=asked["architecture"],
        recipe=_RECIPE.validate_python(asked["recipe"]),
        roles={role: _RECIPE.validate_python(own) for role, own in asked.get("roles", {}).items()},
        test=test,  # only unsound defenses look at them, and the parts of others do not depend on them
    )


class Case:
    """A finished record, and what it is held against, made when first asked for.

    Every property raises :class:`Impossible` where it cannot be had.

    Attributes:
        path, record: the record and where it lies.
        sample: how many images are certified anew.
    """

    def __init__(self, path: Path, record: Record, stock: Stock, sample: int) -> None:
        self.path, self.record, self.sample = path, record, sample
        self._stock = stock

    @cached_property
    def evaluation(self) -> Evaluation:
        """The question; its recorded fields name everything that numbers depend on."""
        fields = self.record.eval.get("fields", {})
        kind = KINDS.get(fields.get("kind"))
        if kind is None:
            raise Impossible(f"this version knows no evaluation of kind {fields.get('kind')!r}")
        try:  # beside the evaluation's own fields stand the settings of the attack that nobody gave
            return kind.model_validate({name: value for name, value in fields.items() if name in kind.model_fields})
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise Impossible(f"this version refuses its eval.fields.{where}: {error.errors()[0]['msg']}") from error

    @property
    def attack_known(self) -> bool:
        """Whether the record's attack, if it has one, is known here."""
        return getattr(self.evaluation, "attack", None) in {None, *attack_classes()}

    @cached_property
    def variant(self) -> Variant:
        """The defense, by its label."""
        return self._stock.variant(self.record.defense["variant"])

    @cached_property
    def outline(self) -> Subject:
        """The subject without its weights, as far as numbers depend on it: members, noise and seed. Needs no data."""
        shape = DATASETS[self.record.task["dataset"]].shape
        nobody = torch.empty(0, dtype=torch.int64)
        none = Images(torch.empty(0, *shape, dtype=torch.uint8), nobody, nobody, "none")
        try:
            model = self.variant.defense.build(bare(self.record, none, none, none))
        except (Impossible, OSError):  # somebody's own defense, or one whose file is somewhere else
            model = _Members(self.record.members)
        return Subject(model, self.record.defense["fields"].get("sigma"), self.record.seed)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """Rows per image."""
        return self._table(".parquet")

    @cached_property
    def examples(self) -> pd.DataFrame:
        """Adversarial examples: id, eps, x_adv."""
        return self._table(EXAMPLES)

    def _table(self, ending: str) -> pd.DataFrame:
        path = self.path.with_suffix(ending)
        if not path.is_file():
            raise Impossible(f"there is no {path.name} beside the record")
        return pd.read_parquet(path)

    @property
    def parts(self) -> Path:
        """Where the networks of its run are."""
        return self.path.absolute().parents[3] / "parts"

    @property
    def device(self) -> str:
        """Where it was measured, if there is such a device here."""
        kind = str(self.record.numerics.get("rng", "torch-cpu")).removeprefix("torch-")
        return kind if kind == "cuda" and torch.cuda.is_available() else "cpu"

    @property
    def task(self) -> Task:
        """What the defense was fitted to."""
        return self._stock.task(self.record, self.device)[0]

    @property
    def trainable(self) -> int:
        """How many images could have trained."""
        return len(self._stock.splits(self.record, self.device)[0])

    @cached_property
    def images(self) -> Images:
        """The test images that were asked for."""
        return self._stock.task(self.record, self.device)[1].first(self.evaluation.images)

    @cached_property
    def held_out(self) -> set[str]:
        """Hashes that the validation images may have: the record's, or, as older ones have none, those that the notes of parts
        have that were made from its training images; empty if nobody tells."""
        hashes = self.record.hashes
        if "validation" in hashes:
            return {hashes["validation"]}
        tasks = self._stock.tasks(self.parts)
        return {str(own.get("validation")) for own in tasks if own.get("train") == hashes.get("train")}

    @cached_property
    def known(self) -> Images:
        """The test images, if they are the ones that were measured."""
        if self.images.hash != self.record.hashes.get("images"):
            raise Impossible("the test images here are not those of the record")
        return self.images

    @cached_property
    def fitted(self) -> Subject:
        """The model of the stored parts."""
        if self.task.train.hash != self.record.hashes.get("train"):
            raise Impossible("the training images here are not those of the record, and so no weights are")
        if self.held_out and self.task.validation.hash not in self.held_out:
            raise Impossible("the validation images here are not those of the record, and so no weights are")
        return self._stock.fitted(self)

    @cached_property
    def own(self) -> Subject:
        """The model of the stored parts, if its weights are the record's."""
        if weights_hash(self.fitted.model) != self.record.hashes.get("weights"):
            raise Impossible("the weights here are not those of the record")
        return self.fitted

    @cached_property
    def subject(self) -> Subject:
        """The model that was measured: the stored one, if decisions can be repeated."""
        own = self.own
        made = str(self.record.numerics.get("rng", "torch-cpu"))
        if made != f"torch-{self.device}":
            raise Impossible(f"measured with {made}; decisions and noise here, on {self.device}, may be others")
        return own

    def other(self, spec: str) -> Classifier:
        """The model of another variant whose images attacked this one, of its stored parts."""
        if spec != ITSELF:
            self._stock.variant(spec)
        assert self.fitted.other is not None
        try:
            return self.fitted.other(spec)
        except RuntimeError as error:
            raise error.__cause__ or error from error


class _Members(Classifier):
    """So many networks, of which nothing else is known."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    @property
    def members(self) -> Sequence[Classifier]:
        return [Classifier() for _ in range(self.count)]
