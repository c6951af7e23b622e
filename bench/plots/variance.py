"""The variance view of smoothed ensembles."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from bench.metrics import variance_ratio
from bench.plots.style import BASELINE, COLOURS, MARKERS, Points, lines, percent, sheet, sigma_of
from bench.store import Record
from bench.tables import without_sigma


def variance(records: list[Record]) -> Figure | None:
    """The variance view, a row a sigma: margin variance against members, ACR against members, members against samples."""
    records = [r for r in records if r.eval["fields"].get("kind") == "variance" and r.metrics]
    records.sort(key=lambda record: (sigma_of(record), record.defense["variant"], record.seed))
    if not records:
        return None
    facts = {"n0 = {n0} draws to select (not in k n), alpha = {alpha:g}".format(**r.eval["fields"]) for r in records}
    figure, panels = sheet(3 * len(records), records, sorted(facts))
    seeds = {record.seed for record in records}
    for row, record in enumerate(records):
        left, middle, right = panels[3 * row : 3 * row + 3]
        margin(left, record)
        radii(middle, record)
        samples(right, record)
        seed = f", seed {record.seed}" if len(seeds) > 1 else ""
        left.set_title(rf"{without_sigma(record.defense['variant'])}, $\sigma$ = {sigma_of(record):g}{seed}", fontsize=9)
    return figure


def margin(axes: Axes, record: Record) -> None:
    """Measured variance of the first k members' margin, and the curve of the fitted correlation."""
    measured = [m for m in record.metrics if m.metric == "margin_variance_ratio"]
    zeta = next(m.value for m in record.metrics if m.metric == "margin_correlation_fitted")
    points: Points = [(m.members or 0, m.value, m.lower, m.upper) for m in measured]
    lines(axes, [("measured", points, {"color": COLOURS[0], "marker": "o", "linestyle": ""})])
    ks = [1 + i * (len(points) - 1) / 50 for i in range(51)]
    axes.plot(ks, [variance_ratio(k, zeta) for k in ks], color=COLOURS[1], lw=1.3, label=r"$(1 + \zeta (k - 1)) / k$")
    axes.axhline(zeta, color=BASELINE, lw=1, ls="--", label=rf"$\zeta$ = {zeta:.2f} (fitted)")
    axes.set(xlabel="members k", ylabel="margin variance ratio", xticks=[m.members for m in measured])
    axes.set_ylim(0, 1.05 * max(1.0, *(end for point in points for end in point[1:] if end is not None)))
    axes.legend(fontsize=6, frameon=False)


def radii(axes: Axes, record: Record) -> None:
    """ACR of the first k members at the largest n."""
    most = max(record.eval["fields"]["n"])
    chosen = [m for m in record.metrics if m.metric == "acr" and m.draws == most]
    points: Points = [(m.members or 0, m.value, m.lower, m.upper) for m in chosen]
    lines(axes, [(f"n = {most}", points, {"color": COLOURS[0], "marker": "o"})])
    axes.set(xlabel="members k", ylabel=r"average certified radius ($\ell_2$)", xticks=[m.members for m in chosen])
    axes.legend(fontsize=6, frameon=False)


def samples(axes: Axes, record: Record) -> None:
    """Certified accuracy at the largest radius asked for: one network with more samples, or more members with few."""
    found = [m for m in record.metrics if m.metric == "certified_accuracy"]
    radius = max(m.radius or 0.0 for m in found)
    least = min(record.eval["fields"]["n"])
    chosen = {
        "one network, more samples": [m for m in found if m.radius == radius and m.members == 1],
        f"more members, n = {least}": [m for m in found if m.radius == radius and m.draws == least],
    }
    curves = []
    for index, (label, own) in enumerate(chosen.items()):
        points: Points = sorted(((m.members or 0) * (m.draws or 0), 100 * m.value, *percent(m)) for m in own)
        curves.append((label, points, {"color": COLOURS[1 - index], "marker": MARKERS[index]}))
    axes.set_xscale("log")
    lines(axes, curves)
    axes.set(xlabel="network evaluations per image (k n)", ylabel=f"certified accuracy (%) at {radius:g}")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.25)  # room for the legend above the lines
    axes.legend(fontsize=6, frameon=False, loc="upper left")
