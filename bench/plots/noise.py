"""Accuracy under noise, by where the noise is (KAP, table 2)."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.columns import under_noise
from bench.plots.style import BASELINE, COLOURS, broken, legend, percent, sheet
from bench.store import Metric, Record

WORDS = {"none": "none", "input": "image", "activations": "activations", "both": "both"}
"""Places of noise as the axis names them."""

SERIES: dict[str, dict[str, Any]] = {
    "images as they are": {"color": BASELINE, "marker": "s"},
    "adversarial images made without noise": {"color": COLOURS[0], "marker": "o"},
    "the same, one draw (bar: deviation over draws)": {"color": COLOURS[0], "marker": "o", "mfc": "white"},
    "attacked through the noise (EOT)": {"color": COLOURS[1], "marker": "^"},
}
"""What is drawn, and how, side by side from left to right."""

MEANING = (
    "noise: where it is added when an image is judged, by the mean of 100 draws; that it repairs adversarial images which were "
    "finished without it says nothing about an attacker who knows of it"
)

Panel = tuple[str, str, float]
"""Evaluation, variant and eps."""


def noise(records: list[Record]) -> Figure | None:
    """A panel a defense, evaluation and eps: accuracy of clean and attacked images against where noise is added.

    Of several seeds the mean is shown, without an interval.
    """
    records = [record for record in records if record.eval["fields"].get("kind") == "noise" and record.metrics]
    found = [(panel, record) for record in records for panel in _panels(record)]
    found.sort(key=lambda pair: (*pair[0], pair[1].seed))
    groups = [(panel, [record for _, record in group]) for panel, group in groupby(found, key=lambda pair: pair[0])]
    if not groups:
        return None
    facts = sorted({f"{record.eval['name']}: {under_noise(record)}" for record in records})
    figure, panels = sheet(len(groups), records, [MEANING, *facts])
    several = len({name for (name, _, _), _ in groups}) > 1
    for axes, ((name, variant, eps), group) in zip(panels, groups, strict=True):
        _draw(axes, group, eps)
        norm = {"linf": r"\ell_\infty", "l2": r"\ell_2"}[group[0].eval["fields"]["norm"]]
        title = broken(f"{variant}, {name}" if several else variant, 32)
        axes.set_title(rf"{title}, ${norm}$ $\epsilon$ = {eps:g}", fontsize=8)
    legend(figure, panels)
    return figure


def _panels(record: Record) -> list[Panel]:
    return [(record.eval["name"], record.defense["variant"], eps) for eps in record.eval["fields"]["eps"]]


def _draw(axes: Axes, group: list[Record], eps: float) -> None:
    """One panel."""
    places = group[0].eval["fields"]["places"]
    for number, (label, look) in enumerate(SERIES.items()):
        shift = 0.16 * (number - (len(SERIES) - 1) / 2)
        for x, place in enumerate(places):
            cells = [_cell(record, label, place, eps) for record in group]
            known = [cell for cell in cells if cell is not None]
            if not known:
                continue
            value, low, high = known[0]
            if len(known) > 1:
                value, low, high = sum(own[0] for own in known) / len(known), None, None
            axes.plot([x + shift], [value], ls="", ms=4.5, label=label, **look)
            if low is not None and high is not None:
                axes.vlines(x + shift, low, high, color=look["color"], lw=1.0, alpha=0.7)
    axes.set_xticks(range(len(places)), [WORDS[place] for place in places])
    axes.set(xlabel="noise when judged", ylabel="accuracy (%)", ylim=(-4, 104), xlim=(-0.5, len(places) - 0.5))


def _cell(record: Record, label: str, place: str, eps: float) -> tuple[float, float | None, float | None] | None:
    """A number in percent with the ends of its bar, if the record has it."""
    series = list(SERIES).index(label)
    source = (None, "none", "none", place)[series]
    name = "noisy_accuracy_single" if series == 2 else "noisy_accuracy"
    if series == 3 and place == "none":
        return None
    same = [m for m in record.metrics if (m.source, m.target, m.eps) == (source, place, eps if source else None)]
    metric = _one(same, name)
    if metric is None:
        return None
    if series == 2:
        deviation = _one(same, "noisy_accuracy_single_deviation")
        spread = 100 * deviation.value if deviation else 0.0
        return 100 * metric.value, 100 * metric.value - spread, 100 * metric.value + spread
    return (100 * metric.value, *percent(metric))


def _one(metrics: list[Metric], name: str) -> Metric | None:
    return next((metric for metric in metrics if metric.metric == name and metric.denominator == "all"), None)
