"""What a table of a paper needs, as runs: the plan with its price, and its execution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from bench import environment
from bench.executors import Executor
from bench.forecast import forecast
from bench.jobs import Job
from bench.papers.cells import Cell, number
from bench.papers.join import join
from bench.papers.layout import Layout
from bench.partial import StoreError
from bench.progress import Progress
from bench.request import Request, Wish
from bench.runner import Run
from bench.store import Record, Store


@dataclass(frozen=True)
class Step:
    """What a suite has to do: a run of exactly the evaluations that each variant needs, or why there is none.

    Attributes:
        lacking: jobs whose finished record lacks a number of the table, and stays without ``fresh``.
    """

    suite: str
    run: Run | None
    problem: str = ""
    lacking: tuple[Job, ...] = ()


def prepare(layout: Layout, wish: Wish, progress: Progress, executor: Executor | None = None) -> list[Step]:
    """A step for each suite of the paper's protocol; its networks are shared with all runs of the same folder.

    Args:
        executor: that of the wish, if it has one; all steps use it.

    Raises:
        ValueError: for an unknown budget or device.
    """
    if executor is None:
        environment.device(wish.device)
    suites, seeds = by_suite(layout, wish)
    wish = replace(wish, seeds=seeds)
    return [step(suite, cells, wish, progress, executor) for suite, cells in suites.items()]


def by_suite(layout: Layout, wish: Wish) -> tuple[dict[str, list[Cell]], tuple[int, ...]]:
    """The cells of a table by suite of the paper's protocol, and the training seeds that they are to have."""
    table = join(layout.protocol, Store(wish.runs), wish.budget)
    suites: dict[str, list[Cell]] = {}
    for cell in table.cells.values():
        suites.setdefault(cell.suite, []).append(cell)
    return suites, wish.seeds or table.seeds


def step(suite: str, cells: Sequence[Cell], wish: Wish, progress: Progress, executor: Executor | None = None) -> Step:
    """A run of the evaluations that cells of a suite need, and of no others.

    If the wish is ``fresh``, records that answer another request or lack a number are moved aside; those that answer stay.
    """
    request = Request(
        defense=",".join(dict.fromkeys(cell.spec for cell in cells)),
        suite=suite,
        only=tuple(dict.fromkeys(cell.answer.eval for cell in cells)),
        **{field.name: getattr(wish, field.name) for field in fields(wish)} | {"fresh": False},
    )
    try:
        run = Run(request, progress, executor)
    except ValueError as error:
        return Step(suite, None, str(error))
    asked: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        asked.setdefault((cell.label, cell.answer.eval), []).append(cell)
    run.jobs = [job for job in run.jobs if _of(job) in asked]
    lacks = [_lacks(run, job, asked[_of(job)]) for job in run.jobs]
    if wish.fresh:
        found = zip(run.jobs, lacks, strict=True)
        run.jobs = [replace(job, fresh=lacking or run.stands_in_the_way(job)) for job, lacking in found]
        return Step(suite, run)
    try:
        run.missing()
    except StoreError as error:  # the other suites go on
        run.close()
        return Step(suite, None, str(error))
    return Step(suite, run, lacking=tuple(job for job, lacking in zip(run.jobs, lacks, strict=True) if lacking))


def _of(job: Job) -> tuple[str, str]:
    """Variant and evaluation, as cells name them."""
    return job.variant.label, str(job.blank.eval["name"])


def _lacks(run: Run, job: Job, cells: Sequence[Cell]) -> bool:
    """Whether a job has a finished record without the number of a cell."""
    old = run.store.find(job.blank)
    return old is not None and old.status == "success" and any(number(old, cell.answer, cell.row) is None for cell in cells)


def plan(layout: Layout, wish: Wish, steps: list[Step]) -> Iterator[str]:
    """The plan in lines: what is there, what is to do, how long it may take and what it holds in memory."""
    yield f"{layout.name}, budget {wish.budget}, records in {wish.runs}"
    for step in steps:
        if step.run is None:
            yield f"{step.suite}: cannot run: {step.problem}"
            continue
        seeds = ",".join(map(str, step.run.request.seeds))
        todo = step.run.missing()
        there = len(step.run.jobs) - len(todo) - len(step.lacking)
        yield f"{step.suite}, seeds {seeds}: {there} of {len(step.run.jobs)} records are there"
        yield from (f"  to do  {line}" for line in _told(todo))
        yield from (f"  to do with --fresh  {line}: the record has no such number" for line in _told(step.lacking))
        size = sum(images.pixels.nbytes for images in (step.run.task.train, step.run.task.validation, step.run.test))
        yield f"  memory: {size / 1e6:.1f} MB of images on {step.run.device}"
        if todo:
            step.run.plan = forecast(step.run, todo)
            yield f"  {step.run.plan}"


def _told(jobs: Sequence[Job]) -> list[str]:
    """Variants, each with its evaluations."""
    evals: dict[str, list[str]] = {}
    for job in jobs:
        evals.setdefault(f"{job.variant.label}, seed {job.blank.seed}", []).append(job.blank.eval["name"])
    return [f"{who}: {', '.join(names)}" for who, names in evals.items()]


def execute(steps: list[Step]) -> tuple[list[Record], list[str]]:
    """Do everything that can run, suite by suite; what is finished already is kept.

    Returns:
        all records, and in words what the run folder refused: pieces of another request, a suite in which another run works.
    """
    records: list[Record] = []
    problems: list[str] = []
    for step in steps:
        try:
            records += step.run.execute() if step.run is not None else []
        except StoreError as error:
            if error.broken:
                raise
            problems.append(f"{step.suite}: {error}")
    return records, problems
