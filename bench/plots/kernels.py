"""The kernels of the first convolution on their sheets (KAP, figures 7 and A1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from bench.arrays import unpacked
from bench.plots.style import SMALL, broken, small_print, sources, suites
from bench.store import Record, Store

PAGE = 8
"""Defenses of one figure."""

GAP = 0.35
"""Space between kernels, in pixels of a kernel."""

MEANING = (
    "kernels as images are convolved with them, means of kernels where a defense pools by mean; row by row on their sheet, one "
    "long row in several, without a margin that a stride leaves empty; they act on pixels that the network has normalised",
    "scale of a panel: mid grey is a weight of 0; a channel is darkest at minus and brightest at plus the number in brackets",
)


def kernels(records: Sequence[Record], store: Store) -> list[Figure]:
    """Figures of up to ``PAGE`` defenses, of every defense its first seed: a panel with all kernels of its first layer."""
    found: dict[str, tuple[Record, np.ndarray]] = {}
    chosen = [record for record in records if record.eval["fields"].get("kind") == "kernels"]
    for record in sorted(chosen, key=lambda record: (record.defense["variant"], record.seed, record.eval["name"])):
        if record.defense["variant"] not in found:
            found[record.defense["variant"]] = record, mosaic(store.rows(record))
    shown = list(found.values())
    return [_figure(shown[start : start + PAGE]) for start in range(0, len(shown), PAGE)]


def mosaic(rows: pd.DataFrame) -> np.ndarray:
    """All kernels on their sheet, (rows columns h w c) with c of 1 or 3.

    A sheet of one row is broken into a square; a margin of kernels that are 0, which a stride leaves, is cut off.
    """
    weights = np.stack([unpacked(own) for own in rows.sort_values("kernel").applied])
    if weights.shape[1] not in (1, 3):
        weights = weights.mean(1, keepdims=True)
    down = int(rows.row.max()) + 1
    if down == 1:
        columns = math.ceil(math.sqrt(len(weights)))
        spare = -len(weights) % columns
        weights = np.concatenate([weights, np.zeros((spare, *weights.shape[1:]), weights.dtype)])
        down = len(weights) // columns
    sheet = weights.transpose(0, 2, 3, 1).reshape(down, -1, *weights.shape[2:], weights.shape[1])
    rows_used, columns_used = (np.flatnonzero(sheet.any(axis)) for axis in ((1, 2, 3, 4), (0, 2, 3, 4)))
    if not len(rows_used):
        return sheet
    return sheet[rows_used[0] : rows_used[-1] + 1, columns_used[0] : columns_used[-1] + 1]


def _figure(shown: Sequence[tuple[Record, np.ndarray]]) -> Figure:
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(
        figsize=(max(4.6, 2.7 * columns), 2.9 * lines + 0.7), layout=ConstrainedLayoutEngine(wspace=0.12, h_pad=0.08)
    )
    panels = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for axes, (record, sheet) in zip(panels, shown, strict=False):
        title = broken(f"{record.defense['variant']}, seed {record.seed}", 34)
        axes.set_title(f"{title} (±{tiles(axes, sheet):.2g})", fontsize=8)
    for axes in panels:
        axes.set_axis_off()
    records = [record for record, _ in shown]
    architectures = sorted({f"{record.task.get('architecture')}" for record in records})
    words = [f"{suites(records)}; {sources(records)}; {', '.join(architectures)}", *MEANING]
    figure.supxlabel(small_print(words, figure.get_figwidth()), **SMALL)
    return figure


def tiles(axes: Axes, sheet: np.ndarray) -> float:
    """Draw a sheet as :func:`mosaic` gives it; the weight that is brightest."""
    largest = float(np.abs(sheet).max()) or 1.0
    axes.imshow(_tiled(0.5 + sheet / (2 * largest)), interpolation="nearest")
    return largest


def _tiled(sheet: np.ndarray, pixel: int = 20) -> np.ndarray:
    """One picture (height width 3) in 0 to 1 of kernels (rows columns h w c) in 0 to 1, white between them."""
    gap = round(GAP * pixel)
    rows, columns, h, w, c = sheet.shape
    big = sheet.repeat(pixel, 2).repeat(pixel, 3)
    big = np.broadcast_to(big, (*big.shape[:-1], 3)) if c == 1 else big
    framed = np.pad(big, ((0, 0), (0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=1.0)
    flat = framed.transpose(0, 2, 1, 3, 4).reshape(rows * (h * pixel + gap), columns * (w * pixel + gap), 3)
    return flat[gap:, gap:]
