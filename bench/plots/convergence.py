"""How far attacks have converged, and what gradients are worth: it tells robust networks from masked ones (methods 12.1)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.plots.style import Styles, broken, legend, lines, points_of, sheet, styles_of
from bench.store import Metric, Record

Panel = tuple[str, float]
"""Evaluation and budget."""

LETTERS, LEVEL, CLOSE = 14, 4, 7
"""Of a line of an attack's name below an axis; of more attacks than this the names stand upright, and of more than this they
get no second line, which would lie on the name beside it."""


def convergence(records: list[Record], styles: Styles | None = None) -> Figure | None:
    """Accuracy left after each attack of an evaluation that runs several in turn, a panel an evaluation and budget.

    Honest networks have lost what they lose to the first ones; a line that goes on falling says that those were too weak.
    """
    shown = [record for record in records if _after(record.metrics)]
    found = sorted({(record.eval["name"], metric.eps or 0.0) for record in shown for metric in _after(record.metrics)})
    if not found:
        return None
    note = "each attack is given what stood after those to its left; percentage of all images"
    figure, panels = sheet(len(found), shown, [note], len({record.defense["variant"] for record in shown}))
    styles = styles or styles_of(record.defense["variant"] for record in shown)
    for axes, (name, eps) in zip(panels, found, strict=True):
        numbers = {variant: _numbers(shown, variant, name, eps) for variant in styles}
        order = _order(list(dict.fromkeys(m.source or "" for m in found)) for found in numbers.values())
        place = partial(_place, order)
        lines(axes, [(variant, points_of(numbers[variant], place), style) for variant, style in styles.items()])
        axes.set_title(f"{name.replace('_', ' ')}, $\\epsilon$ = {eps:.4g}", fontsize=9)
        axes.set(ylabel="accuracy left (%)", ylim=(-2, 102))
        close, turn = len(order) > CLOSE, 90 if len(order) > LEVEL else 0
        labels = order if close else [broken(attack, LETTERS) for attack in order]
        axes.set_xticks(range(len(order)), labels, rotation=turn, fontsize=5 if close else 6)
    legend(figure, panels)
    return figure


def _after(metrics: Iterable[Metric]) -> list[Metric]:
    return [metric for metric in metrics if metric.metric == "robust_accuracy_after"]


def _numbers(records: list[Record], variant: str, name: str, eps: float) -> list[Metric]:
    own = [r for r in records if r.defense["variant"] == variant and r.eval["name"] == name]
    return [metric for record in own for metric in _after(record.metrics) if metric.eps == eps]


def _place(order: list[str], metric: Metric) -> int:
    return order.index(metric.source or "")


def _order(chains: Iterable[list[str]]) -> list[str]:
    """Attacks of several defenses, each chain in its order: what only some have stands behind what it follows."""
    order: list[str] = []
    for chain in chains:
        place = 0
        for attack in chain:
            if attack not in order:
                order.insert(place, attack)
            place = order.index(attack) + 1
    return order


def gradients(records: list[Record], styles: Styles | None = None) -> Figure | None:
    """What the probe saw of gradients, two panels a budget: the share that vanishes at each step of PGD, and the margin of the
    most likely wrong class at the image, at random points of the ball's edge and after one step along the gradient.

    An attacker wants the margin above 0. Where gradients tell the truth, the step along them reaches far higher than chance.
    """
    probes = [record for record in records if record.eval["fields"].get("kind") == "probe" and record.metrics]
    budgets = sorted({m.eps for record in probes for m in record.metrics if m.metric == "margin_clean" and m.eps})
    if not budgets:
        return None
    note = "of the images that the model gets right; margin: largest wrong logit minus the right one"
    figure, panels = sheet(2 * len(budgets), probes, [note], len({record.defense["variant"] for record in probes}))
    styles = styles or styles_of(record.defense["variant"] for record in probes)
    for left, right, eps in zip(panels[::2], panels[1::2], budgets, strict=True):
        shares = []
        for variant, style in styles.items():
            own = [m for r in probes if r.defense["variant"] == variant for m in r.metrics if m.eps == eps]
            steps = [m for m in own if m.metric == "vanishing_gradients_at_step"]
            shares.append((variant, points_of(steps, _step), style))
            _margins(right, own, variant, style)
        lines(left, shares)
        left.set(xlabel=f"step of PGD, $\\epsilon$ = {eps:.4g}", ylabel="vanishing gradients (%)", ylim=(-2, 102))
        right.set(xlabel=f"where, $\\epsilon$ = {eps:.4g}", ylabel="margin (logits)")
        right.axhline(0, color="black", lw=0.8)
        right.set_xticks(range(len(WHERE)), WHERE.values(), fontsize=7)
    legend(figure, panels)
    return figure


def _step(metric: Metric) -> int:
    """The number in "step 3", which the probe gives as the source of a gradient."""
    return int((metric.source or "").removeprefix("step "))


WHERE = {"margin_clean": "image", "margin_random": "random", "margin_gradient": "along gradient"}


def _margins(axes: Axes, metrics: list[Metric], variant: str, style: dict[str, Any]) -> None:
    """Mean over seeds of the mean margins."""
    values = [[m.value for m in metrics if m.metric == name] for name in WHERE]
    if all(values):
        axes.plot(range(len(WHERE)), [sum(own) / len(own) for own in values], label=variant, ms=3.5, lw=1.2, **style)
