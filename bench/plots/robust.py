"""Accuracy against epsilon."""

from __future__ import annotations

from matplotlib.figure import Figure

from bench.metrics import wilson
from bench.plots.style import Styles, legend, lines, points_of, sheet, styles_of
from bench.store import Metric, Record


def robust(records: list[Record], styles: Styles | None = None) -> Figure | None:
    """Accuracy against epsilon, from 0 on, a panel an attack: mean over seeds, or one seed with its interval."""
    attacks = [record for record in records if any(m.metric == "robust_accuracy" for m in record.metrics)]
    names = sorted({record.eval["name"] for record in attacks})
    if not names:
        return None
    figure, panels = sheet(len(names), attacks, [], len({record.defense["variant"] for record in attacks}))
    styles = styles or styles_of(record.defense["variant"] for record in attacks)
    for axes, name in zip(panels, names, strict=False):
        shown = [record for record in attacks if record.eval["name"] == name]
        curves = []
        for variant, style in styles.items():
            points = points_of([m for r in shown if r.defense["variant"] == variant for m in _numbers(r)], "eps")
            curves.append((variant, points, style))
        lines(axes, curves)
        norm = {"linf": r"\ell_\infty", "l2": r"\ell_2"}[shown[0].eval["fields"]["norm"]]
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set(xlabel=rf"${norm}$ budget $\epsilon$", ylabel="accuracy (%)", ylim=(-2, 102))
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))  # markers at 0 may stand aside
    legend(figure, panels)
    return figure


def _numbers(record: Record) -> list[Metric]:
    """Robust accuracy at every epsilon, and at 0 that of the same images without attack, where the record counts them."""
    own = [m for m in record.metrics if m.metric == "robust_accuracy"]
    every = [m for m in own if m.denominator == "all"]
    right = next((m.n for m in own if m.denominator == "clean_correct"), None)
    if not every or right is None:
        return every
    n = every[0].n
    low, high = wilson(right, n)
    return [every[0].model_copy(update={"eps": 0.0, "value": right / n, "lower": low, "upper": high}), *every]
