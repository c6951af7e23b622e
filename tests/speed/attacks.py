"""AutoAttack against its authors' code: the same networks and images, verdicts image by image, seconds and evaluations.

    python tests/speed/attacks.py --suite mnist --data DIR --eps linf:0.1 l2:1.5 [--train 0.2] [--images 100] [--spread]

The network is the first of a defense, by default the naive ensemble (read from the runs folder, trained where missing), or with
``--train EPS`` one of the same architecture adversarially trained by this script. Both engines run the components of `standard`
in turn on the images that still stand; the reference gets its own default batch of 250, and the network in its usual memory
layout. Time is CPU time of one thread (on CUDA: wall time, synchronised). ``--spread`` attacks the images near the radius under
five seeds by both engines: how many verdicts differ between seeds, and how many between engines. ``--alone`` compares each
component on all images.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, where this file has the name of the package that it measures

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from torch import Tensor, nn

from attacks import AutoAttack, Fmn, Pgd, Streams
from attacks.oracle import decide
from attacks.reference import Counted, installed
from attacks.streams import generator
from bench import environment
from bench.evals import Subject
from bench.jobs import Fitted
from bench.progress import Progress
from bench.request import Request
from bench.runner import Run
from defenses.api import Classifier, Images
from defenses.nets import network

COMPONENTS = {"apgd_ce": "apgd-ce", "apgd_t": "apgd-t", "fab_t": "fab-t", "square": "square"}
"""The standard version: our names and the reference's."""

SEEDS = 5
"""Seeds under which images near the radius are attacked."""

Step = Callable[[str, Tensor, Tensor, Tensor], tuple[Tensor, int, int]]
"""(component, images, labels, ids) -> (broken (n), forwards, backwards)."""


@dataclass(frozen=True)
class Spent:
    """What a component cost on the images that stood before it, and how many still stand."""

    component: str
    images: int
    left: int
    seconds: float
    forwards: int
    backwards: int


def main() -> None:
    options = _arguments()
    torch.set_num_threads(1)
    fields = {"suite": options.suite, "budget": options.budget, "data": options.data, "runs": options.runs}
    run = Run(Request(defense=options.defense, only=("clean",), device=options.device, **fields))
    model = hardened(run, options.train) if options.train else plain(run)
    images = run.test.first(options.images)
    rows, notes = [], []
    for threat in options.eps:
        norm, _, eps = threat.partition(":")
        note = compare(model, images, norm, float(eps), options)
        notes.append(note)
        rows += [[options.suite, options.train or "plain", threat, len(images), note["clean"], *(note[k] for k in COLUMNS[5:])]]
        print(tabulate(note["components"], headers="keys", floatfmt=".4g"), flush=True)
    print("\n" + tabulate(rows, headers=COLUMNS, floatfmt=".4g"))
    if options.out:
        made = {"made": environment.code(), "versions": {**environment.versions(), **installed()}}
        what = {
            "suite": options.suite,
            "defense": options.defense,
            "budget": options.budget,
            "trained_at": options.train,
            "data": images.source,
        }
        text = json.dumps({**what, **made, "device": environment.device_name(run.device), "comparisons": notes}, indent=1)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


COLUMNS = ["suite", "network", "threat", "images", "clean", "ours", "reference", "differ", "seconds", "reference s", "ratio"]


def compare(model: Classifier, images: Images, norm: str, eps: float, options: argparse.Namespace) -> dict[str, Any]:
    """One threat model: both cascades, and what they cost."""
    x, y = images.floats(), images.labels
    mine, spent = cascade(ours(model, norm, eps, 0), model, images, options)
    other, theirs = cascade(reference(model, norm, eps, 0), model, images, options)
    note: dict[str, Any] = {"norm": norm, "eps": eps, "images": len(images)}
    note["clean"] = float((decide(model, x) == y).double().mean())
    note["ours"], note["reference"] = float(mine.double().mean()), float(other.double().mean())
    note["differ"] = int((mine != other).sum())
    note["only_ours_broke"] = images.ids[other & ~mine].tolist()
    note["only_reference_broke"] = images.ids[mine & ~other].tolist()
    note["seconds"], note["reference s"] = (sum(part.seconds for part in parts) for parts in (spent, theirs))
    note["ratio"] = note["reference s"] / note["seconds"]
    named = [("ours", part) for part in spent] + [("reference", part) for part in theirs]
    note["components"] = [{"engine": engine, **vars(part)} for engine, part in named]
    if options.spread:
        note["spread"] = spread(model, images, mine != other, norm, eps, options)
        print(json.dumps(note["spread"]), flush=True)
    if options.alone:
        note["alone"] = [alone(name, model, images, norm, eps) for name in COMPONENTS]
        print(tabulate(note["alone"], headers="keys"), flush=True)
    return note


def cascade(step: Step, model: Classifier, images: Images, options: argparse.Namespace) -> tuple[Tensor, list[Spent]]:
    """Which images survive every component, and the cost of each."""
    x, y = images.floats(), images.labels
    clock = _clock(options.device)
    stands, spent = decide(model, x) == y, []
    for name in COMPONENTS:
        rows = stands.nonzero().flatten()
        if len(rows) == 0:
            break
        began = clock()
        broken, forwards, backwards = step(name, x[rows], y[rows], images.ids[rows])
        seconds = clock() - began
        stands[rows[broken]] = False
        spent.append(Spent(name, len(rows), int(stands.sum()), seconds, forwards, backwards))
    return stands, spent


def spread(
    model: Classifier, images: Images, differ: Tensor, norm: str, eps: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Verdicts that differ between two seeds of an engine, and between the engines, over images near the radius.

    The seed decides where the nearest adversarial point that FMN finds is within 6 % of the radius, and where it already did
    (``differ``).
    """
    x, y = images.floats(), images.labels
    nearest = Fmn(norm=norm, steps=300)(model, x, y)
    near = ((nearest.distance / eps - 1).abs() < 0.06) & (nearest.forwards > 0)
    some = images.take((near | differ).nonzero().flatten())
    found = {
        name: torch.stack([cascade(engine(model, norm, eps, seed), model, some, options)[0].cpu() for seed in range(SEEDS)])
        for name, engine in (("ours", ours), ("reference", reference))
    }
    pairs = list(itertools.combinations(range(SEEDS), 2))
    within = {name: [int((masks[i] != masks[j]).sum()) for i, j in pairs] for name, masks in found.items()}
    between = [int((one != other).sum()) for one in found["ours"] for other in found["reference"]]
    return {
        "images": len(some),
        "seeds": SEEDS,
        "survive_ours": [int(mask.sum()) for mask in found["ours"]],
        "survive_reference": [int(mask.sum()) for mask in found["reference"]],
        **{
            f"{name}_differs_from_itself": [min(counts), sum(counts) / len(counts), max(counts)]
            for name, counts in within.items()
        },
        "ours_differs_from_reference": [min(between), sum(between) / len(between), max(between)],
    }


def alone(name: str, model: Classifier, images: Images, norm: str, eps: float) -> dict[str, Any]:
    """One component on all images that are right: survivors by both engines, and the differing verdicts."""
    x, y = images.floats(), images.labels
    right = (decide(model, x) == y).nonzero().flatten()
    broken = [
        step(name, x[right], y[right], images.ids[right])[0]
        for step in (ours(model, norm, eps, 0), reference(model, norm, eps, 0))
    ]
    left = [int((~one).sum()) for one in broken]
    return {
        "component": name,
        "right": len(right),
        "ours": left[0],
        "reference": left[1],
        "differ": int((broken[0] != broken[1]).sum()),
    }


def ours(model: Classifier, norm: str, eps: float, seed: int) -> Step:
    """Our components."""

    def step(name: str, x: Tensor, y: Tensor, ids: Tensor) -> tuple[Tensor, int, int]:
        attack = AutoAttack(norm=norm, eps=eps, version="custom", attacks=(name,))
        result = attack(model, x, y, Streams(seed, "speed", ids=ids.tolist(), device=x.device))
        return result.broken, int(result.forwards.sum()), int(result.backwards.sum())

    return step


def reference(model: Classifier, norm: str, eps: float, seed: int) -> Step:
    """The authors' code, as it comes: its own cascade, one component at a time."""
    from pyautoattack import AutoAttack as Authors

    usual = copy.deepcopy(model).to(memory_format=torch.contiguous_format)

    def step(name: str, x: Tensor, y: Tensor, ids: Tensor) -> tuple[Tensor, int, int]:
        asked = Counted(usual)
        names = {"linf": "Linf", "l2": "L2"}
        authors = Authors(asked, norm=names[norm], eps=eps, seed=seed, device=x.device, version="standard")
        authors.attacks_to_run = [COMPONENTS[name]]
        with torch.random.fork_rng():
            x_adv, _ = authors.run_standard_evaluation(x, y)
        return decide(usual, x_adv) != y, asked.forwards, asked.backwards

    return step


def plain(run: Run) -> Classifier:
    """The first network of the defense."""
    fitted = Fitted(run.task, run.store.root / run.suite.name / "parts", Progress(None), run.jobs)
    subject = fitted.take(run.jobs)[0]
    assert isinstance(subject, Subject), subject
    return subject.model.members[0]


def hardened(run: Run, eps: float, epochs: int = 4, batch: int = 100) -> Classifier:
    """A network adversarially trained with PGD of 7 steps in l_inf on the first 10,000 images."""
    place = run.store.root / "speed" / f"{run.suite.name}-{run.task.architecture}-{eps:g}.safetensors"
    net = network(run.task, generator(0, "hardened"))
    if place.exists():
        net.load_state_dict(load_file(place))
        return net
    train = run.task.train.first(min(10_000, len(run.task.train)))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    attack = Pgd(norm="linf", eps=eps, steps=7, restarts=1)
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=generator(0, "order", epoch)).split(batch)
        # From the clean image to the full radius: LeNet does not learn from the largest perturbations at once.
        now = replace(attack, eps=eps * min(1.0, (epoch + 1) / 2))
        for rows in order:
            some = train.take(rows)
            x, y = some.floats(), some.labels
            x_adv = now(net.eval(), x, y, Streams(epoch, "harden", ids=some.ids.tolist())).x_adv
            loss = nn.functional.cross_entropy(net.train()(x_adv), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    place.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in net.state_dict().items()}, place)
    return net.eval()


def _clock(device: str) -> Callable[[], float]:
    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wall if device.startswith("cuda") else time.process_time


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", default="mnist")
    parser.add_argument("--defense", default="naive", help="whose first network is attacked")
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--eps", nargs="+", default=["linf:0.1"], help="threats, NORM:EPS")
    parser.add_argument("--train", type=float, default=0.0, help="train adversarially at this l_inf radius")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--spread", action="store_true")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
