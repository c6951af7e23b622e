"""What parts and evaluations will cost, with the basis of every estimate.

An estimate is the cost of stored records that asked the same question on this device, where there are some; else counted passes
of the network times the seconds of a pass, which a short probe measures. Attacks and certificates that end early cost less than
what is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from attacks import Attack, AutoAttack
from bench.evals import Certified, Clean, Robust, Skipped, Subject
from bench.jobs import Job
from bench.plan import duration
from bench.store import Record
from defenses.api import Classifier, Part, Task, Weights
from defenses.nets import network
from defenses.training import Trained

PROBE = 0.3
"""Seconds for which a pass is timed."""


ATTACKED = 100
"""Images that are attacked together, at most."""

SMALL = 64
"""Images a step that is timed, at most: on a CPU a whole one of a deep network takes minutes."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of one worker, NaN where nothing is known, and where they come from."""

    seconds: float
    basis: str

    @property
    def known(self) -> bool:
        """Whether there is a number."""
        return self.seconds == self.seconds

    def __str__(self) -> str:
        return f"{duration(self.seconds)} ({self.basis})" if self.known else self.basis


@dataclass(frozen=True)
class Probe:
    """Seconds that were measured on a device.

    Attributes:
        forward, backward: of a pass of the task's network for one image, in batches of a hundred.
        steps: of a training step of a part, by what :func:`training` tells of it.
        kept: bytes that a pass keeps of an image for its gradient.
        weights: bytes of the task's network.
    """

    forward: float
    backward: float
    steps: Mapping[str, float]
    kept: float = float("nan")
    weights: float = float("nan")


def probe(task: Task, parts: Sequence[Part]) -> Probe:
    """Time a pass of the task's network, and three steps of every kind of training, on the task's device."""
    steps = {}
    for part in parts:
        if isinstance(part, Trained) and training(part) not in steps:
            with suppress(Exception):  # a training that fails says so when it is its turn
                steps[training(part)] = _step(task, part)
    net, x = network(task, architecture=task.architecture).to(task.device).eval(), task.validation.floats(slice(0, 100))
    weights = sum(tensor.nbytes for tensor in net.parameters())
    return Probe(*timed(net, x), steps, kept(net, x[:2].clone()), weights)


def kept(net: Classifier, x: torch.Tensor) -> float:
    """Bytes that a pass keeps of an image of ``x`` (n c h w) until its gradient is asked for, weights left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in net.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        answer = net(x)  # alive until everything is counted: memory that is freed is given out again
        total = sum(found.values())
    del answer
    return total / len(x)


def training(part: Trained) -> str:
    """What tells trainings whose steps cost the same: networks of a role differ in seeds and weights of losses only."""
    return repr((part.role, type(part.loss).__name__, part.architecture, part.recipe.batch, len(part.needs)))


def _step(task: Task, part: Trained) -> float:
    """Seconds of a training step with untrained needs, from steps of :data:`SMALL` images. What is measured after an epoch is
    left out."""
    batch = min(part.recipe.batch, SMALL)
    few = task.train.take(slice(0, 3 * batch))
    small = replace(task, train=few, validation=task.validation.take(slice(0, 2)))
    workshop = _Stopwatch()
    short = replace(part, recipe=replace(part.recipe, epochs=1, batch=batch))
    short.make(small, [need.outline(small) or {} for need in part.needs], workshop)
    return workshop.seconds / -(-len(few) // batch) * part.recipe.batch / batch


class _Stopwatch:
    """A workshop that keeps the seconds of the steps alone."""

    seconds = 0.0

    def load(self) -> None:
        """Nothing was made before."""

    def save(self, weights: Weights, state: dict[str, Any]) -> None:
        self.seconds = state["log"][-1]["seconds"]

    def report(self, done: int, total: int, facts: dict[str, float]) -> None:
        """Nobody listens."""


def timed(net: Classifier, x: torch.Tensor) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass for an image of ``x`` (n c h w)."""
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        forward = _median(lambda: net(x), x.device)
    both = _median(lambda: torch.autograd.grad(net(leaf).sum(), leaf), x.device)
    return forward / len(x), max(0.0, both - forward) / len(x)


def _median(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call, after a first one."""
    found: list[float] = []
    call()
    while not found or sum(found) < PROBE:
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return sorted(found)[len(found) // 2]


class Costs:
    """Estimates from records, and from a probe.

    Args:
        records: finished ones; those of the device serve.
        device: what it calls itself.
        measured: of the device; None if only records serve.
    """

    def __init__(self, records: Sequence[Record], device: str, measured: Probe | None) -> None:
        self._records: dict[str, list[Record]] = {}
        self._probe = measured
        for record in records:
            if record.status == "success" and record.cost.get("seconds") and record.made.get("device") == device:
                self._records.setdefault(_question(record), []).append(record)

    def job(self, job: Job) -> Estimate:
        """Of an evaluation by itself, its model being fitted."""
        same = self._records.get(_question(job.blank), [])
        own = [record for record in same if record.defense["variant"] == job.variant.label]
        if same:
            each = [_seconds(record) / record.eval["fields"]["images"] for record in own or same]
            who = "of this variant" if own else "of other defenses"
            return Estimate(job.evaluation.images * sum(each) / len(each), f"as {len(each)} stored records {who}")
        passes = counted(job)
        if passes is None or self._probe is None:
            return Estimate(float("nan"), "no stored record, and its passes cannot be counted")
        forward, backward = passes
        image = forward * self._probe.forward + backward * self._probe.backward
        networks = job.blank.members
        basis = f"{forward + backward:,} x {networks} network passes an image, if nothing ends early; a pass was timed"
        return Estimate(job.evaluation.images * networks * image, basis)

    def memory(self, parts: Sequence[Part], jobs: Sequence[Job]) -> float:
        """Bytes of the largest step: what passes keep, and of training weights, gradients and two moments. NaN: unknown."""
        if self._probe is None:
            return float("nan")
        kept, weights = self._probe.kept, self._probe.weights
        trained = [part for part in parts if isinstance(part, Trained)]
        steps = [getattr(part, "members", 1) * (part.recipe.batch * kept + 4 * weights) for part in trained]
        return max([*steps, *(job.blank.members * (ATTACKED * kept + weights) for job in jobs)], default=0.0)

    def part(self, part: Part, images: int) -> Estimate:
        """Of a part, its needs being made, with so many training images."""
        step = self._probe.steps.get(training(part)) if self._probe and isinstance(part, Trained) else None
        if step is None or not isinstance(part, Trained):
            return Estimate(float("nan"), "no training whose steps could be timed")
        steps = -(-images // part.recipe.batch)
        return Estimate(part.recipe.epochs * steps * step, f"{part.recipe.epochs} epochs of {steps} steps, three timed")


def counted(job: Job) -> tuple[int, int] | None:
    """(forward, backward) passes of a model an image, if nothing ends early; None where they cannot be counted."""
    evaluation, subject = job.evaluation, Subject(Classifier(), getattr(job.variant.defense, "sigma", None), 0)
    if isinstance(evaluation, Clean):
        return 1, 0
    if type(evaluation) is Certified:
        try:
            runs = len(evaluation.grid(subject)) if evaluation.preset else 1
        except Skipped:
            return 0, 0
        return runs * (evaluation.n0 + evaluation.n), 0
    if not isinstance(evaluation, Robust):
        return None
    budgets = 1 if evaluation.looks_for_nearest else len(evaluation.eps)
    forward, backward = _of_attack(evaluation._plain(evaluation.eps[0]), 10)
    return budgets * evaluation.eot * forward, budgets * evaluation.eot * backward


def _of_attack(attack: Attack, classes: int) -> tuple[int, int]:
    """(forward, backward) passes of an attack on an image that stands."""
    if isinstance(attack, AutoAttack):
        each = [_of_attack(own, classes) for _, own in attack.plan(classes).components]
        return sum(forward for forward, _ in each), sum(backward for _, backward in each)
    asked = [getattr(attack, name, None) or 1 for name in ("steps", "restarts", "targets")]
    rounds = int(getattr(attack, "proposals", 0) or asked[0] * asked[1] * asked[2])
    return rounds, 0 if hasattr(attack, "proposals") else rounds


def _seconds(record: Record) -> float:
    return record.cost["seconds"] / record.cost.get("measured_together", 1.0)


def _question(record: Record) -> str:
    """What tells questions of equal cost an image: the evaluation but for its images, data, network, and members."""
    asked = {name: value for name, value in record.eval["fields"].items() if name != "images"}
    who = (record.task.get("dataset"), record.architecture, record.members)
    return repr((sorted(asked.items(), key=str), who))
