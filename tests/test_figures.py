"""Declared figures: each names what exists, holds the stored and the printed numbers, and says what is missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import test_activations
import test_first_kernels
from conftest import TINY
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from test_plots import words
from test_store import record
from test_tables import certified, view
from test_transfer import VALUES, shown, transferred

from bench.figures import Curves, Figure, FigureError, available_figures, load_figure
from bench.plots.declared import Drawn, compose, draw_figure
from bench.plots.panels import printed
from bench.registry import resolve
from bench.store import Finding, Metric, Record, Store
from bench.suites import load_suite
from bench.wanted import AGAIN, Hole, Need, commands

PAPERS = {
    "cear_figure2", "variance_reduction_members", "variance_reduction_samples",
    *(f"edlcm_figure{number}" for number in (4, 5, 6, 7)), *(f"smd_figure{number}" for number in (2, 3, 5)),
    *(f"kap_figure{number}" for number in (4, 5, 6, 7, "A1", "A2", "A3", "A4")),
}  # fmt: skip


@pytest.fixture(scope="module")
def figures() -> dict[str, Figure]:
    """All that come with the project."""
    return {name: load_figure(name) for name in available_figures()}


def test_every_figure_of_the_papers_is_there_and_explains_itself(figures: dict[str, Figure]) -> None:
    assert figures.keys() == PAPERS
    for figure in figures.values():
        assert len(figure.title) > 20 and len(figure.caption) > 150 and figure.remarks


def test_numbers_that_panels_want_printed_are_known(figures: dict[str, Figure]) -> None:
    counts = {}
    for name, figure in figures.items():
        curves = [panel for panel in figure.panels if isinstance(panel, Curves) and panel.published]
        for panel in curves:
            found = [len(printed(panel, index)) for index in range(len(panel.lines))]
            assert any(found), f"{name}, {panel.title}: nothing is known of {panel.published}"
            counts[name] = counts.get(name, 0) + sum(found)
    # 6 lines in 8 panels and one line a noise level in 3, of 9 radii; 4 attacks at 2 budgets; 1 budget.
    assert counts == {"cear_figure2": (6 * 8 + 8) * 9, "edlcm_figure6": 16, "edlcm_figure7": 8, "kap_figure5": 6}


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_from_an_empty_store_it_says_what_would_fill_it(name: str, figures: dict[str, Figure], tmp_path: Path) -> None:
    figure = figures[name]
    drawn = compose(figure, Store(tmp_path / "nothing"), "quick")
    panels = [axes for axes in drawn.page.axes if axes.get_visible() and axes.get_subplotspec()]
    assert sum(len(one.holes) for one in drawn.panels) == sum(one.asked for one in drawn.panels) > 0
    for axes in panels[: len(figure.panels)]:
        assert "no record yet" in axes.get_title() or "no record yet" in [text.get_text() for text in axes.texts]
    needs = [hole.need for one in drawn.panels for hole in one.holes]
    assert {(need.suite, need.variant, need.eval) for need in needs} == told(drawn.words)


def told(text: str) -> set[tuple[str, str, str]]:
    """What the commands in a text would make: suite, variant and evaluation, each of which exists."""
    found = set()
    for defense, suite, only in re.findall(
        r"^bench run --defense (\S+) --suite (\S+) --budget quick --only (\S+)$", text, re.M
    ):
        for variant in resolve(defense, {}):
            for name in only.split(","):
                assert name in load_suite(suite).evals
                found.add((suite, variant.label, name))
    return found


def test_a_page_is_readable(figures: dict[str, Figure], tmp_path: Path) -> None:
    """Nothing covers a panel or leaves the page, and panels are not flat."""
    for name, height in {"kap_figure5": 1.8, "smd_figure5": 1.2}.items():
        page = compose(figures[name], Store(tmp_path), "quick").page
        FigureCanvasAgg(page).draw()
        boxes = [axes.get_tightbbox() for axes in page.axes if axes.get_visible()]
        heads = [*(legend.get_window_extent() for legend in page.legends), *(small_print(page).get_window_extent(),)]
        assert not any(head.overlaps(box) for head in heads for box in boxes)
        assert all(page.bbox.x0 <= box.x0 and box.x1 <= page.bbox.x1 for box in [*heads, *boxes])
        assert all(axes.get_window_extent().height / page.dpi > height for axes in page.axes if axes.get_visible())


def small_print(page: object) -> Text:
    (found,) = [text for text in page.findobj(Text) if "the text file beside" in text.get_text().replace("\n", " ")]  # type: ignore[attr-defined]
    return found


Make = Callable[..., Figure]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A figure of panels, as TOML, on a suite of the name "tiny" that asks all kinds of questions."""
    suite = tmp_path / "tiny.toml"
    evals = ("transfer", 'attack = "pgd"\nnorm = "linf"\neps = [0.1]'), ("variance", "n = [10]"), ("kernels", "")
    more = "".join(f'[evals.{kind}]\nkind = "{kind}"\nimages = 5\n{rest}\n' for kind, rest in evals)
    activations = '[evals.activations]\nkind = "activations"\nattack = "pgd"\nnorm = "l2"\neps = [1.0]\nimages = 40\n'
    suite.write_text(f"{TINY}{more}{activations}")

    def made(panels: str, head: str = "") -> Figure:
        path = tmp_path / "mine.toml"
        text = f'title = "t"\ncaption = "c"\ncolumns = 2\n{head}\npanels = [\n{panels}\n]\n'
        path.write_text(text.replace("SUITE", f'suite = "{suite}"'))
        return load_figure(str(path))

    return made


PGD = '{ kind = "curves", title = "p", SUITE, eval = "pgd", metric = "robust_accuracy", x = "eps" }'

TWO = 'lines = [{ label = "Base", defense = "naive", baseline = true }, { label = "SMD", defense = "smd" }]'


def pgd(variant: str, values: dict[float, float], **changes: object) -> Record:
    """Accuracy by eps, with an interval of 0.1 to each side, beside the same among images that are right as they are."""
    metrics = [
        Metric(metric="robust_accuracy", value=value, lower=value - 0.1, upper=value + 0.1, n=30, eps=eps, denominator="all")
        for eps, value in values.items()
    ]
    others = [m.model_copy(update={"value": 0.99, "denominator": "clean_correct"}) for m in metrics]
    fields = {"kind": "robust", "attack": "pgd", "norm": "linf", "eps": list(values), "images": 30}
    given = {"eval": {"name": "pgd", "fields": fields}, "hashes": {"data": "digits (JPEG re-encoding)"}, **changes}
    return record(defense={"name": variant, "variant": variant, "fields": {}}, metrics=[*metrics, *others], **given)


def drawn_lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}  # type: ignore[arg-type]


def draw(figure: Figure, folder: Path, *records: Record) -> Drawn:
    store = Store(folder)
    for one in records:
        store.write(one)
    return compose(figure, store, "quick")


def test_curves_hold_the_stored_numbers_with_their_intervals(make: Make, tmp_path: Path) -> None:
    drawn = draw(make(PGD, TWO), tmp_path, pgd("smd", {0.1: 0.3, 0.02: 0.6}), pgd("naive", {0.02: 0.5, 0.1: 0.2}))
    (axes,) = drawn.page.axes
    assert drawn_lines(axes) == {"Base": ([0.02, 0.1], [50.0, 20.0]), "SMD": ([0.02, 0.1], [60.0, 30.0])}
    band = axes.collections[1].get_paths()[0].vertices
    assert np.unique(np.round(band[:, 1], 6)).tolist() == [20.0, 40.0, 50.0, 70.0]
    assert axes.get_xlabel() == "ℓ∞ budget ε" and axes.get_title() == "p"
    text = " ".join(words(drawn.page)).replace("\n", " ")
    assert "tiny v1, budget quick (reduced): lenet5, 30 images of digits (JPEG re-encoding); pgd: pgd, linf" in text
    again = "bench run --defense naive,smd --suite FILE.toml --budget quick --seeds 3 --only pgd"
    assert "missing" not in text and drawn.words.partition(f"{AGAIN}\n")[2].strip() == again


def test_it_is_told_whose_numbers_are_flagged(make: Make, tmp_path: Path) -> None:
    masked = Finding(kind="zero_gradients", detail="gradients of 25 of 30 images are zero")
    drawn = draw(make(PGD, TWO), tmp_path, pgd("smd", {0.1: 0.9}, findings=[masked]), pgd("naive", {0.1: 0.2}))
    told = "flagged, to be read in bench diagnose before their numbers are quoted: smd in tiny"
    assert told in " ".join(words(drawn.page)).replace("\n", " ") and told in drawn.words
    drawn = draw(make(PGD, TWO), tmp_path, pgd("smd", {0.1: 0.9}))
    assert "flagged" not in drawn.words


def test_several_seeds_are_a_mean_and_their_deviation(make: Make, tmp_path: Path) -> None:
    drawn = draw(make(PGD, TWO), tmp_path, *(pgd("smd", {0.1: value}, seed=seed) for seed, value in enumerate((0.2, 0.4))))
    (axes,) = drawn.page.axes
    assert drawn_lines(axes)["SMD"] == ([0.1], [pytest.approx(30.0)])
    ends = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (min(ends), max(ends)) == pytest.approx((30 - 10 * 2**0.5, 30 + 10 * 2**0.5))


def test_a_hole_has_a_reason_and_no_zero(make: Make, tmp_path: Path) -> None:
    failed = pgd("naive", {}).model_copy(update={"status": "error", "metrics": [], "error": "x\nValueError: no"})
    drawn = draw(make(PGD, TWO), tmp_path, failed, pgd("smd", {0.1: 0.3}))
    assert drawn_lines(drawn.page.axes[0]).keys() == {"SMD"}
    assert drawn.page.axes[0].get_title() == "p\nmissing: Base"
    assert "- p: Base: error: ValueError: no" in drawn.words
    assert f"bench run --defense naive --suite {tmp_path}/tiny.toml --budget quick --only pgd" in drawn.words
    assert "missing: 1 of 2 results" in small_print(drawn.page).get_text()


@pytest.mark.parametrize(
    ("changes", "reason", "fresh"),
    [
        ({"suite": {"name": "tiny", "version": 2, "budget": "quick"}}, "the record is of version 2 of the suite", True),
        (
            {"suite": {"name": "tiny", "version": 2, "budget": "quick"}, "status": "skipped"},
            "the record is of version 2 of the suite",
            True,
        ),
        ({"suite": {"name": "tiny", "version": 1, "budget": "paper"}}, "no record", False),
        ({"metrics": []}, "the record has no such number", True),
    ],
)
def test_records_of_another_question_do_not_count(
    make: Make, tmp_path: Path, changes: dict[str, object], reason: str, fresh: bool
) -> None:
    """A command that has to move one aside says so, apart from those that have not."""
    one = pgd("smd", {0.1: 0.3}).model_copy(update=changes)
    drawn = draw(make(PGD, TWO), tmp_path, one)
    assert drawn.page.axes[0].get_lines()[:] == [] and f"- p: SMD: {reason}" in drawn.words
    asked = f"--suite {tmp_path}/tiny.toml --budget quick --only pgd"
    apart = [f"bench run --defense naive {asked}", f"bench run --defense smd {asked} --fresh"]
    made = drawn.words.partition("What would make it:\n")[2].split("\n")[:-1]
    assert made == (apart if fresh else [f"bench run --defense naive,smd {asked}"])


def test_what_makes_no_sense_has_no_command(make: Make, tmp_path: Path) -> None:
    skipped = pgd("smd", {}).model_copy(update={"status": "skipped", "error": "no noise", "metrics": []})
    told = draw(make(PGD, TWO), tmp_path, skipped).words
    assert "smd: skipped: no noise" in told.lower() and "--defense naive --suite" in told and "--defense smd" not in told


def test_a_command_makes_all_that_a_suite_lacks() -> None:
    needs = [Need("digits", spec, name) for spec in ("naive", "gal") for name in ("clean", "pgd", "pgd")]
    asked = "--suite digits --budget quick --seeds 0,1 --only clean,pgd"
    assert commands(needs, "quick", (0, 1)) == [f"bench run --defense naive,gal {asked}"]
    mixed = commands(needs, "quick", taken=[needs[0], needs[4]])
    told = "--suite digits --budget quick --only"
    assert mixed == [
        f"bench run --defense naive {told} clean --fresh",
        f"bench run --defense naive {told} pgd",
        f"bench run --defense gal {told} clean",
        f"bench run --defense gal {told} pgd --fresh",
    ]
    assert Hole("p", needs[0], "no record").fillable and not Hole("p", needs[0], "skipped: no noise").fillable


def test_a_line_through_variants_lies_at_their_places(make: Make, tmp_path: Path) -> None:
    lines = 'lines = [{ label = "k", defense = { 5 = "naive@members=5", 1 = "naive@members=1", 3 = "naive" } }]'
    panel = PGD.replace('x = "eps"', f'xlabel = "members", select = {{ eps = 0.1 }}, {lines}')
    records = [pgd(label, {0.02: 0.9, 0.1: value}) for label, value in (("naive@members=5", 0.5), ("naive", 0.3))]
    drawn = draw(make(panel), tmp_path, *records)
    assert drawn_lines(drawn.page.axes[0]) == {"k": ([3.0, 5.0], [30.0, 50.0])}
    assert drawn.page.axes[0].get_title() == "p\npoints missing: k" and "--defense naive@members=1 " in drawn.words
    assert [tick.get_text() for tick in drawn.page.axes[0].get_xticklabels()] == ["1", "3", "5"]  # the hole's place, too
    assert drawn.page.axes[0].get_xlim()[0] < 1 and drawn.page.axes[0].get_xlim()[1] > 5
    with pytest.raises(FigureError, match="pgd has several numbers for a place; select must say which"):
        draw(make(panel.replace("select = { eps = 0.1 }, ", "")), tmp_path, *records)


def test_printed_numbers_are_drawn_beside_ours(figures: dict[str, Figure], tmp_path: Path) -> None:
    """CEAR's table 1; its 5 % at 4 sigma cannot be true and stands apart from the line."""
    one = certified("cear_rw@sigma=0.5", {0.0: 0.9, 0.5: 0.8}, suite={"name": "mnist", "version": 1, "budget": "quick"})
    store = Store(tmp_path)
    store.write(one.model_copy(update={"eval": {**one.eval, "name": "certified"}}))
    drawn = compose(figures["cear_figure2"], store, "quick")
    axes = {one.panel.title: panel for one, panel in zip(drawn.panels, drawn.page.axes, strict=False)}
    ours, *printed_ones = [line for line in axes["MNIST, σ = 0.5"].get_lines() if line.get_color() == "#CC79A7"]
    assert (ours.get_label(), list(ours.get_ydata())) == ("CEAR(RW)", [90.0, 80.0])  # type: ignore[arg-type]
    (line,) = printed_ones
    assert list(line.get_xdata()) == [0.25 * place for place in range(9)]  # type: ignore[arg-type]
    assert list(line.get_ydata()) == [94, 92, 87, 83, 75, 67, 58, 43, 0]  # type: ignore[arg-type]
    crosses = [line for line in axes["CIFAR-10, σ = 0.5"].get_lines() if line.get_marker() == "x"]
    assert [(*cross.get_xdata(), *cross.get_ydata()) for cross in crosses] == [(2.0, 5.0)]  # type: ignore[misc]
    (line,) = [line for line in axes["CIFAR-10, σ = 0.5"].get_lines() if line.get_color() == "#CC79A7" and line not in crosses]
    assert list(line.get_xdata()) == [0.25 * place for place in range(8)]  # type: ignore[arg-type]
    assert drawn.panels[1].suite == "mnist" and drawn.panels[0].suite == "cear_mnist"
    assert "shown in" not in drawn.words
    other = certified("cear_rw", {0.0: 0.9}, 0.25, suite={"name": "cear_mnist", "version": 1, "budget": "quick"})
    store.write(other.model_copy(update={"eval": {**other.eval, "name": "certified"}}))
    told = compose(figures["cear_figure2"], store, "quick").words
    assert re.search(r"(?m)^cear_mnist v1, .*; shown in: MNIST, σ = 0.25 \| MNIST, noise levels$", told)
    assert re.search(r"(?m)^mnist v1, .*; shown in: MNIST, σ = 0.5$", told)


def test_views_show_what_the_plots_of_a_suite_show(make: Make, tmp_path: Path) -> None:
    kinds = {"margin": "variance", "acr": "variance", "samples": "variance", "transfer": "transfer", "depth": "activations"}
    panel = '{{ kind = "{}", title = "{}", SUITE, eval = "{}", defense = "{}" }},'
    defenses = {"variance": "smoothed_ensemble", "transfer": "naive", "activations": "kap"}
    figure = make("\n".join(panel.format(kind, kind, name, defenses[name]) for kind, name in kinds.items()))
    store = Store(tmp_path)
    test_activations.stored(store, "kap")
    drawn = draw(figure, tmp_path, view(), transferred("naive", VALUES))
    margin, radius, samples, transfer, depth = drawn.page.axes[:5]
    assert margin.get_lines()[0].get_ydata().tolist() == [0.9, 0.7]  # type: ignore[union-attr]
    assert radius.get_lines()[0].get_ydata().tolist() == pytest.approx([0.12, 0.22])  # type: ignore[union-attr]
    assert samples.get_lines()[0].get_xdata().tolist() == [10, 20]  # type: ignore[union-attr]
    assert shown(drawn.page, 3)[1][2] == "30" and "n = 150 of 200" in transfer.get_title()
    assert depth.get_lines()[0].get_ydata().tolist() == pytest.approx([0.01, 0.02, 0.04, 0.05])  # type: ignore[union-attr]
    assert not any(one.holes for one in drawn.panels)


def test_kernels_and_changes_are_drawn_from_rows(make: Make, tmp_path: Path) -> None:
    panel = '{{ kind = "{}", title = "{}", SUITE, eval = "{}", defense = "kap"{} }},'
    changes = [("kernel_changes", layer) for layer in ("first", "middle", "last")] + [("layer_changes", "middle")]
    panels = [panel.format(kind, layer, "activations", f', layer = "{layer}"') for kind, layer in changes]
    figure = make("\n".join([*panels, panel.format("kernels", "k", "kernels", "")]))
    store = Store(tmp_path)
    test_activations.stored(store, "kap")
    one = test_first_kernels.stored(store, "kap", np.full((4, 1, 2, 2), 0.5), 2)
    drawn = compose(figure, store, "quick")
    heads = [axes.get_title() for axes in drawn.page.axes[:5]]
    assert heads == [
        "first\nlayer 1, kernel 10", "middle\nlayer 3, kernel 10", "last\nlayer 5, kernel 10", "middle\nlayer 3, all kernels",
        "k\ngrey 0, black and white ±0.5",
    ]  # fmt: skip
    assert all(axes.patches for axes in drawn.page.axes[:4]) and drawn.page.axes[4].images
    rows = store.path(one).with_suffix(".parquet")
    for spoil in (lambda: rows.write_bytes(rows.read_bytes()[:100]), rows.unlink):
        spoil()
        drawn = compose(figure, store, "quick")
        assert "- k: the record's rows are missing or damaged" in drawn.words and not drawn.page.axes[4].images


MARGIN = '{ kind = "margin", title = "p", SUITE, eval = "pgd", defense = "smd" }'


@pytest.mark.parametrize(
    ("panel", "head", "message"),
    [
        (PGD, "", r"panels\.0\.lines: Field required"),
        (PGD.replace("eval", "evil"), TWO, r"panels\.0\.(eval: Field required|evil: unknown key)"),
        (PGD.replace('"pgd"', '"pdg"'), TWO, r"panel 1 \(p\): eval in tiny: unknown 'pdg'; did you mean 'pgd'"),
        (PGD, TWO.replace('"smd"', '"smdd"'), "panel 1 .p.: defense: unknown 'smdd'; did you mean 'smd'"),
        (PGD.replace("SUITE", 'suite = "minst"'), TWO, "suite: unknown 'minst'; did you mean 'mnist'"),
        (PGD.replace('"robust_accuracy"', '"tsr"'), TWO, r"panels\.0\.metric: .*'certified_accuracy'"),
        (PGD.replace('"eps"', '"eps", select = { radios = 1 }'), TWO, "select: unknown 'radios'; did you mean 'radius'"),
        (PGD.replace('x = "eps"', 'xlabel = "k"'), TWO, "a variant for every place"),
        (PGD.replace('"curves"', '"lines"'), TWO, r"panels\.0: .*'curves'"),
        (MARGIN, "", "shows evaluations of kind variance; pgd is robust"),
        (MARGIN.replace("SUITE", 'SUITE, layer = "first"'), "", "layer: first, middle or last, for"),
        ("{", "", "not valid TOML"),
        (PGD, "collumns = 2", "collumns: unknown key"),
    ],
)  # fmt: skip
def test_a_wrong_figure_is_explained(make: Make, panel: str, head: str, message: str) -> None:
    with pytest.raises(FigureError, match=rf"mine\.toml: .*{message}"):
        make(panel, head)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("cear_figur2",), "did you mean 'cear_figure2'"),
        ((), "not neither"),
        (("cear_figure2", "--suite", "mnist"), "not both"),
        (("cear_figure2", "--budget", "quik"), "did you mean 'quick'"),
        (("--suite", "mnist", "--budget", "quick"), "--budget"),
    ],
)
def test_a_wrong_request_is_one_line_and_code_2(bench, given, message, capsys) -> None:  # type: ignore[no-untyped-def]
    assert bench("plot", *given) == 2
    assert message in capsys.readouterr().err and not Path("plots").exists()


def test_a_figure_is_three_files_and_is_listed(bench, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert bench("plot", "variance_reduction_samples", "--out", "out") == 0
    out = capsys.readouterr().out.split()
    assert out == [f"out/variance_reduction_samples.{kind}" for kind in ("pdf", "png", "txt")]
    assert (
        Path(out[0]).read_bytes()[:4] == b"%PDF"
        and b"/Type3" not in Path(out[0]).read_bytes()
        and "bench run --defense smoothed_ensemble" in Path(out[2]).read_text()
    )
    assert bench("list", "figures") == 0
    assert all(name in capsys.readouterr().out for name in ["kap_figureA4"])


def test_files_of_a_figure_are_named_after_it(make: Make, tmp_path: Path) -> None:
    make(PGD, TWO)
    files = draw_figure(str(tmp_path / "mine.toml"), Store(tmp_path), "quick", tmp_path / "out")
    assert [path.name for path in files] == ["mine.pdf", "mine.png", "mine.txt"] and all(path.exists() for path in files)
