"""What a table of a paper needs, as runs: the plan with its price, and its execution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from bench import environment
from bench.executors import Executor
from bench.forecast import forecast
from bench.papers.cells import Cell
from bench.papers.join import join
from bench.papers.layout import Layout
from bench.progress import Progress
from bench.request import Request, Wish
from bench.runner import Run
from bench.store import Record, Store


@dataclass(frozen=True)
class Step:
    """What a suite has to do: a run of exactly the evaluations that each variant needs, or why there is none."""

    suite: str
    run: Run | None
    problem: str = ""


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
    # The protocol's own suites, whatever records of others a table may show.
    only = layout.model_copy(update={"suites": {data: names[:1] for data, names in layout.suites.items()}})
    table = join(only, Store(wish.runs), wish.budget)
    suites: dict[str, list[Cell]] = {}
    for cell in table.cells.values():
        suites.setdefault(cell.suite, []).append(cell)
    return suites, wish.seeds or table.seeds


def step(suite: str, cells: Sequence[Cell], wish: Wish, progress: Progress, executor: Executor | None = None) -> Step:
    """A run of the evaluations that cells of a suite need, and of no others."""
    request = Request(
        defense=",".join(dict.fromkeys(cell.spec for cell in cells)),
        suite=suite,
        only=tuple(dict.fromkeys(cell.answer.eval for cell in cells)),
        **{field.name: getattr(wish, field.name) for field in fields(wish)},
    )
    try:
        run = Run(request, progress, executor)
    except ValueError as error:
        return Step(suite, None, str(error))
    pairs = {(cell.label, cell.answer.eval) for cell in cells}
    run.jobs = [job for job in run.jobs if (job.variant.label, job.blank.eval["name"]) in pairs]
    return Step(suite, run)


def plan(layout: Layout, wish: Wish, steps: list[Step]) -> Iterator[str]:
    """The plan in lines: what is there, what is to do, how long it may take and what it holds in memory."""
    yield f"{layout.name}, budget {wish.budget}, records in {wish.runs}"
    for step in steps:
        if step.run is None:
            yield f"{step.suite}: cannot run: {step.problem}"
            continue
        seeds = ",".join(map(str, step.run.request.seeds))
        todo = step.run.missing()
        yield f"{step.suite}, seeds {seeds}: {len(step.run.jobs) - len(todo)} of {len(step.run.jobs)} records are there"
        evals: dict[str, list[str]] = {}
        for job in todo:
            evals.setdefault(f"{job.variant.label}, seed {job.blank.seed}", []).append(job.blank.eval["name"])
        yield from (f"  to do  {who}: {', '.join(names)}" for who, names in evals.items())
        size = sum(images.pixels.nbytes for images in (step.run.task.train, step.run.task.validation, step.run.test))
        yield f"  memory: {size / 1e6:.1f} MB of images on {step.run.device}; of networks and attacks unknown"
        if todo:
            step.run.plan = forecast(step.run, todo)
            yield f"  {step.run.plan}"


def execute(steps: list[Step]) -> list[Record]:
    """Do everything that can run, suite by suite; what is finished already is kept."""
    return [record for step in steps if step.run is not None for record in step.run.execute()]
