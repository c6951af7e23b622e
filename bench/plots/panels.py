"""The panels of a declared figure: curves of several defenses with what papers print, or one defense as the plots of a suite
show it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from bench import published
from bench.figures import METRICS, Curves, FigureError, View
from bench.plots.activations import counted, depth, kernel_changes, layer_changes, middle
from bench.plots.kernels import mosaic, tiles
from bench.plots.style import Points, lines, points_of
from bench.plots.transfer import counted as counted_images
from bench.plots.transfer import heat_map
from bench.plots.variance import margin, radii, samples
from bench.store import Metric, Record, Store
from bench.suites import load_suite

Looks = Mapping[str, dict[str, Any]]
"""Colour, marker and dashes by label."""

Shown = Mapping[float | None, Sequence[Record]]
"""Records of a line, a seed each, by their place on the axis where there is one."""

PRINTED: dict[str, Any] = {"linestyle": (0, (1, 1.5)), "lw": 0.9, "ms": 4.5, "mfc": "none", "mew": 0.7}
"""How numbers look that a paper prints."""

IMPOSSIBLE: dict[str, Any] = {"linestyle": "", "marker": "x", "ms": 6, "mew": 1.5}
"""How such numbers look that cannot be true."""


def curves(axes: Axes, panel: Curves, suite: str, found: Mapping[str, Shown], looks: Looks) -> None:
    """Draw a line a defense, and what is printed."""
    if panel.log:
        axes.set_xscale("log")
    lines(axes, [(own.label, values(panel, found[own.label]), looks[own.label]) for own in panel.lines])
    for index, own in enumerate(panel.lines):
        _draw_printed(axes, printed(panel, index), panel.x, looks[own.label])
    axes.set(xlabel=panel.xlabel or _axis(panel, suite), ylabel=METRICS[panel.metric], ylim=(-2, 102))
    if panel.log:
        axes.xaxis.set_major_formatter("{x:g}")
    elif panel.x:
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))  # markers at 0 may stand aside
    else:
        places = sorted({place for shown in found.values() for place in shown if place is not None})
        margin = 0.08 * (places[-1] - places[0]) or 0.5
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.set_xlim(places[0] - margin, places[-1] + margin)


def values(panel: Curves, shown: Shown) -> Points:
    """The points of a line in percent, with intervals of one seed or the deviation of several."""
    points: Points = []
    for place, records in sorted(shown.items(), key=lambda pair: pair[0] or 0.0):
        chosen = [metric for record in records for metric in _numbers(panel, record)]
        points += points_of(chosen, panel.x or partial(_at, place or 0.0))
    return points


def _at(place: float, metric: Metric) -> float:
    return place


def _numbers(panel: Curves, record: Record) -> list[Metric]:
    """The numbers of a record that the panel asks for, one at most for every place.

    Raises:
        FigureError: if there are several.
    """
    found = [metric for metric in record.metrics if metric.metric == panel.metric and metric.denominator in (None, "all")]
    found = [m for m in found if all(_equal(getattr(m, name), wanted) for name, wanted in panel.select.items())]
    places = [getattr(metric, panel.x) if panel.x else None for metric in found]
    if len(set(places)) < len(places):
        raise FigureError(
            f"panel {panel.title!r}: {record.eval['name']} has several numbers for a place; select must say which"
        )
    return found


def _equal(a: Any, b: str | float) -> bool:
    return a == b if isinstance(b, str) else a is not None and math.isclose(a, b, rel_tol=1e-9)


def printed(panel: Curves, index: int) -> pd.DataFrame:
    """Rows of :func:`bench.published.frame` for a line, in the order of the axis; empty where none is asked for or known."""
    wanted = panel.facts(panel.lines[index])
    if wanted is None or not panel.x:
        return pd.DataFrame(columns=list(published.COLUMNS))
    rows = published.known(**wanted)
    return rows[rows[panel.x].notna()].sort_values(panel.x)


def _draw_printed(axes: Axes, rows: pd.DataFrame, x: str, look: Mapping[str, Any]) -> None:
    false = rows.flag == "impossible"
    for own, style in ((rows[~false], {**PRINTED, "marker": look["marker"]}), (rows[false], IMPOSSIBLE)):
        if len(own):
            axes.plot(own[x], own.value, color=look["color"], label="_printed", **style)


def _axis(panel: Curves, suite: str) -> str:
    if panel.x == "radius":
        return "certified ℓ2 radius (pixels in [0, 1])"
    norms = {str(getattr(load_suite(suite).evals[own.eval or panel.eval], "norm", "")) for own in panel.lines}
    return f"{'/'.join({'linf': 'ℓ∞', 'l2': 'ℓ2'}.get(norm, norm) for norm in sorted(norms))} budget ε"


def view(axes: Axes, panel: View, records: Sequence[Record], store: Store) -> str:
    """Draw one defense; a few words for below the panel's title."""
    return _VIEWS[panel.kind](axes, panel, records, store)


def _of_variance(draw: Callable[[Axes, Record], None]) -> Callable[[Axes, View, Sequence[Record], Store], str]:
    def drawn(axes: Axes, panel: View, records: Sequence[Record], store: Store) -> str:
        draw(axes, records[0])
        return ""

    return drawn


def _transfer(axes: Axes, panel: View, records: Sequence[Record], store: Store) -> str:
    heat_map(axes, list(records))
    return counted_images(list(records))


def _kernels(axes: Axes, panel: View, records: Sequence[Record], store: Store) -> str:
    axes.set_axis_off()
    return f"grey 0, black and white ±{tiles(axes, mosaic(store.rows(records[0]))):.2g}"


def _depth(axes: Axes, panel: View, records: Sequence[Record], store: Store) -> str:
    depth(axes, records)
    return f"ε = {middle(records[0]):g}"


def _changes(axes: Axes, panel: View, records: Sequence[Record], store: Store) -> str:
    """Changes of one kernel's activation, or of a whole layer's."""
    rows = counted(records[0], store)
    looks = [part for _, part in rows[rows.kernel >= 0].groupby("layer")]
    if not looks:
        return "no image is right as it is"
    part = looks[{"first": 0, "middle": len(looks) // 2, "last": -1}[panel.layer]]
    if panel.kind == "kernel_changes":
        kernel_changes(axes, part)
        axes.set_xlabel("change / rms of the layer")
    else:
        layer_changes(axes, rows[rows.layer == part.layer.iloc[0]])
        axes.set_xlabel(r"$\|\Delta\|\ /\ \|y\|$")
    words = axes.get_title()
    axes.set_ylabel("share")
    return words


_VIEWS: dict[str, Callable[[Axes, View, Sequence[Record], Store], str]] = {
    "margin": _of_variance(margin),
    "acr": _of_variance(radii),
    "samples": _of_variance(samples),
    "transfer": _transfer,
    "kernels": _kernels,
    "depth": _depth,
    "kernel_changes": _changes,
    "layer_changes": _changes,
}
