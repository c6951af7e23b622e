"""Figures hold the stored numbers, tell every line from every other, and can be read: nothing covers data or is cut off."""

from __future__ import annotations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from test_tables import certified, view

from bench import plots
from bench.metrics import variance_ratio
from bench.plots.style import BASELINE, COLOURS, styles_of
from bench.store import Record

NAMES = [
    "cear_gm", "cear_minus_gm", "cear_minus_rw", "cear_rw", "cear_rw@members=3", "kap_noise_training@members=5",
    "randsmooth", "smoothed_ensemble", "sween", "sween_cear",
]  # fmt: skip


def at(sigma: float, name: str, top: float) -> Record:
    """A certificate at a sigma; 0.25 is the default, others stand in the label."""
    label = name if sigma == 0.25 else f"{name}{',' if '@' in name else '@'}sigma={sigma}"
    one = certified(label, {0.0: top, sigma: top / 2})
    return one.model_copy(update={"eval": {**one.eval, "fields": {**one.eval["fields"], "sigma": sigma}}})


def many(*sigmas: float) -> Figure:
    # The order of records must not matter to a defense's colour: at each sigma they come in another one.
    records = [at(s, name, 0.9 - i / 50 - s / 10) for s in sigmas for i, name in enumerate(NAMES)]
    figure = plots.certified(records[::2] + records[1::2])
    assert figure is not None
    FigureCanvasAgg(figure).draw()
    return figure


def test_lines_hold_the_numbers_of_their_panels_sigma() -> None:
    figure = many(1.0, 0.25, 0.5)
    assert [axes.get_title() for axes in figure.axes] == [rf"$\sigma$ = {sigma}" for sigma in ("0.25", "0.5", "1")]
    for axes, sigma in zip(figure.axes, (0.25, 0.5, 1.0), strict=True):
        lines = {str(line.get_label()): line for line in axes.get_lines()}
        assert sorted(lines) == NAMES
        for i, name in enumerate(NAMES):
            top = 100 * (0.9 - i / 50 - sigma / 10)
            assert list(lines[name].get_xdata()) == [0.0, sigma]
            assert list(lines[name].get_ydata()) == pytest.approx([top, top / 2])


def test_a_defense_looks_the_same_in_every_panel_and_like_no_other() -> None:
    figure = many(0.25, 0.5, 1.0)
    looks = [
        {line.get_label(): (line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.get_lines()}
        for axes in figure.axes
    ]
    assert looks[0] == looks[1] == looks[2]
    colours, markers, _ = zip(*(look for name, look in looks[0].items() if name != "randsmooth"), strict=True)
    assert len(set(colours)) == len(set(markers)) == len(NAMES) - 1
    assert looks[0]["randsmooth"][::2] == (BASELINE, "--") and BASELINE not in colours


def test_beyond_the_palette_lines_still_differ() -> None:
    styles = styles_of([f"d{i:02}" for i in range(2 * len(COLOURS) + 1)])
    assert len({(s["color"], s["marker"], s["linestyle"]) for s in styles.values()}) == len(styles)


@pytest.mark.parametrize("sigmas", [(0.25,), (0.25, 0.5), (0.25, 0.5, 1.0), (0.1, 0.25, 0.5, 1.0)])
def test_the_legend_of_many_lines_covers_nothing_and_leaves_the_panels_their_size(sigmas: tuple[float, ...]) -> None:
    figure = many(*sigmas)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == NAMES
    assert not any(axes.get_legend() for axes in figure.axes)
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and box.y1 <= page.y1
    for axes in (axes for axes in figure.axes if axes.get_visible()):
        assert not box.overlaps(axes.get_tightbbox())
        assert axes.get_window_extent().height / figure.dpi > 1.5


def test_small_print_is_not_cut_off() -> None:
    records = [at(0.25, "one", 0.9)]
    long = [r.model_copy(update={"hashes": {"data": "a data set with a name of some length, " * 4}}) for r in records]
    figure = plots.certified(long)
    assert figure is not None
    FigureCanvasAgg(figure).draw()
    (small,) = [t for t in figure.findobj(Text) if "95 % intervals" in t.get_text().replace("\n", " ")]
    text = small.get_text().replace("\n", " ")
    assert all(fact in text for fact in ("tiny v1, budget quick", "100 images of a data set", "grid estimator, n0 = 100"))
    box = small.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0


def test_the_variance_view_stays_out_of_the_certificates_figure() -> None:
    figure = plots.certified([certified("smoothed_ensemble", {0.0: 0.9}), view()])
    assert figure is not None
    assert [list(line.get_ydata()) for line in figure.axes[0].get_lines()] == [[90.0]]
    assert plots.certified([view()]) is None


def test_the_margins_curve_is_that_of_the_fitted_correlation() -> None:
    one = view()
    wide = [m.model_copy(update={"lower": 0.6, "upper": 1.8}) if m.unit == "ratio" else m for m in one.metrics]
    figure = plots.variance([one.model_copy(update={"metrics": wide})])
    assert figure is not None
    left = figure.axes[0]
    _, curve, limit = left.get_lines()
    assert list(curve.get_ydata()) == pytest.approx([variance_ratio(k, 0.4) for k in curve.get_xdata()])
    assert set(limit.get_ydata()) == {0.4} and limit.get_linestyle() == "--"
    assert left.get_ylim()[1] > 1.8, "the band is cut off"


def test_evaluations_are_on_a_logarithmic_axis_and_selection_is_said_not_to_count() -> None:
    figure = plots.variance([view()])
    assert figure is not None
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "linear", "log"]
    FigureCanvasAgg(figure).draw()
    assert [t.get_text() for t in figure.axes[2].get_xticklabels() if t.get_text()] != []
    assert any("n0 = 100 draws to select (not in k n), alpha = 0.001" in t.get_text() for t in figure.findobj(Text))


def test_rows_of_several_seeds_say_which() -> None:
    figure = plots.variance([view(), view().model_copy(update={"seed": 4})])
    assert figure is not None
    assert [axes.get_title().rpartition(", ")[2] for axes in figure.axes[::3]] == ["seed 3", "seed 4"]
