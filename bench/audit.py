"""Audit of certification logs, anybody's or ours: what they claim, and what in them cannot be true.

Certified accuracy and ACR are of the log as read: all its rows, duplicates too, its own column ``correct``, and radii as
printed. Nothing is repaired; what is wrong is a problem with the rows it is in.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench import faults, logs, metrics
from bench.faults import PROBLEMS, Problem, down
from defenses.estimators import Question

__all__ = ["FORMATS", "PROBLEMS", "RADII", "Problem", "Report", "audit", "render"]

FORMATS = ("text", "json", "csv", "latex", "md")

RADII = tuple(i / 4 for i in range(10))
"""Where certified accuracy is told unless radii are given: 0, 0.25, ..., 2.25, the grid of published tables."""


@dataclass(frozen=True)
class Report:
    """What one log says.

    Attributes:
        file: which log.
        rows: how many could be read.
        abstain: fraction of rows whose prediction is -1; None without rows.
        acr: mean radius, 0 where not ``correct``; None without rows.
        certified_accuracy: repr of a radius -> fraction of rows that are ``correct`` with a radius of at least that.
        problems: what is wrong.
        ceiling: the largest radius that can be certified; None if it was not checked, for want of sigma or of rows.
    """

    file: str
    rows: int
    abstain: float | None
    acr: float | None
    certified_accuracy: dict[str, float | None]
    problems: list[Problem]
    ceiling: float | None


def audit(
    paths: str | Path | Iterable[str | Path],
    radii: Iterable[float] | None = None,
    sigma: float | None = None,
    alpha: float | None = None,
    n: int | None = None,
) -> list[Report]:
    """Read and check logs, records, and folders of them.

    Args:
        paths: what :func:`bench.logs.read` reads.
        radii: where certified accuracy is told, l2; :data:`RADII` by default.
        sigma: noise of logs that do not say; without it their ceiling is not checked.
        alpha, n: error probability and draws of logs that do not say; 0.001 and 100,000 by default.

    Raises:
        ValueError: for what is no log, radii that are negative or no numbers, and for sigma, alpha or n that are out of range
            or contradict a record.
    """
    given = {name: value for name, value in {"sigma": sigma, "alpha": alpha, "n": n}.items() if value is not None}
    Question(**{"sigma": 1.0, "alpha": 0.001, "n": 100_000, **given})  # type: ignore[arg-type]  # refuses what is out of range
    at = RADII if radii is None else tuple(float(radius) for radius in radii)
    if not all(0 <= radius < np.inf for radius in at):
        raise ValueError(f"radii must be finite numbers of at least 0, got {', '.join(map(repr, at))}")
    found = logs.read([paths] if isinstance(paths, str | Path) else paths)
    return [_report(log, at, _question(log, given)) for log in found]


def _question(log: logs.Log, given: dict[str, float]) -> Question | None:
    """What was asked of the certificates of a log; None if nobody says with which noise."""
    fields = log.fields
    for name, value in given.items():
        if value != fields.get(name, value):
            raise ValueError(f"{log.file} was made with {name} = {fields[name]}, not {value}; leave --{name} out for records")
    known = {"alpha": 0.001, "n": 100_000, **given, **fields}
    if "sigma" not in known:
        return None
    radii = fields.get("radii", ()) if fields.get("estimator") == "grid" else () if log.asked is None else (log.asked,)
    return Question(known["sigma"], known["alpha"], known["n"], tuple(radii))


def _report(log: logs.Log, at: tuple[float, ...], question: Question | None) -> Report:
    rows = len(log.rows)
    radius, correct = log.rows.radius.to_numpy(), log.rows.correct.to_numpy()
    limits = faults.limits(log, question)
    with np.errstate(over="ignore"):
        acr = metrics.average_certified_radius(np.where(np.isfinite(radius), radius, 0.0), correct) if rows else np.nan
    return Report(
        file=log.file,
        rows=rows,
        abstain=float((log.rows.predict == -1).mean()) if rows else None,
        acr=acr if np.isfinite(acr) else None,
        certified_accuracy={repr(r): metrics.certified_accuracy(radius, correct, r) if rows else None for r in at},
        problems=faults.problems(log, limits),
        ceiling=float(limits.ceiling.max()) if limits else None,
    )


def render(reports: list[Report], fmt: str = "text") -> str:
    """Reports as text or Markdown with the problems below the table, LaTeX (booktabs), CSV (raw numbers, a row a log) or JSON.

    Raises:
        ValueError: for another format.
    """
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt!r}; known are {', '.join(FORMATS)}")
    if fmt == "json":
        told = [{name: value for name, value in asdict(report).items() if name != "ceiling"} for report in reports]
        return json.dumps(told, indent=1, allow_nan=False)
    at = [f"CA {radius.removesuffix('.0')}" for radius in (reports[0].certified_accuracy if reports else [])]
    header = ["file", "rows", "abstain", "ACR", "ceiling", *at, "problems"]
    if fmt == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *map(_raw, reports)])
        return text.getvalue().strip()
    from tabulate import tabulate

    style = {"text": "simple", "md": "github", "latex": "latex_booktabs"}[fmt]
    body = [[cell.replace("|", r"\|") if fmt == "md" else cell for cell in _shown(report)] for report in reports]
    table = str(tabulate(body, header, tablefmt=style, disable_numparse=True))
    if fmt == "latex":
        return table.replace("–", "--")
    mark = "- " if fmt == "md" else ""
    listed = [f"{mark}{report.file}: {_words(problem)}" for report in reports for problem in report.problems]
    return "\n\n".join(filter(None, [table, _CAPTION, "\n".join(listed)]))


_CAPTION = (
    "Percent of all rows as read. CA r: `correct` is 1 and the radius as read is at least r. ACR: mean radius, 0 where "
    "`correct` is 0; too small where radii are of a grid. Ceiling: the largest radius that can be certified; to check it for a "
    "log without a record, give --sigma."
)


def _raw(report: Report) -> list[object]:
    kinds = "; ".join(problem.kind for problem in report.problems)
    return [report.file, report.rows, report.abstain, report.acr, report.ceiling, *report.certified_accuracy.values(), kinds]


def _shown(report: Report) -> list[str]:
    """A row of the table; radii are rounded down, so that none is shown that is not there."""
    abstain, *accuracies = [
        "–" if share is None else f"{100 * share:.1f}" for share in (report.abstain, *report.certified_accuracy.values())
    ]
    acr = "–" if report.acr is None else down(report.acr, 4)
    ceiling = "not checked" if report.ceiling is None else down(report.ceiling, 6)
    kinds = ", ".join(problem.kind for problem in report.problems) or "none"
    return [report.file, str(report.rows), abstain, acr, ceiling, *accuracies, kinds]


def _words(problem: Problem) -> str:
    some = ", ".join(map(str, problem.rows[:10])) + (f", ... ({len(problem.rows)} in all)" if len(problem.rows) > 10 else "")
    return f"{problem.kind}: {problem.detail}" + (f": {some}" if some else "")
