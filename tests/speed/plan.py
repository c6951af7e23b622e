"""How long all tables of papers take at full budget on 8, 64 and 512 workers, by the scheduler of `bench run`; nothing is run.

    python -m tests.speed.plan [--tables cear_table1,...] [--seeds 0,1,2] [--speedup 1] [--workers 8,64,512] [--out FILE]

What several tables need counts once, seeds are those of each table unless given, and suites whose data is not at hand are named
and left out. The unit costs are measured here, on one CPU thread: seconds of a forward and of a backward pass of every suite's
network, and of every kind of training how many such passes a step takes an image, on LeNet-5. Passes of an evaluation are
counted as if nothing ended early. `--speedup` says how many times as fast a worker is as this thread; it divides makespans, and
nothing else depends on it, since no transfer and no start of a task is counted.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.costs import Probe, probe, timed, training
from bench.evals import Robust
from bench.evals.api import Smoothing
from bench.forecast import Forecast, forecast
from bench.jobs import Job
from bench.papers import layout
from bench.papers.cells import Cell
from bench.papers.reproduce import by_suite, step
from bench.plan import Item, duration, schedule
from bench.progress import Progress
from bench.request import Request, Wish
from bench.runner import Run
from defenses.api import Part, Task
from defenses.nets import network
from defenses.training import Trained
from tests.speed.timing import keep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", default="")
    parser.add_argument("--seeds", default="")
    parser.add_argument("--speedup", type=float, default=1.0)
    parser.add_argument("--workers", default="8,64,512")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.tables.split(",") if options.tables else layout.available()
    equivalents: dict[str, float] = {}
    items: list[Item] = []
    note: dict[str, Any] = {"tables": names, "speedup": options.speedup, "suites": [], "plans": []}
    with tempfile.TemporaryDirectory() as folder:
        wish = Wish(budget="paper", seeds=tuple(map(int, filter(None, options.seeds.split(",")))), runs=Path(folder))
        for run, jobs in together(names, wish):
            plan = forecast(run, jobs, lambda parts, run=run: scaled(run.task, parts, equivalents))
            run.close()
            suite = run.suite.name
            own = pieces(suite, plan)
            items += own
            facts = {
                "suite": suite,
                "seconds": sum(item.seconds for item in own),
                "trainings": sum(line.job is None for line in plan.lines),
                "records": len(jobs),
                "tasks": len(own),
                "without_estimate": sum(not line.estimate.known for line in plan.lines),
            }
            note["suites"].append(facts)
            told = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in facts.items() if isinstance(value, int))
            print(f"{suite:22} {duration(facts['seconds']):>12}: {told}", flush=True)
    items = [Item(item.key, item.seconds / options.speedup, item.needs) for item in items]
    for workers in map(int, options.workers.split(",")):
        found = schedule(items, workers)
        limit = found.limit if len(found.limit) < 300 else f"{found.limit[:300]} ..."
        seconds = {"seconds": found.makespan, "efficiency": found.efficiency}
        note["plans"].append({"workers": workers, **seconds, "limit": limit})
        print(f"{workers:4} workers: {duration(found.makespan)}, efficiency {found.efficiency:.1%}, limited by {limit}")
    keep(options.out, note)


def together(names: Sequence[str], wish: Wish) -> Iterator[tuple[Run, list[Job]]]:
    """A run of each suite that the tables need, and those of its jobs that one of them asks for."""
    asked: dict[str, list[tuple[Cell, int]]] = {}
    for name in names:
        suites, seeds = by_suite(layout.load(name), wish)
        for suite, cells in suites.items():
            asked.setdefault(suite, []).extend((cell, seed) for cell in cells for seed in seeds)
    for suite, own in asked.items():
        cells, seeds = [cell for cell, _ in own], tuple(sorted({seed for _, seed in own}))
        found = step(suite, cells, replace(wish, seeds=seeds), Progress(None))
        if found.run is None:
            print(f"left out: {suite}: {found.problem[:100]}")
            continue
        known = {(cell.label, cell.answer.eval, seed) for cell, seed in own}
        yield found.run, [job for job in found.run.jobs if (job.variant.label, job.blank.eval["name"], job.blank.seed) in known]


def scaled(task: Task, parts: list[Part], equivalents: dict[str, float]) -> Probe:
    """Seconds of passes of the task's network, and of steps by the passes that they take on LeNet-5, measured once a kind."""
    forward, backward = timed(network(task, architecture=task.architecture).eval(), task.validation.floats(slice(0, 20)))
    small = Run(Request(defense="naive", suite="digits")).task
    steps = {}
    for part in parts:
        if not isinstance(part, Trained):
            continue
        kind = f"{part.role} {type(part.loss).__name__}"
        if kind not in equivalents:
            equivalents[kind] = equivalent(small, part)
        steps[training(part)] = equivalents[kind] * part.recipe.batch * (forward + backward)
    return Probe(forward, backward, steps)


def equivalent(small: Task, part: Trained) -> float:
    """Passes (forward and backward) of LeNet-5 that cost as much as a step of this kind of training, an image."""
    own = replace(small_copy(part), recipe=replace(part.recipe, batch=64))
    found = probe(small, [own])
    return found.steps[training(own)] / (64 * (found.forward + found.backward))


def small_copy(part: Trained) -> Trained:
    """The part and its needs with LeNet-5."""
    needs = tuple(small_copy(need) if isinstance(need, Trained) else need for need in part.needs)
    return replace(part, architecture="lenet5", needs=needs)


def pieces(suite: str, plan: Forecast) -> list[Item]:
    """Tasks of a plan: parts, and the pieces of evaluations, each of equal cost."""
    found = []
    names = {line.key: f"{suite}: {line.title}" + (f" {line.key[:6]}" if line.job is None else "") for line in plan.lines}
    for line in plan.lines:
        seconds = line.estimate.seconds if line.estimate.known else 0.0
        needs = tuple(names[need] for need in line.needs)
        if line.job is None:
            found.append(Item(names[line.key], seconds, needs))
            continue
        evaluation = line.job.evaluation
        size = 10 if isinstance(evaluation, Smoothing) else 100
        budgets = len(evaluation.eps) if isinstance(evaluation, Robust) and not evaluation.looks_for_nearest else 1
        count = budgets * -(-evaluation.images // size)
        found += [Item(f"{names[line.key]} {number}", seconds / count, needs) for number in range(count)]
    return found


if __name__ == "__main__":
    main()
