"""What a run, a look at a run folder and a comparison of engines print. Heavy imports wait for who needs them."""

from __future__ import annotations

import sys
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from bench import options
from bench.store import Record, Store

if TYPE_CHECKING:
    from bench.papers.layout import Layout
    from bench.progress import Progress
    from bench.request import Wish
    from bench.runner import Run


def finished(root: Path, suite: str, records: list[Record]) -> None:
    """Summary, failures, and where everything is, after a run."""
    from bench import plots, tables

    store = Store(root)
    for table in tables.summaries(store, suite):
        print(f"\n{tables.render(table, 'text')}\n")
    facts = {record.defense["variant"]: record.facts for record in records if record.facts}
    for variant, known in facts.items():
        print(f"{variant}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in known.items()))
    for record in records:
        if record.status == "skipped":
            print(f"skipped: {record.defense['variant']} {record.eval['name']}: {record.error}")
        if record.status == "error":
            last = (record.error or "").strip().splitlines()[-1]
            print(f"failed: {record.defense['variant']} {record.eval['name']} (seed {record.seed}): {last}")
    drawn = plots.draw(store, suite, root / suite / "plots")
    print(f"\nrecords: {root / suite}\nplots:   {', '.join(str(path) for path in drawn if path.suffix == '.png')}")


def planned(run: Run) -> None:
    """What a run would do, what each step costs, and on what basis."""
    from bench.forecast import forecast

    plan = forecast(run, run.missing())
    told = {id(one.job): one.estimate for one in plan.lines}
    for one in plan.lines:
        if one.job is None:
            print(f"to make  {one.title}: {one.estimate}")
    for job in run.jobs:
        print(f"to do  {job.title}: {told[id(job)]}" if id(job) in told else f"done   {job.title}")
    print(plan)


def reproduced(layout: Layout, wish: Wish, progress: Progress, dry_run: bool) -> bool:
    """Print a table's plan, run what is missing unless ``dry_run``, and print the table; whether everything could be done."""
    from bench.executors import opened
    from bench.papers import formats, join, reproduce

    executor = opened(wish.executor, wish.address, wish.device)
    with closing(executor) if executor else nullcontext():
        steps = reproduce.prepare(layout, wish, progress, executor)
        for line in reproduce.plan(layout, wish, steps):
            print(line, flush=True)
        if dry_run:
            return True
        records, problems = reproduce.execute(steps)
    made = join.join(layout.protocol, Store(wish.runs), wish.budget)  # what was run, whatever suite has more to show
    print("\n" + formats.render(replace(made, options=options.elsewhere(wish.runs))))
    for problem in problems:
        print(problem, file=sys.stderr)
    return not problems and all(step.run for step in steps) and all(record.status != "error" for record in records)


def states(runs: Path) -> None:
    """Print what is finished, failed or unfinished in a run folder."""
    store = Store(runs)
    rows = []
    for record in store.records():
        state = "unfinished" if record.status == "running" else record.status
        pieces = len(list(store.partial(record).folder.glob("*.parquet"))) if record.status == "running" else ""
        place = (record.suite["name"], record.defense["variant"], record.suite["budget"], record.seed, record.eval["name"])
        rows.append((*place, state, pieces, record.cost.get("seconds", "")))
    headers = ["suite", "defense", "budget", "seed", "eval", "status", "pieces kept", "seconds"]
    print(tabulate(rows, headers, floatfmt=".1f") if rows else f"no records under {runs}")
    for problem in store.problems:
        print(problem, file=sys.stderr)


def agreement(data: Path | None) -> bool:
    """Print how engines agree; whether all do."""
    from bench import engines

    table = engines.agreement(data)
    rows = []
    for line in table:
        mark = "--" if line.error else "ok" if line.agrees else "BAD"
        numbers = (line.broken, line.ours, line.only_engine, line.only_ours, line.moved, f"{line.seconds:.1f}")
        rows.append(
            (mark, line.attack, line.norm, line.engine, *(numbers if not line.error else ("", "", "", "", "", line.error)))
        )
    headers = [
        "",
        "attack",
        "norm",
        "engine",
        f"broken of {engines.IMAGES}",
        "by ours",
        "only engine",
        "only ours",
        "moved",
        "seconds",
    ]
    print(tabulate(rows, headers, disable_numparse=True))
    return all(line.agrees or line.error for line in table)
