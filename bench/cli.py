"""The command line: parses, prints, and turns errors into one line and an exit code. Heavy imports wait for their command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bench import options
from bench.options import FAILED, INTERRUPTED, RUNS, WRONG, Address, Data, OwnFile, Runs, SuiteName, Workers
from bench.reading import COMMANDS

app = typer.Typer(
    name="bench",
    help="Adversarial evaluation of defenses: attacks, certificates, tables, plots.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def run(  # noqa: PLR0913, PLR0917 (every option of the contract)
    defense: Annotated[str, typer.Option(help="a,b | all | name@field=value | ./mine.py | ./mine.py:name")],
    suite: SuiteName,
    budget: Annotated[str, typer.Option(help="smoke, quick or paper")] = "quick",
    seeds: Annotated[str, typer.Option(help="training seeds, e.g. 0,1,2")] = "0",
    only: Annotated[str, typer.Option(help="evaluations to run, e.g. clean,certified")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1")] = "auto",
    data: Data = None,
    runs: Runs = RUNS,
    fresh: Annotated[bool, typer.Option("--fresh", help="move old results aside (never deleted) and begin anew")] = False,
    executor: Workers = "local",
    address: Address = None,
    shard: Annotated[str, typer.Option(help="I/K: do every K-th piece, from the I-th; then merge, and run without it")] = "1/1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be done")] = False,
) -> None:
    """Train what is missing, evaluate what is missing, store every record, draw the plots."""
    from bench import environment, show
    from bench.forecast import forecast
    from bench.progress import Progress
    from bench.request import Request
    from bench.runner import Run

    environment.one_thread()
    request = Request(
        defense=defense,
        suite=suite,
        budget=budget,
        seeds=options.seeds(seeds),
        only=options.names(only),
        device=device,
        data=data,
        runs=runs,
        fresh=fresh,
        executor=executor,
        address=address,
        shard=options.shard(shard),
    )
    job = Run(request, Progress(sys.stderr))
    if dry_run:
        try:
            show.planned(job)
        finally:
            job.close()
        return
    try:
        job.plan = forecast(job, job.missing())
        job.progress.say(str(job.plan))
        records = job.execute()
    except KeyboardInterrupt:
        print("\ninterrupted; everything finished is kept, the same command goes on from here", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    for problem in job.store.problems:
        print(problem, file=sys.stderr)
    show.finished(job.store.root, job.suite.name, records)
    if any(record.status == "error" for record in records):
        raise typer.Exit(FAILED)


@app.command()
def reproduce(  # noqa: PLR0913, PLR0917 (every option of the contract)
    table: Annotated[str, typer.Argument(help="a table of a paper, e.g. cear_table1 (bench list tables)")],
    budget: Annotated[str, typer.Option(help="smoke, quick or paper")] = "quick",
    seeds: Annotated[str, typer.Option(help="training seeds, e.g. 0,1,2; default: the table's")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1")] = "auto",
    data: Data = None,
    runs: Runs = RUNS,
    fresh: Annotated[bool, typer.Option("--fresh", help="move aside (never deleted) what does not answer the table")] = False,
    executor: Workers = "local",
    address: Address = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan alone")] = False,
) -> None:
    """Run whatever is missing for a table of a paper, and print it; the plan comes first."""
    from bench import environment, show
    from bench.papers.layout import load
    from bench.progress import Progress
    from bench.request import Wish

    environment.one_thread()
    wish = Wish(
        budget=budget,
        seeds=options.seeds(seeds) if seeds else (),
        device=device,
        data=data,
        runs=runs,
        executor=executor,
        address=address,
        fresh=fresh,
    )
    try:
        well = show.reproduced(load(table), wish, Progress(sys.stderr), dry_run)
    except KeyboardInterrupt:
        print("\ninterrupted; everything finished is kept, the same command goes on from here", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if not well:
        raise typer.Exit(FAILED)


@app.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(help="run folders of other shards")],
    runs: Runs = RUNS,
) -> None:
    """Bring the pieces, networks and records of shards that ran apart into one run folder."""
    from bench.merge import merge as bring

    for folder in folders:
        found = bring(folder, runs)
        print(f"{folder}: " + ", ".join(f"{count} {what}" for what, count in found.items()) + f" brought to {runs}")


@app.command(name="list")
def list_(
    what: Annotated[
        str, typer.Argument(help="defenses, attacks, suites, tables, figures, datasets, or your own ./file.py")
    ] = "",
    runs: Runs = RUNS,
) -> None:
    """Show what there is."""
    from bench.listing import listing

    listing(what, runs)


@app.command()
def status(runs: Runs = RUNS) -> None:
    """What is finished, failed or unfinished in a run folder."""
    from bench import show

    show.states(runs)


for _command in COMMANDS:
    app.command()(_command)


@app.command()
def submit(  # noqa: PLR0913, PLR0917 (everything that is asked for)
    run: Annotated[Path, typer.Argument(help="RUNS/SUITE/VARIANT, or a budget or seed below")],
    name: Annotated[str, typer.Option(help="what the board calls it")] = "",
    paper: Annotated[str, typer.Option(help="address of the paper, or none")] = "",
    code: Annotated[str, typer.Option(help="address of the code, or none")] = "",
    contact: Annotated[str, typer.Option(help="e-mail address or page; everybody will see it")] = "",
    defense: OwnFile = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder of results; default: the checkout's")] = None,
) -> None:
    """Verify a run and put its records under leaderboards/results; exit code 1 if it is refused."""
    from bench import environment, submit, verify
    from bench.progress import Progress

    place = out or submit.results()
    submit.variant_of(run)
    prompt = options.ask if sys.stdin.isatty() else None
    answers = submit.asked({"name": name, "paper": paper, "code": code, "contact": contact}, prompt)
    environment.one_thread()
    run = run.resolve() if ".." in run.parts else run
    reports = verify.verify(run, data, progress=Progress(sys.stderr), file=defense)
    print(verify.render(reports))
    folder, new = submit.submit(run, reports, answers, place)
    print(f"written to {folder}" if new else f"{folder} has all of it already")


@app.command()
def doctor(
    data: Data = None,
    runs: Runs = RUNS,
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


for _registered in app.registered_commands:
    _registered.cls = options.Once


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
