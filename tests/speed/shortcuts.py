"""What a certificate costs for each smoothing defense, as a ratio to RandSmooth, and what each exact shortcut saves.

    python tests/speed/shortcuts.py --suite mnist --data DIR [--runs runs] [--images 10] [--out FILE.json]

Networks are those of the suite (read from the runs folder, trained where missing). Every defense certifies the same images with
the suite's grid estimator. Time is CPU time of one thread (on CUDA: wall time, synchronised); nothing else differs between two
figures of a ratio. The shortcuts: a median is iterated only where members disagree; a vote that is settled asks no further
member; defenses that share networks are certified together. Verdicts with and without each are compared, and must be equal.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from attacks.streams import Streams
from bench import environment
from bench.evals import Certified, Subject
from bench.jobs import Fitted, together
from bench.progress import Progress
from bench.request import Request
from bench.runner import Run
from defenses.api import Classifier
from defenses.bounds import Question
from defenses.combine import GeometricMedian, Rule
from defenses.ensemble import Ensemble
from defenses.smoothing import Certificates, certify_together

DEFENSES = "randsmooth,smoothed_ensemble,sween,cear_rw,cear_gm"
PAPER = {"randsmooth": 33, "sween": 164, "cear_rw": 162, "cear_gm": 171}
"""Seconds for 10,000 images, CEAR section 5 (ResNet-110, Tesla T4; what is timed is not spelled out)."""


class EveryAnswer(Rule):
    """The same decisions from all members' answers: no early exit."""

    def __init__(self, inner: Rule) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, logits: Tensor) -> Tensor:
        return self.inner(logits)

    def decide(self, logits: Tensor) -> Tensor:
        return self.inner.decide(logits)


class EveryMedian(EveryAnswer):
    """The median iterated on every draw, also where all members agree."""

    def decide(self, logits: Tensor) -> Tensor:
        return self.inner(logits).argmax(-1)


def main() -> None:
    options = _arguments()
    torch.set_num_threads(1)
    fields = {"suite": options.suite, "budget": options.budget, "data": options.data, "runs": options.runs}
    run = Run(Request(defense=options.defenses, only=("certified",), device=options.device, **fields))
    first = min(getattr(job.variant.defense, "sigma", 0.0) for job in run.jobs)
    jobs = [job for job in run.jobs if getattr(job.variant.defense, "sigma", None) == first]
    fitted = Fitted(run.task, run.store.root / run.suite.name / "parts", Progress(None), jobs)
    subjects = [subject for batch in together(jobs) for subject in fitted.take(batch) if isinstance(subject, Subject)]
    evaluation = run.suite.evals["certified"]
    assert isinstance(evaluation, Certified)
    images = run.test.first(options.images)
    bench = Bench(evaluation, subjects[0], images, run.device)
    models = {job.variant.name: subject.model for job, subject in zip(jobs, subjects, strict=True)}

    alone = {name: bench.measure([model]) for name, model in models.items()}
    rows = [_cost(name, bench, alone) for name in models]
    savings = [_saving(name, label, bench, model, rule) for name, model in models.items() for label, rule in _slower(model)]
    seconds, found = bench.measure(list(models.values()))
    same = all(_equal(own, other[1][0]) for own, other in zip(found, alone.values(), strict=True))
    apart = sum(spent for spent, _ in alone.values())
    joint = {"defense": "all", "shortcut": "certified together", "time_without": apart, "time_with": seconds, "equal": same}
    savings.append(joint)
    for row in savings:
        row["ratio"] = row["time_without"] / row["time_with"]
    note = {
        "suite": run.suite.name, "budget": run.suite.budget, "data": images.source, "sigma": first, "images": len(images),
        "estimator": evaluation.estimator, "n": evaluation.n, "device": environment.device_name(run.device),
        "versions": environment.versions(), "made": environment.code(), "costs": rows, "savings": savings,
    }  # fmt: skip
    print(tabulate(rows, headers="keys", floatfmt=".3g"), tabulate(savings, headers="keys", floatfmt=".3g"), sep="\n\n")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(note, indent=1) + "\n")


class Bench:
    """One question asked of some images, again and again."""

    def __init__(self, evaluation: Certified, subject: Subject, images: Any, device: str) -> None:
        grid = evaluation.grid(subject)
        self._question = Question(float(subject.sigma or 0), evaluation.alpha, evaluation.n, grid)
        self._evaluation, self._device, self._x = evaluation, device, images.floats()
        self._streams = Streams(0, "certified", ids=images.ids, device=device)
        self._clock: Callable[[], float] = time.process_time if device == "cpu" else self._wall

    def _wall(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    def measure(self, models: list[Classifier]) -> tuple[float, list[Certificates]]:
        """Seconds per image, and the certificates."""
        options = {"n0": self._evaluation.n0, "estimator": self._evaluation.estimator, "streams": self._streams}
        certify_together(models, self._x[:1], Question(self._question.sigma, 0.001, 100), n0=10)  # warm
        began = self._clock()
        found = certify_together(models, self._x, self._question, batch=100 if self._device == "cpu" else 1000, **options)
        return (self._clock() - began) / len(self._x), found


def _cost(name: str, bench: Bench, alone: dict[str, tuple[float, list[Certificates]]]) -> dict[str, Any]:
    seconds, (found,) = alone[name]
    base = alone["randsmooth"]
    draws, asked = (float(column.double().mean()) for column in (found.draws, found.evaluations))
    return {
        "defense": name,
        "seconds_per_image": seconds,
        "draws_per_image": draws,
        "networks_per_image": asked,
        "ratio_time": seconds / base[0],
        "ratio_time_per_draw": seconds / draws / (base[0] / float(base[1][0].draws.double().mean())),
        "ratio_in_the_paper": PAPER[name] / PAPER["randsmooth"] if name in PAPER else None,
    }


def _slower(model: Classifier) -> list[tuple[str, Callable[[Rule], Rule]]]:
    """The shortcuts that a model takes, each as the rule that goes without."""
    if not isinstance(model, Ensemble) or model.rule.earliest(len(model.members)) >= len(model.members):
        return []
    found: list[tuple[str, Callable[[Rule], Rule]]] = [("early exit", EveryAnswer)]
    if isinstance(model.rule, GeometricMedian):
        found.append(("early exit, and a median only where members disagree", EveryMedian))
    return found


def _saving(name: str, label: str, bench: Bench, model: Classifier, slower: Callable[[Rule], Rule]) -> dict[str, Any]:
    assert isinstance(model, Ensemble)
    other = Ensemble(model.members, slower(model.rule)).eval()
    without, one = bench.measure([other])
    with_, two = bench.measure([model])
    return {"defense": name, "shortcut": label, "time_without": without, "time_with": with_, "equal": _equal(one[0], two[0])}


def _equal(one: Certificates, other: Certificates) -> bool:
    columns = ("label", "radius", "count", "draws")
    return all(torch.equal(getattr(one, column), getattr(other, column)) for column in columns)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", default="digits")
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--defenses", default=DEFENSES)
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
