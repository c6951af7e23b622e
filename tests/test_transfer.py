"""Transfer between members: the numeric checks of methods 9.4 and 9.5, closed forms, independence of pieces and order."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from test_diversity import Noisy, nets
from test_diversity import images as random_images
from test_store import record
from torch import Tensor, nn

from attacks.streams import generator
from bench import plots, tables
from bench.evals import Robust, Skipped, Subject, Transfer
from bench.evals.transfer import ENSEMBLE, SUMMED
from bench.request import Request
from bench.runner import Run
from bench.store import Metric, Record, Store
from bench.suites import SuiteError, load_suite
from defenses.api import Classifier, Images
from defenses.combine import Mean
from defenses.ensemble import Ensemble

BIM = Transfer(attack="bim", norm="linf", eps=(0.02, 0.04), images=40)
PGD = Transfer(attack="pgd", norm="linf", eps=(0.04,), steps=4, restarts=2, images=40)
THREE = ["0", "1", "2", ENSEMBLE]


def made_up(correct: np.ndarray, wrong: dict[tuple[str, str], Any], eps: float = 0.1) -> pd.DataFrame:
    """Rows of three members that are right on images as ``correct`` (n 4) says, the ensemble last; ``wrong`` where told."""
    n = len(correct)
    columns = {f"correct_{name}": correct[:, place].astype(bool) for place, name in enumerate(THREE)}
    columns |= {f"wrong_{i}_{j}": np.broadcast_to(np.array(wrong.get((i, j), 0), bool), n) for i in THREE for j in THREE}
    return pd.DataFrame({"id": np.arange(n), "label": 0, "eps": eps, **columns})


def numbers_of(rows: pd.DataFrame) -> list[Metric]:
    evaluation = Transfer(attack="fgsm", norm="linf", eps=tuple(rows.eps.unique()), images=rows.id.nunique())
    return evaluation.summarise(rows, Subject(nets(3), None, 0)).metrics


def rate(numbers: list[Metric], source: str, target: str, eps: float = 0.1) -> dict[str | None, float]:
    """Transfer rates by denominator."""
    found = [m for m in numbers if m.metric == "transfer_rate" and (m.source, m.target, m.eps) == (source, target, eps)]
    return {m.denominator: m.value for m in found}


def named(numbers: list[Metric], eps: float | None = 0.1) -> dict[str, Metric]:
    """The averages at one eps, and those of none."""
    return {m.metric: m for m in numbers if m.metric != "transfer_rate" and m.eps in (eps, None)}


def test_each_denominator_counts_other_images() -> None:
    """Methods 9.4: all members are right about three of five images; crafted on the first, two of them fool the second."""
    # What the ensemble makes of it, here of the third image, does not matter.
    correct = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    wrong = {("0", "0"): [1, 1, 0, 1, 1], ("0", "1"): [1, 0, 1, 1, 0], ("1", "0"): [0, 0, 0, 1, 0]}
    numbers = numbers_of(made_up(correct, wrong))
    forth, back = rate(numbers, "0", "1"), rate(numbers, "1", "0")
    assert forth == {
        "all": pytest.approx(3 / 5),
        "source_correct": pytest.approx(2 / 4),  # the first is wrong on the fourth image
        "all_correct": pytest.approx(0.666667, abs=1e-6),
        "successful_at_source": pytest.approx(1 / 3),  # of images 0, 1 and 4
    }
    assert back == {"all": 1 / 5, "source_correct": 1 / 5, "all_correct": 0}, "nothing breaks the second: a hole, not 0"
    one = next(m for m in numbers if (m.source, m.target, m.denominator) == ("0", "1", "all_correct"))
    assert one.n == 3 and one.lower is not None and one.upper is not None and one.lower < one.value < one.upper
    assert set(rate(numbers, "0", ENSEMBLE)) == set(forth) and rate(numbers, ENSEMBLE, "2")["all"] == 0


def first(share: float, of: int = 100) -> np.ndarray:
    """True for the first images of a hundred, then False for a hundred."""
    return np.concatenate([np.arange(of) < round(share * of), np.zeros(of, bool)])


def test_averages_are_those_of_the_methods() -> None:
    """Methods 9.5 on a hundred images that all are right about, and a hundred more on which the third errs, attacked or not."""
    accuracy = [[0.05, 0.60, 0.70], [0.55, 0.10, 0.65], [0.75, 0.70, 0.02]]
    late = np.arange(200) >= 100
    wrong: dict[tuple[str, str], Any] = {
        (str(i), str(j)): first(1 - accuracy[i][j]) | (late & (j == 2)) for i in range(3) for j in range(3)
    }
    # The ensemble is wrong about the late ones as they are; they count in no success rate.
    wrong |= {(str(i), ENSEMBLE): first(0.2 + 0.2 * i) | late for i in range(3)} | {(ENSEMBLE, ENSEMBLE): first(0.9) | late}
    correct = np.ones((200, 4))
    correct[100:, 2:] = 0
    found = named(numbers_of(made_up(correct, wrong)))
    assert found["tsr"].value == pytest.approx(68.3333, abs=1e-4) and found["tsr"].unit == SUMMED
    assert found["tsr_normalised"].value == pytest.approx(0.341667, abs=1e-6)
    assert found["tsr_normalised"].unit == "fraction" and found["tsr"].n == found["tsr_normalised"].n == 100
    # A late image is wrong for the third whoever it is crafted on: by one of two others, for two sources of three.
    assert found["tsr_all"].value == pytest.approx((68.3333 + 200 / 3) / 2, abs=1e-3) and found["tsr_all"].n == 200
    assert found["tsr_floor"].value == pytest.approx(200 / 6) and found["tsr_floor"].eps is None
    assert found["asr_members"].value == pytest.approx(0.4) and found["asr_ensemble"].value == pytest.approx(0.9)
    assert found["asr_members"].n == found["asr_ensemble"].n == 100
    for metric in found.values():
        assert metric.lower is not None and metric.upper is not None and metric.lower < metric.value < metric.upper


def test_intervals_are_those_of_resampled_images() -> None:
    gen = np.random.default_rng(1)
    wrong = {(i, j): gen.random(400) < 0.3 for i in THREE for j in THREE}
    found = named(numbers_of(made_up(np.ones((400, 4)), wrong)))
    each = np.mean([wrong[i, j] for i in "012" for j in "012" if i != j], axis=0)
    low, high = np.quantile(gen.choice(each, (4000, 400)).mean(1), [0.025, 0.975])
    assert found["tsr_normalised"].lower == pytest.approx(low, abs=0.004)
    assert found["tsr_normalised"].upper == pytest.approx(high, abs=0.004)
    assert found["tsr"].lower == pytest.approx(200 * found["tsr_normalised"].lower)


def test_an_empty_denominator_is_a_hole() -> None:
    nobody = np.zeros((4, 4))
    nobody[:, 0] = 1
    numbers = numbers_of(made_up(nobody, {("0", "0"): 1}))
    assert set(named(numbers)) == {"tsr_all", "tsr_floor"}
    assert set(rate(numbers, "0", "1")) == {"all", "source_correct", "successful_at_source"}
    assert set(rate(numbers, "1", "0")) == {"all"}


class Line(Classifier):
    """Class 1 where w x > b, of images (n 1 1 2)."""

    def __init__(self, w: tuple[float, float], b: float) -> None:
        super().__init__()
        self.w, self.b = torch.tensor(w, dtype=torch.float32), b

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w - self.b
        return torch.stack([torch.zeros_like(score), score], 1)


def of_lines(evaluation: Transfer, members: list[Classifier], pixels: tuple[int, int], label: int = 1) -> pd.Series:
    """The row of one image of two pixels."""
    one = Images(torch.tensor(pixels, dtype=torch.uint8).view(1, 1, 1, 2), torch.tensor([label]), torch.tensor([3]), "one")
    subject = Subject(Ensemble(members, Mean()).eval(), None, 0)
    return evaluation.measure([subject], one, evaluation.pieces(subject)[0])[0].iloc[0]


def test_rows_are_sources_and_columns_targets() -> None:
    """The first looks at one pixel, the second at both: what fools the second fools the first, not the other way round."""
    members: list[Classifier] = [Line((1, 0), 0.5), Line((1, 1), 1.0)]
    row = of_lines(Transfer(attack="fgsm", norm="linf", eps=(0.12,), images=1), members, (153, 140))  # (0.6, 0.549)
    assert row.correct_0 and row.correct_1 and row.correct_ensemble
    # Crafted on the first, (0.48, 0.549): 0.02 below its threshold, 0.029 above the second's.
    assert (row.wrong_0_0, row.wrong_0_1, row.wrong_0_ensemble) == (True, False, False)
    # Crafted on the second, or on both, (0.48, 0.429).
    assert (row.wrong_1_0, row.wrong_1_1, row.wrong_1_ensemble) == (True, True, True)
    assert (row.wrong_ensemble_0, row.wrong_ensemble_1, row.wrong_ensemble_ensemble) == (True, True, True)
    assert (row.id, row.label, row.eps) == (3, 1, 0.12)


def test_a_search_goes_on_beyond_its_source_unless_told_to_stop() -> None:
    """Steps of 0.02 from 0.6: the first is wrong below 0.51, the second below 0.45, and 0.4 is in reach."""
    members: list[Classifier] = [Line((1, 0), 0.51), Line((1, 0), 0.45)]
    bim = Transfer(attack="bim", norm="linf", eps=(0.2,), images=1)
    row = of_lines(bim, members, (153, 0))
    assert (row.wrong_0_0, row.wrong_0_1) == (True, True)
    row = of_lines(bim.model_copy(update={"early_stop": True}), members, (153, 0))
    assert (row.wrong_0_0, row.wrong_0_1, row.wrong_1_0) == (True, False, True)
    row = of_lines(bim, [Line((1, 0), 0.3), Line((1, 0), 0.45)], (153, 0))
    assert (row.wrong_0_0, row.wrong_0_1) == (False, True), "what does not fool its source is judged all the same"


class Bump(Classifier):
    """Along s = (0.6 - x) / 0.2 the loss of class 0 rises; it loses to one class for 0.375 < s < 0.954, and then to none."""

    def forward(self, x: Tensor) -> Tensor:
        s = (0.6 - x.flatten(1)[:, 0]) / 0.2
        second = torch.where(s < 0.5, 0.8 * s - 0.3, 0.1 - 0.22 * (s - 0.5))
        third = 2.98 * s - 2.99
        return torch.stack([torch.zeros_like(s), second, third, third], 1)


class Below(Classifier):
    """Class 0 of four where the first pixel is above 0.43."""

    def forward(self, x: Tensor) -> Tensor:
        score = 10 * (x.flatten(1)[:, 0] - 0.43)
        return torch.stack([score, *[torch.zeros_like(score)] * 3], 1)


def test_a_point_that_fools_the_source_goes_before_one_of_higher_loss() -> None:
    """Of the points that fool it the one of the highest loss: s = 0.9, pixel 0.42, where the second is wrong, too."""
    bim = Transfer(attack="bim", norm="linf", eps=(0.2,), images=1)
    row = of_lines(bim, [Bump(), Below()], (153, 0), label=0)
    assert row.correct_0 and (row.wrong_0_0, row.wrong_0_1) == (True, True)
    row = of_lines(bim.model_copy(update={"early_stop": True}), [Bump(), Below()], (153, 0), label=0)
    assert (row.wrong_0_0, row.wrong_0_1) == (True, False)


def test_an_image_that_its_source_gets_wrong_stays_as_it_is() -> None:
    members: list[Classifier] = [Line((1, 0), 0.7), Line((1, 0), 0.5)]
    row = of_lines(Transfer(attack="fgsm", norm="linf", eps=(0.2,), images=1), members, (153, 0))
    assert (row.correct_0, row.correct_1) == (False, True)
    assert (row.wrong_0_0, row.wrong_0_1, row.wrong_1_1) == (True, False, True)


class Sees(Classifier):
    """Logits W (x - 1/2) of images (n 1 6 6)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T


TRUTH = torch.randn(5, 36, generator=generator(1, "truth"))


def kin(members: int = 3) -> Ensemble:
    """Members that come near to the same truth, as trained ones do."""
    gen = generator(1, "members")
    return Ensemble([Sees(TRUTH + 0.4 * torch.randn(5, 36, generator=gen)) for _ in range(members)], Mean()).eval()


def seen(n: int = 40) -> Images:
    """Images of which :func:`kin` get most right."""
    some = random_images(n)
    return replace(some, labels=Sees(TRUTH).predict(some.floats()))


def rows_of(evaluation: Transfer | Robust, model: Classifier, some: Images, **changes: Any) -> pd.DataFrame:
    """All rows of a model, piece by piece."""
    subject = Subject(model, None, 0, **changes)
    pieces = evaluation.pieces(subject)
    return pd.concat([evaluation.measure([subject], some.take(piece.rows), piece)[0] for piece in pieces], ignore_index=True)


@pytest.mark.parametrize("stops", [True, False])
def test_the_diagonal_is_a_robust_run_of_that_network_alone(stops: bool) -> None:
    """Streams of the two differ by their purpose, so the attack starts at the image and draws nothing."""
    model, some = kin(), seen()
    found = rows_of(BIM.model_copy(update={"early_stop": stops}), model, some)
    alone = Robust(attack="bim", norm="linf", eps=BIM.eps, images=40)
    for name, network in {**dict(zip("012", model.members)), ENSEMBLE: model}.items():
        expected = rows_of(alone, network, some)
        pd.testing.assert_frame_equal(found[["id", "label", "eps"]], expected[["id", "label", "eps"]])
        assert (found[f"correct_{name}"] == expected.clean_correct).all()
        assert (found[f"wrong_{name}_{name}"] == expected.broken).all()
        assert 0 < expected.broken[expected.clean_correct].mean() < 1, "all or nothing would prove nothing"


def test_steps_beyond_break_the_same_images_and_fool_more_targets() -> None:
    model, some = kin(), seen()
    on, stopped = rows_of(PGD, model, some), rows_of(PGD.model_copy(update={"early_stop": True}), model, some)
    for name in THREE:
        assert (on[f"wrong_{name}_{name}"] == stopped[f"wrong_{name}_{name}"]).all()
    between = [f"wrong_{i}_{j}" for i in "012" for j in "012" if i != j]
    assert on[between].to_numpy().mean() > stopped[between].to_numpy().mean() + 0.02


def test_rows_know_neither_pieces_nor_order() -> None:
    model, some = kin(), seen()
    whole = rows_of(PGD, model, some).set_index("id")
    order = torch.randperm(len(some), generator=generator(5))
    mixed = rows_of(PGD, model, some.take(order)).set_index("id").loc[whole.index]
    parts = [rows_of(PGD, model, some.take(slice(start, start + 7))) for start in range(0, 40, 7)]
    pd.testing.assert_frame_equal(whole, mixed)
    pd.testing.assert_frame_equal(whole, pd.concat(parts).set_index("id"))


def test_sources_draw_numbers_of_their_own_and_seeds_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from attacks import gradient

    starts: list[Tensor] = []
    original = gradient.STARTS["random"]

    def watched(*given: Any) -> Tensor:
        starts.append(original(*given) - given[1])
        return starts[-1] + given[1]

    monkeypatch.setitem(gradient.STARTS, "random", watched)
    twins = Ensemble([kin().members[0]] * 2, Mean()).eval()
    some = replace(seen(1), labels=twins.predict(seen(1).floats()))
    once = PGD.model_copy(update={"images": 1})
    for seed in (0, 1):
        subject = Subject(twins, None, seed)
        once.measure([subject], some, once.pieces(subject)[0])
    assert len(starts) == 12, "two seeds, three sources, two restarts"
    assert all(not torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])


def test_a_cascade_keeps_the_work_on_each_source_apart(tmp_path: Path) -> None:
    cascade = Transfer(attack="autoattack", norm="linf", eps=(0.05,), steps=2, proposals=5, images=8)
    found = rows_of(cascade, kin(), seen(8), scratch=tmp_path / "work")
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == THREE
    pd.testing.assert_frame_equal(found, rows_of(cascade, kin(), seen(8)))
    assert "early_stop" not in cascade.resolved(Subject(nets(), None, 0))


def test_what_has_no_transfer_is_skipped() -> None:
    with pytest.raises(Skipped, match="two members or more, this is one network"):
        BIM.pieces(Subject(nets(1).members[0], None, 0))
    with pytest.raises(Skipped, match="two members or more"):
        BIM.pieces(Subject(nets(1), None, 0))
    with pytest.raises(Skipped, match="draw noise"):
        BIM.pieces(Subject(Ensemble([*nets(1).members, Noisy()], Mean()), None, 0))


SUITE = """
extends = "digits"
name = "moves"
version = 1
[evals.transfer]
kind = "transfer"
attack = "pgd"
norm = "linf"
eps = ["0.05", "0.1", "0.2"]
steps = 20
step = "eps/5"
restarts = 2
images = 397
[budget.smoke]
"recipe.epochs" = 4
"evals.transfer.images" = 30
"evals.transfer.steps" = 4
"evals.transfer.restarts" = 1
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "moves.toml"
    path.write_text(SUITE)
    return path


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('attack = "pgd"', 'attack = "pdg"', r"evals\.transfer\.attack: unknown 'pdg'; known are autoattack"),
        ('norm = "linf"', 'norm = "l3"', r"evals\.transfer\.norm: unknown 'l3'; known are linf, l2"),
        ('"0.2"', '"1.2"', r"evals\.transfer\.eps: 1\.2 is out of range; in linf 0 < eps <= 1"),
        ("steps = 20", "steps = 20\ntargets = 9", r"evals\.transfer\.targets: pgd has no such setting"),
        ("steps = 20", "steps = 20\nnoise = 0.1", r"evals\.transfer\.noise: unknown key"),
        ('step = "eps/5"', 'step = "eps/7"', "unknown step 'eps/7'"),
        ('eps = ["0.05", "0.1", "0.2"]', "eps = []", r"evals\.transfer\.eps: .*at least 1 item"),
        (
            'attack = "pgd"\nnorm = "linf"\neps = ["0.05", "0.1", "0.2"]\nsteps = 20\nstep = "eps/5"\nrestarts = 2',
            'attack = "fmn"\nnorm = "linf"\neps = ["0.1"]',
            r"evals\.transfer\.attack: fmn looks for the nearest point.*such as pgd",
        ),
        (
            'attack = "pgd"\nnorm = "linf"\neps = ["0.05", "0.1", "0.2"]\nsteps = 20\nstep = "eps/5"\nrestarts = 2',
            'attack = "apgd"\nnorm = "linf"\neps = ["0.1"]\nearly_stop = true',
            r"evals\.transfer\.early_stop: apgd ends its search in its own way; only fgsm",
        ),
    ],
)
def test_wrong_values_are_refused_before_anything_runs(suite: Path, old: str, new: str, text: str) -> None:
    assert old in SUITE
    suite.write_text(SUITE.replace(old, new))
    with pytest.raises(SuiteError, match=text):
        load_suite(suite)


def test_settings_that_are_shared_leave_robust_records_as_they_were() -> None:
    """As they were before there was a common base: the same fields in the same order."""
    suite = load_suite("digits", "paper")
    subject = Subject(Classifier(), 0.25, 0)
    assert json.dumps(suite.evals["pgd"].resolved(subject)) == (
        '{"images": 397, "kind": "robust", "attack": "pgd", "norm": "linf", "eps": [0.05, 0.1, 0.2], "steps": 20, '
        '"step": "2.5eps/T", "restarts": 2, "noise": 0.0, "eot": 1, "average": "loss", "loss": "ce", "start": "random", '
        '"momentum": 0.0, "engine": "native", "nearest": false}'
    )
    assert json.dumps(suite.evals["smoothed_pgd"].resolved(subject)) == (
        '{"images": 100, "kind": "robust", "attack": "pgd", "norm": "l2", "eps": [0.5, 1.0], "steps": 20, '
        '"step": "2.5eps/T", "restarts": 1, "noise": 0.25, "eot": 20, "average": "probability", "loss": "ce", '
        '"start": "random", "momentum": 0.0, "engine": "native", "nearest": false}'
    )


def test_a_run_stores_it_and_table_and_figure_show_it(suite: Path, tmp_path: Path) -> None:
    asked = Request(
        defense="naive@members=3,randsmooth", suite=str(suite), budget="smoke", runs=tmp_path / "runs", only=("transfer",)
    )
    run = Run(asked)
    several, single = run.execute()
    assert (several.status, single.status) == ("success", "skipped"), several.error
    assert single.error == "transfer is between two members or more, this is one network"
    fields = several.eval["fields"]
    assert (fields["kind"], fields["steps"], fields["early_stop"], fields["start"]) == ("transfer", 4, False, "random")
    rows = run.store.rows(several)
    assert len(rows) == 90 and sorted(rows.eps.unique()) == [0.05, 0.1, 0.2]
    assert list(rows.columns[3:]) == [*(f"correct_{n}" for n in THREE), *(f"wrong_{i}_{j}" for i in THREE for j in THREE)]
    part = rows[rows.eps == 0.2]
    for i, j in product(THREE, THREE):
        assert rate(several.metrics, i, j, 0.2)["all"] == part[f"wrong_{i}_{j}"].mean()
    assert Run(asked).missing() == [], "what is done answers the same request"
    (table,) = tables.summaries(Store(asked.runs))
    assert table.title == "moves, smoke: transfer between members"
    groups = ("transfer", "TSR", "TSR all", "floor", "ASR members", "ASR white-box")
    names = [f"{name} {eps}" if name != "floor" else name for name in groups for eps in (0.05, 0.1, 0.2)]
    assert table.columns[2:-1] == list(dict.fromkeys(names))
    (line,) = tables.body(table)
    cells = dict(zip(table.columns, line))
    found = named(several.metrics, 0.1)
    for metric, name, scale in (("tsr_normalised", "transfer 0.1", 100), ("tsr", "TSR 0.1", 1), ("tsr_floor", "floor", 1)):
        one = found[metric]
        assert cells[name] == f"{one.value * scale:.1f} [{(one.lower or 0) * scale:.1f}, {(one.upper or 0) * scale:.1f}]"
    assert found["tsr"].value == pytest.approx(200 * found["tsr_normalised"].value)
    assert all(f"{name}:" in table.caption for name in groups)
    assert "crafted by pgd, linf, steps 4, step eps/5, restarts 1, loss ce, start random, all steps taken" in table.caption
    for fmt in tables.FORMATS:
        assert tables.render(table, fmt)
    files = plots.draw(Store(asked.runs), "moves", tmp_path / "plots")
    assert {"transfer.png", "transfer.pdf"} <= {path.name for path in files}


def transferred(variant: str, values: np.ndarray, **changes: Any) -> Record:
    """A record with rates of all-correct images (sources targets) at the middle one of three eps, NaN for a hole."""
    numbers = [
        Metric(metric="transfer_rate", value=value, n=150, eps=eps, source=i, target=j, denominator=denominator)
        for i, line in zip(THREE, values)
        for j, value in zip(THREE, line)
        if not np.isnan(value)
        for eps, denominator in ((0.1, "all_correct"), (0.1, "all"), (0.2, "all_correct"))
    ]
    numbers = [m if (m.eps, m.denominator) == (0.1, "all_correct") else m.model_copy(update={"value": 0.99}) for m in numbers]
    fields = {"kind": "transfer", "attack": "pgd", "norm": "linf", "eps": [0.05, 0.1, 0.2], "images": 200, "early_stop": False}
    return record(
        defense={"name": "d", "variant": variant, "fields": {}},
        eval={"name": "transfer", "fields": fields},
        metrics=[*numbers, Metric(metric="tsr_all", value=1, n=200, eps=0.1, unit=SUMMED)],
        hashes={"data": "random"},
        **changes,
    )


def shown(figure: Figure, panel: int) -> list[list[str]]:
    """The numbers in the cells of a panel, from top to bottom."""
    FigureCanvasAgg(figure).draw()
    cells = {text.get_position(): text.get_text() for text in figure.axes[panel].texts}
    return [[cells[column, row] for column in range(4)] for row in range(4)]


VALUES = np.arange(16).reshape(4, 4) / 20


def test_a_heat_map_has_sources_as_rows_and_a_panel_a_defense() -> None:
    figure = plots.transfer([transferred("two", VALUES.T), transferred("one", VALUES)])
    assert figure is not None
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title().splitlines()[0] for axes in panels] == ["one", "two"]
    assert shown(figure, 0) == [[f"{100 * value:.0f}" for value in line] for line in VALUES]
    assert shown(figure, 1) == [[f"{100 * value:.0f}" for value in line] for line in VALUES.T]
    for axes in panels:
        assert "source" in axes.get_ylabel() and "target" in axes.get_xlabel()
        assert [label.get_text() for label in axes.get_yticklabels()] == THREE
        assert r"$\ell_\infty$, $\epsilon$ = 0.1; n = 150 of 200" in axes.get_title()
        box = axes.get_tightbbox()
        assert box is not None and figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_a_heat_map_says_how_wide_its_widest_interval_is() -> None:
    own = transferred("one", VALUES)
    wide = [
        m.model_copy(update={"lower": m.value - 0.01 * i, "upper": m.value + 0.02 * i}) for i, m in enumerate(own.metrics[:-1])
    ]
    told = [m for m in wide if (m.eps, m.denominator) == (0.1, "all_correct")]
    figure = plots.transfer([own.model_copy(update={"metrics": wide})])
    assert figure is not None
    half = max(m.upper - m.lower for m in told if m.upper is not None and m.lower is not None) / 2
    assert f"n = 150 of 200, ±{100 * half:.0f}" in figure.axes[0].get_title()
    assert "±" not in plots.transfer([own]).axes[0].get_title()  # type: ignore[union-attr]


def test_seeds_are_averaged_and_a_hole_stays_a_hole() -> None:
    holed = VALUES.copy()
    holed[1, 2] = np.nan
    figure = plots.transfer([transferred("one", VALUES), transferred("one", holed + 0.2, seed=4)])
    assert figure is not None
    cells = shown(figure, 0)
    assert cells[1][2] == tables.HOLE and cells[0][1] == f"{100 * (VALUES[0, 1] + 0.1):.0f}"
    assert "mean of 2 seeds" in figure.axes[0].get_title()
    empty = plots.transfer([transferred("one", np.full((4, 4), np.nan))])
    assert empty is not None and [t.get_text() for t in empty.axes[0].texts] == ["no image is right\nby all members"]
    assert plots.transfer([record()]) is None


def test_a_difference_map_is_the_first_less_the_second() -> None:
    holed = VALUES.copy()
    holed[1, 2] = np.nan
    figure = plots.differences([transferred("one", VALUES)], [transferred("two", holed.T * 0.4)])
    assert figure is not None
    expected = [[f"{100 * (a - b):+.0f}" for a, b in zip(*lines)] for lines in zip(VALUES, VALUES.T * 0.4)]
    assert shown(figure, 0) == [[tables.HOLE if (i, j) == (2, 1) else expected[i][j] for j in range(4)] for i in range(4)]
    assert any(text.get_text() == "one less two" for text in figure.findobj(Text))
    assert plots.differences([transferred("one", VALUES)], [record()]) is None
