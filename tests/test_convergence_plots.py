"""Convergence and gradients as figures: the stored numbers, the attacks in their order, whatever some defenses lack."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_store import record

from bench import plots
from bench.store import Metric, Record


def told(variant: str, name: str, metrics: list[Metric], seed: int = 0) -> Record:
    one = record(seed=seed)
    fields: dict[str, Any] = {"kind": name, "norm": "linf", "eps": [0.1], "images": 100}
    return one.model_copy(
        update={
            "status": "success",
            "defense": {**one.defense, "variant": variant},
            "eval": {"name": name, "fields": fields},
            "metrics": metrics,
        }
    )


def after(**left: float) -> list[Metric]:
    return [
        Metric(metric="robust_accuracy_after", value=v, n=100, eps=0.1, source=name.replace("_", " "))
        for name, v in left.items()
    ]


def test_each_attack_stands_where_it_was_asked_also_if_only_some_defenses_have_it() -> None:
    plain = told("naive", "adaptive", after(apgd=0.5, square=0.4))
    viewed = told("kap", "adaptive", after(apgd=0.9, folded_ce=0.7, square=0.3))
    figure = plots.convergence([plain, viewed])
    assert figure is not None
    (axes,) = (axes for axes in figure.axes if axes.get_visible())
    assert [text.get_text() for text in axes.get_xticklabels()] == ["apgd", "folded ce", "square"]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert lines == {"naive": ([0, 2], [50.0, 40.0]), "kap": ([0, 1, 2], [90.0, 70.0, 30.0])}


@pytest.mark.parametrize("count", [4, 7, 10, 25])
def test_names_of_attacks_do_not_lie_on_each_other(count: int) -> None:
    left = {f"unrolled_median:_pgd,_margin_{place}": 0.5 for place in range(count)}
    figure = plots.convergence([told(name, name, after(**left)) for name in ("adaptive", "other")])
    assert figure is not None
    FigureCanvasAgg(figure).draw()
    for axes in (axes for axes in figure.axes if axes.get_visible()):
        boxes = [text.get_window_extent() for text in axes.get_xticklabels()]
        assert len(boxes) == count and not any(a.overlaps(b) for a, b in pairwise(boxes))
        assert axes.get_window_extent().height > 120, "names leave room for the lines"


def test_seeds_are_averaged_and_other_evaluations_left_out() -> None:
    figure = plots.convergence([told("naive", "adaptive", after(apgd=v), seed) for seed, v in enumerate((0.2, 0.4))])
    assert figure is not None
    assert [list(line.get_ydata()) for line in figure.axes[0].get_lines()] == [[pytest.approx(30.0)]]
    clean = [Metric(metric="clean_accuracy", value=0.9, n=100)]
    assert (
        plots.convergence([told("naive", "clean", clean)]) is None and plots.gradients([told("naive", "clean", clean)]) is None
    )


def test_the_legend_names_lines_that_the_first_panel_lacks() -> None:
    figure = plots.convergence([told("naive", "adaptive", after(apgd=0.5)), told("kap", "probe", after(pgd=0.7))])
    assert figure is not None
    (legend,) = (axes.get_legend() for axes in figure.axes if axes.get_legend())
    assert {text.get_text() for text in legend.get_texts()} == {"naive", "kap"}


def test_gradients_that_vanish_and_margins_on_the_way() -> None:
    steps = {"step 0": 0.0, "step 1": 0.5, "step 10": 1.0}
    margins = {"margin_gradient": 2.0, "margin_random": -3.0, "margin_clean": -4.0}
    numbers = [Metric(metric="vanishing_gradients_at_step", value=v, n=9, eps=0.1, source=s) for s, v in steps.items()]
    numbers += [Metric(metric=name, value=v, n=9, eps=0.1, unit="logits") for name, v in margins.items()]
    figure = plots.gradients([told("naive", "probe", numbers)])
    assert figure is not None
    left, right = (axes for axes in figure.axes if axes.get_visible())
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in left.get_lines()] == [([0, 1, 10], [0, 50, 100])]
    (line,) = (line for line in right.get_lines() if line.get_label() == "naive")
    assert list(line.get_ydata()) == [-4.0, -3.0, 2.0]
    assert [text.get_text() for text in right.get_xticklabels()] == ["image", "random", "along gradient"]
