"""Runs what is missing of a request: fits each defense from shared parts, evaluates it piece by piece, stores every record."""

from __future__ import annotations

import errno
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bench import environment, registry
from bench.evals import Evaluation, Skipped, Subject
from bench.jobs import ITSELF, Fitted, Job, Ready, price, together, weights_hash
from bench.partial import StoreError, differences
from bench.progress import Progress
from bench.registry import Variant, resolve
from bench.store import Finding, Record, Store, as_json
from bench.suites import SuiteError, load_suite, unknown
from bench.tasks import prepare
from defenses.api import Classifier
from defenses.recipe import settings


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks for; the same words as on the command line.

    Attributes:
        defense: "a,b", "all", "name@field=value", "./mine.py" or "./mine.py:name".
        suite: name of a suite, or the path of a TOML file.
        budget: smoke, quick or paper.
        seeds: training seeds; every one trains its own networks.
        only: evaluations to run; all by default.
        device: auto, cpu, cuda, cuda:1.
        data: folder of data sets; the environment variable BENCH_DATA by default.
        runs: folder of results.
        fresh: move finished results aside and compute them again.
        shard: (i, k), do every k-th piece of work, from the i-th of 1 to k; :mod:`bench.merge` brings shards together.
    """

    defense: str
    suite: str
    budget: str = "quick"
    seeds: tuple[int, ...] = (0,)
    only: tuple[str, ...] = ()
    device: str = "auto"
    data: Path | None = None
    runs: Path = Path("runs")
    fresh: bool = False
    shard: tuple[int, int] = (1, 1)


class Run:
    """A request made concrete: suite, data and jobs.

    Raises:
        ValueError: for names, devices, suites or data that cannot be used (before anything is written).
    """

    def __init__(self, request: Request, progress: Progress | None = None) -> None:
        self.request = request
        self.progress = progress or Progress(None)
        self.suite = load_suite(request.suite, request.budget)
        self.device = environment.device(request.device)
        if not 1 <= request.shard[0] <= request.shard[1]:
            raise ValueError(f"--shard: I/K with 1 <= I <= K, such as 2/3, got {request.shard[0]}/{request.shard[1]}")
        for name in request.only:
            if name not in self.suite.evals:
                raise SuiteError(f"--only: {unknown(name, self.suite.evals)}")
        self.task, self.test = prepare(self.suite, self.device, request.data)
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

    def _plan(self) -> Iterator[Job]:
        wanted = self.request.only or tuple(self.suite.evals)
        for seed in self.request.seeds:
            for variant in self.variants:
                subject = Subject(Classifier(), getattr(variant.defense, "sigma", None), seed)
                for name in wanted:
                    evaluation = self.suite.evals[name]
                    yield Job(variant, evaluation, self._blank(variant, seed, name, evaluation, subject))

    def _blank(self, variant: Variant, seed: int, name: str, evaluation: Evaluation, subject: Subject) -> Record:
        """The record of a job before it is done."""
        try:
            asked = evaluation.resolved(subject)
        except Skipped:
            asked = evaluation.model_dump(mode="json")
        images = self.test.first(evaluation.images)
        roles = {role: as_json(settings(own)) for role, own in self.task.roles.items()}
        attack = getattr(evaluation, "attack", "")
        versions = environment.versions() | registry.packages(variant, evaluation.others, attack, self.request.suite)
        return Record(
            status="running",
            suite={"name": self.suite.name, "version": self.suite.version, "budget": self.suite.budget},
            defense={"name": variant.name, "variant": variant.label, "fields": as_json(settings(variant.defense))},
            eval={"name": name, "fields": asked},
            seed=seed,
            task={
                "dataset": self.suite.dataset,
                "architecture": self.task.architecture,
                "recipe": as_json(settings(self.task.recipe)),
                **({"roles": roles} if roles else {}),
                "train_images": len(self.task.train),
                "validation_images": len(self.task.validation),
            },
            hashes={"train": self.task.train.hash, "images": images.hash, "data": images.source},
            numerics={**_numerics(evaluation), "rng": f"torch-{torch.device(self.device).type}"},
            made={**environment.code(), "versions": versions, "device": environment.device_name(self.device)},
        )

    def missing(self) -> list[Job]:
        """Jobs without a finished record.

        Raises:
            StoreError: if a finished record answers another request; names every field that differs.
        """
        jobs = []
        for job in self.jobs:
            old = self.store.find(job.blank)
            if old is None or old.status in ("error", "running") or self.request.fresh:
                jobs.append(job)
                continue
            wrong = differences(old.request(), job.blank.request())
            if wrong:
                raise StoreError(
                    f"{self.store.path(job.blank)} answers another request: {wrong}; "
                    "use --fresh to move it aside, or another --runs DIR"
                )
        return jobs

    def execute(self) -> list[Record]:
        """Do what is missing; returns the records of all jobs, in order.

        Raises:
            StoreError: if the folder is in use, cannot be written, or holds results of another request.
        """
        with self.store.locked(self.suite.name), environment.measuring():
            missing = self.missing()
            if self.request.fresh:
                for job in missing:
                    self.store.move_aside(job.blank)
            try:
                done = 0
                fitted = Fitted(self.task, self.store.root / self.suite.name / "parts", self.progress, missing)
                for batch in together(missing):
                    done += len(batch)
                    self.progress.prefix = f"[{done}/{len(missing)}] "
                    self._evaluate(batch, fitted)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EPERM):
                    raise StoreError(
                        f"cannot write under {self.store.root} ({error.strerror}); everything finished is kept: "
                        "make room and give the same command again",
                        broken=True,
                    ) from error
                raise
        return [found for job in self.jobs if (found := self.store.find(job.blank)) is not None]

    def _evaluate(self, jobs: list[Job], fitted: Fitted) -> None:
        """Do jobs that ask the same question; each leaves a record, whatever happens."""
        subjects = fitted.take(jobs)
        ready: list[Ready] = []
        for job, subject in zip(jobs, subjects, strict=True):
            if isinstance(subject, Exception):
                self._failed(job.blank, subject)
                continue
            try:
                sources = _sources(job.evaluation, subject)
            except RuntimeError as error:
                self._failed(job.blank, error)
                continue
            blank = replace_hashes(job.blank, weights=weights_hash(subject.model), **sources)
            self.store.write(blank)
            ready.append(Ready(job, blank, subject))
        if ready:
            self._measure(ready)

    def _measure(self, ready: list[Ready]) -> None:
        """Measure fitted models together, or, where one of them spoils the common work, each alone."""
        began = time.perf_counter()
        try:
            tables = self._rows(ready)
        except (OSError, StoreError):
            raise
        except Exception as error:  # a failed evaluation is a stored record; the others go on
            if len(ready) > 1:
                for one in ready:
                    self._measure([one])
            else:
                self._failed(ready[0].blank, error)
            return
        if tables is None:
            return
        cost = {"seconds": time.perf_counter() - began, "measured_together": float(len(ready))}
        for one, rows in zip(ready, tables, strict=True):
            self._finish(one, rows, cost)

    def _finish(self, one: Ready, rows: pd.DataFrame, cost: dict[str, float]) -> None:
        """Turn rows into numbers and store both."""
        try:
            outcome = one.job.evaluation.summarise(rows, one.subject)
            facts = one.job.variant.defense.facts(one.subject.model)
            cost = {**cost, **price(one, self.test)}
        except Exception as error:  # a wrong number is a stored record; the others go on
            self._failed(one.blank, error)
            return
        self.store.write_rows(one.blank, rows)
        unsound = one.job.variant.defense.unsound
        findings = [*outcome.findings, *([Finding(kind="unsound", detail=unsound)] if unsound else [])]
        findings += [Finding(kind="training_ended_early", detail=text) for text in one.subject.ended]
        found = {"metrics": outcome.metrics, "findings": findings, "facts": facts, "cost": cost}
        record = one.blank.model_copy(update={"status": "success", **found})
        self.store.write(record)
        self.store.partial(record).discard()

    def _failed(self, blank: Record, error: Exception) -> None:
        """Store that an evaluation makes no sense, or what went wrong; finished pieces stay for the next attempt."""
        if isinstance(error, Skipped):
            self.store.write(blank.model_copy(update={"status": "skipped", "error": str(error)}))
            return
        self.progress.say(f"{blank.defense['variant']} {blank.eval['name']}: {type(error).__name__}: {error}")
        text = "".join(traceback.format_exception(error))
        self.store.write(blank.model_copy(update={"status": "error", "error": text}))

    def _rows(self, ready: list[Ready]) -> list[pd.DataFrame] | None:
        """All rows of evaluations: pieces on disk are read, this shard's others computed and kept; None if some are missing."""
        evaluation, subjects = ready[0].job.evaluation, [one.subject for one in ready]
        pieces = evaluation.pieces(subjects[0])
        partials = [self.store.partial(one.blank) for one in ready]
        for one, partial in zip(ready, partials, strict=True):
            networks = {f"hashes.{name}": value for name, value in one.blank.made_of().items()}
            request = {**one.blank.request(), **networks, "numerics": one.blank.numerics}
            partial.open(request)
        tables: list[list[pd.DataFrame]] = [[] for _ in ready]
        who = ready[0].job.variant.label if len(ready) == 1 else f"{len(ready)} defenses"
        blank = ready[0].blank
        complete = True
        with self.progress.step(f"{who} {blank.eval['name']} (seed {blank.seed})") as report:
            for number, piece in enumerate(pieces):
                found = {place: rows for place, part in enumerate(partials) if (rows := part.piece(number)) is not None}
                new = [place for place in range(len(ready)) if place not in found]
                if new and not self._mine(number):
                    complete = False
                    continue
                if new:
                    images = self.test.take(piece.rows)
                    asked = [replace(subjects[place], scratch=partials[place].scratch(number)) for place in new]
                    made = evaluation.measure(asked, images, piece)
                    for place, rows in zip(new, made, strict=True):
                        found[place] = rows
                        partials[place].keep(number, rows)
                    report(number + 1, len(pieces), {})
                for place, table in enumerate(tables):
                    table.append(found[place])
        return [pd.concat(table, ignore_index=True) for table in tables] if complete else None

    def _mine(self, number: int) -> bool:
        """Whether a piece of work belongs to this shard."""
        place, shards = self.request.shard
        return number % shards == place - 1


def _sources(evaluation: Evaluation, subject: Subject) -> dict[str, str]:
    """Hashes of the other models that an evaluation needs, by name."""
    assert subject.other is not None
    return {f"source {name}": weights_hash(subject.other(name)) for name in evaluation.others}


def _numerics(evaluation: Evaluation) -> dict[str, Any]:
    """Numerics of what votes, as a record tells them."""
    dtype, _, compiled = (getattr(evaluation, "numerics", None) or "float32").partition(" ")
    return {"dtype": dtype, "compile": bool(compiled)}


def replace_hashes(record: Record, **hashes: str) -> Record:
    """The record with further hashes."""
    return record.model_copy(update={"hashes": {**record.hashes, **hashes}})


def run(**fields: Any) -> list[Record]:
    """``run(defense="cear_rw", suite="digits", ...)``: do a :class:`Request` and return its records."""
    return Run(Request(**fields), Progress(sys.stderr)).execute()
