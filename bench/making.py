"""Which parts a run lacks, in the order of their needs: found by asking defenses, made by workers, kept in the run folder."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bench.outlook import absent
from bench.partial import write_atomic
from bench.parts import PartStore
from bench.progress import Progress
from bench.registry import Variant
from defenses.api import Part, Task, Weights


@dataclass
class Model:
    """A variant and training seed, and the keys of parts that it waits for; settled when it can be fitted, or never will."""

    variant: Variant
    seed: int
    waits: set[str] = field(default_factory=set)
    settled: bool = False


class Gathered(PartStore):
    """Parts that workers made; one that nobody could make fails again, with the same error."""

    failures: dict[str, Exception]

    def _get(self, part: Part) -> Weights:
        key = part.key(self.task)
        weights = self._read(self.folder / f"{key}.safetensors")
        if weights is None:
            raise self.failures.get(key) or RuntimeError(f"{part.role} {part.member} was made and cannot be read back: {key}")
        return weights


class Making:
    """The parts of some models.

    Args:
        models: variants and training seeds.
        task: what they are fitted to.
        folder: where parts are kept.
        seconds: how long a part may take, with what waits for it; the longest is made first.

    Attributes:
        parts: those that were found missing, by key.
        failures: why some cannot be made, by key.
    """

    def __init__(
        self, models: Iterable[tuple[Variant, int]], task: Task, folder: Path, seconds: Callable[[Part], float]
    ) -> None:
        self.models = {(variant.label, seed): Model(variant, seed) for variant, seed in models}
        self.parts: dict[str, Part] = {}
        self.failures: dict[str, Exception] = {}
        self._task, self._folder, self._seconds = task, folder, seconds
        self._made: set[str] = set()
        self._queue: list[tuple[float, str]] = []

    @property
    def store(self) -> type[PartStore]:
        """What models are fitted from."""
        return type("Store", (Gathered,), {"failures": self.failures})

    def settle(self) -> None:
        """Find out what models lack whose parts, as far as they were known, are all made or failed."""
        while True:
            ripe = [one for one in self.models.values() if not one.settled and not one.waits - self.failures.keys()]
            if not ripe:
                return
            for model in ripe:
                hopeless = model.waits & self.failures.keys()
                lacks = {} if hopeless else absent(model.variant, model.seed, self._task, self._folder)
                model.settled, model.waits = not lacks, set(lacks)
                for key, part in lacks.items():
                    self._lacking(key, part)

    def _lacking(self, key: str, part: Part) -> None:
        if key in self._made:
            self.fail(key, RuntimeError(f"{part.role} {part.member} was made and cannot be read back: {key}"))
        elif key not in self.parts:
            self.parts[key] = part
            self._enqueue(key)

    def _enqueue(self, key: str) -> None:
        """Queue a part if all that it needs is there."""
        needs = self.needs(key)
        failed = [self.failures[need] for need in needs if need in self.failures]
        if failed:
            self.fail(key, failed[0])
        elif all(self.path(need).exists() for need in needs):
            heapq.heappush(self._queue, (-self._seconds(self.parts[key]), key))

    def next(self) -> str | None:
        """Key of the next part to make, None if there is none now."""
        return heapq.heappop(self._queue)[1] if self._queue else None

    def needs(self, key: str) -> list[str]:
        """Keys of the parts that a part is made from."""
        return [need.key(self._task) for need in self.parts[key].needs]

    def path(self, key: str) -> Path:
        """Where a part is kept."""
        return self._folder / f"{key}.safetensors"

    def checkpoint(self, key: str) -> Path:
        """Where the checkpoint of an unfinished part is kept."""
        return self._folder / f"{key}.checkpoint"

    def keep(self, key: str, weights: bytes, log: bytes) -> None:
        """Store a part and its log, which come as files; what waited for it may be made."""
        write_atomic(self.path(key).with_suffix(".json"), log)
        write_atomic(self.path(key), weights)
        self.checkpoint(key).unlink(missing_ok=True)
        PartStore(self._folder, self._task, Progress(None)).made(self.parts[key], key)
        self._made.add(key)
        for other in self.parts:
            if key in self.needs(other):
                self._enqueue(other)
        for model in self.models.values():
            model.waits.discard(key)

    def fail(self, key: str, error: Exception) -> None:
        """A part cannot be made, and neither can what needs it."""
        self.failures[key] = error
        for other in list(self.parts):
            if other not in self.failures and key in self.needs(other):
                self.fail(other, error)

    def wanted(self) -> set[str]:
        """Keys of parts that others, which are not made yet, are made from."""
        waiting = [key for key in self.parts if key not in self.failures and key not in self._made]
        return {need for key in waiting for need in self.needs(key)}
