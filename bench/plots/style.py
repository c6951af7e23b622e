"""How figures look: colours, lines with intervals, panels, legends."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.store import Metric, Record
from bench.tables import without_sigma

# Okabe & Ito 2008 without yellow (too faint on white), then indigo, wine and olive of Tol 2021 (muted): distinct for
# colour-blind readers; markers, one a colour, carry the same information in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#332288", "#882255", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">")
BASELINE = "#777777"


def sigma_of(record: Record) -> float:
    """The noise of a certificate, 0 where there is none."""
    return float(record.eval["fields"].get("sigma") or 0.0)


def percent(metric: Metric) -> tuple[float | None, float | None]:
    """The interval in percent."""
    return tuple(None if end is None else 100 * end for end in (metric.lower, metric.upper))  # type: ignore[return-value]


Points = list[tuple[float, float, float | None, float | None]]


def points_of(metrics: list[Metric], place: str | Callable[[Metric], float]) -> Points:
    """(x, value, lower, upper) in percent, x a field or a function's; of several seeds mean and deviation."""
    x_of = attrgetter(place) if isinstance(place, str) else place
    groups: dict[float, list[Metric]] = {}
    for metric in metrics:
        groups.setdefault(x_of(metric), []).append(metric)
    points: Points = []
    for x, group in sorted(groups.items()):
        values = [100 * metric.value for metric in group]
        value, deviation = mean(values), stdev(values) if len(values) > 1 else 0.0
        ends = (value - deviation, value + deviation) if len(values) > 1 else percent(group[0])
        points.append((x, value, *ends))
    return points


Style = Mapping[str, Any]
"""Colour, marker and dashes."""

Styles = dict[str, dict[str, Any]]
"""Those of defenses, by name."""


def lines(axes: Axes, named: Sequence[tuple[str, Points, Style]]) -> None:
    """The lines of a panel, each with label and style, and their intervals: bands, or bars where bands would show nothing.

    Bars of one place would hide each other, so they stand side by side, and every marker stands on its bar: colours repeat, and
    only markers tell whose a bar is. Lines stay where they are: moved aside a steep one would seem to be higher or lower than
    it is. A scale must be set before.
    """
    drawn = [one for one in named if one[1]]
    beside = _aside(axes, [points for _, points, _ in drawn])
    for number, (label, points, style) in enumerate(drawn):
        xs, ys = [point[0] for point in points], [point[1] for point in points]
        (line,) = axes.plot(xs, ys, label=label, ms=3.5, lw=1.2, **style)
        ends = [(x, low, high) for x, _, low, high in points if low is not None and high is not None]
        if not ends:
            continue
        x, low, high = zip(*ends, strict=True)
        if len(drawn) > BANDS or len(ends) == 1:  # of a single point a band has no width
            axes.vlines([beside(number, place) for place in x], low, high, color=style["color"], alpha=0.7, lw=0.9)
            line.set(markevery=[], lw=0.8, alpha=0.6)  # its legend shows the marker all the same
            look = {"marker": style.get("marker"), "color": style["color"], "alpha": style.get("alpha")}
            axes.scatter([beside(number, place) for place in xs], ys, s=3.5**2, zorder=3, **look)
        else:
            axes.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)


BANDS = 3
"""More lines than this get bars for intervals: bands on top of each other show nothing."""

NEAR = 0.7
"""Of the way to the next place, what the markers of all lines take at most."""

MARKER = 0.018
"""Of a panel's width, what a marker takes."""


def _aside(axes: Axes, every: Sequence[Points]) -> Callable[[int, float], float]:
    """Where markers of line number i stand for a place x: no further apart than they need, nearer to x than to other places."""
    scale = axes.xaxis.get_transform()
    places = np.unique(scale.transform([x for points in every for x, *_ in points]))
    gap, span = (min(np.diff(places)), np.ptp(places)) if len(places) > 1 else [abs(places).sum() or 1.0] * 2
    step = min(NEAR * gap / max(1, len(every) - 1), MARKER * span)

    def beside(number: int, x: float) -> float:
        return float(scale.inverted().transform(scale.transform(x) + step * (number - (len(every) - 1) / 2)))

    return beside


def styles_of(variants: Iterable[str]) -> Styles:
    """Colour, marker and dashes of each variant, and of its name without a sigma; randomised smoothing is the baseline.

    Figures that shall agree are given the same styles.
    """
    every = set(variants)
    plain = {without_sigma(name) for name in every}
    names = [*sorted(plain), *sorted(every - plain)]  # certificates show the plain ones, to which the clearest colours go
    baselines = [name for name in names if name.partition("@")[0] == "randsmooth"]
    return styles_in_order([name for name in names if name not in baselines], baselines)


def styles_in_order(others: Sequence[str], baselines: Sequence[str]) -> Styles:
    """Colour, marker and dashes of each name, those of the palette in order; baselines are grey and dashed."""
    styles: Styles = {}
    for index, name in enumerate(baselines):
        styles[name] = {"color": BASELINE, "marker": MARKERS[index % len(MARKERS)], "linestyle": "--"}
    for index, name in enumerate(others):
        turn, place = divmod(index, len(COLOURS))
        # In a second turn through the colours markers and dashes differ.
        marker = MARKERS[(place + 3 * turn) % len(MARKERS)]
        styles[name] = {"color": COLOURS[place], "marker": marker, "linestyle": ("-", "-.", ":")[turn % 3]}
    return styles


def sheet(count: int, records: list[Record], extra: list[str], curves: int = 0) -> tuple[Figure, list[Axes]]:
    """Panels in rows of three, or of two where many lines need room for bars, and in small print what was measured on what."""
    figure, panels = page(count, min(count, 2), (4.35, 3.2)) if curves > BANDS else page(count, min(count, 3), (2.9, 2.7))
    for axes in panels:
        tidy(axes)
    images = sorted({f"{r.eval['fields']['images']}" for r in records}, key=int)
    lines = [f"{suites(records)}; {'/'.join(images)} images of {sources(records)}; {INTERVALS}", *extra]
    figure.supxlabel(small_print(lines, figure.get_figwidth()), **SMALL)
    return figure, panels


def page(count: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Panels of a width and height in inches, in rows."""
    rows = -(-count // columns)
    figure = Figure(figsize=(max(4.6, size[0] * columns), size[1] * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]


OVER_IMAGES = "bands: 95 % intervals over images"

INTERVALS = (
    "bands and bars: 95 % intervals over images, bars beside their place together with their markers; of several trainings "
    "the mean and one standard deviation"
)

SMALL: dict[str, Any] = {"fontsize": 6, "color": "#444444"}


def suites(records: Sequence[Record]) -> str:
    """What records answer: suites, versions and budgets."""
    return ", ".join(sorted({f"{r.suite['name']} v{r.suite['version']}, budget {_budget(r)}" for r in records}))


def _budget(record: Record) -> str:
    budget = record.suite["budget"]
    return budget if budget == "paper" else f"{budget} (reduced)"


def sources(records: Sequence[Record]) -> str:
    """Where their images came from."""
    return ", ".join(sorted({r.hashes.get("data", "unknown data") for r in records}))


def small_print(lines: Sequence[str], width: float) -> str:
    """Lines of size ``SMALL``, broken so that they fit into a width in inches."""
    return "\n".join(textwrap.fill(line, int(22 * width)) for line in lines)


def broken(name: str, letters: int) -> str:
    """A label in lines of so many letters, broken behind commas."""
    return textwrap.fill(", ".join(part.strip() for part in name.split(",")), letters)


def save(figure: Figure, path: Path) -> None:
    """Write a figure; letters of a PDF are TrueType, since many publishers refuse Type 3."""
    with rc_context({"pdf.fonttype": 42}):
        figure.savefig(path, dpi=200)


def tidy(axes: Axes) -> None:
    """Small labels, a faint grid, no box."""
    axes.tick_params(labelsize=8)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_fontsize(9)
    axes.grid(True, lw=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, panels: list[Axes]) -> None:
    """One legend for all panels: inside the first, or above them where many lines would leave no room."""
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(handles) <= BANDS:
        panels[0].legend(handles.values(), handles.keys(), fontsize=7, frameon=False)  # also of lines that others have
    else:
        legend_above(figure, handles)


def legend_above(figure: Figure, handles: dict[str, Any], title: str = "") -> None:
    """A legend above all panels, where it covers nothing, and above it a title; handles by label."""
    room = 16 * figure.get_figwidth()  # letters that fit side by side; a handle takes the room of eight
    columns = max(1, min(6, len(handles), int(room / (max(map(len, handles)) + 8))))
    # The legend gets room of its own: taken from the panels, ten lines of it would leave them flat.
    figure.set_figheight(figure.get_figheight() + 0.15 * -(-len(handles) // columns))
    look: dict[str, Any] = {"ncols": columns, "handlelength": 3.2, "fontsize": 6.5, "frameon": False}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", title=title or None, title_fontsize=10, **look)
