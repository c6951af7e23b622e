"""How long what is missing will take, by what records of the same question on this device cost; unknown stays unknown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.jobs import APART, ITSELF, Job
from bench.registry import Variant, resolve
from bench.store import Record

EFFORT = ("images", "n", "steps", "restarts", "proposals")
"""Fields of an evaluation that its time grows with; no faster than this, since images that fall early cost less."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of trainings and of evaluations, and what nothing is known of."""

    training: float
    evaluation: float
    unknown: tuple[str, ...]

    def __str__(self) -> str:
        known = f"about {duration(self.training + self.evaluation)}"
        known += f" (training at most {duration(self.training)}, evaluation {duration(self.evaluation)})"
        if not self.unknown:
            return known
        missing = f"no record of this device tells of: {', '.join(self.unknown)}"
        return f"unknown; {missing}" if self.training + self.evaluation == 0 else f"{known}, and what is unknown; {missing}"


def estimate(jobs: Sequence[Job], known: Iterable[Record]) -> Estimate:
    """What jobs will cost, by the finished records among ``known`` that were made on the same device.

    Networks that several variants share are counted for each of them, and every network counts as untrained.
    """
    finished = [record for record in known if record.status == "success"]
    evaluations = {f"{job.blank.suite['name']} {job.blank.eval['name']}": 0.0 for job in jobs}
    unknown: dict[str, None] = {}
    for job in jobs:
        name = f"{job.blank.suite['name']} {job.blank.eval['name']}"
        alike = [one for one in finished if _alike(one, job.blank) and one.eval["name"] == job.blank.eval["name"]]
        seconds = _evaluation(job.blank, alike)
        evaluations[name] += seconds or 0.0
        if seconds is None:
            unknown[name] = None
    training = 0.0
    for (suite, variant, _), (own, blank) in _networks(jobs).items():
        seconds = _training(own, blank, [one for one in finished if _alike(one, blank)])
        training += seconds or 0.0
        if seconds is None:
            unknown[f"training of {variant} in {suite}"] = None
    return Estimate(training, sum(evaluations.values()), tuple(unknown))


def _networks(jobs: Iterable[Job]) -> dict[tuple[str, str, int], tuple[Variant, Record]]:
    """What is trained, by suite, variant and seed, with a job's record; models whose images attack have seeds of their own."""
    found: dict[tuple[str, str, int], tuple[Variant, Record]] = {}
    for job in jobs:
        suite, seed = job.blank.suite["name"], job.blank.seed
        found.setdefault((suite, job.variant.label, seed), (job.variant, job.blank))
        for spec in job.evaluation.others:
            other = job.variant if spec == ITSELF else resolve(spec, {})[0]
            found.setdefault((suite, other.label, seed + APART), (other, job.blank))
    return found


def _alike(record: Record, blank: Record) -> bool:
    """Whether a record tells something of a job: same suite, network and device."""
    sides = [(one.suite["name"], one.task.get("architecture"), one.made.get("device")) for one in (record, blank)]
    return sides[0] == sides[1]


def _training(own: Variant, blank: Record, alike: Iterable[Record]) -> float | None:
    """Seconds of all epochs, by an epoch of the same variant, or of the same defense with other fields."""
    found = [record for record in alike if record.cost.get("training_seconds_per_epoch") is not None]
    for name, wanted in (("variant", own.label), ("name", own.name)):
        for record in found:
            if record.defense[name] == wanted:
                share = blank.task["train_images"] / record.task["train_images"]
                return record.cost["training_seconds_per_epoch"] * share * float(blank.task["recipe"]["epochs"])
    return None


def _evaluation(blank: Record, alike: Iterable[Record]) -> float | None:
    """Seconds of the evaluation, by the same of any variant, the job's own first."""
    found = [record for record in alike if "seconds" in record.cost]
    for record in sorted(found, key=lambda one: one.defense["name"] != blank.defense["name"]):
        alone = record.cost["seconds"] / record.cost.get("measured_together", 1.0)
        return alone * _effort(blank.eval["fields"]) / _effort(record.eval["fields"])
    return None


def _effort(fields: dict[str, Any]) -> float:
    own = [fields[name] for name in EFFORT if isinstance(fields.get(name), int | float)]
    return float(math.prod(own)) * len(fields.get("eps") or [1])


def duration(seconds: float) -> str:
    """12 s, 5 min, 3.2 h, 4 days."""
    for limit, length, unit in ((90.0, 1.0, "s"), (5400.0, 60.0, "min"), (172_800.0, 3600.0, "h")):
        if seconds < limit:
            return f"{seconds / length:.2g} {unit}" if unit == "h" else f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86_400:.2g} days"
