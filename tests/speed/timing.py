"""What the scripts beside this one share: random images, steps of training, and ratios of interleaved works."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from attacks.streams import Shared, drawing, generator
from bench import environment
from defenses.api import Images, Recipe, Task
from defenses.training import Batch

BATCH = {"lenet5": 128, "resnet20": 32, "resnet18": 8}

Work = Callable[[], object]


class Step:
    """One step of training after the other; two in the same of ``epochs``, then two in the next."""

    def __init__(
        self, net: nn.Module, loss: Callable[..., dict[str, Tensor]], batch: Batch, epochs: Sequence[int] = (0,)
    ) -> None:
        self.net, self.loss, self.batch = net.train(), loss, batch
        self.epochs = itertools.cycle(epoch for epoch in epochs for _ in range(2))
        self.optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)

    def __call__(self) -> None:
        with drawing(self.net, Shared(self.batch.gen)):
            parts = self.loss(self.net, replace(self.batch, epoch=next(self.epochs)), [])
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(parts.values())).sum().backward()
        self.optimizer.step()


def rows_of(works: dict[str, Work], reference: str, options: argparse.Namespace, calls: int = 1) -> list[dict[str, Any]]:
    """Median seconds of each work, and the median over rounds of how many times it takes the reference's.

    What cannot be done is told, and left out.
    """
    for name in list(works):
        try:
            works[name]()
        except Exception as error:  # torch's own classes
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            del works[name]
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.rounds):
        for name, work in works.items():
            work()  # what another work left in caches and in the allocator shall not count
            began = clock(options.device)
            for _ in range(calls):
                work()
            times[name].append((clock(options.device) - began) / calls)
    found: list[dict[str, Any]] = []
    for name, seconds in times.items():
        ratios = sorted(own / other for own, other in zip(seconds, times[reference], strict=True))
        middle = statistics.median(ratios)
        row = {"way": name, "seconds": statistics.median(seconds), "ratio": middle, "faster": 1 / middle}
        found.append({**row, "ratio_lowest": ratios[0], "ratio_highest": ratios[-1]})
    return found


def clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def task_of(options: argparse.Namespace) -> Task:
    """Random images, twice as many as a step sees."""
    shape = (1, 28, 28) if options.architecture == "lenet5" else (3, 32, 32)
    n, gen = 2 * options.batch, generator(0, "speed")
    pixels = torch.randint(0, 256, (n, *shape), generator=gen, dtype=torch.uint8)
    images = Images(pixels, torch.randint(0, 10, (n,), generator=gen), torch.arange(n), "random").to(options.device)
    half = (0.5,) * shape[0]
    return Task("random", images, images, 10, half, half, options.architecture, Recipe(epochs=1, batch=options.batch))


def batch_of(task: Task) -> Batch:
    n, x, y = task.recipe.batch, task.train.floats(), task.train.labels
    return Batch(x[:n], y[:n], generator(0, "losses", device=task.device), partner=lambda: (x[n:], y[n:]))


def arguments(description: str | None, defenses: str) -> argparse.ArgumentParser:
    """The options of all scripts; :func:`report` reads them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--architecture", default="lenet5", choices=list(BATCH))
    parser.add_argument("--batch", type=int, help=f"images a step; without it {BATCH}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--defenses", default=defenses, help="separated by commas")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    return parser


def report(
    parser: argparse.ArgumentParser, titles: dict[str, Callable[[Task, argparse.Namespace], list[dict[str, Any]]]]
) -> None:
    """Make each comparison, print it, and write all of them with what they are of."""
    given = parser.parse_args()
    options = argparse.Namespace(**{**vars(given), "batch": given.batch or BATCH[given.architecture]})
    torch.set_num_threads(1)
    torch.empty(31 * 2**20, dtype=torch.uint8)  # freed, it teaches glibc to keep large blocks: so does loading images
    task = task_of(options)
    shown = {name: getattr(options, name) for name in ("architecture", "members", "batch", "rounds") if hasattr(options, name)}
    note: dict[str, Any] = shown
    for title, compare in titles.items():
        note[title] = compare(task, options)
        print(f"\n{title}\n{tabulate(note[title], headers='keys', floatfmt='.3g')}", flush=True)
    keep(options.out, note, options.device)


def keep(out: Path | None, note: dict[str, Any], device: str = "cpu") -> None:
    """Write what was measured, with the command, the device and the versions that it is of; nothing without a file."""
    if out is None:
        return
    # Where the script and the record lie is nobody else's business.
    words = ["python", "-m", f"tests.speed.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    asked = [word for place, word in enumerate(words) if "--out" not in words[max(0, place - 1) : place + 1]]
    about = {
        "command": shlex.join(asked), "threads": torch.get_num_threads(), "device": environment.device_name(device),
        "versions": environment.versions(), "made": environment.code(),
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**about, **note}, indent=1) + "\n")
