"""Figures of stored records for a paper: certified accuracy, accuracy against epsilon, training curves; as PDF and PNG."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.store import Metric, Record, Store
from bench.tables import certificate

# Okabe & Ito 2008: distinct for colour-blind readers; markers carry the same information in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BASELINE = "#777777"


def draw(store: Store, suite: str, out: Path) -> list[Path]:
    """Draw every figure that the suite's records allow.

    Returns:
        the files written: ``<figure>_<budget>.pdf`` and ``.png`` (``certified.png`` where there is one budget).
    """
    records = [record for record in store.records(suite) if record.status == "success"]
    records.sort(key=lambda record: record.suite["budget"])
    figures: dict[str, Figure | None] = {"training": training(store.root / suite / "parts")}
    budgets = {record.suite["budget"] for record in records}
    for budget, group in groupby(records, key=lambda record: record.suite["budget"]):
        chosen, suffix = list(group), f"_{budget}" if len(budgets) > 1 else ""
        figures[f"certified{suffix}"] = certified(chosen)
        figures[f"robust{suffix}"] = robust(chosen)
    files = []
    for name, figure in figures.items():
        if figure is not None:
            out.mkdir(parents=True, exist_ok=True)
            for kind in ("pdf", "png"):
                files.append(out / f"{name}.{kind}")
                figure.savefig(files[-1], dpi=200)
    return sorted(files)


def certified(records: list[Record]) -> Figure | None:
    """Certified accuracy at the radii that were decided, a line a variant: mean over seeds, or one seed with its interval."""
    records = [record for record in records if certificate(record)]
    if not records:
        return None
    figure, (axes,) = _figure(1, records, sorted({certificate(record) for record in records}))
    for variant, style in _styles(records).items():
        own = [r for r in records if r.defense["variant"] == variant]
        kinds = sorted({(r.eval["name"], certificate(r)) for r in own})
        for index, kind in enumerate(kinds):  # estimators are never averaged: each has a line of its own
            curves = [r for r in own if (r.eval["name"], certificate(r)) == kind]
            points = _points([m for r in curves for m in r.metrics if m.metric == "certified_accuracy"], "radius")
            label = f"{variant}, {curves[0].eval['fields']['estimator']}" if len(kinds) > 1 else variant
            _line(axes, points, label, {**style, "alpha": 1 - 0.4 * index / len(kinds)})
    axes.set(xlabel=r"$\ell_2$ radius (pixels in [0, 1])", ylabel="certified accuracy (%)")
    axes.set_ylim(max(0, axes.get_ylim()[0]), 101)
    axes.set_xlim(left=0)
    _legend(axes)
    return figure


def robust(records: list[Record]) -> Figure | None:
    """Accuracy against epsilon, a panel an attack: mean over seeds, or one seed with its interval."""
    attacks = [record for record in records if any(m.metric == "robust_accuracy" for m in record.metrics)]
    names = sorted({record.eval["name"] for record in attacks})
    if not names:
        return None
    figure, panels = _figure(len(names), attacks, [])
    styles = _styles(attacks)
    for axes, name in zip(panels, names, strict=False):
        shown = [record for record in attacks if record.eval["name"] == name]
        for variant, style in styles.items():
            numbers = [m for r in shown if r.defense["variant"] == variant for m in r.metrics]
            points = _points([m for m in numbers if m.metric == "robust_accuracy" and m.denominator == "all"], "eps")
            _line(axes, points, variant, style)
        norm = {"linf": r"\ell_\infty", "l2": r"\ell_2"}[shown[0].eval["fields"]["norm"]]
        axes.set(title=name.replace("_", " "), xlabel=rf"${norm}$ budget $\epsilon$", ylabel="accuracy (%)", ylim=(-2, 102))
        axes.set_xlim(left=0)
    _legend(panels[0])
    return figure


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
        _tidy(axes)
    _legend(panels[1])
    return figure


Points = list[tuple[float, float, float | None, float | None]]


def _points(metrics: list[Metric], place: str) -> Points:
    """(x, value, lower, upper) in percent; several seeds give their mean and no band of a single one."""
    groups: dict[float, list[Metric]] = {}
    for metric in metrics:
        groups.setdefault(getattr(metric, place), []).append(metric)
    points: Points = []
    for x, group in sorted(groups.items()):
        value = 100 * sum(metric.value for metric in group) / len(group)
        one = group[0]
        if len(group) == 1 and one.lower is not None and one.upper is not None:
            points.append((x, value, 100 * one.lower, 100 * one.upper))
        else:
            points.append((x, value, None, None))
    return points


def _line(axes: Axes, points: Points, label: str, style: dict[str, Any]) -> None:
    if not points:
        return
    xs = [point[0] for point in points]
    axes.plot(xs, [point[1] for point in points], label=label, ms=4, lw=1.3, **style)
    band = [(x, low, high) for x, _, low, high in points if low is not None and high is not None]
    if band:
        x, low, high = zip(*band, strict=True)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)


def _styles(records: list[Record]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each variant; randomised smoothing, the baseline, is grey and dashed."""
    variants = sorted({record.defense["variant"] for record in records})
    baselines = [v for v in variants if v.partition("@")[0] == "randsmooth"]
    others = [v for v in variants if v not in baselines]
    styles: dict[str, dict[str, Any]] = {}
    for index, variant in enumerate(baselines):
        styles[variant] = {"color": BASELINE, "marker": MARKERS[index % len(MARKERS)], "linestyle": "--"}
    for index, variant in enumerate(others):
        styles[variant] = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
    return styles


def _figure(count: int, records: list[Record], extra: list[str]) -> tuple[Figure, list[Axes]]:
    """Panels in rows of three, and in small print what was measured on what."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(4.6, 2.9 * columns), 2.7 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in panels[count:]:
        spare.set_visible(False)
    for axes in panels[:count]:
        _tidy(axes)
    suites = sorted({f"{r.suite['name']} v{r.suite['version']}, budget {r.suite['budget']}" for r in records})
    images = sorted({f"{r.eval['fields']['images']}" for r in records}, key=int)
    sources = sorted({r.hashes.get("data", "unknown data") for r in records})
    lines = [f"{', '.join(suites)}; {'/'.join(images)} images of {', '.join(sources)}; bands: 95 % intervals", *extra]
    figure.supxlabel("\n".join(lines), fontsize=6, color="#444444")
    return figure, panels[:count]


def _tidy(axes: Axes) -> None:
    axes.grid(True, lw=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=7, frameon=False)
