"""LaTeX tables for any article, with no package but booktabs: what is too wide or too long for a page is set in parts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

T = TypeVar("T")

WIDTH = 90
"""Characters that a page of a plain article takes side by side at \\scriptsize."""

LINES = 46
"""Lines of a page at \\scriptsize below a caption."""

LONGEST = 26
"""Characters after which a text in a cell goes on in the next line."""

GAP = 1.5
"""Characters between two columns."""


@dataclass(frozen=True)
class Cell:
    """A cell as it is read, for its width, and as LaTeX writes it; styled ones are never broken."""

    plain: str
    written: str

    @classmethod
    def of(cls, text: str) -> Cell:
        return cls(text, escaped(text))

    @property
    def lines(self) -> list[Cell]:
        """The cell in pieces below each other."""
        if self.written != escaped(self.plain):
            return [self]
        return [Cell.of(line) for line in _wrapped(self.plain, LONGEST)]


Line = Sequence[Cell]


def escaped(text: str) -> str:
    """Text with everything escaped that LaTeX would take for a command."""
    return text.translate(_SPECIAL).replace("<=", r"$\leq$").replace(">=", r"$\geq$")


_SPECIAL = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "±": r"$\pm$",
    **{sign: "\\" + sign for sign in "&%_#${}"},
})  # fmt: skip


def sentence(text: str) -> str:
    """Escaped text of a paragraph, with opening and closing quotes, the two hyphens of an option, and breaks behind commas."""
    quoted = re.sub(r'"([^"]*)"', r"``\1''", escaped(text.replace("--", "\0"))).replace("\0", "-{}-")
    return re.sub(r",(?=\S)", r",\\allowbreak{}", quoted)


def floats(title: str, caption: str, heads: Sequence[str], groups: Sequence[Sequence[Line]], labels: int) -> str:
    """A table as floats of at most a page, each with the first columns again.

    Args:
        title, caption: the first float has both, the others the title alone.
        heads: headings, as plain text.
        groups: lines that stay together, each with a cell for every heading.
        labels: how many columns at the left name a line.
    """
    widths = [
        max((len(cell.plain) for group in groups for line in group for cell in line[c].lines), default=0)
        for c in range(len(heads))
    ]
    tops = [_wrapped(head, max(wide, *map(len, _pieces(head)), 1)) for head, wide in zip(heads, widths, strict=True)]
    widths = [max(wide, *map(len, top)) for wide, top in zip(widths, tops, strict=True)]
    grids = []
    for columns in _columns(widths, labels):
        top = list(zip_longest(*(tops[c] for c in columns), fillvalue=""))
        body = [[part for line in group for part in _lines([line[c] for c in columns])] for group in groups]
        grids += [_grid(labels, top, part) for part in _pages(body, LINES - _RULES - len(top))]
    written: list[str] = []
    for page in _pages(grids, LINES):
        name = escaped(title) + (" (continued)" if written else f". {sentence(caption)}")
        begin = [r"\begin{table}[p]", r"\centering", r"\scriptsize", r"\setlength{\tabcolsep}{3pt}", rf"\caption{{{name}}}"]
        written.append("\n".join([*begin, *page, r"\end{table}"]))
    return "\n\n".join(written)


def _grid(labels: int, top: Sequence[Sequence[str]], lines: Sequence[Line]) -> list[str]:
    """A tabular, in lines that need about a line of a page each."""
    spec = "l" * labels + "r" * (len(top[0]) - labels)
    heads = [" & ".join(map(escaped, line)) + r" \\" for line in top]
    cells = [" & ".join(cell.written for cell in line) + r" \\" for line in lines]
    return [
        rf"\begin{{tabular}}{{{spec}}}",
        r"\toprule",
        *heads,
        r"\midrule",
        *cells,
        r"\bottomrule",
        r"\end{tabular}\par\medskip",
    ]


_RULES = 5
"""Lines that a tabular has besides headings and cells."""


def _pages(blocks: Sequence[Sequence[T]], room: int) -> Iterator[list[T]]:
    """Blocks joined as long as a page has room for the next one."""
    page: list[T] = []
    for block in blocks:
        if page and len(page) + len(block) > room:
            yield page
            page = []
        page = [*page, *block]
    yield page


def _columns(widths: Sequence[int], labels: int) -> Iterator[list[int]]:
    """The columns of each part, by their numbers: the labels, and as many others as fit beside them."""
    names = list(range(labels))
    room = WIDTH - sum(widths[c] + GAP for c in names)
    taken: list[int] = []
    for column in range(labels, len(widths)):
        if taken and sum(widths[c] + GAP for c in (*taken, column)) > room:
            yield names + taken
            taken = []
        taken.append(column)
    yield names + taken


def _lines(line: Line) -> Iterator[Line]:
    """A line of cells as several where a text is long."""
    return zip_longest(*(cell.lines for cell in line), fillvalue=Cell("", ""))


def _wrapped(text: str, limit: int) -> list[str]:
    lines = [""]
    for piece in _pieces(text):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > limit:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def _pieces(text: str) -> list[str]:
    """Where a line may end: behind spaces, commas and semicolons."""
    return re.split(r"(?<=[ ,;])(?=[^ ])", text)
