"""The commands that read what is stored: tables, plots, comparisons, checks, logs, the leaderboard. They train nothing."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench import options
from bench.options import FAILED, RUNS, Data, Out, OwnFile, Runs, SuiteName

if TYPE_CHECKING:
    from bench.store import Store


def table(
    name: Annotated[str, typer.Argument(help="summary, or a table of a paper, e.g. cear_table1 (bench list tables)")],
    suite: Annotated[str | None, typer.Option("--suite", help="of the summary only this suite")] = None,
    budget: Annotated[str | None, typer.Option(help="of a paper's table; default: the largest that has records")] = None,
    format_: Annotated[str, typer.Option("--format", help="text, md, latex, csv, json or html")] = "text",
    runs: Runs = RUNS,
) -> None:
    """Print a table of stored records, or a paper's beside them."""
    from bench import tables

    options.check_format(format_, tables.FORMATS)
    if name == "summary":
        if budget is not None:
            raise ValueError("--budget: the summary shows every budget in tables of their own; give it with a paper's table")
        store = _filled(runs, suite or "*")
        print(tables.render_all(tables.summaries(store, suite), format_))
    else:
        from bench.papers import formats, join, layout

        if suite is not None:
            raise ValueError(f"--suite: the table of a paper names its suites; give it with summary, got {name}")
        store = _existing(runs)
        made = join.join(layout.load(name, ("summary",)), store, budget)
        print(formats.render(replace(made, options=options.elsewhere(runs)), format_))
    for problem in store.problems:
        print(problem, file=sys.stderr)


def plot(
    name: Annotated[str, typer.Argument(help="a figure of `bench list figures`, or a .toml file")] = "",
    suite: Annotated[str, typer.Option("--suite", help="instead of a figure: everything that this suite's records allow")] = "",
    budget: Annotated[str, typer.Option(help="of a figure: smoke, quick or paper; default: quick")] = "",
    out: Out = Path("plots"),
    runs: Runs = RUNS,
) -> None:
    """Draw a figure of a paper beside its numbers, or every plot of a suite, as PDF and PNG."""
    from bench import plots
    from bench.plots.declared import draw_figure

    if bool(name) == bool(suite):
        raise ValueError(
            f"plot: give the name of a figure or --suite, not {'both' if name else 'neither'}; see bench list figures"
        )
    if suite and budget:
        raise ValueError("--budget: goes with a figure; the plots of a suite are of every budget")
    if name:
        files = draw_figure(name, _existing(runs), budget or "quick", out, options.elsewhere(runs))
    else:
        files = plots.draw(_filled(runs, suite), suite, out)
    print(*files, sep="\n")


def compare(  # noqa: PLR0913, PLR0917 (every option of the contract)
    first: Annotated[str, typer.Argument(help="a variant, e.g. gal or gal@members=5")],
    second: Annotated[str, typer.Argument(help="another, e.g. naive")],
    suite: SuiteName,
    budget: Annotated[str, typer.Option(help="smoke, quick or paper")] = "quick",
    only: Annotated[str, typer.Option(help="evaluations to compare, e.g. clean,diversity; default: all")] = "",
    format_: Annotated[str, typer.Option("--format", help="text, md, csv or json")] = "text",
    out: Annotated[Path | None, typer.Option("--out", help="folder for maps of the difference in transfer")] = None,
    runs: Runs = RUNS,
) -> None:
    """Compare two defenses on the same images: differences with intervals and tests."""
    from bench import compare as comparison

    options.check_format(format_, comparison.FORMATS)
    store = _filled(runs, suite)
    first, second = comparison.label(first), comparison.label(second)
    if first == second:
        raise ValueError(f"compare: give two variants, not {first} twice")
    between = comparison.Between(first, second, suite, budget, options.names(only))
    rows = comparison.compare(store, between)
    notes = [*comparison.notes(store, between, rows), *store.problems]
    print(comparison.table(rows, first, second, format_, notes))
    if notes and format_ in ("csv", "json"):  # whose rows have no place for them
        print(*notes, sep="\n", file=sys.stderr)
    if out:
        from bench import plots

        drawn = plots.against(store, suite, budget, (first, second), out)
        told = map(str, drawn) if drawn else ["no map: these two share no transfer between as many members"]
        print(*told, sep="\n", file=sys.stderr)


def verify(
    path: Annotated[Path, typer.Argument(help="a record's .json, or a folder above: seed, budget, variant, suite, run folder")],
    data: Data = None,
    sample: Annotated[int, typer.Option(help="images of a certified record that are certified anew")] = 5,
    defense: OwnFile = None,
    format_: Annotated[str, typer.Option("--format", help="text or json")] = "text",
) -> None:
    """Recompute stored numbers from rows, data, weights and adversarial examples; exit code 1 if something does not hold."""
    from bench import environment
    from bench import verify as verifier
    from bench.progress import Progress

    options.check_format(format_, verifier.FORMATS)
    environment.one_thread()  # as `run` does, which measured
    reports = verifier.verify(path, data, sample, Progress(sys.stderr), defense)
    print(verifier.render(reports, format_))
    if any(report.mismatches for report in reports):
        raise typer.Exit(FAILED)


def diagnose(
    run: Annotated[Path, typer.Argument(help="RUNS/SUITE, RUNS/SUITE/VARIANT, .../BUDGET, .../seedK, or a record's .json")],
    format_: Annotated[str, typer.Option("--format", help="text or json")] = "text",
) -> None:
    """Say what stored records show of masked gradients and of numbers that cannot be true, and what may be believed."""
    from bench import diagnose as doubts

    options.check_format(format_, doubts.FORMATS)
    told, problems = doubts.read(run)
    print(doubts.render(told, format_))
    for problem in problems:
        print(problem, file=sys.stderr)


def audit(
    logs: Annotated[list[Path], typer.Argument(help="tab-separated logs, records (.json or .parquet), folders of them")],
    radii: Annotated[str, typer.Option(help="where certified accuracy is told, e.g. 0,0.25,0.5; default: 0 to 2.25")] = "",
    sigma: Annotated[float | None, typer.Option(help="noise of logs that do not say; without it no ceiling is checked")] = None,
    alpha: Annotated[float | None, typer.Option(help="error probability of logs that do not say; default: 0.001")] = None,
    n: Annotated[int | None, typer.Option(help="draws of logs that do not say; default: 100000")] = None,
    format_: Annotated[str, typer.Option("--format", help="text, json, csv, latex or md")] = "text",
) -> None:
    """Look for what cannot be true in certification logs, anybody's or ours; exit code 1 if there is something."""
    from bench import audit as auditor

    options.check_format(format_, auditor.FORMATS)
    reports = auditor.audit(logs, options.radii(radii), sigma, alpha, n)
    print(auditor.render(reports, format_))
    if any(report.problems for report in reports):
        raise typer.Exit(FAILED)


def export(
    records: Annotated[list[Path], typer.Argument(help="certified records (.json or .parquet), or folders of them")],
    out: Out,
) -> None:
    """Write certified records as tab-separated logs: idx, label, predict, radius, correct, time."""
    from bench import logs

    for path in logs.export(records, out):
        print(path)


def leaderboard(
    with_: Annotated[Path | None, typer.Option("--with", help="also show the records of this run folder")] = None,
    out: Out = Path("board"),
) -> None:
    """Write the leaderboard of the committed records as one static page."""
    from bench import site
    from bench.store import Store
    from bench.suites import SUITES

    stores = [Store(SUITES.parent / "results"), *([_filled(with_)] if with_ else [])]
    print(site.write(stores, out))


def _filled(runs: Path, suite: str = "*") -> Store:
    """The store, which must hold records of the suite."""
    from bench.store import Store
    from bench.suites import unknown

    store = Store(runs)
    if not store.records(suite):
        there = sorted({record.suite["name"] for record in store.records()})
        raise ValueError(f"there are no records under {runs}" + (f" of that suite: {unknown(suite, there)}" if there else ""))
    return store


def _existing(runs: Path) -> Store:
    """The store, which may be empty; a folder that was asked for must be there."""
    from bench.store import Store

    options.check_folder(runs)
    return Store(runs)


COMMANDS = (table, plot, compare, verify, diagnose, audit, export, leaderboard)
"""In the order in which ``bench --help`` lists them."""
