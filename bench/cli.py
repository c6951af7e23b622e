"""The command line: parses, prints, and turns errors into one line and an exit code. Heavy imports wait for their command."""

from __future__ import annotations

import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="bench",
    help="Adversarial evaluation of defenses: attacks, certificates, tables, plots.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130

Runs = Annotated[Path, typer.Option("--runs", help="folder of results")]
Data = Annotated[Path | None, typer.Option("--data", help="folder of data sets; default: $BENCH_DATA, else a download")]
SuiteName = Annotated[str, typer.Option("--suite", help="name of a suite, or a .toml file")]
Out = Annotated[Path, typer.Option("--out", help="folder to write to")]


@app.command()
def run(  # noqa: PLR0913, PLR0917 (every option of the contract)
    defense: Annotated[str, typer.Option(help="a,b | all | name@field=value | ./mine.py | ./mine.py:name")],
    suite: SuiteName,
    budget: Annotated[str, typer.Option(help="smoke, quick or paper")] = "quick",
    seeds: Annotated[str, typer.Option(help="training seeds, e.g. 0,1,2")] = "0",
    only: Annotated[str, typer.Option(help="evaluations to run, e.g. clean,certified")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1")] = "auto",
    data: Data = None,
    runs: Runs = Path("runs"),
    fresh: Annotated[bool, typer.Option("--fresh", help="move old results aside (never deleted) and begin anew")] = False,
    shard: Annotated[str, typer.Option(help="I/K: do every K-th piece, from the I-th; then merge, and run without it")] = "1/1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be done")] = False,
) -> None:
    """Train what is missing, evaluate what is missing, store every record, draw the plots."""
    import torch

    from bench import show
    from bench.progress import Progress
    from bench.runner import Request, Run

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # small networks gain little from threads, and lose tenfold where the cores are busy
    request = Request(
        defense=defense,
        suite=suite,
        budget=budget,
        seeds=_seeds(seeds),
        only=tuple(filter(None, only.split(","))),
        device=device,
        data=data,
        runs=runs,
        fresh=fresh,
        shard=_shard(shard),
    )
    job = Run(request, Progress(sys.stderr))
    if dry_run:
        missing = {id(item) for item in job.missing()}
        for item in job.jobs:
            state = "to do" if id(item) in missing else "done "
            print(f"{state}  {item.variant.label}  seed {item.blank.seed}  {item.blank.eval['name']}")
        return
    try:
        records = job.execute()
    except KeyboardInterrupt:
        print("\ninterrupted; everything finished is kept, the same command goes on from here", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    for problem in job.store.problems:
        print(problem, file=sys.stderr)
    show.finished(job.store.root, job.suite.name, records)
    if any(record.status == "error" for record in records):
        raise typer.Exit(FAILED)


def _shard(text: str) -> tuple[int, int]:
    place, _, shards = text.partition("/")
    try:
        return int(place), int(shards)
    except ValueError:
        raise ValueError(f"--shard: {text!r} is not I/K, such as 2/3") from None


@app.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(help="run folders of other shards")],
    runs: Runs = Path("runs"),
) -> None:
    """Bring the pieces, networks and records of shards that ran apart into one run folder."""
    from bench.merge import merge as bring

    for folder in folders:
        found = bring(folder, runs)
        print(f"{folder}: " + ", ".join(f"{count} {what}" for what, count in found.items()) + f" brought to {runs}")


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise ValueError(f"--seeds: {text!r} is no list of integers such as 0,1,2") from None


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="defenses, attacks, suites, tables, datasets, or your own ./file.py")] = "",
) -> None:
    """Show what there is."""
    from bench import show

    show.listing(what)


@app.command()
def status(runs: Runs = Path("runs")) -> None:
    """What is finished, failed or unfinished in a run folder."""
    from tabulate import tabulate

    from bench.store import Store

    store = Store(runs)
    rows = []
    for record in store.records():
        state = "unfinished" if record.status == "running" else record.status
        pieces = len(list(store.partial(record).folder.glob("*.parquet"))) if record.status == "running" else ""
        place = (record.suite["name"], record.defense["variant"], record.suite["budget"], record.seed, record.eval["name"])
        rows.append((*place, state, pieces, record.cost.get("seconds", "")))
    headers = ["suite", "defense", "budget", "seed", "eval", "status", "pieces kept", "seconds"]
    print(tabulate(rows, headers, floatfmt=".1f") if rows else f"no records under {runs}")
    for problem in store.problems:
        print(problem, file=sys.stderr)


@app.command()
def table(
    name: Annotated[str, typer.Argument(help="summary")],
    suite: Annotated[str | None, typer.Option("--suite", help="only this suite")] = None,
    format_: Annotated[str, typer.Option("--format", help="text, md, latex, csv, json or html")] = "text",
    runs: Runs = Path("runs"),
) -> None:
    """Print a table of stored records."""
    from bench import tables
    from bench.suites import unknown

    if name != "summary":
        raise ValueError(f"table: {unknown(name, ['summary'])}")
    if format_ not in tables.FORMATS:
        raise ValueError(f"--format: {unknown(format_, tables.FORMATS)}")
    store = _filled(runs)
    print(tables.render_all(tables.summaries(store, suite), format_))
    for problem in store.problems:
        print(problem, file=sys.stderr)


@app.command()
def plot(suite: SuiteName, out: Out = Path("plots"), runs: Runs = Path("runs")) -> None:
    """Draw certified accuracy, accuracy against epsilon, and training curves of a suite, as PDF and PNG."""
    from bench import plots

    for path in plots.draw(_filled(runs, suite), suite, out):
        print(path)


@app.command()
def compare(  # noqa: PLR0913, PLR0917 (every option of the contract)
    first: Annotated[str, typer.Argument(help="a variant, e.g. gal")],
    second: Annotated[str, typer.Argument(help="another, e.g. naive")],
    suite: SuiteName,
    budget: Annotated[str, typer.Option(help="smoke, quick or paper")] = "quick",
    only: Annotated[str, typer.Option(help="evaluations to compare, e.g. clean,diversity; default: all")] = "",
    format_: Annotated[str, typer.Option("--format", help="text, md, csv or json")] = "text",
    runs: Runs = Path("runs"),
) -> None:
    """Compare two defenses on the same images: differences with intervals and tests."""
    from bench import compare as comparison

    rows = comparison.compare(_filled(runs, suite), first, second, suite, budget, tuple(filter(None, only.split(","))))
    print(comparison.table(rows, first, second, format_))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="a record's .json, or a folder above: seed, budget, variant, suite, run folder")],
    data: Data = None,
    sample: Annotated[int, typer.Option(help="images of a certified record that are certified anew")] = 5,
    format_: Annotated[str, typer.Option("--format", help="text or json")] = "text",
) -> None:
    """Recompute stored numbers from rows, data, weights and adversarial examples; exit code 1 if something does not hold."""
    import torch

    from bench import verify as verifier
    from bench.progress import Progress

    if format_ not in verifier.FORMATS:
        raise ValueError(f"--format: unknown {format_!r}; known are {', '.join(verifier.FORMATS)}")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as `run` does, which measured
    reports = verifier.verify(path, data, sample, Progress(sys.stderr))
    print(verifier.render(reports, format_))
    if any(report.mismatches for report in reports):
        raise typer.Exit(FAILED)


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(help="RUNS/SUITE, RUNS/SUITE/VARIANT, .../BUDGET, .../seedK, or a record's .json")],
    format_: Annotated[str, typer.Option("--format", help="text or json")] = "text",
) -> None:
    """Say what stored records show of masked gradients and of numbers that cannot be true, and what may be believed."""
    from bench import diagnose as doubts
    from bench.suites import unknown

    if format_ not in doubts.FORMATS:
        raise ValueError(f"--format: {unknown(format_, doubts.FORMATS)}")
    told, problems = doubts.read(run)
    print(doubts.render(told, format_))
    for problem in problems:
        print(problem, file=sys.stderr)


@app.command()
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

    if format_ not in auditor.FORMATS:
        from bench.suites import unknown

        raise ValueError(f"--format: {unknown(format_, auditor.FORMATS)}")
    reports = auditor.audit(logs, _radii(radii), sigma, alpha, n)
    print(auditor.render(reports, format_))
    if any(report.problems for report in reports):
        raise typer.Exit(FAILED)


def _radii(text: str) -> list[float] | None:
    try:
        return [float(Fraction(radius)) for radius in text.split(",")] if text else None
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--radii: {text!r} is no list of numbers such as 0,0.25,8/255") from None


@app.command()
def export(
    records: Annotated[list[Path], typer.Argument(help="certified records (.json or .parquet), or folders of them")],
    out: Out,
) -> None:
    """Write certified records as tab-separated logs: idx, label, predict, radius, correct, time."""
    from bench import logs

    for path in logs.export(records, out):
        print(path)


@app.command()
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


def _filled(runs: Path, suite: str = "*"):  # type: ignore[no-untyped-def]
    """The store, which must hold records of the suite."""
    from bench.store import Store

    store = Store(runs)
    if not store.records(suite):
        raise ValueError(f"there are no records under {runs}" + (f" for suite {suite!r}" if suite != "*" else ""))
    return store


@app.command()
def doctor(
    data: Data = None,
    runs: Runs = Path("runs"),
    reference: Annotated[
        bool, typer.Option("--reference", help="also compare all engines of all attacks, image by image")
    ] = False,
) -> None:
    """Look at this installation: versions, device, data at hand, defenses, run folder."""
    from bench import environment, show

    checks = environment.doctor(data, runs)
    for name, well, detail in checks:
        print(f"{'ok  ' if well else 'BAD '} {name:20} {detail}")
    agree = show.agreement(data) if reference else True
    if not agree or not all(well for _, well, _ in checks):
        raise typer.Exit(FAILED)


def main() -> None:
    """Entry point: a message instead of a traceback (``--debug`` anywhere shows it), and the contract's exit codes."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        if debug:
            raise
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(_code(error))


def _code(error: Exception) -> int:
    """2 for a wrong request; 1 where the request was right and the machine failed."""
    from bench.partial import StoreError

    return WRONG if isinstance(error, ValueError) or (isinstance(error, StoreError) and not error.broken) else FAILED
