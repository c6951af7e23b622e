"""Accuracy under noise: closed forms of one pixel, the images of `robust`, what repairs mean, and one run with all it shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from test_store import record
from torch import Tensor, nn

from attacks import Eot, Pgd, Streams
from attacks.streams import generator
from bench import plots, tables
from bench.columns import key
from bench.compare import Between, compare
from bench.evals import Robust, Skipped, Subject, UnderNoise
from bench.evals.noise import FEWEST
from bench.request import Request
from bench.runner import Run
from bench.store import Metric, Record, Store
from bench.suites import SuiteError, load_suite
from defenses.api import Classifier, Images, Wrapped
from defenses.combine import Mean
from defenses.ensemble import Ensemble
from defenses.kap import Kap
from defenses.kernels import KernelNetwork, with_noise
from defenses.nets import Network, Normalise

PLACES = ("none", "input", "activations", "both")


class Margin(nn.Module):
    """Logits (0, margin) of the only activation."""

    def __init__(self, margin: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, z: Tensor) -> Tensor:
        own = self.margin(z.flatten())
        return torch.stack([torch.zeros_like(own), own], 1)


def pixel(margin: Callable[[Tensor], Tensor], weight: float = 1.0) -> Network:
    """A network of one pixel, whose convolution passes it on times a weight."""
    conv = nn.Conv2d(1, 1, 1, bias=False)
    conv.weight.data.fill_(weight)
    return Network(Normalise([0.0], [1.0]), nn.Sequential(conv, Margin(margin)), "pixel").eval()


def small(seed: int = 0) -> Network:
    """Two convolutions with BatchNorm on images 1x6x6, five classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(
            nn.Conv2d(1, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 9, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
        )
    return Network(Normalise([0.5], [0.5]), body, "small").eval()


def images(n: int, value: float | None = None, label: int = 1, side: int = 6) -> Images:
    gen = generator(0, "noise images")
    pixels = torch.randint(0, 256, (n, 1, side, side), generator=gen, dtype=torch.uint8)
    if value is not None:
        pixels = torch.full((n, 1, 1, 1), round(255 * value), dtype=torch.uint8)
    return Images(pixels, torch.full((n,), label), 3 * torch.arange(n), "random")


def own_labels(net: Network, some: Images) -> Images:
    """The images with the labels that the network gives them, but for every fourth."""
    labels = net.predict(some.floats())
    labels[::4] = (labels[::4] + 1) % 5
    return Images(some.pixels, labels, some.ids, some.source)


def asked(n: int, **changes: Any) -> UnderNoise:
    fields = {"attack": "pgd", "norm": "l2", "eps": [0.2], "steps": 10, "restarts": 1, "sigma": 0.1, "images": n}
    return UnderNoise(**{**fields, **changes})


def stepping(n: int, eps: float, **changes: Any) -> UnderNoise:
    """With one step of length eps."""
    return asked(n, attack="fgsm", steps=None, restarts=None, eps=[eps], **changes)


def measured(net: Classifier, some: Images, evaluation: UnderNoise, seed: int = 0) -> pd.DataFrame:
    subject = Subject(net, None, seed)
    tables = [evaluation.measure([subject], some.take(p.rows), p)[0] for p in evaluation.pieces(subject)]
    return pd.concat(tables, ignore_index=True)


def number(metrics: list[Metric], name: str, place: str, source: str | None, denominator: str = "all") -> Metric:
    (found,) = [m for m in metrics if (m.metric, m.target, m.source, m.denominator) == (name, place, source, denominator)]
    return found


# Closed forms


def test_single_draws_of_a_pixel_are_a_normal_distribution_and_the_mean_prediction_is_its_side() -> None:
    """Class 1 beyond 1/2. Noise on the pixel or behind the convolution moves it by sigma, both by sqrt(2) sigma."""
    net, some = pixel(lambda z: 50 * (z - 0.5)), images(8, 0.6)
    evaluation = stepping(8, 0.2, repeats=250)
    metrics = evaluation.summarise(measured(net, some, evaluation), Subject(net, None, 0)).metrics
    for source, x in ((None, 0.6), ("none", 0.4)):
        side = 1.0 if x > 0.5 else 0.0
        assert number(metrics, "noisy_accuracy", "none", source).value == side
        for place, sigma in (("input", 0.1), ("activations", 0.1), ("both", 0.1 * math.sqrt(2))):
            expected = norm.cdf((x - 0.5) / sigma)
            single = number(metrics, "noisy_accuracy_single", place, source)
            assert single.value == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 2000))
            assert single.n == 8 and single.draws == 1 and single.lower is not None and single.lower <= single.value
            spread = number(metrics, "noisy_accuracy_single_deviation", place, source)
            assert spread.value == pytest.approx(math.sqrt(expected * (1 - expected) / 8), rel=0.2) and spread.n == 250
            judged = number(metrics, "noisy_accuracy", place, source)
            assert judged.value == side and judged.draws == 100 and judged.n == 8


def test_next_to_no_noise_changes_nothing() -> None:
    net = small()
    some = own_labels(net, images(12))
    rows = measured(net, some, asked(12, steps=3, sigma=1e-9))
    for (eps, made), part in rows.groupby(["eps", "made"]):
        quiet = part[part.place == "none"].correct.to_numpy()
        assert 0 < quiet.mean() < 1 or made == "attacked"
        for place in PLACES:
            noisy = part[part.place == place]
            assert (noisy.correct.to_numpy() == quiet).all(), (eps, made, place)
            assert (noisy[[f"single_{draw}" for draw in range(10)]].to_numpy() == quiet[:, None]).all()


def test_a_constant_classifier_is_right_whatever_the_noise() -> None:
    net = pixel(lambda z: 1.0 + 0 * z)
    evaluation = asked(3, eot=1, steps=1)
    outcome = evaluation.summarise(measured(net, images(3, 0.4), evaluation), Subject(net, None, 0))
    assert {m.value for m in outcome.metrics if "deviation" not in m.metric} == {1.0}
    assert {m.value for m in outcome.metrics if "deviation" in m.metric} == {0.0}
    never = evaluation.summarise(measured(net, images(3, 0.4, label=0), evaluation), Subject(net, None, 0))
    assert {m.value for m in never.metrics} == {0.0} and not never.findings
    assert not [m for m in never.metrics if m.denominator == "clean_correct"]  # nothing to condition on


def shell(z: Tensor) -> Tensor:
    """Class 1 everywhere but in a thin shell around 0.46."""
    return 100 * ((z - 0.46).abs() - 0.01)


def test_noise_repairs_what_lies_on_a_thin_shell_and_the_finding_says_what_that_is_worth() -> None:
    net, some = pixel(shell), images(FEWEST + 4, 0.6)
    some.labels[:4] = 0  # wrong as they are: the attack did not break them
    evaluation = stepping(FEWEST + 4, 0.14)
    rows = measured(net, some, evaluation)
    assert (rows[rows.made == "attacked"].broken).all()
    outcome = evaluation.summarise(rows, Subject(net, None, 0))
    values = [number(outcome.metrics, "noisy_accuracy", place, "none").value for place in PLACES]
    assert values == [0.0, *[10 / 14] * 3]
    (found,) = outcome.findings
    assert found.kind == "noise_repairs" and "10 (input), 10 (activations), 10 (both) of 10 adversarial" in found.detail
    assert found.detail.endswith("that says nothing about an attacker who knows of the noise (eot)")
    through = evaluation.model_copy(update={"eot": 1})
    (found,) = through.summarise(measured(net, some, through), Subject(net, None, 0)).findings
    assert found.detail.endswith(
        "10 (input), 10 (activations), 10 (both) of 14 images stand when the attack knows of the noise"
    )
    assert found.evidence["repaired"] == found.evidence["stand_attacked_through_noise"] == dict.fromkeys(PLACES[1:], 10)
    few = stepping(FEWEST - 1, 0.14)
    assert not few.summarise(measured(net, images(FEWEST - 1, 0.6), few), Subject(net, None, 0)).findings


def test_no_repairs_no_finding() -> None:
    net, evaluation = pixel(lambda z: 50 * (z - 0.5)), stepping(FEWEST, 0.2)
    assert not evaluation.summarise(measured(net, images(FEWEST, 0.6), evaluation), Subject(net, None, 0)).findings


# Whose images, whose noise


def test_attacked_images_are_those_of_robust() -> None:
    net = small()
    some = own_labels(net, images(20))
    robust = Robust(attack="pgd", norm="l2", eps=[0.2], steps=10, restarts=1, images=20)
    subject = Subject(net, None, 5)
    (piece,) = robust.pieces(subject)
    (expected,) = robust.measure([subject], some, piece)
    rows = measured(net, some, asked(20), seed=5)
    found = rows[(rows.made == "attacked") & (rows.place == "none")].reset_index(drop=True)
    for name in ("id", "label", "clean_correct", "broken", "distance"):
        assert (found[name] == expected[name]).all(), name
    assert (found.correct == ~expected.broken).all()


def test_eot_is_the_attack_on_the_noisy_network() -> None:
    net = small()
    some = own_labels(net, images(8))
    rows = measured(net, some, asked(8, steps=4, eot=3, places=["none", "activations"]))
    through = rows[rows.made == "eot"]
    assert set(through.place) == {"activations"} and len(through) == 8
    streams = Streams(0, "pgd", "l2", ids=some.ids).child("eot", "activations")
    attack = Eot(Pgd(norm="l2", eps=0.2, steps=4, restarts=1), 3)
    expected = attack(with_noise(net, "activations", 0.1), some.floats(), some.labels, streams)
    assert through.broken.tolist() == expected.broken.tolist() and (through.correct == ~through.broken).all()
    assert np.allclose(through.distance, expected.distance)
    assert not measured(net, some, asked(8)).made.eq("eot").any()


def test_eot_meets_the_noise_of_its_place() -> None:
    """Behind a convolution of weight 0.1 noise of 0.1 is as loud as the pixel; on the image it is a tenth of it."""
    net, some = pixel(lambda z: 500 * (z - 0.05), weight=0.1), images(20, 0.6)
    evaluation = stepping(20, 0.05, eot=2)
    through = measured(net, some, evaluation).query("made == 'eot'").groupby("place").correct.mean()
    assert through["input"] == 1.0 and through["activations"] < 1.0 and through["both"] < 1.0


def test_an_image_that_noise_spoils_before_the_attack_does_not_come_back() -> None:
    """On the boundary every verdict is a coin; what was wrong at the first stays wrong at the second."""
    net, some = pixel(lambda z: 50 * (z - 128 / 255)), images(40, 128 / 255)
    through = measured(net, some, stepping(40, 1e-6, eot=1, places=["input"])).query("made == 'eot'")
    assert not through.correct[~through.clean_correct].any() and 0 < through.clean_correct.sum() < 40
    assert (through.correct == ~through.broken).all()


def test_rows_know_neither_pieces_nor_order() -> None:
    net, evaluation = small(), asked(9, eot=2, repeats=2, places=["none", "both"])
    some = own_labels(net, images(9))
    subject, columns = Subject(net, None, 0), ["made", "place", "id"]
    for piece in evaluation.pieces(subject):
        whole = evaluation.measure([subject], some, piece)[0].set_index(columns).sort_index()
        order = torch.randperm(9, generator=generator(3))
        parts = [evaluation.measure([subject], some.take(part), piece)[0] for part in order.split(5)]
        pd.testing.assert_frame_equal(whole, pd.concat(parts).set_index(columns).sort_index(), atol=1e-5)


def test_pieces_are_clean_images_then_every_eps() -> None:
    evaluation = asked(150, eps=[0.1, 0.2])
    pieces = evaluation.pieces(Subject(small(), None, 0))
    assert [piece.setting["eps"] for piece in pieces] == [0, 0, 0.1, 0.1, 0.2, 0.2]
    assert [piece.rows for piece in pieces[:2]] == [slice(0, 100), slice(100, 150)]


def test_networks_with_pools_are_judged_behind_them() -> None:
    net = KernelNetwork(small(), Kap(noise=0.5).kernels()).eval()
    some = own_labels(net, images(10))
    rows = measured(net, some, asked(10, sigma=1e-9))
    assert (rows[(rows.made == "clean") & (rows.place == "both")].correct.to_numpy() == [bool(i % 4) for i in range(10)]).all()


# Rows to numbers


def by_hand() -> pd.DataFrame:
    """Four images at one place: three right as they are, of which the attack breaks two; noise repairs one."""
    common = {"id": range(4), "label": 0, "clean_correct": [True, True, True, False], "place": "both"}
    clean = pd.DataFrame({**common, "eps": 0.0, "made": "clean", "broken": [False, False, False, True]})
    hit = pd.DataFrame({**common, "eps": 0.2, "made": "attacked", "broken": [True, True, False, True]})
    clean[["correct", "single_0", "single_1"]] = [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
    hit[["correct", "single_0", "single_1"]] = [[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]]
    both = pd.concat([clean, hit], ignore_index=True)
    return both.astype({name: bool for name in ("correct", "single_0", "single_1")})


def test_rows_become_numbers() -> None:
    evaluation = asked(4, places=["both"], repeats=2)
    metrics = evaluation.summarise(by_hand(), Subject(small(), None, 0)).metrics
    shown = [(m.metric, m.source, m.denominator, m.eps, m.value, m.n) for m in metrics]
    spread = [math.sqrt(0.5) * abs(a - b) for a, b in ((3 / 4, 2 / 4), (3 / 4, 1 / 4))]
    assert shown == [
        ("noisy_accuracy", None, "all", None, 1.0, 4),
        ("noisy_accuracy_single", None, "all", None, 0.625, 4),
        ("noisy_accuracy_single_deviation", None, "all", None, pytest.approx(spread[0]), 2),
        ("noisy_accuracy", "none", "all", 0.2, 0.5, 4),
        ("noisy_accuracy", "none", "clean_correct", 0.2, pytest.approx(2 / 3), 3),
        ("noisy_accuracy_single", "none", "all", 0.2, 0.5, 4),
        ("noisy_accuracy_single_deviation", "none", "all", 0.2, pytest.approx(spread[1]), 2),
    ]
    wilson = metrics[3]
    assert (wilson.lower, wilson.upper) == (pytest.approx(0.15, abs=0.01), pytest.approx(0.85, abs=0.01))
    one = record(eval={"name": "noise", "fields": {"kind": "noise", "places": ["both"]}}, metrics=metrics)
    columns = [key(one, metric)[2:] for metric in metrics if key(one, metric)]
    assert columns == [("clean, both", -1.0), ("attacked, both, eps", 0.2), ("one draw, both, eps", 0.2)]


# What it refuses


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"places": ["none", "act"]}, r"evals\.x\.places: unknown 'act'; known are none, input, activations, both"),
        ({"places": ["both", "both"]}, r"evals\.x\.places: each only once, got both, both"),
        ({"attack": "fmn", "norm": "l2", "restarts": None}, r"evals\.x\.attack: fmn looks for the nearest point"),
        ({"attack": "pdg"}, r"evals\.x\.attack: unknown 'pdg'"),
        ({"proposals": 3}, r"evals\.x\.proposals: pgd has no such setting"),
    ],
)
def test_wrong_values_name_their_key(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        asked(5, **changes).check("evals.x", (1, 6, 6))


@pytest.mark.parametrize(
    "changes", [{"sigma": 0}, {"sigma": "-1/255"}, {"repeats": 1}, {"eot": -1}, {"places": []}, {"what": 1}]
)
def test_wrong_values_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        asked(5, **changes)


def test_a_suite_explains_a_missing_sigma(tiny: Path) -> None:
    tiny.write_text(tiny.read_text() + '[evals.noise]\nkind = "noise"\nattack = "pgd"\nnorm = "l2"\neps = ["1"]\nimages = 3\n')
    with pytest.raises(SuiteError, match=r"evals\.noise\.sigma: Field required"):
        load_suite(tiny)


def test_what_is_no_quiet_network_is_skipped() -> None:
    evaluation = asked(5)
    models: list[tuple[Classifier, str]] = [
        (Ensemble([small(), small(1)], Mean()), "of one network, the defense has 2"),
        (Wrapped(nn.Sequential(nn.Flatten(), nn.Linear(36, 5))), "not into a Wrapped"),
        (Network(Normalise([0.0], [1.0]), nn.Sequential(nn.Flatten(), nn.Linear(36, 5)), "mlp"), "mlp has no convolution"),
        (with_noise(small(), "both", 0.1), "draws noise of its own in evaluation"),
    ]
    for model, text in models:
        with pytest.raises(Skipped, match=text):
            evaluation.pieces(Subject(model, None, 0))


# A run, and what it shows

EVALS = """
[evals.noise]
kind = "noise"
attack = "autoattack"
norm = "l2"
eps = ["0.5", "1.0"]
steps = 2
proposals = 10
sigma = 0.1
repeats = 3
eot = 2
places = ["none", "both"]
images = 5
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Request, list[Record]]:
    folder = tmp_path_factory.mktemp("noise")
    suite = folder / "noisy.toml"
    suite.write_text(
        'name = "noisy"\nversion = 1\ndataset = "digits"\narchitecture = "cnn2_16"\n'
        "train_images = 320\nvalidation_images = 20\n"
        '[recipe]\nepochs = 6\nbatch = 32\noptimizer = "adam"\nlr = 0.01\n' + EVALS
    )
    request = Request(defense="kap@noise=0.1,nt", suite=str(suite), runs=folder / "runs", device="cpu")
    return request, Run(request).execute()


def test_a_run_stores_it_and_a_table_shows_it(ran: tuple[Request, list[Record]]) -> None:
    request, (kap, nt) = ran
    assert (kap.status, nt.status) == ("success", "success"), (kap.error, nt.error)
    fields = kap.eval["fields"]
    assert (fields["sigma"], fields["eot"], fields["places"], fields["version"]) == (0.1, 2, ["none", "both"], "standard")
    assert Run(request).missing() == []
    rows = Store(request.runs).rows(kap)
    assert len(rows) == 5 * (2 + 2 * (2 + 1))
    assert number(kap.metrics, "noisy_accuracy", "none", None).value > 0.3
    (table,) = tables.summaries(Store(request.runs))
    assert table.title == "noisy, quick: accuracy under noise"
    groups = ["attacked, none", "attacked, both", "one draw, both", "EOT, both"]
    heads = ["clean, none", "clean, both", *(f"{group}, eps {eps}" for group in groups for eps in ("0.5", "1"))]
    assert table.columns[2:-1] == heads
    assert [line[0] for line in tables.body(table)] == ["kap@noise=0.1", "nt"]
    facts = ("sigma = 0.1, autoattack, l2, version standard, steps 2", "EOT with 2 draws", "says nothing about an attacker")
    assert all(fact in table.caption for fact in facts)
    frame = Store(request.runs).frame()
    assert set(frame[frame.metric == "noisy_accuracy"].sigma) == {0.1}
    found = compare(Store(request.runs), Between("kap@noise=0.1", "nt", "noisy"))
    assert {row.number for row in found} >= {"accuracy clean, noise: both", "accuracy eot at eps 1, noise: both"}


def test_a_run_goes_on_where_it_was_stopped(ran: tuple[Request, list[Record]], tmp_path: Path) -> None:
    request, (kap, _) = ran

    again = Run(Request(**{**vars(request), "runs": tmp_path / "runs", "defense": "kap@noise=0.1"}))
    store, wanted = again.store, again.jobs[0]
    partial = store.partial(wanted.blank)
    kept: list[int] = []
    original = type(partial).keep

    def keep(self: Any, number: int, rows: pd.DataFrame) -> None:
        original(self, number, rows)
        kept.append(number)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(partial), "keep", keep)
        with pytest.raises(KeyboardInterrupt):
            again.execute()
    (found,) = Run(again.request).execute()
    assert kept == [0, 1] and found.metrics == kap.metrics
    pd.testing.assert_frame_equal(store.rows(found), Store(request.runs).rows(kap))


def test_the_figure_holds_the_numbers_and_says_what_they_are_worth(ran: tuple[Request, list[Record]], tmp_path: Path) -> None:
    request, (kap, nt) = ran
    figure = plots.noise([nt, kap])
    assert figure is not None
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert len(titles) == 4  # two defenses at two eps
    assert titles[0].startswith("kap@noise=0.1") and titles[1].endswith("= 1") and titles[2].startswith("nt")
    first = figure.axes[1]
    assert [label.get_text() for label in first.get_xticklabels()] == ["none", "both"]
    drawn = {(str(line.get_label()), round(line.get_xdata()[0])): line.get_ydata()[0] for line in first.get_lines()}  # type: ignore[index]
    at = [m for m in kap.metrics if m.eps == 1.0]
    assert drawn["images as they are", 1] == 100 * number(kap.metrics, "noisy_accuracy", "both", None).value
    assert drawn["adversarial images made without noise", 1] == 100 * number(at, "noisy_accuracy", "both", "none").value
    assert drawn["attacked through the noise (EOT)", 1] == 100 * number(at, "noisy_accuracy", "both", "both").value
    once = "the same, one draw (bar: deviation over draws)"
    assert drawn[once, 1] == pytest.approx(100 * number(at, "noisy_accuracy_single", "both", "none").value)
    assert (once, 0) not in drawn and ("attacked through the noise (EOT)", 0) not in drawn
    words = " ".join(text.get_text().replace("\n", " ") for text in figure.findobj(match=lambda own: hasattr(own, "get_text")))
    assert "says nothing about an attacker who knows of it" in words and "EOT with 2 draws a gradient" in words
    assert plots.noise([kap.model_copy(update={"metrics": []})]) is None
    several = plots.noise([kap, kap.model_copy(update={"seed": 1})])
    assert several is not None and len(several.axes) == 2 and not several.axes[0].collections  # no bars of one seed
    files = plots.draw(Store(request.runs), "noisy", tmp_path / "plots")
    assert {"noise.png", "noise.pdf"} <= {path.name for path in files}
