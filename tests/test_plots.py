"""Figures hold the stored numbers, tell every line from every other, and can be read: nothing covers data or is cut off."""

from __future__ import annotations

import io
import json
import math
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.text import Text
from test_store import record
from test_tables import certified, view

from attacks.streams import generator
from bench import plots
from bench.evals.saliency import saliency
from bench.metrics import variance_ratio
from bench.plots.style import BASELINE, COLOURS, Styles, lines, styles_of
from bench.store import Metric, Record, Store
from defenses.api import Images, Wrapped

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


def diverse(store: Store, variant: str, members: int, channels: int = 1, **changes: Any) -> Record:
    """A record of linear members on random images of 6 x 6 pixels, of which three keep maps."""
    one = record(
        defense={"name": "d", "variant": variant, "fields": {}},
        eval={"name": "diversity", "fields": {"kind": "diversity", "h": 0.3, "images": 20}},
        metrics=[],
        **changes,
    )
    gen = generator(0, variant)
    pixels = torch.randint(0, 256, (5, channels, 6, 6), generator=gen, dtype=torch.uint8)
    some = Images(pixels, torch.arange(5), torch.arange(5), "random")
    nets = []
    for _ in range(members):
        last = torch.nn.Linear(36 * channels, 5)
        last.weight.data = torch.randn(last.weight.shape, generator=gen)
        nets.append(Wrapped(torch.nn.Sequential(torch.nn.Flatten(), last)))
    store.write_rows(one, pd.DataFrame({"id": some.ids, "label": some.labels, **saliency(nets, some, 3)}))
    store.write(one)
    return one


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_saliency_maps_stand_beside_their_image_with_the_cosines_below(tmp_path: Path) -> None:
    store = Store(tmp_path)
    records = [diverse(store, "adp", 3), diverse(store, "adp", 2, seed=9), diverse(store, "gal@members=2", 2, channels=3)]
    (figure,) = plots.saliency(records[::-1], store)
    pictures = [axes for axes in figure.axes if axes.images]
    assert len(pictures) == 3 * (1 + 3) + 3 * (1 + 2)  # of seed 9 nothing
    assert [list(axes.images[0].get_array().shape) for axes in pictures][12:15] == [[6, 6, 3], [6, 6], [6, 6]]
    for axes in pictures[1:4]:
        assert axes.images[0].get_array().max() == 1 and axes.images[0].get_array().min() >= 0
    shown = words(figure)
    assert shown.count("image") == 2 and shown.count("member 2") == 2 and shown.count("member 3") == 1
    assert {"adp, seed 3", "gal@members=2, seed 3", "class 0", "class 2"} <= set(shown)
    cosines = [text for text in shown if text.startswith("cos  ")]
    assert [text.count(":") for text in cosines] == [3, 3, 3, 1, 1, 1]
    kept = store.rows(records[0])
    a, b, c = np.load(io.BytesIO(kept.saliency_cosines[0]), allow_pickle=False)
    assert cosines[0] == f"cos  1,2: {a:.2f}  1,3: {b:.2f}  2,3: {c:.2f}"
    third = np.load(io.BytesIO(kept.saliency[2]), allow_pickle=False)
    assert all(np.array_equal(axes.images[0].get_array(), own) for axes, own in zip(pictures[9:12], third))


def test_titles_of_transfer_maps_of_several_seeds_leave_each_other_room() -> None:
    figure = plots.transfer(Store(Path(__file__).parents[1] / "leaderboards/results").records("smd_fashion_mnist"))
    assert figure is not None
    FigureCanvasAgg(figure).draw()
    titles = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
    assert len(titles) == 12 and not any(a.overlaps(b) for a, b in combinations(titles, 2))


def test_blocks_of_maps_neither_overlap_nor_leave_the_page(tmp_path: Path) -> None:
    store = Store(tmp_path)
    members = {"a": 3, "b": 5, "c" * 40: 2, "d": 8, "e": 3, "f": 3, "g": 2}
    first, second = plots.saliency([diverse(store, name, number) for name, number in members.items()], store)
    assert len(second.axes) == 3 * 3 + 1  # the seventh, and the scale
    for figure in (first, second):
        FigureCanvasAgg(figure).draw()
        boxes = [axes.get_window_extent() for axes in figure.axes]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        titles = [text for text in figure.texts if ", seed " in text.get_text()]
        assert not any(a.get_window_extent().overlaps(b.get_window_extent()) for a, b in combinations(titles, 2))
        for text in figure.findobj(Text):
            if text.get_text() and text.get_visible():
                box = text.get_window_extent()
                assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text.get_text()
                assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text.get_text()
    assert any("cos of 28 pairs: mean" in text for text in words(first))


def test_without_maps_there_is_no_figure_of_them(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = diverse(store, "adp", 2)
    kept = store.rows(one)
    assert len(plots.saliency([one, view()], store)) == 1
    for rows in (kept.assign(saliency=None), kept.drop(columns=["saliency", "pixels", "saliency_cosines"])):
        store.write_rows(one, rows)
        assert plots.saliency([one], store) == []
    assert plots.saliency([view()], store) == []


def test_every_page_of_maps_is_drawn(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    for name in "abcdefg":
        diverse(store, name, 2)
    files = plots.draw(store, "tiny", tmp_path / "figures")
    assert [path.name for path in files if path.suffix == ".png"] == ["saliency_1.png", "saliency_2.png"]


def notes(folder: Path, *trained: tuple[str, dict[str, list[float]]]) -> Path:
    """Notes of trainings: role, and the numbers of each epoch by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (role, series) in enumerate(trained):
        lines = [dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)]
        log = [{"epoch": epoch, "lr": 0.1, **line, "seconds": 1.0} for epoch, line in enumerate(lines, start=1)]
        note = {"key": str(number), "part": {"fields": {"role": role, "member": number}}, "log": log}
        (folder / f"{number}.json").write_text(json.dumps(note))
    return folder


def drawn(axes: Axes) -> list[list[float]]:
    return [np.asarray(line.get_ydata(), float).round(6).tolist() for line in axes.get_lines() if len(line.get_xdata())]


PLAIN = {"ce": [2.0, 1.0, 0.05], "loss": [2.0, 1.0, 0.05], "validation_accuracy": [0.5, 0.6, 0.7]}
ADP = {
    "ce": [3.0, 2.0, 1.0], "entropy": [-4.0, -4.5, -4.0], "diversity": [1.0, 0.5, 0.01], "loss": [0.0, -2.0, -2.99],
    "validation_accuracy": [0.4, 0.5, 0.6], "validation_robust": [0.1, 0.2, 0.3],
}  # fmt: skip
SMD = {"ce": [1.0, 0.9, 0.8], "diversity": [1.2, 1.1, 1.0], "loss": [2.2, 2.0, 1.8], "validation_accuracy": [0.3, 0.2, 0.1]}


def test_losses_of_several_parts_have_a_panel_a_part(tmp_path: Path) -> None:
    figure = plots.training(notes(tmp_path, ("adp", ADP), ("plain", PLAIN), ("smd", SMD)))
    assert figure is not None
    panels = {axes.get_ylabel(): axes for axes in figure.axes if axes.get_visible()}
    parts = [f"part of the loss: {name}" for name in ("ce", "diversity", "entropy")]
    assert list(panels) == ["training loss", "validation accuracy (%)", *parts]
    assert drawn(panels["training loss"]) == [ADP["loss"], PLAIN["loss"], SMD["loss"]]
    assert drawn(panels[parts[0]]) == [ADP["ce"], SMD["ce"]]  # the only part of a loss is the loss
    assert drawn(panels[parts[1]]) == [ADP["diversity"], SMD["diversity"]]
    assert drawn(panels[parts[2]]) == [ADP["entropy"]]
    assert [axes.get_yscale() for axes in panels.values()] == ["symlog", "linear", "linear", "log", "linear"]


def test_quick_robust_accuracy_is_dashed_in_the_colour_of_its_network(tmp_path: Path) -> None:
    figure = plots.training(notes(tmp_path, ("adp", ADP), ("plain", PLAIN)))
    assert figure is not None
    solid, dashed, other = (line for line in figure.axes[1].get_lines() if len(line.get_xdata()))
    assert list(dashed.get_ydata()) == pytest.approx([10, 20, 30]) and list(solid.get_ydata()) == pytest.approx([40, 50, 60])
    assert dashed.get_linestyle() == "--" != solid.get_linestyle() == other.get_linestyle() == "-"
    assert dashed.get_color() == solid.get_color() != other.get_color()
    assert "dashed: under a short PGD" in figure.axes[1].get_title()
    figure = plots.training(notes(tmp_path / "plain", ("plain", PLAIN)))
    assert figure is not None and len(figure.axes) == 2
    assert figure.axes[1].get_title() == "" and figure.axes[1].get_ylabel() == "clean validation accuracy (%)"
    assert figure.axes[0].get_yscale() == "log"


def test_many_networks_of_many_roles_can_be_told_apart(tmp_path: Path) -> None:
    roles = [f"role{number:02}" for number in range(12)]
    wide = {**ADP, "loss": [24.0, 3.0, -1.0]}
    figure = plots.training(notes(tmp_path, *[(role, wide) for role in roles for _ in range(4)]))
    assert figure is not None
    FigureCanvasAgg(figure).draw()
    assert figure.axes[0].get_yscale() == "symlog"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"{role} (4)" for role in roles]
    looks = {(line.get_color(), line.get_marker()) for line in figure.axes[0].get_lines()}
    assert len(looks) == len(roles)
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes if axes.get_visible())


def test_an_only_epoch_is_a_dot(tmp_path: Path) -> None:
    figure = plots.training(notes(tmp_path, ("plain", {name: values[:1] for name, values in PLAIN.items()})))
    assert figure is not None
    assert figure.axes[0].get_lines()[0].get_marker() == "."


def bars(axes: Axes) -> list[tuple[float, float, float]]:
    """Place and ends of every bar."""
    collections = [own for own in axes.collections if isinstance(own, LineCollection)]
    return [(float(a[0]), float(a[1]), float(b[1])) for own in collections for a, b in own.get_segments()]


def marked(axes: Axes, styles: Styles) -> dict[tuple[float, float], str]:
    """Whose marker stands where: told by its colour and shape, as a reader would."""
    looks = {(to_rgba(style["color"]), _shape(style["marker"])): name for name, style in styles.items()}
    found = {}
    for own in (own for own in axes.collections if isinstance(own, PathCollection)):
        name = looks[to_rgba(own.get_facecolor()[0]), own.get_paths()[0].vertices.tobytes()]
        found |= {(float(x), float(y)): name for x, y in own.get_offsets()}
    return found


def _shape(marker: str) -> bytes:
    style = MarkerStyle(marker)
    return bytes(style.get_path().transformed(style.get_transform()).vertices.tobytes())


@pytest.mark.parametrize(("count", "scale"), [(1, "linear"), (4, "linear"), (23, "linear"), (6, "log")])
def test_every_marker_stands_on_the_bar_of_its_own_line(count: int, scale: str) -> None:
    """All lines with the same values but other intervals; some lack places, as defenses lack attacks."""
    axes = Figure().add_subplot()
    axes.set_xscale(scale)
    styles = styles_of(f"d{i:02}" for i in range(count))
    ends = {name: (40.0 - i, 60.0 + i) for i, name in enumerate(styles)}
    places = (0.1, 0.2, 0.4)
    kept = [places if number % 2 else places[::2] if count > 1 else places[:1] for number in range(count)]
    lines(axes, [(n, [(x, 50.0, *ends[n]) for x in own], styles[n]) for n, own in zip(styles, kept, strict=True)])
    told = marked(axes, styles)
    assert len(told) == len(bars(axes)) == sum(map(len, kept)), "markers or bars cover each other"
    measure, shifts = math.log if scale == "log" else float, set()
    for x, low, high in bars(axes):
        assert ends[told[x, 50.0]] == (low, high)
        place = min(places, key=lambda place: abs(measure(place) - measure(x)))
        shifts.add((told[x, 50.0], round(measure(x) - measure(place), 9)))
    assert len(shifts) == count, "a line stands equally far aside at each of its places"
    assert [tuple(np.asarray(own.get_xdata())) for own in axes.get_lines()] == kept, "the lines do not move"
    assert all(own.get_markevery() == [] for own in axes.get_lines()), "a second marker, beside the bar"


@pytest.mark.parametrize("count", [1, 2, 6])
def test_intervals_of_a_single_budget_stand_beside_their_place(count: int) -> None:
    axes = Figure().add_subplot()
    styles = styles_of(f"d{i}" for i in range(count))
    lines(axes, [(name, [(0.1, 50.0, 40.0, 60.0)], style) for name, style in styles.items()])
    beside = {x for x, *_ in bars(axes)}
    assert len(beside) == count and all(abs(x - 0.1) < 0.01 for x in beside)
    assert beside == {x for x, _ in marked(axes, styles)}


def test_few_lines_keep_their_markers_and_have_bands() -> None:
    axes = Figure().add_subplot()
    lines(axes, [(str(i), [(x, 50.0, 40.0, 60.0) for x in (0.1, 0.2)], {"marker": "o", "color": "C0"}) for i in range(3)])
    assert bars(axes) == [] and len(axes.collections) == 3
    assert [(np.asarray(own.get_xdata()).tolist(), own.get_markevery()) for own in axes.get_lines()] == [([0.1, 0.2], None)] * 3


def attacked(variant: str, name: str, kind: str, metrics: list[Metric], status: str = "success") -> Record:
    fields = {"kind": kind, "norm": "linf", "eps": [0.1], "images": 100}
    defense = {"name": variant, "variant": variant, "fields": {}}
    return record(defense=defense, eval={"name": name, "fields": fields}, metrics=metrics, status=status)


def test_a_defense_looks_the_same_in_every_figure_of_a_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each figure shows other defenses: of the first few it lacks some."""
    store = Store(tmp_path / "runs")
    stands = partial(Metric, value=0.5, n=100, lower=0.4, upper=0.6, eps=0.1)
    for name in "abcdefgh":
        number = stands(metric="robust_accuracy", denominator="all")
        store.write(attacked(name, "pgd", "robust", [number]))
    for name in "cefh":
        number = stands(metric="robust_accuracy_after", source="apgd")
        store.write(attacked(name, "adaptive", "adaptive", [number]))
    for name in "gh":
        places = ("clean", "random", "gradient")
        margins = [Metric(metric=f"margin_{at}", value=1.0, n=9, eps=0.1, unit="logits") for at in places]
        store.write(attacked(name, "probe", "probe", margins))
    store.write(certified("h@sigma=0.5", {0.0: 0.9}))
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.setdefault(path.stem, figure))
    plots.draw(store, "tiny", tmp_path / "plots")
    looks: dict[str, set[Any]] = {}
    shown: dict[str, set[str]] = {}
    for title, figure in figures.items():
        for own in (own for axes in figure.axes for own in axes.get_lines() if not str(own.get_label()).startswith("_")):
            looks.setdefault(str(own.get_label()), set()).add((own.get_color(), own.get_marker(), own.get_linestyle()))
            shown.setdefault(title, set()).add(str(own.get_label()))
    assert {title: "".join(sorted(names)) for title, names in shown.items()} == {
        "robust": "abcdefgh", "convergence": "cefh", "gradients": "gh", "certified": "h",
    }  # fmt: skip
    assert [len(own) for own in looks.values()] == [1] * 8
    assert len(set.union(*looks.values())) == 8
