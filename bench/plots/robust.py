"""Accuracy against epsilon."""

from __future__ import annotations

from matplotlib.figure import Figure

from bench.plots.style import legend, line, points_of, sheet, styles_of
from bench.store import Record


def robust(records: list[Record]) -> Figure | None:
    """Accuracy against epsilon, a panel an attack: mean over seeds, or one seed with its interval."""
    attacks = [record for record in records if any(m.metric == "robust_accuracy" for m in record.metrics)]
    names = sorted({record.eval["name"] for record in attacks})
    if not names:
        return None
    figure, panels = sheet(len(names), attacks, [])
    styles = styles_of([record.defense["variant"] for record in attacks])
    for axes, name in zip(panels, names, strict=False):
        shown = [record for record in attacks if record.eval["name"] == name]
        for index, (variant, style) in enumerate(styles.items()):
            numbers = [m for r in shown if r.defense["variant"] == variant for m in r.metrics]
            points = points_of([m for m in numbers if m.metric == "robust_accuracy" and m.denominator == "all"], "eps")
            line(axes, points, variant, style, (index, len(styles)))
        norm = {"linf": r"\ell_\infty", "l2": r"\ell_2"}[shown[0].eval["fields"]["norm"]]
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set(xlabel=rf"${norm}$ budget $\epsilon$", ylabel="accuracy (%)", ylim=(-2, 102))
        axes.set_xlim(left=0)
    legend(figure, panels)
    return figure
