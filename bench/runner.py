"""Runs what is missing of a request: fits each defense from shared parts, evaluates it piece by piece, stores every record."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import pandas as pd
import torch

from bench import environment, plugins, registry
from bench.evals import Evaluation, Skipped, Subject
from bench.executors import Executor, opened
from bench.forecast import Forecast
from bench.jobs import ITSELF, Fitted, Job, Ready, numerics, price, together, weights_hash
from bench.locks import locked
from bench.partial import StoreError, differences
from bench.pieces import Pieces
from bench.progress import Progress
from bench.registry import Variant, resolve
from bench.request import Request
from bench.spread import Spread
from bench.store import Finding, Record, Store, as_json
from bench.suites import SuiteError, load_suite, unknown
from bench.tasks import prepare
from defenses.api import Classifier
from defenses.recipe import settings


class Run:
    """A request made concrete: suite, data and jobs.

    Args:
        executor: workers that other runs share; without it those that the request names, which this run lets go.

    Attributes:
        plan: of what is missing, if somebody made one; the longest work then begins first.

    Raises:
        ValueError: for names, devices, suites or data that cannot be used (before anything is written).
    """

    def __init__(self, request: Request, progress: Progress | None = None, executor: Executor | None = None) -> None:
        self.request = request
        self.progress = progress or Progress(None)
        self.suite = load_suite(request.suite, request.budget)
        if not 1 <= request.shard[0] <= request.shard[1]:
            raise ValueError(f"--shard: I/K with 1 <= I <= K, such as 2/3, got {request.shard[0]}/{request.shard[1]}")
        for name in request.only:
            if name not in self.suite.evals:
                raise SuiteError(f"--only: {unknown(name, self.suite.evals)}")
        # After the suite, whose own attacks go to the workers.
        self._own = None if executor else opened(request.executor, request.address, request.device)
        self.executor = executor or self._own
        # With workers elsewhere this process only hands over and keeps.
        self.device = self.executor.device if self.executor else environment.device(request.device)
        self.device_name = self.executor.device_name if self.executor else environment.device_name(self.device)
        self.task, self.test = prepare(self.suite, "cpu" if self.executor else self.device, request.data)
        for name, evaluation in self.suite.evals.items():
            for spec in evaluation.others:  # a wrong name is better refused before the work than after
                if spec != ITSELF and len(resolve(spec, {})) != 1:
                    raise SuiteError(f"evals.{name}.sources: one variant each, got {spec!r}")
        suited, warnings = registry.suited(self.task)
        for text in warnings:
            self.progress.say(text)
        self.variants = resolve(request.defense, self.suite.sweep, suited)
        self.store = Store(request.runs)
        self.jobs = list(self._plan())
        self.plan: Forecast | None = None

    def _plan(self) -> Iterator[Job]:
        wanted = dict.fromkeys(self.request.only or self.suite.evals)
        for seed in dict.fromkeys(self.request.seeds):
            for variant in self.variants:
                subject = Subject(Classifier(), getattr(variant.defense, "sigma", None), seed)
                for name in wanted:
                    evaluation = self.suite.evals[name]
                    yield Job(variant, evaluation, self._blank(variant, seed, name, evaluation, subject), self.request.fresh)

    def _blank(self, variant: Variant, seed: int, name: str, evaluation: Evaluation, subject: Subject) -> Record:
        """The record of a job before it is done."""
        try:
            asked = evaluation.resolved(subject)
        except Skipped:
            asked = evaluation.model_dump(mode="json")
        images = self.test.first(evaluation.images)
        roles = {role: as_json(settings(own)) for role, own in self.task.roles.items()}
        attack = asked.get("attack", "")
        versions = environment.versions() | registry.packages(variant, evaluation.others, attack, self.request.suite)
        return Record(
            status="running",
            suite={"name": self.suite.name, "version": self.suite.version, "budget": self.suite.budget},
            defense={
                "name": variant.name,
                "variant": variant.label,
                "fields": as_json(settings(variant.defense)),
                **plugins.fingerprint(variant.module),
            },
            eval={"name": name, "fields": asked, **(plugins.fingerprint(plugins.attack_origin(attack)) if attack else {})},
            seed=seed,
            task={
                "dataset": self.suite.dataset,
                "architecture": self.task.architecture,
                "recipe": as_json(settings(self.task.recipe)),
                **({"roles": roles} if roles else {}),
                "train_images": len(self.task.train),
                "validation_images": len(self.task.validation),
            },
            hashes={
                "train": self.task.train.hash,
                "validation": self.task.validation.hash,
                "images": images.hash,
                "data": images.source,
            },
            numerics={**numerics(evaluation), "rng": f"torch-{torch.device(self.device).type}"},
            made={**environment.code(), "versions": versions, "device": self.device_name},
        )

    def close(self) -> None:
        """Let go of the run's own workers; only for a run that is not executed."""
        if self._own:
            self._own.close()

    def missing(self) -> list[Job]:
        """Jobs without a finished record.

        Raises:
            StoreError: if a finished record answers another request; names every field that differs.
        """
        jobs = []
        for job in self.jobs:
            old = self.store.find(job.blank)
            if job.fresh or old is None or old.status in ("error", "running"):
                jobs.append(job)
                continue
            wrong = differences(old.request(), job.blank.request())
            if wrong:
                raise StoreError(
                    f"{self.store.path(job.blank)} answers another request: {wrong}; "
                    "use --fresh to move it aside, or another --runs DIR"
                )
        return jobs

    def stands_in_the_way(self, job: Job) -> bool:
        """Whether a record in the place of a job, or pieces of one, answer another request."""
        old, asked = self.store.find(job.blank), job.blank.request()
        unfinished = self.store.partial(job.blank).differs({**asked, "numerics": job.blank.numerics})
        return unfinished or (old is not None and bool(differences(old.request(), asked)))

    def execute(self) -> list[Record]:
        """Do what is missing; returns the records of all jobs, in order.

        Raises:
            StoreError: if the folder is in use, cannot be written, or holds results of another request.
        """
        with closing(self), locked(self.store.root / self.suite.name), environment.measuring():
            missing = self.missing()
            for job in missing:
                if job.fresh:
                    self.store.move_aside(job.blank)
            try:
                if self.executor:
                    Spread(self, missing, self.executor).execute()
                else:
                    self._one_by_one(missing)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EPERM):
                    raise StoreError(
                        f"cannot write under {self.store.root} ({error.strerror}); everything finished is kept: "
                        "make room and give the same command again",
                        broken=True,
                    ) from error
                raise
        return [found for job in self.jobs if (found := self.store.find(job.blank)) is not None]

    def _one_by_one(self, missing: list[Job]) -> None:
        """Do jobs in this process, in order."""
        done = 0
        fitted = Fitted(self.task, self.store.root / self.suite.name / "parts", self.progress, missing)
        for batch in together(missing):
            done += len(batch)
            self.progress.prefix = f"[{done}/{len(missing)}] "
            for pieces in self.begun(self.ready(batch, fitted)):
                self._measure(pieces)

    def ready(self, jobs: list[Job], fitted: Fitted) -> list[Ready]:
        """Those of some jobs whose models can be fitted, each with its record begun; the others leave a record of why not."""
        ready: list[Ready] = []
        for job, subject in zip(jobs, fitted.take(jobs), strict=True):
            if isinstance(subject, Exception):
                self.failed(job.blank, subject)
                continue
            try:
                sources = job.sources(subject)
            except RuntimeError as error:
                self.failed(job.blank, error)
                continue
            blank = job.blank.hashed(weights=weights_hash(subject.model), **sources)
            self.store.write(blank)
            ready.append(Ready(job, blank, subject))
        return ready

    def begun(self, ready: list[Ready]) -> list[Pieces]:
        """The pieces of jobs, of all together, or, where one of them spoils the common work, of each alone."""
        if not ready:
            return []
        try:
            return [Pieces(ready, self.store)]
        except (OSError, StoreError):
            raise
        except Exception as error:  # a failed evaluation is a stored record; the others go on
            return self.alone(ready, error)

    def alone(self, ready: Sequence[Ready], error: Exception) -> list[Pieces]:
        """What becomes of jobs that failed together: each is begun alone; one that was alone leaves its record."""
        if len(ready) > 1:
            return [pieces for one in ready for pieces in self.begun([one])]
        self.failed(ready[0].blank, error)
        return []

    def _measure(self, pieces: Pieces) -> None:
        """Measure fitted models in this process."""
        try:
            with self.progress.step(pieces.title) as report:
                for number in self.mine(pieces):
                    if places := pieces.absent(number):
                        pieces.keep(number, places, pieces.measure(number, places, self.test))
                        report(number + 1, len(pieces.whole), {})
        except (OSError, StoreError):
            raise
        except Exception as error:
            for own in self.alone(pieces.ready, error):
                self._measure(own)
        else:
            self.conclude(pieces)

    def mine(self, pieces: Pieces) -> range:
        """Numbers of the pieces that belong to this shard."""
        place, shards = self.request.shard
        return range(place - 1, len(pieces.whole), shards)

    def conclude(self, pieces: Pieces) -> None:
        """Turn pieces into records, unless some are missing."""
        tables = pieces.tables()
        if tables is None:
            return
        for one, (rows, cost) in zip(pieces.ready, tables, strict=True):
            self._finish(one, rows, cost)

    def _finish(self, one: Ready, rows: pd.DataFrame, cost: dict[str, float]) -> None:
        """Turn rows into numbers and store both."""
        try:
            outcome = one.job.evaluation.summarise(rows, one.subject)
            facts = one.job.variant.defense.facts(one.subject.model)
            cost = {**cost, **price(one.subject)}
        except Exception as error:  # a wrong number is a stored record; the others go on
            self.failed(one.blank, error)
            return
        self.store.write_rows(one.blank, rows)
        unsound = one.job.variant.defense.unsound
        findings = [*outcome.findings, *([Finding(kind="unsound", detail=unsound)] if unsound else [])]
        findings += [Finding(kind="training_ended_early", detail=text) for text in one.subject.ended]
        found = {"metrics": outcome.metrics, "findings": findings, "facts": facts, "cost": cost}
        record = one.blank.model_copy(update={"status": "success", **found})
        self.store.write(record)
        self.store.partial(record).discard()

    def failed(self, blank: Record, error: Exception) -> None:
        """Store that an evaluation makes no sense, or what went wrong; finished pieces stay for the next attempt."""
        if isinstance(error, Skipped):
            self.store.write(blank.model_copy(update={"status": "skipped", "error": str(error)}))
            return
        self.progress.say(f"{blank.defense['variant']} {blank.eval['name']}: {type(error).__name__}: {error}")
        text = "".join(traceback.format_exception(error))
        self.store.write(blank.model_copy(update={"status": "error", "error": text}))


def run(**fields: Any) -> list[Record]:
    """``run(defense="cear_rw", suite="digits", ...)``: do a :class:`Request` and return its records."""
    return Run(Request(**fields), Progress(sys.stderr)).execute()
