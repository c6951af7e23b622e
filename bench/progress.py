"""Progress of long steps: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

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
    def _bar(self, title: str) -> Iterator[Report]:
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
        with Rich(*columns, console=Console(file=self.stream)) as rich:
            task = rich.add_task(title, total=None, facts="")

            def report(done: int, total: int, facts: dict[str, float]) -> None:
                rich.update(task, completed=done, total=total, facts=_brief(facts))

            yield report

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
