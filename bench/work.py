"""What a worker does for a run: it makes a part, or measures a piece, and answers in files as the run folder holds them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from bench.costs import Probe, probe
from bench.evals import Evaluation, Piece, Subject
from bench.executors import Desk, Token, Told
from bench.partial import as_parquet
from bench.parts import DiskWorkshop, PartStore
from bench.pieces import measured
from bench.progress import Progress
from defenses.api import Classifier, Defense, Images, Part, Task, Weights
from defenses.ensemble import share

CHECKPOINT = 30.0
"""Seconds between two checkpoints that travel to the driver."""


@dataclass(frozen=True)
class Asked:
    """A subject without its model, which travels by itself.

    Attributes:
        model: the fitted model.
        defense: whose it is.
        sigma, seed: as of :class:`bench.evals.Subject`.
        others: models of other variants, by name.
    """

    model: Token
    defense: Defense
    sigma: float | None
    seed: int
    others: Mapping[str, Token]


def moved(task: Task, device: str) -> Task:
    """The task on another device."""
    images = {name: getattr(task, name).to(device) for name in ("train", "validation")}
    return replace(task, **images, test=task.test.to(device) if task.test else None)


class AwayStore(PartStore):
    """Parts in a folder of a worker, whose trainings tell the driver how far they are.

    Attributes:
        desk: the worker's.
    """

    def __init__(self, desk: Desk, task: Task) -> None:
        super().__init__(desk.folder, task, Progress(None))
        self.desk = desk

    def workshop(self, key: str, report: Any) -> DiskWorkshop:
        return AwayWorkshop(self, self.folder / f"{key}.checkpoint", self._tell)

    def _tell(self, done: int, total: int, facts: dict[str, float]) -> None:
        self.desk.tell(Told(done, total, dict(facts)))


class AwayWorkshop(DiskWorkshop):
    """A workshop whose checkpoints go to the driver, now and then."""

    _sent = 0.0

    def save(self, weights: Weights, state: dict[str, Any]) -> None:
        super().save(weights, state)
        now = time.monotonic()
        self._sent = self._sent or now  # the first seconds are soon done again
        if now - self._sent >= CHECKPOINT:
            self._sent = now
            self._store.desk.tell(Told(checkpoint=self._path.read_bytes()))  # type: ignore[attr-defined]


def make_part(desk: Desk, task: Token, part: Part, needs: Sequence[Token], checkpoint: bytes | None) -> tuple[bytes, bytes]:
    """Make a part from the files of its needs, or go on from its checkpoint; its safetensors file and its log."""
    here: Task = desk.fetch(task, partial(moved, device=desk.device))
    key = part.key(here)
    for need, token in zip(part.needs, needs, strict=True):
        (desk.folder / f"{need.key(here)}.safetensors").write_bytes(desk.fetch(token))
    if checkpoint:
        (desk.folder / f"{key}.checkpoint").write_bytes(checkpoint)
    AwayStore(desk, here).get(part)
    return (desk.folder / f"{key}.safetensors").read_bytes(), (desk.folder / f"{key}.json").read_bytes()


def measure(  # noqa: PLR0913, PLR0917 (what a piece depends on)
    desk: Desk,
    task: Token,
    test: Token,
    evaluation: Evaluation,
    asked: Sequence[Asked],
    piece: Piece,
    most: int | None,
) -> list[bytes]:
    """Measure a piece for every subject, at most so many images at a time: a Parquet file each."""

    def model(token: Token) -> Classifier:
        found: Classifier = desk.fetch(token, lambda model: model.to(desk.device).eval())
        return found

    here: Task = desk.fetch(task, partial(moved, device=desk.device))
    images: Images = desk.fetch(test, lambda images: images.to(desk.device))
    models = share([model(own.model) for own in asked])
    subjects = [
        Subject(
            one,
            own.sigma,
            own.seed,
            scratch=desk.folder / str(place),
            views=cache(partial(own.defense.views, one, here)),
            other=lambda spec, others=own.others: model(others[spec]),  # type: ignore[misc]
        )
        for place, (one, own) in enumerate(zip(models, asked, strict=True))
    ]
    return [as_parquet(rows) for rows in measured(evaluation, subjects, images.take(piece.rows), piece, most)]


def probed(desk: Desk, task: Token, parts: Sequence[Part]) -> Probe:
    """Time the task's network and trainings on this worker's device."""
    return probe(desk.fetch(task, partial(moved, device=desk.device)), parts)
