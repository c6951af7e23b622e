"""How far noise and attacks move activations, layer by layer (KAP, figures A2 to A4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.arrays import unpacked
from bench.columns import crafted
from bench.plots.style import BASELINE, COLOURS, SMALL, broken, sheet, small_print, sources, suites, tidy
from bench.store import Metric, Record, Store

LOOKS: dict[str, dict[str, Any]] = {
    "noise": {"color": BASELINE, "linestyle": "--"},
    "attack": {"color": COLOURS[0], "linestyle": "-"},
}

WORDS = {"noise": "Gaussian noise", "attack": "attack"}

SIDE = ("shortcut", "downsample")
"""In the names of convolutions beside the main path, which take what an earlier layer gave."""

ROWS = 6
"""Defenses on a page of histograms."""

BINS = 30
"""At most; of few values fewer."""

TITLE = 40
"""Letters that fit above a panel."""

MEANING = (
    "noise: Gaussian, of the l2 length that the attack may have, not clipped; images that the network gets right as they are"
)

KERNEL = (
    "left: of such images among the first {} the changes of one kernel's activation, the middle one of its sheet, at all "
    "positions, over the root mean square of all the layer's activations; right: of all such images the change of all the "
    "layer's activations over the activations, in l2; heights are shares, the outermost bars hold the rest"
)


def activations(records: Sequence[Record]) -> Figure | None:
    """A panel a defense and evaluation: the relative change of activations against depth, at the middle eps.

    Of several seeds the mean is shown, without an interval.
    """
    chosen = _chosen(records)
    groups = [(panel, list(group)) for panel, group in groupby(chosen, key=_panel)]
    if not groups:
        return None
    facts = sorted({f"{record.eval['name']}: {crafted(record)}, eps {middle(record):g}" for record in chosen})
    lines = [MEANING, "hollow: convolutions in a shortcut, which take what an earlier layer gave", *facts]
    figure, panels = sheet(len(groups), list(chosen), lines)
    several = len({name for (name, _), _ in groups}) > 1
    for axes, ((name, variant), group) in zip(panels, groups, strict=True):
        depth(axes, group)
        axes.set_title(broken(f"{variant}, {name}" if several else variant, TITLE), fontsize=8)
    alike(panels)
    _legend(figure, panels[0])
    return figure


def depth(axes: Axes, records: Sequence[Record]) -> None:
    """The relative change of activations against depth, of several seeds their mean."""
    for source in LOOKS:
        _curve(axes, [_layers(record, source) for record in records], source)
    axes.set(xlabel="convolution, in order", ylabel=r"$\|\Delta\|\ /\ \|y\|$ of its activations", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def alike(panels: Sequence[Axes]) -> None:
    """The same range on all vertical axes."""
    ends = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))


def _legend(figure: Figure, axes: Axes) -> None:
    """Above all panels, where it covers nothing."""
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2, fontsize=7, frameon=False)


def _chosen(records: Sequence[Record]) -> list[Record]:
    found = [record for record in records if record.eval["fields"].get("kind") == "activations" and record.metrics]
    return sorted(found, key=lambda record: (*_panel(record), record.seed))


def _panel(record: Record) -> tuple[str, str]:
    return record.eval["name"], record.defense["variant"]


def middle(record: Record) -> float:
    """The eps that is shown."""
    found = sorted(record.eval["fields"]["eps"])
    return float(found[len(found) // 2])


def _layers(record: Record, source: str) -> list[Metric]:
    """The changes of all layers at the middle eps, in order."""
    found = [m for m in record.metrics if m.metric == "activation_change" and m.source == source]
    return [metric for metric in found if metric.eps == middle(record)]


def _curve(axes: Axes, seeds: list[list[Metric]], source: str) -> None:
    """One line, through the main path, and marks beside it."""
    names = [metric.target or "" for metric in seeds[0]]
    values = np.mean([[metric.value for metric in own] for own in seeds], axis=0)
    x, main = np.arange(1, len(names) + 1), np.array([not any(word in name for word in SIDE) for name in names])
    axes.plot(x[main], values[main], lw=1.3, ms=3.5, marker="o", label=WORDS[source], **LOOKS[source])
    axes.plot(x[~main], values[~main], ls="", ms=3.5, marker="o", mfc="white", color=LOOKS[source]["color"])
    if len(seeds) == 1:
        low, high = (np.array([getattr(metric, end) for metric in seeds[0]], float) for end in ("lower", "upper"))
        axes.fill_between(x[main], low[main], high[main], color=LOOKS[source]["color"], alpha=0.15, lw=0)


def histograms(records: Sequence[Record], store: Store) -> list[Figure]:
    """Pages of up to ``ROWS`` defenses, of every defense its first seed, a row each: changes of one kernel's activation in the
    first, middle and last layer, then the relative changes of these layers over images."""
    found: dict[tuple[str, str], tuple[Record, pd.DataFrame]] = {}
    for record in _chosen(records):
        kept = counted(record, store)
        if (kept.kernel >= 0).any() and _panel(record) not in found:
            found[_panel(record)] = record, kept
    shown = list(found.values())
    return [_page(shown[start : start + ROWS]) for start in range(0, len(shown), ROWS)]


def counted(record: Record, store: Store) -> pd.DataFrame:
    """Rows at the middle eps, of images that are right as they are."""
    rows = store.rows(record)
    return rows[(rows.eps == middle(record)) & rows.clean_correct & (rows["size"] > 0)]


def _page(shown: Sequence[tuple[Record, pd.DataFrame]]) -> Figure:
    records = [record for record, _ in shown]
    figure = Figure(figsize=(11.2, 1.75 * len(shown) + 0.9), layout="constrained")
    panels = figure.subplots(len(shown), 6, squeeze=False)
    for line, (record, kept) in zip(panels, shown, strict=True):
        looks = kept[kept.kernel >= 0].groupby("layer")
        for place, (number, part) in enumerate(looks):
            kernel_changes(line[place], part)
            layer_changes(line[3 + place], kept[kept.layer == number])
        for axes in line:
            tidy(axes)
            axes.tick_params(labelsize=6)
            axes.set_yticks([])
            axes.set_visible(bool(axes.patches))
        line[0].set_ylabel(broken(f"{record.defense['variant']}, seed {record.seed}", 24), fontsize=7)
    for place, axes in enumerate(panels[-1]):
        axes.set_xlabel("change / rms of the layer" if place < 3 else r"$\|\Delta\|\ /\ \|y\|$", fontsize=7)
    counts = sorted({record.eval["fields"]["shown"] for record in records})
    lines = [
        f"{suites(records)}; {sources(records)}, {records[0].task.get('architecture')}; {MEANING}",
        KERNEL.format("/".join(map(str, counts))),
        *sorted({f"{record.eval['name']}: {crafted(record)}, eps {middle(record):g}" for record in records}),
    ]
    figure.supxlabel(small_print(lines, figure.get_figwidth()), **SMALL)
    _legend(figure, panels[0][0])
    return figure


def kernel_changes(axes: Axes, part: pd.DataFrame) -> None:
    """Changes of one kernel."""
    values = {who: np.concatenate([unpacked(own).astype(float).ravel() for own in part[f"kernel_{who}"]]) for who in LOOKS}
    low, high = np.quantile(np.concatenate(list(values.values())), [0.005, 0.995])
    _bars(axes, values, np.linspace(low, high if high > low else low + 1e-6, BINS + 1))
    axes.set_title(f"layer {part.layer.iloc[0]}, kernel {part.kernel.iloc[0]}", fontsize=7)


def layer_changes(axes: Axes, part: pd.DataFrame) -> None:
    """Changes of a layer, on a logarithmic axis: those by noise and by an attack may be far apart."""
    values = {who: (part[who] / part["size"]).to_numpy(float) for who in LOOKS}
    everything = np.concatenate(list(values.values()))
    low, high = np.quantile(everything[everything > 0], [0.005, 0.995]) if (everything > 0).any() else (1e-3, 1.0)
    _bars(axes, values, np.geomspace(low, high if high > low else 2 * low, min(BINS, math.isqrt(len(everything)) + 5)))
    axes.set_xscale("log")
    ticks = round_numbers(float(low), float(high))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_title(f"layer {part.layer.iloc[0]}, all kernels", fontsize=7)


def round_numbers(low: float, high: float) -> list[float]:
    """Two to four ticks of a logarithmic axis, as round as can be; the lower end where no round number lies between them."""
    decades, found = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1), [low]
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        inside = [number for decade in decades for digit in digits if low <= (number := digit * 10.0**decade) <= high]
        found = inside or found
        if len(found) > 1:
            break
    return found[:: -(-len(found) // 4)]


def _bars(axes: Axes, values: dict[str, np.ndarray], bins: np.ndarray) -> None:
    """Both histograms, as shares."""
    for who, own in values.items():
        inside, equal = np.clip(own, bins[0], bins[-1]).tolist(), np.full(len(own), 1 / len(own)).tolist()
        axes.hist(inside, bins.tolist(), weights=equal, histtype="stepfilled", alpha=0.25, color=LOOKS[who]["color"])
        axes.hist(inside, bins.tolist(), weights=equal, histtype="step", label=WORDS[who], **LOOKS[who])
