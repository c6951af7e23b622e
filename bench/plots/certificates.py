"""Certified accuracy against the radius, and estimators on the same votes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.columns import certificate
from bench.metrics import whole_set_bound, wilson
from bench.plots.style import COLOURS, MARKERS, Styles, legend, lines, points_of, sheet, sigma_of, styles_of
from bench.store import Record, Store
from bench.tables import without_sigma


def certified(records: list[Record], store: Store | None = None, styles: Styles | None = None) -> Figure | None:
    """Certified accuracy, a panel a sigma, a line a defense: mean over seeds, or one seed.

    At the radii that were decided; whole radii, whose rows are read from ``store``, give a curve with its confidence band.
    """
    records = [r for r in records if certificate(r) and any(m.metric == "certified_accuracy" for m in r.metrics)]
    if not records:
        return None
    sigmas = sorted({sigma_of(record) for record in records})
    dotted = [DOTTED] if store is not None and any(_whole(record) for record in records) else []
    names = {without_sigma(record.defense["variant"]) for record in records}
    figure, panels = sheet(len(sigmas), records, [*sorted({certificate(r) for r in records}), *dotted], len(names))
    styles = styles or styles_of(record.defense["variant"] for record in records)
    for axes, sigma in zip(panels, sigmas, strict=True):
        chosen = [record for record in records if sigma_of(record) == sigma]
        shown = sorted({(without_sigma(r.defense["variant"]), r.eval["name"], certificate(r)) for r in chosen})
        variants = [one[0] for one in shown]
        dots = []
        for index, (variant, name, kind) in enumerate(shown):  # estimators are never averaged: each has a line of its own
            curves = [
                r
                for r in chosen
                if (without_sigma(r.defense["variant"]), r.eval["name"], certificate(r)) == (variant, name, kind)
            ]
            points = points_of([m for r in curves for m in r.metrics if m.metric == "certified_accuracy"], "radius")
            several = variants.count(variant) > 1
            label = f"{variant}, {curves[0].eval['fields']['estimator']}" if several else variant
            faded = {"alpha": 1 - 0.4 * variants[:index].count(variant) / variants.count(variant)}
            style = {**styles[variant], **faded}
            if store is not None and len(curves) == 1 and _whole(curves[0]):
                _curve(axes, store.rows(curves[0]), label, style, curves[0].eval["fields"]["alpha"])
            else:
                dots.append((label, points, style))
        lines(axes, dots)
        axes.set(xlabel=r"$\ell_2$ radius (pixels in [0, 1])", ylabel="certified accuracy (%)")
        axes.set_title(rf"$\sigma$ = {sigma:g}" if sigma else "", fontsize=9)
        axes.set_ylim(max(0, axes.get_ylim()[0]), 101)
    legend(figure, panels)
    return figure


DOTTED = "dotted: what holds for the whole set with probability 1 - alpha"


def _whole(record: Record) -> bool:
    """Whether radii are whole, not members of a grid."""
    return any(metric.metric == "acr" for metric in record.metrics)


def _curve(axes: Axes, rows: pd.DataFrame, label: str, style: dict[str, Any], alpha: float) -> None:
    """Certified accuracy at every radius in steps of 0.01, its 95 % band, and dotted what holds for the whole set."""
    right = (rows.prediction == rows.label).to_numpy()
    radii = np.arange(0, rows.radius.max() + 0.02, 0.01)
    hits = [int((right & (rows.radius >= r)).sum()) for r in radii]
    band = 100 * np.array([wilson(hit, len(rows)) for hit in hits])
    style = {**style, "marker": ""}
    axes.plot(radii, 100 * np.array(hits) / len(rows), lw=1.3, label=label, **style)
    sure = [100 * whole_set_bound(hit / len(rows), len(rows), alpha) for hit in hits]
    axes.plot(radii, sure, lw=0.8, color=style["color"], ls=":")
    axes.fill_between(radii, band[:, 0], band[:, 1], color=style["color"], alpha=0.12, lw=0)


def estimators(records: list[Record]) -> Figure | None:
    """What estimators make of the same votes: accuracies, and mean draws of a run for one radius beside the oracle's."""
    records = [r for r in records if r.eval["fields"].get("kind") == "votes" and r.metrics]
    if not records:
        return None
    facts = {"n0 = {n0}, n = {n}, alpha = {alpha:g}".format(**r.eval["fields"]) for r in records}
    figure, panels = sheet(2 * len(records), records, sorted(facts))
    names = sorted({m.estimator for r in records for m in r.metrics if m.estimator})
    styles = {name: {"color": COLOURS[i], "marker": MARKERS[i]} for i, name in enumerate(names)}
    for row, record in enumerate(records):
        left, right = panels[2 * row : 2 * row + 2]
        curves = []
        for name in names:
            own = [m for m in record.metrics if m.estimator == name]
            found = [m for m in own if m.metric == "certified_accuracy"]
            curves.append((name, points_of(found, "radius"), styles[name]))
            draws = [(m.radius, m.value) for m in own if m.metric == "draws_per_image"]
            if draws[0][0] is None:
                right.axhline(draws[0][1], color=styles[name]["color"], lw=1, ls=":", label=f"{name}, one run for all")
            else:
                right.plot(*zip(*draws, strict=True), lw=1.3, ms=4, label=name, **styles[name])  # type: ignore[arg-type]
        lines(left, curves)
        left.set(xlabel=r"$\ell_2$ radius (pixels in [0, 1])", ylabel="certified accuracy (%)")
        right.set(xlabel=r"$\ell_2$ radius (pixels in [0, 1])", ylabel="mean draws an image", yscale="log")
        left.set_title(rf"{without_sigma(record.defense['variant'])}, $\sigma$ = {sigma_of(record):g}", fontsize=9)
    legend(figure, panels)
    return figure
