"""What a stored record was made from, rebuilt out of the record alone: question, defense, images, networks from stored parts.

Every check can be impossible: see :mod:`bench.stock`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from pydantic import ValidationError

from bench.datasets import DATASETS
from bench.evals import KINDS, Evaluation, Subject
from bench.jobs import ITSELF, weights_hash
from bench.plugins import attack_classes
from bench.registry import Variant
from bench.stock import Impossible, Stock, bare
from bench.store import EXAMPLES, Record
from defenses.api import Classifier, Images, Task


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
