"""What a run consists of: jobs, batches of jobs that share work, and the fitted models they need."""

from __future__ import annotations

import errno
import hashlib
import time
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from attacks import Streams
from attacks.oracle import decide
from bench.evals import Evaluation, Skipped, Subject
from bench.parts import PartStore
from bench.progress import Progress
from bench.registry import Variant, variant_of
from bench.store import Record
from defenses.api import Classifier, Images, Task
from defenses.ensemble import share

APART = 1000
"""Between the training seeds of a subject and of the models whose images attack it."""

ITSELF = "itself"
"""As the name of another model: the subject's own variant."""


@dataclass(frozen=True)
class Job:
    """One record to be made: where it will be, what was asked, how to do it, and whether what is there is moved aside first."""

    variant: Variant
    evaluation: Evaluation
    blank: Record
    fresh: bool = False

    @property
    def model(self) -> tuple[str, int]:
        """What tells the fitted model from others: variant and seed."""
        return self.variant.label, self.blank.seed

    @property
    def title(self) -> str:
        """Who is asked what, in words."""
        return f"{self.variant.label}  seed {self.blank.seed}  {self.blank.eval['name']}"

    def models(self) -> list[tuple[Variant, int]]:
        """Variants and training seeds of the fitted models that it asks for."""
        others = [self.variant if spec == ITSELF else variant_of(spec) for spec in self.evaluation.others]
        return [(self.variant, self.blank.seed), *((other, self.blank.seed + APART) for other in others)]

    def sources(self, subject: Subject) -> dict[str, str]:
        """Hashes of the other models that the evaluation needs, by name.

        Raises:
            RuntimeError: if one cannot be fitted.
        """
        assert subject.other is not None
        return {f"source {name}": weights_hash(subject.other(name)) for name in self.evaluation.others}


@dataclass(frozen=True)
class Ready:
    """A job whose model is fitted; the record names its weights."""

    job: Job
    blank: Record
    subject: Subject


def storage_failed(error: Exception) -> bool:
    """Whether the disk is at fault, so that nothing can be recorded; a defense that cannot find its files is not that."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def together(jobs: list[Job]) -> list[list[Job]]:
    """Jobs in batches that are cheaper to do together; a batch stands where the first of its jobs stood."""
    batches: dict[Hashable, list[Job]] = {}
    for number, job in enumerate(jobs):
        subject = Subject(Classifier(), getattr(job.variant.defense, "sigma", None), job.blank.seed)
        try:
            company = job.evaluation.company(subject)
        except Skipped:
            company = None
        name = job.blank.eval["name"]
        batches.setdefault(number if company is None else (job.blank.seed, name, company), []).append(job)
    return list(batches.values())


class Fitted:
    """Fitted models, each made when first needed and let go after its last job. Equal networks are one object.

    Args:
        task: what defenses are fitted to.
        folder: where trained parts are kept.
        progress: where training reports.
        jobs: everything that will be asked for.
        parts: where trained parts come from.
    """

    def __init__(
        self, task: Task, folder: Path, progress: Progress, jobs: list[Job], parts: type[PartStore] = PartStore
    ) -> None:
        self._task, self._folder, self._progress, self._parts = task, folder, progress, parts
        self._left = Counter(job.model for job in jobs)
        self._models: dict[tuple[str, int], Subject | Exception] = {}
        self._others: dict[tuple[str, int], Subject | Exception] = {}

    def take(self, jobs: list[Job]) -> list[Subject | Exception]:
        """The subjects of some jobs, or what went wrong while making them; storage errors go up."""
        for job in jobs:
            if job.model not in self._models:
                self._models[job.model] = self._fit(job.variant, job.blank.seed, f"{job.variant.label}: ")
        found = [self._models[job.model] for job in jobs]
        shared = iter(share([subject.model for subject in found if isinstance(subject, Subject)]))
        subjects = [replace(subject, model=next(shared)) if isinstance(subject, Subject) else subject for subject in found]
        for job, subject in zip(jobs, subjects, strict=True):
            self._models[job.model] = subject
            self._left[job.model] -= 1
            if self._left[job.model] <= 0:
                del self._models[job.model]
        return subjects

    def other(self, spec: str, own: Variant, seed: int) -> Classifier:
        """The fitted model of another variant, or of :data:`ITSELF`, trained with seed :data:`APART` more than the subject's.

        Raises:
            RuntimeError: if it cannot be fitted.
        """
        variant = own if spec == ITSELF else variant_of(spec)
        found = self._others.get((variant.label, seed))
        if found is None:
            found = self._others[variant.label, seed] = self._fit(variant, seed + APART, f"{variant.label} (surrogate): ")
        if isinstance(found, Exception):
            raise RuntimeError(f"{variant.label}, whose images were asked for, cannot be fitted: {found}") from found
        return found.model

    def _fit(self, variant: Variant, seed: int, prefix: str) -> Subject | Exception:
        prefix, self._progress.prefix = self._progress.prefix, prefix
        try:
            reason = variant.defense.unsuited(self._task)
            if reason:
                return Skipped(reason)
            model = variant.defense.build(self._task)
            parts = self._parts(self._folder, self._task, self._progress)
            variant.defense.fit(model, self._task, parts, seed)
            model.to(self._task.device).eval()
        except Exception as error:  # whatever a defense does wrong becomes its record; the others go on
            if storage_failed(error):
                raise
            return error
        finally:
            self._progress.prefix = prefix
        views = cache(partial(variant.defense.views, model, self._task))  # may take a pass over the training images
        sigma, ended = getattr(variant.defense, "sigma", None), parts.ended()
        other = partial(self.other, own=variant, seed=seed)
        return Subject(model, sigma, seed, epoch_seconds=parts.epoch_seconds(), ended=ended, views=views, other=other)


def price(subject: Subject) -> dict[str, float]:
    """What a fitted defense costs: its parameters, and seconds of training an epoch."""
    found = {"parameters": float(sum(parameter.numel() for parameter in subject.model.parameters()))}
    if subject.epoch_seconds is not None:
        found["training_seconds_per_epoch"] = subject.epoch_seconds
    return found


def forward_milliseconds(subject: Subject, images: Images) -> float:
    """Of a decision on one of the first hundred images, in the fastest of three passes, on a machine as busy as it was."""
    images = images.first(min(100, len(images)))
    x, seconds = images.floats(), []
    streams = Streams(subject.seed, "price", ids=images.ids, device=images.pixels.device)
    for _ in range(3):
        began = time.perf_counter()
        decide(subject.model, x, streams).cpu()  # which waits for the device
        seconds.append(time.perf_counter() - began)
    return 1000 * min(seconds) / len(images)


def weights_hash(model: Classifier) -> str:
    """sha256 over names and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def numerics(evaluation: Evaluation) -> dict[str, Any]:
    """Numerics of what votes, as a record tells them."""
    dtype, _, compiled = (getattr(evaluation, "numerics", None) or "float32").partition(" ")
    return {"dtype": dtype, "compile": bool(compiled)}
