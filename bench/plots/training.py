"""Training curves."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from bench.plots.style import COLOURS, tidy


def training(folder: Path) -> Figure | None:
    """Loss and clean validation accuracy of every trained network against the epoch, a colour a role."""
    notes = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    notes = [note for note in notes if note["log"] and "validation_accuracy" in note["log"][0]]
    if not notes:
        return None
    figure = Figure(figsize=(7.0, 3.0), layout="constrained")
    panels = figure.subplots(1, 2)
    roles = sorted({note["part"]["fields"]["role"] for note in notes})
    for note in notes:
        role = note["part"]["fields"]["role"]
        colour, epochs = COLOURS[roles.index(role) % len(COLOURS)], [line["epoch"] for line in note["log"]]
        panels[0].plot(epochs, [line["loss"] for line in note["log"]], color=colour, lw=1, alpha=0.8)
        accuracies = [100 * line["validation_accuracy"] for line in note["log"]]
        panels[1].plot(epochs, accuracies, color=colour, lw=1, alpha=0.8)
    for role in roles:
        count = sum(note["part"]["fields"]["role"] == role for note in notes)
        colour = COLOURS[roles.index(role) % len(COLOURS)]
        panels[1].plot([], [], color=colour, label=f"{role} ({count})" if count > 1 else role)
    panels[0].set(xlabel="epoch", ylabel="training loss", yscale="log")
    panels[1].set(xlabel="epoch", ylabel="clean validation accuracy (%)")
    for axes in panels:
        tidy(axes)
    panels[1].legend(fontsize=7, frameon=False)
    return figure
