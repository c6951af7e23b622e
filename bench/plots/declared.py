"""A declared figure on a page: its panels, a mark for everything that is missing, and the words that a stranger needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Page
from matplotlib.lines import Line2D

from bench.figures import Curves, Figure, FigureError, load_figure
from bench.plots import filled as contents
from bench.plots.activations import LOOKS, WORDS, alike
from bench.plots.filled import Filled, fill
from bench.plots.panels import IMPOSSIBLE, PRINTED, Looks, curves, view
from bench.plots.style import BASELINE, SMALL, broken, legend_above, page, save, small_print, styles_in_order, tidy
from bench.plots.transfer import RATES, colour_bar
from bench.store import Store
from bench.suites import BUDGETS, unknown
from bench.wanted import AGAIN, Shelf, again

SIZES = {"transfer": (2.3, 2.3), "kernels": (2.5, 2.8), "kernel_changes": (2.2, 1.9), "layer_changes": (2.2, 1.9)}
"""Inches of a panel by kind; other panels are ``SIZE``."""

SIZE = (2.9, 2.7)

SQUARE = ("transfer", "kernels")
"""Panels that show a sheet and no axes."""

LINE = 0.1
"""Inches of a line of small print."""

LETTERS = 13
"""Of a panel's title that fit into an inch; of the page's there are a few less."""

NAMED = 3
"""Lines that a title calls missing by name; the text beside the figure names all."""


@dataclass(frozen=True)
class Drawn:
    """A finished page.

    Attributes:
        page: the figure, panels in the order of the file.
        panels: with the records and the holes behind them.
        words: title, caption, what was measured on what, the commands that make it again, and what would fill its holes.
    """

    page: Page
    panels: list[Filled]
    words: str


def draw_figure(name: str, store: Store, budget: str, out: Path, options: str = "") -> list[Path]:
    """Draw a figure by name, or from a TOML file, at a budget; the files written: PDF, PNG, and its words as text.

    Args:
        options: further ones of the commands that would fill its holes.

    Raises:
        bench.figures.FigureError: for an unknown budget, or a figure that cannot be used.
    """
    if budget not in BUDGETS:
        raise FigureError(f"budget: {unknown(budget, BUDGETS)}")
    drawn = compose(load_figure(name), store, budget, options)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{Path(name).name.removesuffix('.toml')}.{kind}" for kind in ("pdf", "png", "txt")]
    for path in files[:2]:
        save(drawn.page, path)
    files[2].write_text(drawn.words)
    return files


def compose(figure: Figure, store: Store, budget: str, options: str = "") -> Drawn:
    """Lay a figure out and draw every panel; options are of the commands that would fill its holes."""
    shelf = Shelf(store, budget)
    filled = [fill(panel, shelf) for panel in figure.panels]
    width, height = (max(sides) for sides in zip(*(SIZES.get(panel.kind, SIZE) for panel in figure.panels), strict=True))
    sheet, every = page(len(filled), min(figure.columns, len(filled)), (width, height))
    looks = _looks(figure)
    for axes, one in zip(every, filled, strict=True):
        _draw(axes, one, looks, store)
    deep = [axes for axes, one in zip(every, filled, strict=True) if one.panel.kind == "depth" and not one.empty]
    if deep:
        alike(deep)
    if any(one.panel.kind == "transfer" for one in filled):
        colour_bar(sheet, ScalarMappable(Normalize(*RATES.ends), RATES.colours), every, "target is wrong (%)")
    _head(sheet, figure.title, _keys(every, filled, looks))
    small = [*contents.explained(figure), *contents.facts(filled), *contents.doubts(filled, shelf)]
    _foot(sheet, small, filled)
    made = again(record for one in filled for record in one.records)
    commands = ["\n".join([AGAIN, *made])] if made else []
    commands += contents.missing(contents.holes(filled), budget, options)
    return Drawn(sheet, filled, "\n\n".join([figure.title, *small, *commands]) + "\n")


def _draw(axes: Axes, one: Filled, looks: Looks, store: Store) -> None:
    """Draw a panel, and say what of it is missing."""
    panel, words = one.panel, _gaps(one)
    if isinstance(panel, Curves):
        curves(axes, panel, one.suite, one.found, looks)
        drawn = bool(axes.lines)
    else:
        drawn = not one.empty
        if panel.kind in SQUARE:
            axes.set_box_aspect(1)
        if drawn:
            words = [view(axes, panel, one.records, store)]
    if not drawn:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, words.pop(), ha="center", va="center", fontsize=8, color=BASELINE, transform=axes.transAxes)
    if panel.kind not in SQUARE:
        tidy(axes)
    title = broken(panel.title, int(LETTERS * SIZES.get(panel.kind, SIZE)[0]))
    axes.set_title("\n".join(filter(None, [title, *words])), fontsize=8)


def _gaps(one: Filled) -> list[str]:
    """Which lines are missing, for below the title of a panel."""
    if len(one.empty) == len(one.found):
        return ["no record yet" if not one.records else one.holes[0].reason]
    told = {"missing": one.empty, "points missing": one.partly}
    names = {word: ", ".join(some) if len(some) <= NAMED else f"{len(some)} of {len(one.found)}" for word, some in told.items()}
    return [broken(f"{word}: {text}", int(LETTERS * SIZE[0])) for word, text in names.items() if text]


def _looks(figure: Figure) -> dict[str, dict[str, Any]]:
    """How the lines of each label look, in the order in which they first occur."""
    lines = {own.label: own.baseline for panel in figure.panels if isinstance(panel, Curves) for own in panel.lines}
    looks = styles_in_order([label for label in lines if not lines[label]], [label for label in lines if lines[label]])
    return {label: looks[label] for label in lines}


def _keys(every: Sequence[Axes], filled: Sequence[Filled], looks: Mapping[str, dict[str, Any]]) -> dict[str, Line2D]:
    """What lines and colours mean."""
    handles = {label: Line2D([], [], ms=3.5, lw=1.2, **look) for label, look in looks.items()}
    printed = [line.get_marker() for axes in every for line in axes.get_lines() if line.get_label() == "_printed"]
    if printed:
        handles["as the paper prints it"] = Line2D([], [], color="black", marker="o", **PRINTED)
    if IMPOSSIBLE["marker"] in printed:
        handles["printed, but impossible"] = Line2D([], [], color="black", **IMPOSSIBLE)
    if any(one.panel.kind in ("depth", "kernel_changes", "layer_changes") for one in filled):
        handles |= {WORDS[source]: Line2D([], [], **look) for source, look in LOOKS.items()}
    return handles


def _head(sheet: Page, title: str, handles: dict[str, Line2D]) -> None:
    """The title, and below it the keys."""
    title = broken(title, int((LETTERS - 2) * sheet.get_figwidth()))
    if handles:
        legend_above(sheet, handles, title)
    else:
        sheet.suptitle(title, fontsize=10)


def _foot(sheet: Page, told: Sequence[str], filled: Sequence[Filled]) -> None:
    """Caption, facts, and that something is missing, in small print, for which the page grows: else panels would be flat."""
    lines = list(told)
    gaps, asked = len(contents.holes(filled)), sum(one.asked for one in filled)
    if gaps:
        lines.append(f"missing: {gaps} of {asked} results; the text file beside this figure has the commands that make them")
    small = small_print(lines, sheet.get_figwidth())
    sheet.set_figheight(sheet.get_figheight() + LINE * (small.count("\n") + 1))
    sheet.supxlabel(small, **SMALL)
