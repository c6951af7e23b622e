"""What stored records were made from, kept at hand: data sets, variants, and models of stored parts.

Nothing is trained, downloaded or written: what is not there makes a check impossible, and the reason is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load

from bench.datasets import DATASETS, DataError
from bench.evals import Skipped, Subject
from bench.jobs import Fitted, Job
from bench.parts import PartStore
from bench.progress import Progress
from bench.registry import Variant, from_file, variant_of
from bench.store import Record
from bench.tasks import splits
from defenses.api import Images, Part, Task, Weights
from defenses.recipe import Recipe

if TYPE_CHECKING:
    from bench.restore import Case

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
        here = f"the defense {label!r} is not registered here"
        if ".py" in label:
            raise Impossible(here)
        try:
            mine = self._file is not None and re.split(r"\W", label)[0] in from_file(self._file)
            return variant_of(f"{self._file}:{label}" if mine else label)
        except ValueError as error:
            raise Impossible(here) from error

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
