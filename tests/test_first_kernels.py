"""Kernels of the first layer: what is stored and shown is what images are convolved with, and cosines known by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from test_store import record
from test_training import task
from torch import nn

from attacks.streams import generator
from bench import plots, tables
from bench.arrays import packed, unpacked
from bench.evals import FirstKernels, Skipped, Subject
from bench.evals.first_kernels import kernels, pairs
from bench.plots.kernels import PAGE, mosaic
from bench.request import Request
from bench.runner import Run
from bench.store import Record, Store
from defenses.api import Wrapped
from defenses.combine import Mean
from defenses.ensemble import Ensemble
from defenses.kap import Kap
from defenses.kernels import KernelNetwork, folded
from defenses.nets import Network, network
from defenses.pooling import Pool


def net(defense: Kap | None = None, architecture: str = "cnn1") -> Network:
    plain = network(task((3, 32, 32), architecture, 20), generator(1, "kernels"))
    return KernelNetwork(plain, defense.kernels()) if defense else plain


def weights(column: pd.Series) -> np.ndarray:
    return np.stack([unpacked(own) for own in column])


def first(model: Network) -> nn.Conv2d:
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


# What is stored


@pytest.mark.parametrize("defense", [Kap(), Kap(kernel=5), Kap(norm_first=True), Kap(dims=1), Kap(noise=0.2)])
def test_applied_kernels_are_those_of_the_folded_network(defense: Kap) -> None:
    model = net(defense)
    assert isinstance(model, KernelNetwork)
    found = kernels(model)
    applied, learned = weights(found.applied), weights(found.learned)
    assert applied.dtype == np.float32 and np.array_equal(applied, first(folded(model)).weight.detach().numpy())
    assert np.array_equal(learned, first(model).weight.detach().numpy()) and not np.allclose(applied, learned)
    columns = 144 if defense.dims == 1 else 12
    assert found.row.tolist() == [number // columns for number in range(144)]
    assert found.column.tolist() == [number % columns for number in range(144)] and found.kernel.tolist() == list(range(144))


@pytest.mark.parametrize("defense", [None, Kap(pool="none"), Kap(pool="max")])
def test_without_a_mean_learned_kernels_are_applied(defense: Kap | None) -> None:
    found = kernels(net(defense))
    assert (found.applied == found.learned).all()
    assert np.array_equal(weights(found.applied), first(net(defense)).weight.detach().numpy())
    assert (found.row.max(), found.column.max()) == (11, 11)


# Numbers


def test_cosines_of_neighbours_and_of_all_pairs_by_hand() -> None:
    """2 x 2: east, north; east, west. Side by side: (0,1) (0,2) (1,3) (2,3)."""
    own = np.array([[2.0, 0], [0, 1], [1, 0], [-3, 0]])
    cells = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    cosines, adjacent = pairs(own, cells)
    assert cosines.tolist() == [0, 1, -1, 0, 0, -1] and adjacent.tolist() == [True, True, False, False, True, True]
    rows = pd.DataFrame({"kernel": range(4), "row": cells[:, 0], "column": cells[:, 1]})
    rows["applied"] = [packed(one.reshape(1, 1, 2).astype(np.float32)) for one in own]
    rows["learned"] = [packed(np.ones((1, 1, 2), np.float32)) for _ in own]
    metrics = FirstKernels(images=1).summarise(rows, Subject(net(), None, 0)).metrics
    assert [(m.source, m.target, m.value, m.n, m.lower) for m in metrics] == [
        ("applied", "neighbours", 0.0, 4, None),
        ("applied", "all", pytest.approx(-1 / 6), 6, None),
        ("learned", "neighbours", pytest.approx(1.0), 4, None),
        ("learned", "all", pytest.approx(1.0), 6, None),
    ]
    assert {m.unit for m in metrics} == {"cosine"}
    empty = np.array([[0.0, 0], [1, 0], [1, 1], [0, 0]])  # as a stride leaves cells
    assert [found.tolist() for found in pairs(empty, cells)] == [[pytest.approx(0.5**0.5)], [False]]
    only = FirstKernels(images=1).summarise(rows[:1], Subject(net(), None, 0))
    assert only.metrics == []


def test_means_of_kernels_that_have_nothing_in_common_are_alike_as_the_caption_says() -> None:
    own = torch.randn((20 * 20, 1000), generator=generator(0, "alike"))
    cells = np.stack(np.divmod(np.arange(400), 20), 1)
    inside = np.logical_and(cells > 1, cells < 18).all(1)
    cosines, adjacent = pairs(Pool("average")(own).numpy()[inside], cells[inside])
    assert cosines[adjacent].mean() == pytest.approx(2 / 3, abs=0.005)
    assert pairs(own.numpy()[inside], cells[inside])[0][adjacent].mean() == pytest.approx(0, abs=0.005)


def test_it_is_of_one_network() -> None:
    evaluation = FirstKernels(images=1)
    assert len(evaluation.pieces(Subject(net(Kap(noise=0.1)), None, 0))) == 1
    for model, text in ((Ensemble([net(), net()], Mean()), "the defense has 2"), (Wrapped(net().body), "not into a Wrapped")):
        with pytest.raises(Skipped, match=text):
            evaluation.pieces(Subject(model, None, 0))


# The figure


def stored(store: Store, variant: str, own: np.ndarray, columns: int, **changes: Any) -> Record:
    places = np.arange(len(own))
    files = [packed(one.astype(np.float32)) for one in own]
    fields = {"kind": "kernels", "images": 1}
    one = record(
        defense={"name": "d", "variant": variant, "fields": {}},
        eval={"name": "kernels", "fields": fields},
        metrics=[],
        **changes,
    )
    rows = {"kernel": places, "row": places // columns, "column": places % columns, "applied": files, "learned": files}
    store.write_rows(one, pd.DataFrame(rows))
    store.write(one)
    return one


def test_a_kernel_lies_in_its_cell_with_its_colours(tmp_path: Path) -> None:
    own = np.zeros((6, 3, 2, 2))
    own[0, 2, 1, 1] = 0.125
    own[4, 0, 1, 0] = -0.5  # red of the lower left pixel of the kernel in the second row, second column
    own[2, 1, 0, 0] = 0.25
    store = Store(tmp_path)
    one = stored(store, "kap", own, 3)
    tiles = mosaic(store.rows(one).sample(frac=1, random_state=0))
    assert tiles.shape == (2, 3, 2, 2, 3) and tiles[1, 1, 1, 0].tolist() == [-0.5, 0, 0] and np.count_nonzero(tiles) == 3
    (figure,) = plots.kernels([one], store)
    axes = figure.axes[0]
    picture = np.asarray(axes.images[0].get_array())
    side, gap = 20, 7
    corner = lambda row, column: (row * (2 * side + gap), column * (2 * side + gap))  # noqa: E731
    top, left = corner(1, 1)
    assert picture[top + side + 3, left + 3].tolist() == [0.0, 0.5, 0.5]  # -0.5 is the largest weight
    top, left = corner(0, 2)
    assert picture[top + 3, left + 3].tolist() == [0.5, 0.75, 0.5]
    assert picture[top + 3, left - 3].tolist() == [1, 1, 1] and picture.shape == (2 * 40 + gap, 3 * 40 + 2 * gap, 3)
    assert axes.get_title() == "kap, seed 3 (±0.5)"


def test_grey_kernels_and_long_rows(tmp_path: Path) -> None:
    gen, store = np.random.default_rng(0), Store(tmp_path)
    long = mosaic(store.rows(stored(store, "dims", gen.normal(size=(10, 1, 3, 3)), 10)))
    assert long.shape == (3, 4, 3, 3, 1) and not long[2, 2:].any()  # 12 cells, of which two are empty
    strided = np.zeros((144, 1, 3, 3))
    strided[[65, 66, 77, 78]] = 1.0  # the middle of 12 x 12
    assert mosaic(store.rows(stored(store, "strided", strided, 12))).shape == (2, 2, 3, 3, 1)
    deep = mosaic(store.rows(stored(store, "deep", gen.normal(size=(4, 5, 3, 3)), 2)))
    assert deep.shape == (2, 2, 3, 3, 1)
    (figure,) = plots.kernels([stored(store, "zero", np.zeros((4, 1, 1, 1)), 2)], store)
    assert set(np.unique(figure.axes[0].images[0].get_array())) == {0.5, 1.0}


def test_pages_hold_every_defense_once_and_cut_nothing_off(tmp_path: Path) -> None:
    gen, store = np.random.default_rng(0), Store(tmp_path)
    names = [f"kap@architecture=cnn2_400,kernel={number},noise=0.1,stride={number}" for number in range(PAGE + 1)]
    records = [stored(store, name, gen.normal(size=(64, 3, 3, 3)), 8, hashes={"data": "cifar10 parquet"}) for name in names]
    records.append(stored(store, names[0], gen.normal(size=(64, 3, 3, 3)), 8, seed=9))
    first, second = plots.kernels(records[::-1], store)
    assert [sum(bool(axes.images) for axes in figure.axes) for figure in (first, second)] == [PAGE, 1]
    for figure in (first, second):
        FigureCanvasAgg(figure).draw()
        boxes = [axes.title.get_window_extent() for axes in figure.axes if axes.images]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        for box in (*boxes, *(text.get_window_extent() for text in figure.texts)):
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 - 1 <= box.y0 and box.y1 <= figure.bbox.y1
    words = " ".join(text.get_text().replace("\n", " ") for text in second.findobj(Text))
    assert "mid grey is a weight of 0" in words and "cifar10 parquet" in words and "lenet5" in words
    assert plots.kernels([], store) == []


# A run


def test_a_run_stores_them_and_table_and_figure_show_them(tiny: Path, tmp_path: Path) -> None:
    text = tiny.read_text().replace('"lenet5"', '"cnn2_16"')
    tiny.write_text(text + '[evals.kernels]\nkind = "kernels"\nimages = 1\n')
    request = Request(
        defense="kap,kmp,naive@members=2", suite=str(tiny), runs=tmp_path / "runs", device="cpu", only=("kernels",)
    )
    kap, kmp, naive = Run(request).execute()
    assert (kap.status, kmp.status, naive.status) == ("success", "success", "skipped"), kap.error
    assert Run(request).missing() == []
    store = Store(request.runs)
    assert len(store.rows(kap)) == 16 and unpacked(store.rows(kap).applied[0]).shape == (1, 3, 3)
    (table,) = tables.summaries(store)
    assert table.title == "tiny, quick: kernels of the first layer"
    assert table.columns[2:-1] == ["applied, neighbours", "applied, all pairs", "learned, neighbours", "learned, all pairs"]
    values = {(m.source, m.target): f"{m.value:.3f}" for m in kap.metrics}
    assert tables.body(table)[0][2:6] == [values[s, t] for s in ("applied", "learned") for t in ("neighbours", "all")]
    assert "no image is used" in table.caption and "alike by construction" in table.caption
    files = plots.draw(store, "tiny", tmp_path / "plots")
    assert {"kernels.png", "kernels.pdf"} <= {path.name for path in files}
