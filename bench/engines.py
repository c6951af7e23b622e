"""`bench doctor --reference`: one network through every engine of every attack, compared image by image."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from attacks import Apgd, ApgdT, Attack, AutoAttack, Bim, Ddn, Fab, FabT, Fgsm, Mim, Pgd, Square, Streams
from attacks.reference import COUNTERPARTS, EngineError, check, installed
from bench.evals import Subject
from bench.jobs import Fitted
from bench.progress import Progress
from bench.request import Request
from bench.runner import Run
from defenses.api import Classifier, Images

IMAGES, LINF, L2 = 40, 0.08, 1.2
"""Images, and the radii at which about half of them break."""


@dataclass(frozen=True)
class Agreement:
    """An attack by one engine beside our own.

    Attributes:
        attack, norm, engine: what ran.
        broken, ours: images broken by the engine, and by the native attack.
        only_engine, only_ours: images that one of them broke and the other did not.
        moved: images broken by both, at other points.
        seconds: what the engine took.
        error: why there is no comparison, or "".
    """

    attack: str
    norm: str
    engine: str
    broken: int = 0
    ours: int = 0
    only_engine: int = 0
    only_ours: int = 0
    moved: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def agrees(self) -> bool:
        """Whether ours is as strong: an image at the edge may go either way, as it does under another seed."""
        return not self.error and self.only_engine <= 1


def attacks() -> Iterator[Attack]:
    """Every attack that another engine has, at a radius that half of the images survive."""
    for norm, eps in (("linf", LINF), ("l2", L2)):
        yield from (kind(norm=norm, eps=eps) for kind in (Apgd, Bim, Mim))
        yield from (kind(norm=norm, eps=eps, steps=50) for kind in (ApgdT, Fab, FabT))
        yield Square(norm=norm, eps=eps, proposals=1000)
        yield Pgd(norm=norm, eps=eps, steps=20, start={"linf": "random", "l2": "random_images"}[norm], restarts=1)
        yield AutoAttack(norm=norm, eps=eps, steps=50, proposals=500)
    yield Fgsm(norm="linf", eps=LINF)
    yield Ddn(eps=L2)


def agreement(data: Path | None = None) -> list[Agreement]:
    """Train a network on the bundled digits (half a minute), and ask all engines about it."""
    model, images = _subject(data)
    table, at_hand = [], installed()
    for attack in attacks():
        names = [name for name, kinds in COUNTERPARTS.items() if any(isinstance(attack, kind) for kind in kinds)]
        for engine in [*names, *(["autoattack"] if isinstance(attack, AutoAttack) else [])]:
            other = replace(attack, engine=engine)  # type: ignore[type-var]
            try:
                check(other)
                table.append(_compare(attack, other, engine, model, images))
            except EngineError as error:
                if engine not in at_hand:
                    raise
                table.append(Agreement(type(attack).__name__, attack.norm, engine, error=str(error)))
    return table


def _compare(attack: Attack, other: Attack, engine: str, model: Classifier, images: Images) -> Agreement:
    streams = Streams(0, "doctor", ids=images.ids)
    ours = attack(model, images.floats(), images.labels, streams)
    began = time.perf_counter()
    theirs = other(model, images.floats(), images.labels, streams)
    seconds = time.perf_counter() - began
    both = ours.broken & theirs.broken
    apart = (ours.x_adv - theirs.x_adv).flatten(1).abs().amax(1) > 1e-6
    only = theirs.broken & ~ours.broken, ours.broken & ~theirs.broken
    broken, own, others, mine, moved = (int(mask.sum()) for mask in (theirs.broken, ours.broken, *only, both & apart))
    return Agreement(type(attack).__name__, attack.norm, engine, broken, own, others, mine, moved, seconds)


def _subject(data: Path | None) -> tuple[Classifier, Images]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        request = Request(defense="randsmooth@sigma=0.1", suite="digits", only=("clean",), runs=Path(folder), data=data)
        run = Run(request, Progress(sys.stderr))
        subject = Fitted(run.task, Path(folder), run.progress, run.jobs).take(run.jobs)[0]
    if not isinstance(subject, Subject):
        raise subject
    return subject.model, run.test.first(IMAGES)
