"""Throughput of the certificate and of AutoAttack with 1 and 2 workers, as a ratio, and what an executor costs a task.

    python -m tests.speed.executors [--executor processes|ray] [--images 40] [--rounds 3] [--empty 200] [--out FILE]

Both work on pieces of one question about a network that is trained before; workers start before the clock, and the median
of the rounds' ratios counts. On busy cores, or with more workers than cores, the ratio says little.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import work
from bench.evals import Certified, Piece, Robust
from bench.executors import Answer, Executor
from bench.parts import PartStore
from bench.processes import Processes
from bench.progress import Progress
from bench.request import Request
from bench.runner import Run
from defenses.naive import naive
from tests.speed.timing import keep

EPS = 1e-6
"""So small that every image costs the whole attack."""

SIZE = 5
"""Images of a task."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executor", choices=["processes", "ray"], default="processes")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--empty", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    run = Run(Request(defense="naive", suite="digits", device="cpu"))
    model, task = naive.build(run.task), replace(run.task, recipe=replace(run.task.recipe, epochs=5))
    with tempfile.TemporaryDirectory() as folder:
        naive.fit(model, task, PartStore(Path(folder), task, Progress(None)), 0)
    note: dict[str, Any] = {"executor": options.executor, "cores": os.cpu_count(), "load": os.getloadavg()[0], "works": []}
    print(f"{note['cores']} cores, load {note['load']:.1f}")
    if options.executor == "ray":
        from bench.cluster import Cluster

        executor: Executor = Cluster(None, "cpu")
    else:
        executor = Processes([None, None])
    data, test = executor.put(run.task), executor.put(run.test)
    asked = [work.Asked(executor.put(model), naive, 0.25, 0, {})]
    threat = {"attack": "autoattack", "norm": "linf", "eps": (EPS,), "steps": 20, "proposals": 500}
    questions = {
        "certificate": Certified(images=options.images, estimator="fixed", radii=(0.0,), n=5000),
        "AutoAttack": Robust(images=options.images, **threat),
    }
    try:
        drive(executor, [(work.measure, (data, test, questions["certificate"], asked, Piece(slice(0, 1), {}), None))] * 4, 2)
        spent = drive(executor, [(id, ())] * options.empty, 2)
        note["empty_task_milliseconds"] = 1000 * spent / options.empty
        print(f"an empty task: {note['empty_task_milliseconds']:.2f} ms of two workers")
        for name, question in questions.items():
            setting = {} if name == "certificate" else {"eps": EPS}
            slices = [slice(start, start + SIZE) for start in range(0, options.images, SIZE)]
            tasks = [(work.measure, (data, test, question, asked, Piece(rows, setting), None)) for rows in slices]
            seconds = [[drive(executor, tasks, workers) for workers in (1, 2)] for _ in range(options.rounds)]
            ratios = sorted(one / two for one, two in seconds)
            row = {"work": name, "images": options.images, "tasks": len(tasks), "seconds": seconds}
            row |= {"ratio": statistics.median(ratios), "ratio_lowest": ratios[0], "ratio_highest": ratios[-1]}
            note["works"].append(row)
            print(f"{name}: {row['ratio']:.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f}) with 2 workers; {seconds} s")
    finally:
        executor.close()
    keep(options.out, note)


def drive(executor: Executor, tasks: list[tuple[Callable[..., Any], tuple[Any, ...]]], most: int) -> float:
    """Seconds for all tasks, with at most so many in flight."""
    began, waiting, flight = time.perf_counter(), list(tasks), set[int]()
    while waiting or flight:
        while waiting and len(flight) < most and executor.room() > 0:
            function, arguments = waiting.pop()
            flight.add(executor.submit(function, *arguments))
        for number, news in executor.events(1.0):
            if isinstance(news, Answer):
                flight.discard(number)
                if news.error is not None:
                    raise news.error
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
