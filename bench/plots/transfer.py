"""Transfer between the members of an ensemble as heat maps: rows are sources, columns are targets (methods 9.4)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from bench.columns import crafted
from bench.plots.style import SMALL, small_print, sources, suites
from bench.store import Metric, Record

Matrix = dict[tuple[str, str], Metric]
"""(source, target) -> a number."""

HOLE = math.nan

Grid = list[list[float]]
"""Rows are sources, columns targets; NaN is a hole."""


@dataclass(frozen=True)
class Look:
    """How numbers are shown: colours, their smallest and largest number, the number's format, and from which size on a cell is
    so dark that its number is white."""

    colours: str
    ends: tuple[float, float]
    number: str
    dark: float


RATES = Look("Blues", (0, 100), ".0f", 55.0)
POINTS = Look("RdBu_r", (-100, 100), "+.0f", 65.0)


def transfer(records: list[Record]) -> Figure | None:
    """A panel a defense, or an evaluation and defense: transfer rates of the images that all members get right, at one eps.

    The eps is the middle one of the evaluation's; of several seeds the mean is shown, a hole where one of them has a hole.
    """
    records = [record for record in records if record.eval["fields"].get("kind") == "transfer" and record.metrics]
    records.sort(key=lambda record: (*_panel(record), record.seed))
    if not records:
        return None
    groups = [(panel, list(group)) for panel, group in groupby(records, key=_panel)]
    largest = max(len(_names([matrix_of(record) for record in group])) for _, group in groups)
    columns = min(len(groups), 3)
    rows = -(-len(groups) // columns)
    # A cell has room for three digits; names and a title take an inch.
    side = 1.1 + max(1.6, 0.36 * largest)
    figure = Figure(figsize=(columns * (side + 0.3) + 0.9, rows * (side + 0.1) + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in panels[len(groups) :]:
        spare.set_visible(False)
    several = len({name for (name, _), _ in groups}) > 1
    for axes, ((name, variant), group) in zip(panels, groups, strict=False):
        shown = heat_map(axes, group)
        title = textwrap.fill(f"{variant}, {name}" if several else variant, int(15 * side))
        axes.set_title(f"{title}\n{facts(group)}", fontsize=8)
    colour_bar(figure, shown, panels, "target is wrong (%)")
    lines = [
        f"{suites(records)}; {sources(records)}",
        "percentage of the images that all members get right as they are (n of all that were asked), ± half of the widest 95 % "
        "interval of a cell, over images of one seed; framed: crafted on the target itself (white-box)",
        *sorted({f"{record.eval['name']}: {crafted(record)}" for record in records}),
    ]
    figure.supxlabel(small_print(lines, figure.get_figwidth()), **SMALL)
    return figure


def differences(first: list[Record], second: list[Record]) -> Figure | None:
    """Transfer rates of one defense less those of another, a panel an evaluation that both answered with as many members.

    A rate is that of :func:`transfer`, of the images that all members of its own defense get right; blue cells, the negative
    ones, say that images of the first transfer less.
    """
    pairs: dict[str, tuple[list[Record], list[Record]]] = {}
    for name in sorted({record.eval["name"] for record in first}):
        one, other = ([r for r in own if r.eval["name"] == name and matrix_of(r)] for own in (first, second))
        if one and other and _grid(one)[0] == _grid(other)[0]:
            pairs[name] = one, other
    if not pairs:
        return None
    # Signed numbers take a letter more than rates.
    side = 1.1 + max(1.9, 0.42 * max(len(_grid(one)[0]) for one, _ in pairs.values()))
    figure = Figure(figsize=(len(pairs) * (side + 0.3) + 0.9, side + 1.1), layout="constrained")
    panels = figure.subplots(1, len(pairs), squeeze=False).flatten().tolist()
    for axes, (name, (one, other)) in zip(panels, pairs.items(), strict=True):
        (names, less), (_, more) = _grid(other), _grid(one)
        apart = [[a - b for a, b in zip(*lines, strict=True)] for lines in zip(more, less, strict=True)]
        shown = _draw(axes, names, apart, POINTS)
        axes.set_title(f"{name}\n{facts(one)}", fontsize=8)
    colour_bar(figure, shown, panels, "difference (points)")
    records = [record for pair in pairs.values() for group in pair for record in group]
    figure.suptitle(f"{_panel(one[0])[1]} less {_panel(other[0])[1]}", fontsize=9)
    lines = [
        f"{suites(records)}; {sources(records)}",
        "percentage points between the rates at which targets are wrong; framed: crafted on the target itself (white-box)",
    ]
    figure.supxlabel(small_print(lines, figure.get_figwidth()), **SMALL)
    return figure


def colour_bar(figure: Figure, shown: ScalarMappable, panels: Sequence[Axes], label: str) -> None:
    """What the colours of heat maps mean, beside all of them."""
    bar = figure.colorbar(shown, ax=list(panels), shrink=0.8, aspect=30, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _panel(record: Record) -> tuple[str, str]:
    return record.eval["name"], record.defense["variant"]


def middle(record: Record) -> float:
    """The eps that is shown."""
    found = sorted(record.eval["fields"]["eps"])
    return float(found[len(found) // 2])


def matrix_of(record: Record) -> Matrix:
    """The transfer rates of the images that all members get right, at the middle eps; empty where there is no such image."""
    chosen = [m for m in record.metrics if m.metric == "transfer_rate" and m.denominator == "all_correct"]
    return {(m.source or "", m.target or ""): m for m in chosen if m.eps == middle(record)}


def _names(matrices: list[Matrix]) -> list[str]:
    """Members by number, then the ensemble."""
    found = {source for matrix in matrices for source, _ in matrix}
    return sorted(found, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0))


def _grid(group: list[Record]) -> tuple[list[str], Grid]:
    """Names, and the percentages between them: means over seeds."""
    matrices = [matrix_of(record) for record in group]
    names = _names(matrices)
    return names, [[_mean([matrix.get((i, j)) for matrix in matrices]) for j in names] for i in names]


def heat_map(axes: Axes, records: list[Record]) -> AxesImage:
    """Transfer rates of a defense, the mean over seeds."""
    return _draw(axes, *_grid(records), RATES)


def _draw(axes: Axes, names: list[str], grid: Grid, look: Look) -> AxesImage:
    """One heat map; what is crafted on its own target, the white-box attack, has a frame."""
    low, high = look.ends
    shown = axes.imshow(grid or [[HOLE]], cmap=look.colours, vmin=low, vmax=high)
    for row, line in enumerate(grid):
        for column, value in enumerate(line):
            text = "–" if math.isnan(value) else f"{value:{look.number}}"
            colour = "white" if abs(value) > look.dark else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
        axes.add_patch(Rectangle((row - 0.47, row - 0.47), 0.94, 0.94, fill=False, edgecolor="#D55E00", lw=1.2))
    if not names:
        axes.text(0, 0, "no image is right\nby all members", ha="center", va="center", fontsize=7)
    else:
        axes.axhline(len(names) - 1.5, color="black", lw=0.8)
        axes.axvline(len(names) - 1.5, color="black", lw=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(labelsize=7, length=0)
    axes.set_xlabel("target: judged by member", fontsize=8)
    axes.set_ylabel("source: crafted on member", fontsize=8)
    return shown


def _mean(numbers: list[Metric | None]) -> float:
    """Mean over seeds in percent; a hole where one has none."""
    values = [HOLE if metric is None else 100 * metric.value for metric in numbers]
    return sum(values) / len(values)


def facts(group: list[Record]) -> str:
    """Norm and budget, and how many images count."""
    norm = {"linf": r"\ell_\infty", "l2": r"\ell_2"}[group[0].eval["fields"]["norm"]]
    return f"${norm}$, {counted(group)}"


def counted(group: list[Record]) -> str:
    """The budget, how many images count, and the widest interval of a cell, over images of one seed; of several seeds on a line
    of its own."""
    numbers = [metric for record in group for metric in matrix_of(record).values()]
    counts = sorted({metric.n for metric in numbers}) or [0]
    images = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    between = f", mean of {len(group)} seeds\n" if len(group) > 1 else "; "
    of = group[0].eval["fields"]["images"]
    widest = max((50 * (m.upper - m.lower) for m in numbers if m.upper is not None and m.lower is not None), default=0.0)
    return f"$\\epsilon$ = {middle(group[0]):.4g}{between}n = {images} of {of}" + (f", ±{widest:.0f}" if widest else "")
