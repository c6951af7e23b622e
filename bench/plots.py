"""Figures of stored records for a paper: certified accuracy, the variance view, accuracy against epsilon, training curves."""

from __future__ import annotations

import json
import textwrap
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from bench.columns import certificate
from bench.metrics import variance_ratio
from bench.store import Metric, Record, Store
from bench.tables import without_sigma

# Okabe & Ito 2008 without yellow (too faint on white), then indigo, wine and olive of Tol 2021 (muted): distinct for
# colour-blind readers; markers, one a colour, carry the same information in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#332288", "#882255", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">")
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
        figures[f"variance{suffix}"] = variance(chosen)
    files = []
    for name, figure in figures.items():
        if figure is not None:
            out.mkdir(parents=True, exist_ok=True)
            for kind in ("pdf", "png"):
                files.append(out / f"{name}.{kind}")
                figure.savefig(files[-1], dpi=200)
    return sorted(files)


def certified(records: list[Record]) -> Figure | None:
    """Certified accuracy at the radii that were decided, a panel a sigma, a line a defense: mean over seeds, or one seed."""
    records = [record for record in records if certificate(record)]
    if not records:
        return None
    sigmas = sorted({_sigma(record) for record in records})
    figure, panels = _figure(len(sigmas), records, sorted({certificate(record) for record in records}))
    styles = _styles([without_sigma(record.defense["variant"]) for record in records])
    for axes, sigma in zip(panels, sigmas, strict=True):
        chosen = [record for record in records if _sigma(record) == sigma]
        lines = sorted({(without_sigma(r.defense["variant"]), r.eval["name"], certificate(r)) for r in chosen})
        variants = [line[0] for line in lines]
        for index, (variant, name, kind) in enumerate(lines):  # estimators are never averaged: each has a line of its own
            curves = [
                r
                for r in chosen
                if (without_sigma(r.defense["variant"]), r.eval["name"], certificate(r)) == (variant, name, kind)
            ]
            points = _points([m for r in curves for m in r.metrics if m.metric == "certified_accuracy"], "radius")
            several = variants.count(variant) > 1
            label = f"{variant}, {curves[0].eval['fields']['estimator']}" if several else variant
            faded = {"alpha": 1 - 0.4 * variants[:index].count(variant) / variants.count(variant)}
            _line(axes, points, label, {**styles[variant], **faded}, (index, len(lines)))
        axes.set(xlabel=r"$\ell_2$ radius (pixels in [0, 1])", ylabel="certified accuracy (%)")
        axes.set_title(rf"$\sigma$ = {sigma:g}" if sigma else "", fontsize=9)
        axes.set_ylim(max(0, axes.get_ylim()[0]), 101)
    _legend(figure, panels)
    return figure


def _sigma(record: Record) -> float:
    return float(record.eval["fields"].get("sigma") or 0.0)


def variance(records: list[Record]) -> Figure | None:
    """The variance view, a row a sigma: margin variance against members, ACR against members, members against samples."""
    records = [r for r in records if r.eval["fields"].get("kind") == "variance" and r.metrics]
    records.sort(key=lambda record: (_sigma(record), record.defense["variant"], record.seed))
    if not records:
        return None
    facts = {"n0 = {n0} draws to select (not in k n), alpha = {alpha:g}".format(**r.eval["fields"]) for r in records}
    figure, panels = _figure(3 * len(records), records, sorted(facts))
    seeds = {record.seed for record in records}
    for row, record in enumerate(records):
        left, middle, right = panels[3 * row : 3 * row + 3]
        _margin(left, record)
        _radii(middle, record)
        _samples(right, record)
        seed = f", seed {record.seed}" if len(seeds) > 1 else ""
        left.set_title(rf"{without_sigma(record.defense['variant'])}, $\sigma$ = {_sigma(record):g}{seed}", fontsize=9)
    return figure


def _margin(axes: Axes, record: Record) -> None:
    """Measured variance of the first k members' margin, and the curve of the fitted correlation."""
    measured = [m for m in record.metrics if m.metric == "margin_variance_ratio"]
    zeta = next(m.value for m in record.metrics if m.metric == "margin_correlation_fitted")
    points: Points = [(m.members or 0, m.value, m.lower, m.upper) for m in measured]
    _line(axes, points, "measured", {"color": COLOURS[0], "marker": "o", "linestyle": ""})
    ks = [1 + i * (len(points) - 1) / 50 for i in range(51)]
    axes.plot(ks, [variance_ratio(k, zeta) for k in ks], color=COLOURS[1], lw=1.3, label=r"$(1 + \zeta (k - 1)) / k$")
    axes.axhline(zeta, color=BASELINE, lw=1, ls="--", label=rf"$\zeta$ = {zeta:.2f} (fitted)")
    axes.set(xlabel="members k", ylabel="margin variance ratio", xticks=[m.members for m in measured])
    axes.set_ylim(0, 1.05 * max(1.0, *(end for point in points for end in point[1:] if end is not None)))
    axes.legend(fontsize=6, frameon=False)


def _radii(axes: Axes, record: Record) -> None:
    """ACR of the first k members at the largest n."""
    most = max(record.eval["fields"]["n"])
    chosen = [m for m in record.metrics if m.metric == "acr" and m.draws == most]
    points: Points = [(m.members or 0, m.value, m.lower, m.upper) for m in chosen]
    _line(axes, points, f"n = {most}", {"color": COLOURS[0], "marker": "o"})
    axes.set(xlabel="members k", ylabel=r"average certified radius ($\ell_2$)", xticks=[m.members for m in chosen])
    axes.legend(fontsize=6, frameon=False)


def _samples(axes: Axes, record: Record) -> None:
    """Certified accuracy at the largest radius asked for: one network with more samples, or more members with few."""
    found = [m for m in record.metrics if m.metric == "certified_accuracy"]
    radius = max(m.radius or 0.0 for m in found)
    least = min(record.eval["fields"]["n"])
    lines = {
        "one network, more samples": [m for m in found if m.radius == radius and m.members == 1],
        f"more members, n = {least}": [m for m in found if m.radius == radius and m.draws == least],
    }
    for index, (label, chosen) in enumerate(lines.items()):
        points: Points = sorted(((m.members or 0) * (m.draws or 0), 100 * m.value, *_percent(m)) for m in chosen)
        _line(axes, points, label, {"color": COLOURS[1 - index], "marker": MARKERS[index]})
    axes.set(xlabel="network evaluations per image (k n)", ylabel=f"certified accuracy (%) at {radius:g}", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=6, frameon=False)


def _percent(metric: Metric) -> tuple[float | None, float | None]:
    """The interval in percent."""
    return tuple(None if end is None else 100 * end for end in (metric.lower, metric.upper))  # type: ignore[return-value]


def robust(records: list[Record]) -> Figure | None:
    """Accuracy against epsilon, a panel an attack: mean over seeds, or one seed with its interval."""
    attacks = [record for record in records if any(m.metric == "robust_accuracy" for m in record.metrics)]
    names = sorted({record.eval["name"] for record in attacks})
    if not names:
        return None
    figure, panels = _figure(len(names), attacks, [])
    styles = _styles([record.defense["variant"] for record in attacks])
    for axes, name in zip(panels, names, strict=False):
        shown = [record for record in attacks if record.eval["name"] == name]
        for index, (variant, style) in enumerate(styles.items()):
            numbers = [m for r in shown if r.defense["variant"] == variant for m in r.metrics]
            points = _points([m for m in numbers if m.metric == "robust_accuracy" and m.denominator == "all"], "eps")
            _line(axes, points, variant, style, (index, len(styles)))
        norm = {"linf": r"\ell_\infty", "l2": r"\ell_2"}[shown[0].eval["fields"]["norm"]]
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set(xlabel=rf"${norm}$ budget $\epsilon$", ylabel="accuracy (%)", ylim=(-2, 102))
        axes.set_xlim(left=0)
    _legend(figure, panels)
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
    panels[1].legend(fontsize=7, frameon=False)
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


def _line(axes: Axes, points: Points, label: str, style: dict[str, Any], place: tuple[int, int] = (0, 1)) -> None:
    """A line with its intervals: a band, or bars beside the points where it is number ``place[0]`` of many (``place[1]``)."""
    if not points:
        return
    xs = [point[0] for point in points]
    axes.plot(xs, [point[1] for point in points], label=label, ms=3.5, lw=1.2, **style)
    ends = [(x, low, high) for x, _, low, high in points if low is not None and high is not None]
    if not ends:
        return
    x, low, high = zip(*ends, strict=True)
    index, count = place
    if count > BANDS:
        step = xs[1] - xs[0] if len(xs) > 1 else 1.0
        beside = [value + 0.04 * step * (index - (count - 1) / 2) for value in x]
        axes.vlines(beside, low, high, color=style["color"], alpha=0.4, lw=0.8)
    else:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)


BANDS = 3
"""More lines than this get bars for intervals, beside the points: bands on top of each other show nothing."""


def _styles(variants: list[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of each variant; randomised smoothing, the baseline, is grey and dashed."""
    names = sorted(set(variants))
    baselines = [v for v in names if v.partition("@")[0] == "randsmooth"]
    others = [v for v in names if v not in baselines]
    styles: dict[str, dict[str, Any]] = {}
    for index, variant in enumerate(baselines):
        styles[variant] = {"color": BASELINE, "marker": MARKERS[index % len(MARKERS)], "linestyle": "--"}
    for index, variant in enumerate(others):
        turn, place = divmod(index, len(COLOURS))
        # In a second turn through the colours markers and dashes differ.
        marker = MARKERS[(place + 3 * turn) % len(MARKERS)]
        styles[variant] = {"color": COLOURS[place], "marker": marker, "linestyle": ("-", "-.", ":")[turn % 3]}
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
    lines = [f"{', '.join(suites)}; {'/'.join(images)} images of {', '.join(sources)}; bands and bars: 95 % intervals", *extra]
    letters = int(22 * figure.get_figwidth())  # that fit side by side at this size
    figure.supxlabel("\n".join(textwrap.fill(line, letters) for line in lines), fontsize=6, color="#444444")
    return figure, panels[:count]


def _tidy(axes: Axes) -> None:
    axes.tick_params(labelsize=8)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_fontsize(9)
    axes.grid(True, lw=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, panels: list[Axes]) -> None:
    """One legend for all panels: inside the first, or above them where many lines would leave no room."""
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(handles) <= BANDS:
        panels[0].legend(fontsize=7, frameon=False)
        return
    room = 16 * figure.get_figwidth()  # letters that fit side by side; a handle takes the room of eight
    columns = max(1, min(5, len(handles), int(room / (max(map(len, handles)) + 8))))
    # The legend gets room of its own: taken from the panels, ten lines of it would leave them flat.
    figure.set_figheight(figure.get_figheight() + 0.15 * -(-len(handles) // columns))
    look: dict[str, Any] = {"ncols": columns, "handlelength": 3.2, "fontsize": 6.5, "frameon": False}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", **look)
