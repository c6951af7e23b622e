"""What the commands share: their options, what the text of an option means, and the exit codes."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130

RUNS = Path("runs")
"""Where results go unless something else is said."""

Runs = Annotated[Path, typer.Option("--runs", file_okay=False, help="folder of results")]
Data = Annotated[Path | None, typer.Option("--data", help="folder of data sets; default: $BENCH_DATA, else a download")]
SuiteName = Annotated[str, typer.Option("--suite", help="name of a suite, or a .toml file")]
OwnFile = Annotated[Path | None, typer.Option("--defense", help="your .py file, if the records' defense is in one")]
Workers = Annotated[str, typer.Option("--executor", help="local (with several GPUs a process for each) or ray")]
Address = Annotated[
    str | None, typer.Option("--address", help="of a Ray cluster, such as auto; default: $RAY_ADDRESS, else a new one")
]
Out = Annotated[Path, typer.Option("--out", file_okay=False, help="folder to write to")]


class Once(TyperCommand):
    """A command that refuses an option given twice, of which the parser would keep the last without a word, or given empty."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As its parent's.

        Raises:
            ValueError: names the option.
        """
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for param, count in Counter(order).items():
            if count > 1 and not getattr(param, "is_flag", False):
                raise ValueError(f"{param.opts[0]}: given {count} times; give it once, with commas if it takes several (a,b)")
        for param in order:
            if values.get(param.name) == "" and param.default != "":  # an empty path would be the current folder
                raise ValueError(f"{param.opts[0]}: nothing was given")
        return super().parse_args(ctx, args)


def elsewhere(runs: Path) -> str:
    """The option of a command that works in a folder of results; nothing for the usual one."""
    return "" if runs == RUNS else f" --runs {shlex.quote(str(runs))}"


def check_folder(runs: Path) -> None:
    """Refuse a folder of results that was asked for and is not there, or is that of one suite.

    Raises:
        ValueError: names it.
    """
    if not runs.is_dir() and runs != RUNS:
        raise ValueError(f"--runs: there is no folder {runs}")
    if any(runs.glob("*/*/seed*/*.json")):
        raise ValueError(f"--runs: {runs} holds the variants of one suite; give the folder above it")


def seeds(text: str) -> tuple[int, ...]:
    """Training seeds, each once: "0,1,2".

    Raises:
        ValueError: if that is not what was given.
    """
    try:
        return tuple(dict.fromkeys(int(seed) for seed in text.split(",")))
    except ValueError:
        raise ValueError(f"--seeds: {text!r} is no list of integers such as 0,1,2") from None


def shard(text: str) -> tuple[int, int]:
    """Which of how many shards: "2/3".

    Raises:
        ValueError: if that is not what was given.
    """
    place, _, shards = text.partition("/")
    try:
        return int(place), int(shards)
    except ValueError:
        raise ValueError(f"--shard: {text!r} is not I/K, such as 2/3") from None


def radii(text: str) -> list[float] | None:
    """Radii in pixels: "0,0.25,8/255"; None for an empty text.

    Raises:
        ValueError: if that is not what was given.
    """
    try:
        return [float(Fraction(radius)) for radius in text.split(",")] if text else None
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--radii: {text!r} is no list of numbers such as 0,0.25,8/255") from None


def names(text: str) -> tuple[str, ...]:
    """Names between commas: "clean,certified"; none for an empty text."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def ask(field: str, purpose: str) -> str:
    """Ask on the terminal for a field of a submission, until the answer can be used."""
    from bench.submissions import checked

    def usable(text: str) -> str:
        try:
            return checked(field, text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error

    return str(typer.prompt(f"{field}: {purpose}", value_proc=usable))


def check_format(given: str, known: Sequence[str]) -> None:
    """Refuse a format that a command does not write, before it does any work.

    Raises:
        ValueError: names the nearest.
    """
    from bench.suites import unknown

    if given not in known:
        raise ValueError(f"--format: {unknown(given, known)}")
