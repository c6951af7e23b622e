"""Training curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.plots.style import COLOURS, MARKERS, legend, tidy

Note = Mapping[str, Any]
"""What lies beside a trained part: its fields, and a log with a line an epoch."""

FACTS = ("epoch", "lr", "loss", "seconds", "kept")
"""What a log's lines hold beside the parts of the loss and what was measured, whose names begin with "validation_"."""

QUICK = "dashed: under a short PGD (at most 1,000 images)"

KEPT = "ring: the epoch whose weights were kept"

WIDE, LINEAR = 20.0, 0.1
"""When an axis is logarithmic, see :func:`_scale`."""


def training(folder: Path) -> Figure | None:
    """Every trained network against the epoch, a colour a role: its loss, its clean and quick robust validation accuracy, and,
    in a panel a name, the parts of a loss that has several, with their weights: the loss is their sum."""
    notes = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    notes = [note for note in notes if note["log"] and "validation_accuracy" in note["log"][0]]
    if not notes:
        return None
    names = sorted({name for note in notes for name in loss_parts(note)}, key=lambda name: (name != "ce", name))
    figure, panels = _panels(2 + len(names))
    roles = sorted({_role(note) for note in notes})
    styles = {role: _style(place) for place, role in enumerate(roles)}
    for note in notes:
        style = styles[_role(note)]
        _draw(panels[0], note, "loss", style)
        _draw(panels[1], note, "validation_accuracy", style, 100)
        _draw(panels[1], note, "validation_robust", {**style, "linestyle": "--", "lw": 0.7}, 100)
        for axes, name in zip(panels[2:], names, strict=True):
            if name in loss_parts(note):
                _draw(axes, note, name, style)
        _ring(panels[1], note, style)
    labels = ["training loss", "clean validation accuracy (%)", *(f"part of the loss: {name}" for name in names)]
    for axes, label in zip(panels, labels, strict=True):
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
        if axes is not panels[1]:
            _scale(axes)
    if any("validation_robust" in note["log"][0] for note in notes):
        kept = any("kept" in note["log"][-1] for note in notes)
        panels[1].set_title("\n".join([f"solid: clean; {QUICK}", *([KEPT] if kept else [])]), fontsize=7)
        panels[1].set_ylabel("validation accuracy (%)")
    for role in roles:
        count = sum(_role(note) == role for note in notes)
        panels[1].plot([], [], label=f"{role} ({count})" if count > 1 else role, **styles[role])
    legend(figure, panels[1:])
    return figure


def loss_parts(note: Note) -> list[str]:
    """The parts of a loss that has more than one; else the loss says it all."""
    names = [name for name in note["log"][0] if name not in FACTS and not name.startswith("validation_")]
    return names if len(names) > 1 else []


def _role(note: Note) -> str:
    return str(note["part"]["fields"]["role"])


def _style(place: int) -> dict[str, Any]:
    """Colour of a role, and in further turns through the colours a marker too."""
    turn, place = divmod(place, len(COLOURS))
    marker = MARKERS[(place + 3 * (turn - 1)) % len(MARKERS)] if turn else ""
    return {"color": COLOURS[place], "lw": 0.9, "alpha": 0.8, "marker": marker, "ms": 3}


def _draw(axes: Axes, note: Note, name: str, style: Mapping[str, Any], scale: float = 1) -> None:
    """One network's line, if its log has the number; a dot where there is one epoch only."""
    points = [(line["epoch"], scale * line[name]) for line in note["log"] if name in line]
    if points:
        few = {"markevery": max(1, len(points) // 5), "marker": style["marker"] or ("." if len(points) == 1 else "")}
        axes.plot(*zip(*points, strict=True), **{**style, **few})


def _ring(axes: Axes, note: Note, style: Mapping[str, Any]) -> None:
    """A ring around the accuracy, under the short PGD if there is one, of the epoch that was kept, if one was."""
    for line in note["log"]:
        if line["epoch"] == note["log"][-1].get("kept"):
            value = 100 * line.get("validation_robust", line["validation_accuracy"])
            axes.plot([line["epoch"]], [value], "o", ms=6, mfc="none", color=style["color"])


def _scale(axes: Axes) -> None:
    """A logarithmic axis where numbers differ ``WIDE`` times in size; with both signs it is linear between +-``LINEAR``."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.get_lines()])
    low, high = values.min(), values.max()
    if 0 < low < high / WIDE:
        axes.set_yscale("log")
    elif low <= 0 and high > WIDE * LINEAR:
        axes.set_yscale("symlog", linthresh=LINEAR)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Two panels side by side, or rows of three."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.5 * columns if rows == 1 and columns == 2 else 3.2 * columns, 2.6 * rows + 0.4))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in panels[count:]:
        spare.set_visible(False)
    return figure, panels[:count]
