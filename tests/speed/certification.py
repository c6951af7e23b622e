"""Certification as ratios over a plain loop of the published algorithm: the same networks, images and sigma, in one process.

    python tests/speed/certification.py --suite mnist --data DIR [--defense randsmooth,cear_rw] [--images 20] [--n 100000]

The reference is the sampling loop of Cohen et al. (2019), written from the paper: repeat the image, add fresh Gaussian noise,
classify with networks in the usual memory layout, count the votes on the host; at its batch of 1,000 and at its best batch.
Ours is ``certify`` under every numerics: seconds per draw with fixed n, and, end to end, seconds per image of the grid
estimator and (``--fixed``) of fixed n without draws for wrong images, which keeps the ACR. The reference is timed on
``--draws`` draws of one image and scaled to n; each of its draws costs the same. Time is CPU time of one thread (on CUDA: wall
time, synchronised). ``--memory`` prints the peak of processes that certify with n = 1,000 and n = 1,000,000.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, where a file has the name of the package attacks

import argparse
import copy
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

from attacks.streams import Streams
from bench import environment
from bench.jobs import Fitted
from bench.progress import Progress
from bench.request import Request
from bench.runner import Run
from defenses.api import Classifier, Images
from defenses.estimators import ESTIMATORS, Question, grid_up_to
from defenses.numerics import NUMERICS, under
from defenses.smoothing import Certificates, certify


def usual(model: Classifier) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same networks as a published code base holds them: NCHW, one after the other, then the rule."""
    copies = [copy.deepcopy(nn.Sequential(*net.children())).to(memory_format=torch.contiguous_format) for net in model.members]
    if len(copies) == 1:
        return lambda x: copies[0](x).argmax(-1)
    return lambda x: model.rule.decide(torch.stack([net(x) for net in copies]))  # type: ignore[operator, union-attr]


def published(classify: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, sigma: float, num: int, batch: int) -> None:
    """Votes of one image as the paper's pseudo-code samples them."""
    counts = np.zeros(10, dtype=int)
    with torch.no_grad():
        while num > 0:
            this = min(batch, num)
            num -= this
            images = x.repeat((this, 1, 1, 1))
            predictions = classify(images + torch.randn_like(images) * sigma)
            for label in predictions.cpu().numpy():
                counts[label] += 1


def clock(device: str) -> float:
    """Seconds of this process."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(works: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each work, interleaved, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            began = clock(device)
            work()
            if turn:
                times[name].append(clock(device) - began)
    return {name: statistics.median(values) for name, values in times.items()}


def kernel(model: Classifier, x: torch.Tensor, sigma: float, options: argparse.Namespace) -> dict[str, float]:
    """Seconds per draw of each way, and of the networks alone."""
    draws, device, batch = options.draws, options.device, 100 if options.device == "cpu" else 1000
    works: dict[str, Callable[[], object]] = {
        f"published loop, batch {size}": partial(published, usual(model), x[0], sigma, draws, size) for size in (1000, 400, 100)
    }
    noisy = x[:1] + sigma * torch.randn(
        batch, *x.shape[1:], generator=torch.Generator(x.device).manual_seed(0), device=x.device
    )

    def alone(voter: Classifier) -> None:
        with torch.inference_mode():
            for _ in range(draws // batch):
                for net in voter.members:
                    net(noisy)

    for numerics in options.numerics:
        voter = under(model, numerics, batch)
        works[numerics] = partial(certify, voter, x[:1], sigma, n0=batch, n=draws - batch, batch=batch)
        if len(model.members) == 1:  # members that need not be asked make shares of an ensemble hard to read
            works[f"network alone, {numerics}"] = partial(alone, voter)
    return {name: seconds / draws for name, seconds in measure(works, options.rounds, device).items()}


def whole(
    voter: Classifier, images: Images, sigma: float, estimator: str, options: argparse.Namespace
) -> tuple[float, Certificates]:
    """Seconds per image of a full certification, and the certificates."""
    radii: tuple[float, ...] = ()
    if estimator == "grid":
        radii = grid_up_to(0.25, ESTIMATORS["grid"].ceiling(Question(sigma, 0.001, options.n)))
    streams = Streams(0, "certified", ids=images.ids, device=images.pixels.device)
    batch = 100 if options.device == "cpu" else 1000
    fields = {"estimator": estimator, "radii": radii, "n": options.n, "streams": streams, "batch": batch}
    labels = images.labels if estimator == "fixed" else None
    began = clock(options.device)
    found = certify(voter, images.floats(), sigma, labels=labels, **fields)
    return (clock(options.device) - began) / len(images), found


def compare(name: str, model: Classifier, images: Images, sigma: float, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one defense."""
    x = images.floats()
    seconds = kernel(model, x, sigma, options)
    loops = [value for work, value in seconds.items() if work.startswith("published")]
    first, best = loops[0], min(loops)
    note: dict[str, Any] = {
        "defense": name,
        "sigma": sigma,
        "members": len(model.members),
        "n": options.n,
        "seconds_per_draw": seconds,
    }
    rows = [[work, 1 / s, first / s, best / s] for work, s in seconds.items()]
    heads = ["seconds per draw", "draws/s", "over batch 1000", "over its best batch"]
    print(
        f"\n{name}, {len(model.members)} networks, sigma {sigma:g}\n{tabulate(rows, heads, floatfmt=('', '.0f', '.2f', '.2f'))}"
    )
    note["outside"] = {
        numerics: 1 - seconds[f"network alone, {numerics}"] / seconds[numerics]
        for numerics in options.numerics
        if f"network alone, {numerics}" in seconds
    }
    for numerics, share in note["outside"].items():
        print(f"share of certify's time outside the network, {numerics}: {100 * share:.1f} %")
    note["end_to_end"] = []
    plain = (options.n + 100) * first
    for numerics in options.numerics:
        voter = under(model, numerics, 100 if options.device == "cpu" else 1000)
        for estimator in ["grid", *(["fixed"] if options.fixed else [])]:
            spent, found = whole(voter, images, sigma, estimator, options)
            draws = float(found.draws.double().mean()) + 100
            line = {
                "numerics": numerics,
                "estimator": estimator,
                "images": len(images),
                "seconds_per_image": spent,
                "draws": draws,
            }
            note["end_to_end"].append({**line, "ratio": plain / spent, "ratio_best_batch": (options.n + 100) * best / spent})
    print(tabulate(note["end_to_end"], headers="keys", floatfmt=".4g"), flush=True)
    return note


def peak(n: int) -> float:
    """MiB of a process that certifies two images with n draws."""
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from defenses.smoothing import certify\n"
        f"certify(lambda x: x.flatten(1)[:, :10].argmax(1), torch.rand(2, 1, 28, 28), 0.25, n={n}, batch=1000)\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def main() -> None:
    options = _arguments()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()} {cpu()}, device {options.device}, one thread")
    notes = []
    for defense in options.defense.split(","):
        fields = {"suite": options.suite, "budget": options.budget, "data": options.data, "runs": options.runs}
        run = Run(Request(defense=defense, only=("clean",), device=options.device, **fields))
        subject = Fitted(run.task, run.store.root / run.suite.name / "parts", Progress(None), run.jobs).take(run.jobs)[0]
        if isinstance(subject, Exception):
            raise subject
        notes.append(compare(defense, subject.model, run.test.first(options.images), subject.sigma or 0.25, options))
    note: dict[str, Any] = {"suite": options.suite, "budget": options.budget, "comparisons": notes}
    if options.memory:
        note["peak_mib"] = {str(n): peak(n) for n in (1_000, 1_000_000)}
        print(f"peak memory in MiB by n: {note['peak_mib']}")
    if options.out:
        made = {"made": environment.code(), "versions": environment.versions(), "device": f"{options.device} {cpu()}"}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**note, **made}, indent=1) + "\n")


def cpu() -> str:
    """Name of the processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", default="mnist")
    parser.add_argument("--defense", default="randsmooth,cear_rw", help="whose networks, separated by commas")
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--numerics", default=",".join(NUMERICS), type=lambda text: text.split(","))
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--draws", type=int, default=2000, help="on which seconds per draw are measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fixed", action="store_true", help="also certify with fixed n, without draws for wrong images")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
