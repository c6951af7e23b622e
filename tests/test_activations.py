"""Changes of activations: layers known by hand, what counts, which kernels are shown, and figures that hold the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from test_noise_evaluation import images, own_labels, small
from test_store import record
from test_training import task
from torch import nn

from attacks import Pgd, Streams
from attacks.streams import drawing, generator
from bench import plots, tables
from bench.arrays import packed, unpacked
from bench.evals import Activations, Skipped, Subject
from bench.evals.activations import BATCH, jittered, layers, middle, reach
from bench.plots.activations import round_numbers
from bench.request import Request
from bench.runner import Run
from bench.store import Metric, Record, Store
from defenses.combine import Mean
from defenses.ensemble import Ensemble
from defenses.kap import Kap
from defenses.kernels import KernelNetwork, answers, folded, with_noise
from defenses.nets import Network, Normalise, network


def two_layers(bias: float = 1.0) -> Network:
    """y1 = 2 x and y2 = 3 relu(y1) + bias, of every pixel alone; then two classes that look at the brightest pixel."""
    first, second = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1)
    first.weight.data.fill_(2.0)
    second.weight.data.fill_(3.0)
    assert second.bias is not None
    second.bias.data.fill_(bias)
    body = nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(36, 2))
    return Network(Normalise([0.0], [1.0]), body, "two").eval()


def asked(n: int, **changes: Any) -> Activations:
    fields = {"attack": "pgd", "norm": "l2", "eps": [0.3], "steps": 5, "restarts": 1, "images": n}
    return Activations(**{**fields, **changes})


def measured(net: Network, n: int, evaluation: Activations) -> pd.DataFrame:
    subject = Subject(net, None, 0)
    return pd.concat([evaluation.measure([subject], images(n).take(p.rows), p)[0] for p in evaluation.pieces(subject)])


# What a layer answers


def test_changes_of_linear_layers_are_those_by_hand() -> None:
    net, x = two_layers(), images(4).floats()
    step = 0.01 * torch.rand(x.shape, generator=generator(0, "step"))
    first, second = layers(net, x, {"noise": x + step, "attack": x + 2 * step}, 0)
    size, moved = x.flatten(1).norm(dim=1), step.flatten(1).norm(dim=1)
    assert np.allclose(first["size"], 2 * size) and np.allclose(second["size"], (6 * x + 1).flatten(1).norm(dim=1))
    for table, factor in ((first, 2), (second, 6)):
        assert np.allclose(table.noise, factor * moved, rtol=1e-4) and np.allclose(table.attack, 2 * factor * moved, rtol=1e-4)
    assert [first.name[0], second.name[0]] == ["body.0", "body.2"] and [first.layer[0], second.layer[0]] == [1, 2]
    assert (first.kernel == -1).all() and first.kernel_noise.isna().all()


def test_noise_has_the_length_of_the_budget() -> None:
    x, streams = images(6).floats(), Streams(0, "length", ids=range(6))
    delta = jittered(x, 0.7, streams) - x
    assert torch.allclose(delta.flatten(1).norm(dim=1), torch.full((6,), 0.7))
    assert abs(float(delta.mean())) < 0.05 and len({round(float(own.sum()), 4) for own in delta}) == 6
    assert reach("l2", 0.5, 36) == 0.5 and reach("linf", 0.1, 36) == pytest.approx(0.6)
    rows = measured(two_layers(), 5, asked(5)).groupby("layer")
    assert np.allclose(rows.get_group(1).noise, 2 * 0.3)
    assert (rows.get_group(2).noise <= 6 * 0.3 + 1e-4).all()  # noisy pixels may be negative, and ReLU cuts them


@pytest.mark.parametrize("defense", [Kap(noise=0.3), Kap(noise=0.3, pool="max"), Kap(noise=0.3, norm_first=True)])
def test_layers_with_pools_are_seen_behind_the_pool_and_before_the_noise(defense: Kap) -> None:
    net = KernelNetwork(network(task((3, 32, 32), "cnn2", 20), generator(1, "kap")), defense.kernels())
    x = torch.rand((3, 3, 32, 32), generator=generator(0, "x"))
    seen = answers(with_noise(net, "none", 0.3), x)
    assert len(seen) == 2
    first, names = net.convolutions()[0], list(seen)
    with torch.no_grad():
        assert torch.equal(seen[names[0]], first(net.normalise(x)))
        if defense.pool != "max":
            plain = answers(folded(net), x)
            assert all(torch.allclose(seen[name], plain[name], atol=1e-4) for name in names)
    noisy = with_noise(net, "activations", 0.3)
    with drawing(noisy, Streams(0, "a", ids=range(3))):
        assert torch.equal(answers(noisy, x)[names[0]], seen[names[0]])


@pytest.mark.parametrize(
    ("architecture", "count"), [("resnet20", 21), ("preactresnet18", 20), ("densenet100", 99), ("vgg16", 13)]
)
def test_layers_come_in_the_order_in_which_they_are_asked(architecture: str, count: int) -> None:
    net = network(task((3, 32, 32), architecture, 20), generator(0, "order"))
    before = [len(module._forward_hooks) for module in net.modules()]
    seen = answers(net, torch.rand(1, 3, 32, 32))
    assert len(seen) == count and next(iter(seen)) == "body.0"
    assert [len(module._forward_hooks) for module in net.modules()] == before
    if architecture == "preactresnet18":  # the shortcut sees what the first convolution of its block sees, and before it
        assert [name for name in seen if name.startswith("body.3.")] == ["body.3.shortcut", "body.3.conv1", "body.3.conv2"]


# What counts


def test_only_images_that_are_right_count_and_a_silent_layer_has_no_ratio() -> None:
    rows = pd.DataFrame(
        {
            "id": [0, 1, 2, 3] * 2,
            "eps": 0.3,
            "clean_correct": [True, True, False, True] * 2,
            "layer": [1] * 4 + [2] * 4,
            "name": ["body.2"] * 4 + ["body.10"] * 4,  # not in the order of the alphabet
            "size": [1.0, 2, 1, 4, 1, 0, 1, 2],
            "noise": [0.5, 0.5, 9, 1, 1, 1, 9, 1],
            "attack": [1.0, 4, 0, 4, 3, 0, 0, 2],
        }
    )
    metrics = asked(4).summarise(rows, Subject(two_layers(), None, 0)).metrics
    assert [(m.target, m.source, m.n, pytest.approx(m.value)) for m in metrics] == [
        ("body.2", "noise", 3, 1 / 3),
        ("body.2", "attack", 3, 4 / 3),
        ("body.10", "noise", 2, 0.75),
        ("body.10", "attack", 2, 2.0),
    ]
    assert all(m.unit == "ratio" and m.eps == 0.3 and m.denominator == "clean_correct" for m in metrics)
    assert all(m.lower is not None and m.upper is not None and m.lower <= m.value <= m.upper for m in metrics)
    none = rows.assign(clean_correct=False)
    assert asked(4).summarise(none, Subject(two_layers(), None, 0)).metrics == []


def test_the_attack_is_that_of_robust_and_leaves_wrong_images_alone() -> None:
    net, evaluation = small(), asked(12)
    some = own_labels(net, images(12))
    (piece,) = evaluation.pieces(Subject(net, None, 0))
    rows = evaluation.measure([Subject(net, None, 0)], some, piece)[0]
    x, y = some.floats(), some.labels
    result = Pgd(norm="l2", eps=0.3, steps=5, restarts=1)(net, x, y, Streams(0, "pgd", "l2", ids=some.ids))
    first = rows[rows.layer == 1]
    assert first.id.tolist() == some.ids.tolist() and first.broken.tolist() == result.broken.tolist()
    assert first.clean_correct.tolist() == (net.predict(x) == y).tolist()
    change = answers(net, result.x_adv)["body.0"] - answers(net, x)["body.0"]
    assert np.allclose(first.attack, change.flatten(1).norm(dim=1), atol=1e-5)
    assert not first[~first.clean_correct].attack.any() and first[first.clean_correct].attack.all()


def test_shown_kernels_are_those_in_the_middle_of_their_sheet() -> None:
    assert [middle(channels) for channels in (1, 9, 16, 64, 128)] == [0, 4, 10, 36, 72]
    net, x = small(), images(4).floats()
    found = layers(net, x, {"noise": x, "attack": x.flip(-1)}, 2)
    assert [table.kernel.tolist() for table in found] == [[4, 4, -1, -1]] * 2
    answer, other = answers(net, x)["body.3"], answers(net, x.flip(-1))["body.3"]
    kept = unpacked(found[1].kernel_attack[1])
    rms = answer[1].square().mean().sqrt()
    assert kept.dtype == np.float16 and np.allclose(kept, (other[1, 4] - answer[1, 4]) / rms, atol=2e-3)
    assert not unpacked(found[1].kernel_noise[0]).any()
    assert found[0].kernel_noise.notna().tolist() == [True, True, False, False]
    deep = network(task((3, 32, 32), "resnet20", 20), generator(0, "deep"))
    y = torch.rand((1, 3, 32, 32), generator=generator(0, "y"))
    tables = layers(deep, y, {"noise": y, "attack": y}, 1)
    assert [table.layer[0] for table in tables if table.kernel[0] >= 0] == [1, 11, 21]
    assert len(packed(np.zeros((32, 32), np.float16))) < 2300


def test_rows_know_neither_pieces_nor_batches() -> None:
    net, n = small(), BATCH + 5
    some, subject = own_labels(net, images(n)), Subject(net, None, 0)
    evaluation = asked(n, shown=BATCH + 2)
    (piece,) = evaluation.pieces(subject)
    whole = evaluation.measure([subject], some, piece)[0].set_index(["layer", "id"]).sort_index()
    order = torch.randperm(n, generator=generator(3))
    mixed = evaluation.measure([subject], some.take(order), piece)[0].set_index(["layer", "id"]).sort_index()
    numbers = [name for name in whole.columns if not name.startswith("kernel")]
    pd.testing.assert_frame_equal(whole[numbers], mixed[numbers], rtol=1e-4, atol=1e-5)
    assert (whole.kernel >= 0).groupby("layer").sum().tolist() == [BATCH + 2] * 2
    cut = slice(0, BATCH), slice(BATCH, n)
    parts = [evaluation.measure([subject], some.take(part), type(piece)(part, piece.setting))[0] for part in cut]
    pd.testing.assert_frame_equal(
        pd.concat(parts).set_index(["layer", "id"]).sort_index()[numbers], whole[numbers], rtol=1e-4, atol=1e-5
    )
    assert sum((part.kernel >= 0).sum() for part in parts) == 2 * (BATCH + 2)


def test_what_it_refuses_and_skips() -> None:
    with pytest.raises(ValueError, match=r"evals\.x\.attack: ddn looks for the nearest point.*such as autoattack or pgd"):
        asked(5, attack="ddn", restarts=None).check("evals.x", (1, 6, 6))
    with pytest.raises(ValueError, match=r"evals\.x\.eps: 9 is out of range"):
        asked(5, eps=[9]).check("evals.x", (1, 6, 6))
    with pytest.raises(ValueError):
        asked(5, shown=-1)
    for model in (Ensemble([small(), small(1)], Mean()), with_noise(small(), "both", 0.1)):
        with pytest.raises(Skipped):
            asked(5).pieces(Subject(model, None, 0))


# Figures


def stored(store: Store, variant: str, depth: int = 5, seed: int = 0, shown: bool = True, **fields: Any) -> Record:
    """A record of a network whose layers move by 0.01 of their number under noise, 0.1 under an attack; one is a shortcut."""
    names = [f"body.{place}.{'shortcut.0' if place == 2 else 'conv1'}" for place in range(depth)]
    gen = np.random.default_rng(len(variant))
    tables, metrics = [], []
    for number, name in enumerate(names, start=1):
        own = pd.DataFrame({"id": range(40), "eps": 1.0, "clean_correct": True, "layer": number, "name": name, "size": 2.0})
        for who, factor in (("noise", 0.01), ("attack", 0.1)):
            own[who] = 2 * factor * number * gen.uniform(0.8, 1.2, 40)
            mean = factor * number
            facts: dict[str, Any] = {"source": who, "target": name, "denominator": "clean_correct", "unit": "ratio", "eps": 1.0}
            metrics.append(Metric(metric="activation_change", value=mean, n=40, lower=0.9 * mean, upper=1.1 * mean, **facts))
            keep = shown and number in (1, depth // 2 + 1, depth)
            files = [
                packed(gen.normal(0, factor, (8, 8)).astype(np.float16)) if keep and place < 4 else None for place in range(40)
            ]
            own[f"kernel_{who}"] = files
            own["kernel"] = [10 if keep and place < 4 else -1 for place in range(40)]
        tables.append(own)
    asks = {"kind": "activations", "attack": "pgd", "norm": "l2", "eps": [1.0], "images": 40, "shown": 4, **fields}
    one = record(
        defense={"name": "d", "variant": variant, "fields": {}},
        eval={"name": "activations", "fields": asks},
        metrics=metrics,
        seed=seed,
        hashes={"data": "cifar10 parquet"},
    )
    store.write_rows(one, pd.concat(tables, ignore_index=True))
    store.write(one)
    return one


def test_curves_hold_the_numbers_and_shortcuts_stand_beside_them(tmp_path: Path) -> None:
    store = Store(tmp_path)
    figure = plots.activations([stored(store, "nt", 3), stored(store, "kap", 5), stored(store, "kap", 5, seed=1)])
    assert figure is not None
    kap, nt = figure.axes
    assert [kap.get_title(), nt.get_title()] == ["kap", "nt"]
    noise, hollow, attack, _ = nt.get_lines()
    assert list(noise.get_xdata()) == [1, 2] and list(hollow.get_xdata()) == [3]
    assert np.allclose(noise.get_ydata(), [0.01, 0.02]) and np.allclose(attack.get_ydata(), [0.1, 0.2])
    assert noise.get_linestyle() == "--" and attack.get_linestyle() == "-" and hollow.get_markerfacecolor() == "white"
    assert len(nt.collections) == 2 and not kap.collections  # bands of one seed, none of a mean over two
    assert kap.get_ylim() == nt.get_ylim() and kap.get_ylim()[1] >= 0.5 and kap.get_yscale() == "log"
    FigureCanvasAgg(figure).draw()
    shown = " ".join(text.get_text().replace("\n", " ") for text in figure.findobj(Text))
    assert "hollow: convolutions in a shortcut" in shown and "pgd, l2, eps 1" in shown and "cifar10 parquet" in shown
    assert plots.activations([]) is None


def test_histograms_are_of_three_layers_of_every_defense_and_nothing_overlaps(tmp_path: Path) -> None:
    store = Store(tmp_path)
    names = [f"kap@architecture=cnn2_400,kernel={number},stride={number}" for number in range(1, 8)]
    records = [stored(store, name) for name in names] + [stored(store, "other", shown=False), stored(store, names[0], seed=1)]
    first, second = plots.histograms(records, store)
    assert len(first.axes) == 36 and len(second.axes) == 6
    titles = [axes.get_title() for axes in second.axes]
    assert titles[:3] == ["layer 1, kernel 10", "layer 3, kernel 10", "layer 5, kernel 10"]
    assert titles[3:] == ["layer 1, all kernels", "layer 3, all kernels", "layer 5, all kernels"]
    noise, attack = (second.axes[5].patches[place].get_path().vertices for place in (1, 3))
    assert noise[:, 0].max() <= attack[:, 0].max() and np.isclose(attack[:, 1].max(), noise[:, 1].max(), rtol=1.0)
    for figure in (first, second):
        FigureCanvasAgg(figure).draw()
        for text in figure.findobj(Text):
            if text.get_text() and text.get_visible():
                box = text.get_window_extent()
                inside = figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 - 1 <= box.y0
                assert inside and box.y1 <= figure.bbox.y1, text.get_text()
    words = " ".join(text.get_text().replace("\n", " ") for text in second.findobj(Text))
    assert "such images among the first 4" in words and "the outermost bars hold the rest" in words
    assert plots.histograms([stored(store, "other", shown=False)], store) == []


def test_ticks_are_round_and_few() -> None:
    assert round_numbers(0.01, 1.0) == pytest.approx([0.01, 0.1, 1.0])
    assert round_numbers(0.02, 0.12) == pytest.approx([0.03, 0.1])
    assert round_numbers(0.031, 0.052) == pytest.approx([0.04, 0.05])
    for low, high in ((1e-6, 10.0), (0.011, 0.9), (0.5, 0.6), (1.01, 1.02)):
        found = round_numbers(low, high)
        assert 1 <= len(found) <= 4 and all(low <= tick <= high for tick in found)


# A run


def test_a_run_stores_it_and_table_and_figures_show_it(tmp_path: Path) -> None:
    suite = tmp_path / "moves.toml"
    suite.write_text(
        'name = "moves"\nversion = 1\ndataset = "digits"\narchitecture = "cnn2_16"\n'
        "train_images = 300\nvalidation_images = 20\n"
        '[recipe]\nepochs = 5\nbatch = 32\noptimizer = "adam"\nlr = 0.01\n'
        '[evals.activations]\nkind = "activations"\nattack = "pgd"\nnorm = "l2"\neps = ["1.0"]\n'
        "steps = 5\nrestarts = 1\nimages = 20\n"
    )
    request = Request(
        defense="kap,nt,kap@inference_noise=both,noise=0.1", suite=str(suite), runs=tmp_path / "runs", device="cpu"
    )
    kap, nt, noisy = Run(request).execute()
    assert (kap.status, nt.status, noisy.status) == ("success", "success", "skipped"), kap.error
    assert "its variant with inference_noise=none can be asked" in str(noisy.error)
    assert Run(request).missing() == []
    store = Store(request.runs)
    rows = store.rows(kap)
    assert len(rows) == 40 and (rows.kernel >= 0).sum() == 16 and rows.layer.max() == 2
    values = {(m.target, m.source): m for m in kap.metrics}
    part = rows[(rows.layer == 2) & rows.clean_correct]
    assert values["body.3", "attack"].value == pytest.approx((part.attack / part["size"]).mean())
    assert values["body.3", "attack"].value > values["body.3", "noise"].value
    (table,) = tables.summaries(store)
    assert table.title == "moves, quick: activations under noise and attack"
    assert table.columns[2:-1] == [f"{end} layer, {who}, eps 1" for end in ("first", "last") for who in ("noise", "attack")]
    (line, _) = tables.body(table)
    assert line[5].startswith(f"{values['body.3', 'attack'].value:.3f} [")
    assert "not clipped" in table.caption and "pgd, l2, steps 5" in table.caption
    files = {path.name for path in plots.draw(store, "moves", tmp_path / "plots")}
    assert {"activations.png", "activation_histograms.pdf"} <= files
