"""The plan of a run before it begins: what is to be made and measured, what each costs, and how long all of it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from bench import work
from bench.costs import Costs, Estimate, Probe, probe
from bench.executors import Answer
from bench.jobs import Job
from bench.outlook import absent
from bench.plan import Item, Schedule, duration, schedule, tails
from bench.store import Store
from bench.suites import SUITES
from defenses.api import Part

if TYPE_CHECKING:
    from bench.runner import Run


@dataclass(frozen=True)
class Line:
    """A part, or an evaluation, of the plan."""

    key: str
    job: Job | None
    title: str
    estimate: Estimate
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Forecast:
    """What is left of a run.

    Attributes:
        lines: parts, needs first, as far as they are known, then evaluations.
        workers: how many do the work.
        memory: bytes of the largest step of a worker, images left out; NaN where unknown.
    """

    lines: tuple[Line, ...]
    workers: int
    memory: float = float("nan")

    def schedule(self) -> Schedule:
        """When it would be done; what has no estimate counts nothing, and evaluations as wholes."""
        return schedule(self._items(), self.workers)

    def tails(self) -> dict[str, float]:
        """Seconds of each line with the longest chain that waits for it; what has more of them is better done first."""
        return tails(self._items())

    def _items(self) -> list[Item]:
        return [Item(one.key, one.estimate.seconds if one.estimate.known else 0.0, one.needs) for one in self.lines]

    def __str__(self) -> str:
        if not self.lines:
            return "plan: nothing is left to do"
        known = [one.estimate.seconds for one in self.lines if one.estimate.known]
        found, dark = self.schedule(), len(self.lines) - len(known)
        bases = [one.estimate.basis for one in self.lines if one.estimate.known]
        stored = sum("stored record" in basis for basis in bases)
        return (
            f"plan: about {duration(found.makespan)} on {self.workers} worker{'s' * (self.workers > 1)} "
            f"({duration(sum(known))} of work; {stored} estimates from stored records, {len(bases) - stored} from a probe"
            + (f"; {dark} steps without an estimate are not counted)" if dark else ")")
            + (f"; about {self.memory / 1e6:,.0f} MB a worker for the largest step" if self.memory == self.memory else "")
        )


def forecast(run: Run, jobs: Sequence[Job], timed: Callable[[list[Part]], Probe | None] | None = None) -> Forecast:
    """The plan of some jobs of a run.

    Args:
        run, jobs: what is to be done.
        timed: gives the seconds of passes and of steps of parts; a probe of the device that will do the work unless given, and
            then stored records are not asked.
    """
    workers = run.executor.places() if run.executor else 1
    if not jobs:  # a probe of the device would be for nothing
        return Forecast((), workers)
    folder = run.store.root / run.suite.name / "parts"
    parts: dict[str, Part] = {}
    lacks: dict[tuple[str, int], tuple[str, ...]] = {}
    for job in jobs:
        for variant, seed in job.models():
            if (variant.label, seed) not in lacks:
                found = absent(variant, seed, run.task, folder)
                parts |= found
                lacks[variant.label, seed] = tuple(found)
    records = [] if timed else [one for root in (run.store.root, SUITES.parent / "results") for one in Store(root).records()]
    costs = Costs(records, run.device_name, (timed or partial(_probed, run))(list(parts.values())))
    lines = []
    for key, part in parts.items():
        title = f"{part.role} {part.member} (seed {part.seed})"
        needs = tuple(other for need in part.needs if (other := need.key(run.task)) in parts)
        lines.append(Line(key, None, title, costs.part(part, len(run.task.train)), needs))
    for job in jobs:
        needs = tuple(dict.fromkeys(key for variant, seed in job.models() for key in lacks[variant.label, seed]))
        lines.append(Line(job.title, job, job.title, costs.job(job), needs))
    return Forecast(tuple(lines), workers, costs.memory(list(parts.values()), jobs))


def _probed(run: Run, parts: list[Part]) -> Probe | None:
    """A probe here, or as a task of the run's executor; None if its worker was lost or could not do it."""
    if run.executor is None:
        return probe(run.task, parts)
    token = run.executor.put(run.task)
    number = run.executor.submit(work.probed, token, parts)
    while True:
        for found, news in run.executor.events(1.0):
            if found == number and isinstance(news, Answer):
                run.executor.forget(token)
                return news.value if news.error is None else None
