"""Submitting a run: what verified goes under ``leaderboards/results``, records and rows per image, all of it or nothing.

Weights and adversarial examples stay where they are. Nothing of a run is executed: a defense in a file of the user's own is
looked at only if the user names that file.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq

from bench.partial import StoreError, write_atomic
from bench.store import Record, Store
from bench.submissions import ASKED, FILE, Answers, Submission, checked, hashed, read
from bench.suites import SUITES
from bench.verify import Report, find

LIMIT = 20_000_000
"""Bytes of all committed results together."""

MUST = ("rows", "numbers", "data")
"""Checks without which nothing stands behind a number; each can be made where a run was made."""


class Refused(RuntimeError):
    """A run that cannot be submitted; says exactly why."""


def asked(given: Mapping[str, str], prompt: Callable[[str, str], str] | None) -> Answers:
    """What the submitter says, checked.

    Args:
        given: answers that are there already; empty where not.
        prompt: asks for a field, whose purpose it is given, where somebody can answer.

    Raises:
        ValueError: for an answer that is missing or cannot be used.
    """
    missing = [field for field in ASKED if not given[field]]
    if missing and prompt is None:
        told = ", ".join(f"--{field} ({ASKED[field]})" for field in missing)
        raise ValueError(f"missing: {told}; on a terminal they are asked for")
    there = {field: checked(field, text) for field, text in given.items() if text}
    return Answers(**{field: there.get(field) or prompt(field, ASKED[field]) for field in ASKED})  # type: ignore[misc]


def results() -> Path:
    """Where submissions go: the checkout's results.

    Raises:
        ValueError: if the package was installed without a checkout.
    """
    root = SUITES.parent.parent
    if not (root / "pyproject.toml").is_file():
        raise ValueError(f"{root} is an installed package, no checkout: clone the repository, and give --out with its results")
    return SUITES.parent / "results"


def variant_of(run: Path) -> Path:
    """The variant's folder RUNS/SUITE/VARIANT of a run folder at or below it, made absolute.

    Raises:
        ValueError: if there are no records, or it is a folder above a variant.
    """
    if not run.is_dir():
        raise ValueError(f"{run} is no folder; give RUNS/SUITE/VARIANT")
    folders = sorted({path.parents[2] for path in find(run.resolve())})
    if not run.resolve().is_relative_to(folders[0]):
        names = ", ".join(folder.name for folder in folders[:5])
        raise ValueError(f"one variant is submitted at a time, in {run} are {names}; give e.g. {folders[0]}")
    return folders[0]


def submit(run: Path, reports: Sequence[Report], answers: Answers, out: Path) -> tuple[Path, bool]:
    """Write the bundle of a run; returns its folder, and whether anything was new.

    Args:
        run: RUNS/SUITE/VARIANT, or a folder of a budget or seed below it.
        reports: what :func:`bench.verify.verify` says of it.
        answers: what the submitter says.
        out: folder of results.

    Raises:
        Refused: if something does not verify, is unfinished or failed, or there is no room for it.
        ValueError: if the folder is not one variant's.
    """
    source = variant_of(run)
    records = _records(run, reports)
    files = {path.relative_to(source).as_posix(): path.read_bytes() for path in _files(source, records)}
    target = out / source.parent.name / source.name
    old = _earlier(target, answers)
    _no_conflict(target, files)
    new = {name for name in files if not (target / name).exists()}
    if old and not new and files.keys() <= old.files.keys():
        return target, False
    _room(out, sum(len(files[name]) for name in new))
    _write(target, files, _note(records[0], answers, old), out)
    return target, True


def _records(run: Path, reports: Sequence[Report]) -> list[Record]:
    """The records of a run, each of which verified or was skipped."""
    wrong = [
        f"{report.record}: {own.what}: stored {own.stored}, recomputed {own.recomputed}"
        for report in reports
        for own in report.mismatches
    ]
    if wrong:
        raise Refused("refused, because numbers do not verify:\n" + "\n".join(wrong))
    for report in reports:
        if report.status not in ("success", "skipped"):
            raise Refused(f"refused: {report.record} is {report.status} ({report.note}); run it again until all are finished")
        for name in MUST if report.status == "success" else ():
            if name not in report.checked:
                reason = report.not_checked.get(name, "it has none")
                raise Refused(f"refused: {name} of {report.record} could not be checked: {reason}")
    paths = find(run.resolve())
    records = [Store(path.parents[4]).read(path) for path in paths]
    for path, record in zip(paths, records, strict=True):
        if Store(path.parents[4]).path(record) != path:  # of skipped ones, which are not verified
            raise Refused(f"refused: {path} is not where its record belongs")
        if record.status == "skipped" and (record.metrics or record.findings or record.facts):
            raise Refused(f"refused: {path} was skipped, and has numbers")
    if all(record.status == "skipped" for record in records):
        raise Refused(f"refused: nothing was measured in {run}")
    return records


def _files(source: Path, records: Sequence[Record]) -> list[Path]:
    """What is submitted: every record, and the rows of those that have some."""
    store, found = Store(source.parents[1]), []
    for record in records:
        path = store.path(record)
        found.append(path)
        if record.status == "success":
            found.append(path.with_suffix(".parquet"))
            if "x_adv" in pq.read_schema(found[-1]).names:
                raise Refused(f"refused: {found[-1]} holds adversarial examples, which are not submitted")
    return found


def _earlier(target: Path, answers: Answers) -> Submission | None:
    """The submission that is there already, if it is the same submitter's."""
    if not (target / FILE).exists():
        return None
    try:
        old = read(target / FILE)
    except ValueError as error:
        raise Refused(f"refused: {error}") from error
    if old.answers != answers:
        differing = [field for field in ASKED if getattr(old.answers, field) != getattr(answers, field)]
        raise Refused(
            f"refused: {target} was submitted by {old.answers.name!r} on {old.date} with another {', '.join(differing)}; "
            "give the same answers to add to it, or your defense another name"
        )
    return old


def _no_conflict(target: Path, files: Mapping[str, bytes]) -> None:
    """Refuse to replace a file by another."""
    others = [name for name, content in files.items() if (target / name).exists() and (target / name).read_bytes() != content]
    if others:
        raise Refused(
            f"refused: {target} holds other results already ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}); "
            "nothing is replaced: give your defense another name, or remove the old ones first"
        )


def _room(out: Path, size: int) -> None:
    """Refuse what would make the results too large together."""
    there = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if there + size > LIMIT:
        raise Refused(
            f"refused: it has {size / 1e6:.1f} MB and {out} {there / 1e6:.1f} MB; "
            f"all results together may have {LIMIT / 1e6:.0f} MB"
        )


def _note(record: Record, answers: Answers, old: Submission | None) -> Submission:
    """The submission file's content, but for the new hashes."""
    today = datetime.now(UTC).date()
    suite, variant = record.suite["name"], record.defense["variant"]
    return Submission(suite=suite, variant=variant, answers=answers, date=today, files=old.files if old else {})


def _write(target: Path, files: Mapping[str, bytes], note: Submission, out: Path) -> None:
    """Everything into a temporary folder, which then takes the place of the target.

    Raises:
        StoreError: if it cannot be written; then nothing has changed.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        # One level deeper than records are looked for.
        temporary = Path(tempfile.mkdtemp(prefix=".submitting-", dir=out))
        fresh, aside = temporary / "new" / target.name, temporary / "old"
        try:
            if target.exists():
                shutil.copytree(target, fresh)
            for name, content in files.items():
                write_atomic(fresh / name, content)
            hashes = {**note.files, **{name: hashed(fresh / name) for name in files}}
            whole = note.model_copy(update={"files": dict(sorted(hashes.items()))})
            write_atomic(fresh / FILE, (whole.model_dump_json(indent=1) + "\n").encode())
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                os.replace(target, aside)
            os.replace(fresh, target)
        finally:
            if aside.exists() and not target.exists():
                os.replace(aside, target)
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise StoreError(f"cannot write to {out} ({error.strerror}); nothing was submitted", broken=True) from error
