"""Recompute what stored records say: numbers from rows, data, weights, clean decisions, adversarial examples, certificates.

Nothing is trained, downloaded or written. What cannot be recomputed is named with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from bench import checks, environment
from bench.evals import Certified
from bench.mismatch import Mismatch, Unknown
from bench.partial import StoreError
from bench.progress import Progress
from bench.registry import from_file
from bench.remeasure import measured
from bench.restore import Case
from bench.stock import Impossible, Stock
from bench.store import FORMAT, Record, Store

FORMATS = ("text", "json")


@dataclass
class Report:
    """What became of one record.

    Attributes:
        record: its path.
        status: of the record; "unreadable" if it is none.
        checked: what was recomputed, whether it holds or not.
        not_checked: what could not be, and why.
        mismatches: what does not hold.
        times: what of the cost nobody can check: it was measured once, on a machine as busy as it was.
        note: why nothing was checked.
    """

    record: str
    status: str
    checked: list[str] = field(default_factory=list)
    not_checked: dict[str, str] = field(default_factory=dict)
    mismatches: list[Mismatch] = field(default_factory=list)
    times: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.mismatches:
            return "MISMATCH"
        if self.status != "success":
            return self.status
        if self.not_checked:
            return "holds in part"
        return "holds but for times" if self.times else "holds"


def verify(
    path: Path, data: Path | None = None, sample: int = 5, progress: Progress | None = None, file: Path | None = None
) -> list[Report]:
    """Recompute what can be recomputed of every record at or below a path.

    Args:
        path: a record's JSON file, or a folder above records: of a seed, budget, variant, suite, or a whole run folder.
        data: folder of data sets; the environment's BENCH_DATA by default.
        sample: images of a certified record that are certified anew.
        progress: where to tell how far it is.
        file: a .py file of the caller's with defenses of the records; it is executed.

    Raises:
        ValueError: if there is no record, the sample is negative, or the file has no defense.
    """
    if sample < 0:
        raise ValueError(f"--sample: how many images to certify anew, at least 0, got {sample}")
    paths = find(path)
    if file is not None:
        from_file(file)  # what is wrong with it is better said now than as something that could not be checked
    stock, reports = Stock(data, file), []
    tell = (progress or Progress(None)).step(f"verifying {path}")
    # Whatever is drawn globally leaves no trace.
    with environment.measuring(), torch.random.fork_rng(devices=[]), tell as report:
        for number, record in enumerate(paths):
            reports.append(_verify(record, stock, sample))
            report(number + 1, len(paths), {})
    return reports


def find(path: Path) -> list[Path]:
    """The records at or below a path, in a fixed order.

    Raises:
        ValueError: if there are none.
    """
    if path.is_file() and path.suffix == ".json":
        return [path]
    found = sorted(own for own in path.rglob("*.json") if re.fullmatch(r"seed-?\d+", own.parent.name)) if path.is_dir() else []
    if not found:
        raise ValueError(f"there is no record at or below {path}; give a record's .json file or a folder above, such as --runs")
    return found


def _verify(path: Path, stock: Stock, sample: int) -> Report:
    """One record."""
    content = _read(path)
    if isinstance(content, Report):
        return content
    report = Report(str(path), content.status, times=[name for name in content.cost if name not in checks.PRICED])
    if content.status != "success":
        report.note = (content.error or "it is not finished").strip().splitlines()[-1]
        return report
    case = Case(path, content, stock, sample)
    names = ["request", "networks", "rows", "numbers", "data", "weights"]
    names += ["cost"] if any(name in content.cost for name in checks.PRICED) else []
    planned = {name: getattr(checks, name) for name in names}
    try:
        if isinstance(case.evaluation, Certified):
            planned["radii"] = checks.radii
        name, check = measured(case)
        planned[name] = check
    except Impossible as reason:
        report.not_checked["measurements"] = str(reason)
    for name, check in planned.items():
        try:
            for found in check(case):
                if isinstance(found, Unknown):
                    report.not_checked[found.what] = found.reason
                else:
                    report.mismatches.append(found)
            report.checked.append(name)
        except Impossible as reason:
            report.not_checked[name] = str(reason)
        except Exception as error:  # what was measured once can be measured again: that it cannot is what was looked for
            report.mismatches.append(Mismatch(name, "could be computed", f"{type(error).__name__}: {error}"))
    return report


def _read(path: Path) -> Record | Report:
    """The record, or what is wrong with it."""
    try:
        return Store(path.parent).read(path)
    except StoreError as error:
        try:
            form = json.loads(path.read_bytes()).get("format", FORMAT)
        except (ValueError, AttributeError):
            form = FORMAT
        if form != FORMAT:
            return Report(str(path), "unreadable", note=f"format {form!r}; this version reads {FORMAT}")
        return Report(str(path), "unreadable", mismatches=[Mismatch("the file", "a record", str(error))])


def render(reports: Sequence[Report], fmt: str = "text") -> str:
    """The reports as text, a line a record and then every mismatch, or as JSON."""
    if fmt == "json":
        shown = [{"verdict": report.verdict, **asdict(report)} for report in reports]
        return json.dumps(shown, indent=1, default=str)
    lines = [_line(report) for report in reports]
    for report in reports:
        lines += [
            f"{report.record}: {own.what}\n    stored      {own.stored}\n    recomputed  {own.recomputed}"
            for own in report.mismatches
        ]
    wrong = [report for report in reports if report.mismatches]
    counts = {
        verdict: sum(report.verdict == verdict for report in reports) for verdict in dict.fromkeys(r.verdict for r in reports)
    }
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    number = sum(len(report.mismatches) for report in wrong)
    ending = f"{_many(number, 'mismatch', 'es')} in {_many(len(wrong), 'record')}" if wrong else "no mismatch"
    times = ", ".join(dict.fromkeys(name for report in reports for name in report.times))
    ending += f"; never measured again: {times}" if times else ""
    return "\n".join([*lines, f"{_many(len(reports), 'record')}: {told}; {ending}"])


def _many(count: int, what: str, ending: str = "s") -> str:
    return f"{count} {what}{'' if count == 1 else ending}"


def _line(report: Report) -> str:
    """One record: what was checked, and what could not be, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in report.not_checked.items():
        reasons.setdefault(reason, []).append(name)
    parts = [report.note] if report.note else []
    parts += [f"checked {', '.join(report.checked)}"] if report.checked else []
    parts += [f"could not check {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return f"{report.verdict:19} {report.record}: {'; '.join(parts)}"
