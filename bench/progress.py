"""Progress of long steps: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

Report = Callable[[int, int, dict[str, float]], None]
"""(done, total, facts worth showing)."""


class Progress:
    """Shows steps on a stream; silent if there is none.

    Args:
        stream: where to; None for silence.
        every: seconds between plain lines of one step.
    """

    def __init__(self, stream: TextIO | None, every: float = 10.0) -> None:
        self.stream = stream
        self.every = every
        self.prefix = ""

    def say(self, text: str) -> None:
        """One line."""
        if self.stream is not None:
            print(text, file=self.stream, flush=True)

    @contextmanager
    def step(self, name: str) -> Iterator[Report]:
        """A long step; call what is yielded with (done, total, facts)."""
        title = f"{self.prefix}{name}"
        if self.stream is None:
            yield lambda done, total, facts: None
        elif self.stream.isatty():
            with self._bar(title) as report:
                yield report
        else:
            yield self._lines(title)

    @contextmanager
    def board(self, title: str) -> Iterator[Board]:
        """Many steps at once, with how many of all are done."""
        if self.stream is not None and self.stream.isatty():
            with self._rich() as rich:
                yield Bars(title, rich)
        else:
            yield Lines(title, self)

    @contextmanager
    def _bar(self, title: str) -> Iterator[Report]:
        with self._rich() as rich:
            task = rich.add_task(title, total=None, facts="")

            def report(done: int, total: int, facts: dict[str, float]) -> None:
                rich.update(task, completed=done, total=total, facts=_brief(facts))

            yield report

    def _rich(self) -> RichProgress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        return Rich(*columns, console=Console(file=self.stream))

    def _lines(self, title: str) -> Report:
        began = told = time.monotonic()
        first: int | None = None

        def report(done: int, total: int, facts: dict[str, float]) -> None:
            nonlocal told, first
            now = time.monotonic()
            first = done - 1 if first is None else first  # work found finished says nothing about the speed of the rest
            if now - told < self.every and done < total:
                return
            told = now
            left = (now - began) / max(done - first, 1) * (total - done)
            ending = f"about {left:.0f} s left" if done < total else f"done in {now - began:.1f} s"
            self.say(f"{title}: {done} of {total}, {ending}  {_brief(facts)}".rstrip())

        return report


def _brief(facts: dict[str, float]) -> str:
    shown = ("loss", "validation_accuracy", "certified_accuracy")
    return "  ".join(f"{name.replace('_', ' ')} {facts[name]:.3f}" for name in shown if name in facts)


class Board(Protocol):
    """Shows what many workers do, each step by its number."""

    def count(self, done: int, total: int) -> None:
        """How much of everything is done."""

    def begin(self, number: int, name: str) -> None:
        """A step begins."""

    def report(self, number: int, done: int, total: int, facts: dict[str, float]) -> None:
        """How far it is."""

    def end(self, number: int) -> None:
        """It ended, in whatever way."""


class Bars:
    """A board on a terminal: a bar for everything, and one for each step that goes on."""

    def __init__(self, title: str, rich: RichProgress) -> None:
        self._rich = rich
        self._all = rich.add_task(title, total=None, facts="")
        self._steps: dict[int, TaskID] = {}

    def count(self, done: int, total: int) -> None:
        self._rich.update(self._all, completed=done, total=total)

    def begin(self, number: int, name: str) -> None:
        self._steps[number] = self._rich.add_task(f"  {name}", total=None, facts="")

    def report(self, number: int, done: int, total: int, facts: dict[str, float]) -> None:
        self._rich.update(self._steps[number], completed=done, total=total, facts=_brief(facts))

    def end(self, number: int) -> None:
        self._rich.remove_task(self._steps.pop(number))


class Lines:
    """A board elsewhere: now and then a line for everything, with the steps that go on."""

    def __init__(self, title: str, progress: Progress) -> None:
        self._title, self._progress = title, progress
        self._told = time.monotonic()
        self._count = ""
        self._steps: dict[int, str] = {}
        self._far: dict[int, str] = {}

    def count(self, done: int, total: int) -> None:
        before, self._count = self._count, f"[{done}/{total}] "
        if before != self._count:
            self._say()

    def begin(self, number: int, name: str) -> None:
        self._steps[number] = name

    def report(self, number: int, done: int, total: int, facts: dict[str, float]) -> None:
        self._far[number] = f" {done} of {total}  {_brief(facts)}".rstrip()
        if time.monotonic() - self._told >= self._progress.every:
            self._say()

    def end(self, number: int) -> None:
        self._steps.pop(number), self._far.pop(number, None)

    def _say(self) -> None:
        self._told = time.monotonic()
        going = "; ".join(f"{name}{self._far.get(number, '')}" for number, name in self._steps.items())
        self._progress.say(f"{self._count}{self._title}{': ' if going else ''}{going}")
