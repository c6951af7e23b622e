"""Certification throughput as ratios over a plain loop of the published algorithm, in one process, interleaved.

    python tests/speed/certification.py [--rounds 3] [--draws 2000] [--device cpu] [--architectures lenet5,resnet20]

The reference is the sampling loop of Cohen et al. (2019), written from the paper: repeat the image, add fresh Gaussian noise,
classify, count the votes on the host; at its batch of 1,000 and at its best batch. Ours is ``certify`` with the fixed estimator
and the same number of draws. Time is CPU time of one thread (on CUDA: wall time, synchronised). Networks have random weights.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

from attacks.streams import generator
from defenses.api import Classifier, Images, Recipe, Task
from defenses.combine import Mean
from defenses.ensemble import Ensemble
from defenses.nets import network
from defenses.numerics import NUMERICS, voter
from defenses.smoothing import certify

SHAPES = {"lenet5": (1, 28, 28), "resnet20": (3, 32, 32)}


def plain(model: Classifier) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same networks as a published code base holds them: NCHW, one after the other, mean softmax, argmax."""
    copies = [copy.deepcopy(nn.Sequential(*net.children())).to(memory_format=torch.contiguous_format) for net in model.members]
    return lambda x: torch.stack([net(x).softmax(-1) for net in copies]).mean(0).argmax(-1)


def published(
    classify: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, sigma: float, num: int, batch_size: int
) -> np.ndarray:
    """Votes of one image as the paper's pseudo-code samples them."""
    counts = np.zeros(10, dtype=int)
    with torch.no_grad():
        while num > 0:
            this = min(batch_size, num)
            num -= this
            batch = x.repeat((this, 1, 1, 1))
            predictions = classify(batch + torch.randn_like(batch) * sigma)
            for label in predictions.cpu().numpy():
                counts[label] += 1
    return counts


def clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def models(architecture: str, device: str) -> dict[str, Classifier]:
    shape = SHAPES[architecture]
    gen = generator(0, "speed")
    pixels = torch.randint(0, 256, (4, *shape), generator=gen, dtype=torch.uint8)
    images = Images(pixels, torch.zeros(4, dtype=torch.int64), torch.arange(4), "random").to(device)
    channels = (0.5,) * shape[0]
    task = Task("random", images, images, 10, channels, channels, architecture, Recipe(epochs=1))
    members = [network(task, generator(1, member)) for member in range(5)]
    return {"1 network": members[0], "5 members, mean": Ensemble(members, Mean()).to(device).eval()}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--architectures", default="lenet5,resnet20")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device, draws = options.device, options.draws
    print(f"torch {torch.__version__}, {platform.machine()} {cpu()}, device {device}, one thread, {draws} draws")
    for architecture in options.architectures.split(","):
        x = torch.rand(1, *SHAPES[architecture], generator=generator(2)).to(device)
        for name, model in models(architecture, device).items():
            works: dict[str, Callable[[], object]] = {
                f"published loop, batch {size}": partial(published, plain(model), x[0], 0.25, draws, size)
                for size in (1000, 400, 100)
            }
            for numerics in NUMERICS:
                base = voter(model, numerics, batch=100)
                works[f"certify, {numerics}"] = partial(certify, base, x, 0.25, n0=100, n=draws - 100)
            noisy = x.expand(100, *x.shape[1:]).contiguous()

            def forward(model: Classifier = model, noisy: torch.Tensor = noisy) -> None:
                with torch.inference_mode():
                    for _ in range(draws // 100):
                        model.predict(noisy)

            works["network alone, float32, batch 100"] = forward
            seconds = measure(works, options.rounds, device)
            loops = [seconds[work] for work in works if work.startswith("published")]
            rows = [(work, draws / s, loops[0] / s, min(loops) / s) for work, s in seconds.items()]
            heads = ["work", "draws/s", "over batch 1000", "over its best batch"]
            print(f"\n{architecture}, {name}\n{tabulate(rows, heads, floatfmt=('', '.0f', '.2f', '.2f'))}")
            outside = 1 - seconds["network alone, float32, batch 100"] / seconds["certify, float32"]
            print(f"share of certify's time outside the network (float32): {100 * outside:.1f} %")


def cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
