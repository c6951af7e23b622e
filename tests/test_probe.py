"""Four ways to hide gradients, planted in trained networks, are told apart; networks that hide nothing are not accused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from attacks.streams import Draws
from bench.diagnose import diagnose
from bench.evals import Probe, Subject
from bench.evals.api import Outcome
from bench.evals.signs import column, findings
from bench.findings import SIGNS
from bench.request import Request
from bench.runner import Run
from bench.store import Finding, Record, Store
from bench.tables import body, summaries
from defenses.api import Classifier, Images
from defenses.nets import Network

HONEST = "naive@members=1,at_es@eps=0.1,steps=3,trades@eps=0.1,steps=3,randsmooth"

SUITE = """
name = "honest"
version = 1
dataset = "digits"
architecture = "lenet5"
train_images = 512
validation_images = 50
[recipe]
epochs = 6
batch = 32
optimizer = "adam"
lr = 0.003
[evals.autoattack]
kind = "robust"
attack = "autoattack"
norm = "linf"
eps = ["0.1"]
steps = 10
proposals = 50
images = 25
[evals.pgd]
kind = "robust"
attack = "pgd"
norm = "linf"
eps = ["0.05", "0.1"]
steps = 10
restarts = 1
images = 50
[evals.fgsm]
kind = "robust"
attack = "fgsm"
norm = "linf"
eps = ["0.05", "0.1"]
images = 50
[evals.square]
kind = "robust"
attack = "square"
norm = "linf"
eps = ["0.05", "0.1"]
proposals = 50
images = 25
[evals.probe]
kind = "probe"
norm = "linf"
eps = ["0.05", "0.1"]
steps = [5, 20]
restarts = [1, 2]
eot = 4
images = 25
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Honest networks and their records."""
    folder = tmp_path_factory.mktemp("honest")
    (folder / "honest.toml").write_text(SUITE)
    run = Run(Request(defense=HONEST, suite=str(folder / "honest.toml"), device="cpu", runs=folder / "runs"))
    records = run.execute()
    assert [record.error for record in records if record.status != "success"] == []
    return run


@pytest.fixture(scope="module")
def networks(trained: Run) -> list[Network]:
    """The networks themselves."""
    from bench.jobs import Fitted
    from bench.progress import Progress

    fitted = Fitted(trained.task, trained.store.root / "honest" / "parts", Progress(None), trained.jobs)
    subjects = fitted.take([next(job for job in trained.jobs if job.variant is variant) for variant in trained.variants])
    return [subject.model.members[0] for subject in subjects]  # type: ignore[union-attr]


def test_honest_networks_are_not_flagged(trained: Run) -> None:
    found = diagnose(trained.store, trained.store.records())
    assert len(found) == 4
    for one in found:
        assert [own for own in one.findings if one.flags(own)] == [], one.place
        assert one.status == "autoattack-ok"
    rows = {row[0]: row[-1] for row in body(summaries(trained.store)[0])}
    assert len(rows) == 4 and all(status.startswith("autoattack-ok") for status in rows.values())


def test_numbers_are_of_the_rows_with_n_and_intervals(trained: Run) -> None:
    (record, *_) = [record for record in trained.store.records() if record.eval["name"] == "probe"]
    rows = trained.store.rows(record)
    assert len(rows) == 2 * 25 and rows.groupby("eps").id.nunique().tolist() == [25, 25]
    for steps, restarts in ((5, 1), (20, 1), (20, 2)):
        found = [m for m in record.metrics if (m.source or "").startswith(f"pgd, {steps} steps, {restarts} restart")]
        values = rows.groupby("eps")[column(steps, restarts)].mean()
        assert {m.eps: m.value for m in found} == pytest.approx(values.to_dict())
    assert (rows.stands_5_1 >= rows.stands_20_1).all() and (rows.stands_20_1 >= rows.stands_20_2).all()
    assert (rows.clean_correct >= rows.stands_5_1).all()
    (unbounded,) = [m for m in record.metrics if m.metric == "unbounded_accuracy"]
    assert (unbounded.eps, unbounded.n, unbounded.value) == (1.0, 25, 0.0)
    assert unbounded.lower == 0.0 and unbounded.upper is not None and 0.1 < unbounded.upper < 0.2
    right = rows[rows.clean_correct]
    for name in ("clean", "random", "gradient"):
        found = [m for m in record.metrics if m.metric == f"margin_{name}"]
        assert {m.eps: m.value for m in found} == pytest.approx(right.groupby("eps")[f"margin_{name}"].mean().to_dict())
    assert (right.margin_clean < 0).all() and (right.margin_gradient > right.margin_best).mean() > 0.9
    steps_told = {m.source for m in record.metrics if m.metric == "zero_gradients_at_step"}
    assert steps_told == {f"step {number}" for number in range(5)} and (rows.gradients.str.len() == 5).all()


# What is planted: a layer in front of one of the network's, or behind the last.


class Planted(Classifier):
    """A network with a layer put in front of number ``place`` of its body; 0 is the image."""

    def __init__(self, net: Network, layer: nn.Module, place: int, declared: bool = False) -> None:
        super().__init__()
        own = copy.deepcopy(net)
        self.layer, self.normalise, self.image = layer, own.normalise, place == 0
        layers = list(own.body)  # type: ignore[arg-type]
        self.before, self.behind = nn.Sequential(*layers[:place]), nn.Sequential(*layers[place:])
        self.randomized = declared
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.image:
            return self.behind(self.normalise(self.layer(x)))
        return self.behind(self.layer(self.before(self.normalise(x))))


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Noise(Draws):
    """Noise that the model declares."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sigma * self.normal_like(x)


class Scrambled(torch.autograd.Function):
    """The identity, whose gradient drowns in noise that depends on the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        noise = torch.sin(1e4 * x + torch.arange(x[0].numel()).view(x[0].shape))
        size = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1)) / math.sqrt(x[0].numel())
        return gradient + ctx.strength * size * noise, None


def quantised(net: Network, rng: Random) -> Classifier:
    levels = rng.choice([2, 4, 8, 16, 32])
    return Planted(net, Apply(lambda x: (x * levels).round() / levels), rng.randrange(len(net.body)))  # type: ignore[arg-type]


def scaled(net: Network, rng: Random) -> Classifier:
    factor = 10 ** rng.uniform(2.5, 5)
    return Planted(net, Apply(lambda logits: factor * logits), len(net.body))  # type: ignore[arg-type]


def shattered(net: Network, rng: Random) -> Classifier:
    strength, place = 10 ** rng.uniform(1.2, 3), rng.randrange(len(net.body) + 1)  # type: ignore[arg-type]
    if rng.random() < 0.5:
        return Planted(net, Apply(lambda x: Scrambled.apply(x, strength)), place)
    frequency = 10 ** rng.uniform(2, 4)
    return Planted(net, Apply(lambda x: x + strength * torch.sin(frequency * x) / frequency), place)


def noisy(net: Network, rng: Random) -> Classifier:
    sigma, place = rng.uniform(0.1, 0.5), rng.randrange(len(net.body) + 1)  # type: ignore[arg-type]
    if rng.random() < 0.5:
        return Planted(net, Noise(sigma), place, declared=True)
    return Planted(net, Apply(lambda x: x + sigma * torch.randn_like(x)), place)


def probed(model: Classifier, images: Images, **changes: Any) -> tuple[pd.DataFrame, Outcome]:
    """Rows and outcome of a short probe."""
    fields = {"norm": "linf", "eps": (0.1,), "steps": (4, 12), "restarts": (1,), "eot": 2, "images": len(images), **changes}
    probe, subject = Probe(**fields), Subject(model.eval(), None, 0)
    rows = [probe.measure([subject], images.take(piece.rows), piece)[0] for piece in probe.pieces(subject)]
    table = pd.concat(rows, ignore_index=True)
    return table, probe.summarise(table, subject)


def kinds(outcome: Outcome) -> set[str]:
    return {finding.kind for finding in outcome.findings}


PLANTS: dict[Callable[[Network, Random], Classifier], tuple[set[str], int]] = {
    quantised: ({"zero_gradients"}, 10),
    scaled: ({"saturated_loss"}, 10),
    shattered: ({"gradient_no_better_than_random", "shattered_gradients"}, 14),
    noisy: ({"noise_dependent", "randomised"}, 4),
}
"""Each with the reasons of which one must be given, and how many images it takes; other reasons must not be given."""


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_planted_maskers_are_flagged_with_the_right_reason(
    plant: Callable[[Network, Random], Classifier], networks: list[Network], trained: Run
) -> None:
    reasons, count = PLANTS[plant]
    wrong = set.union(*(own for own, _ in PLANTS.values())) - reasons
    for draw in range(20):
        rng = Random(f"{plant.__name__} {draw}")
        model = plant(rng.choice(networks), rng)
        _, outcome = probed(model, trained.test.first(count))
        assert kinds(outcome) & reasons, (plant.__name__, draw, kinds(outcome))
        if plant is not noisy:  # large noise may do to gradients what it does to answers
            assert not kinds(outcome) & wrong, (plant.__name__, draw, kinds(outcome))
        for finding in outcome.findings:
            assert finding.kind in SIGNS and finding.evidence["images"] and finding.evidence["count"] <= count


def test_a_planted_masker_is_flagged_in_the_table_and_its_images_are_named(
    networks: list[Network], trained: Run, tmp_path: Path
) -> None:
    old = next(record for record in trained.store.records() if record.eval["name"] == "probe")
    rows, outcome = probed(quantised(networks[0], Random(1)), trained.test.first(10))
    store = Store(tmp_path)
    record = old.model_copy(update={"metrics": outcome.metrics, "findings": outcome.findings})
    store.write(Record.model_validate_json(record.model_dump_json()))
    (one,) = diagnose(store, store.records())
    assert one.status == "flagged"
    (zero,) = [finding for finding in one.findings if finding.kind == "zero_gradients"]
    assert zero.evidence["images"] == rows.id[rows.clean_correct].tolist() and zero.evidence["evaluations"] == ["probe"]
    (line,) = body(summaries(store)[0])
    assert line[-1].startswith("flagged; ") and "zero_gradients" in line[-1]


# Each sign by itself, on functions whose answer is known


class Valley(Classifier):
    """Two classes by a score of the mean pixel, x in [0,1]; the image .5 has score ``height``, and class 0 above 0."""

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.score = score
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x.flatten(1).mean(1))
        return torch.stack([score, -score], 1)


GREY = Images(torch.full((6, 1, 8, 8), 128, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64), torch.arange(40, 46), "made")


def found(score: Callable[[Tensor], Tensor], **changes: Any) -> dict[str, Finding]:
    return {finding.kind: finding for finding in probed(Valley(score), GREY, **changes)[1].findings}


def test_a_slope_is_no_sign() -> None:
    assert found(lambda mean: 0.9 - mean) == {}


def test_a_plateau_beyond_the_image_is_found_on_the_way() -> None:
    """A slope around the image, then nothing: PGD's first gradient is there, its other three are not."""
    signs = found(lambda mean: 0.3 + 0.1 * (0.5 - mean).clamp(-0.05, 0.05))
    assert set(signs) == {"zero_gradients", "unbounded_stands"}
    assert signs["zero_gradients"].evidence == {"images": list(range(40, 46)), "count": 6, "share": 0.75, "eps": 0.1}


def test_points_that_stand_within_the_whole_box_are_named() -> None:
    signs = found(lambda mean: 2 - mean)
    assert set(signs) == {"unbounded_stands"}
    assert signs["unbounded_stands"].evidence == {"images": list(range(40, 46)), "count": 6, "eps": 1.0}


def test_more_steps_that_break_more_are_no_convergence() -> None:
    """A pit near the ball's edge, which one large step jumps over and sixty small ones meet."""
    signs = found(lambda mean: torch.where((mean - 0.58).abs() < 0.004, -1.0, 1.0) * (1.1 - mean), steps=(1, 60))
    assert signs["not_converged"].evidence == {"images": list(range(40, 46)), "count": 6, "eps": 0.1}
    assert "pgd, 1 step, 1 restart and fell to pgd, 60 steps" in signs["not_converged"].detail


def test_what_one_search_broke_stays_broken() -> None:
    """A loss with a hill on the way: one large step comes behind it, sixty small ones stay on top."""
    hill = Valley(lambda mean: torch.where(mean > 0.58, -1.0, 1 + (mean - 0.53).abs()))
    rows, outcome = probed(hill, GREY, steps=(1, 60))
    assert not rows.stands_1_1.any() and not rows.stands_60_1.any() and "not_converged" not in kinds(outcome)
    rows, _ = probed(hill, GREY, steps=(60,))
    assert rows.stands_60_1.all()


def test_the_whole_box_is_searched() -> None:
    dark = Images(torch.full_like(GREY.pixels, 25), GREY.labels, GREY.ids, "made")
    assert probed(Valley(lambda mean: 0.8 - mean), dark)[1].findings == []


# Each sign by itself, on rows


def made(first: int = 12, **changes: Any) -> dict[str, list[int]]:
    """Findings, with their images, on rows of an honest network with some columns changed in the first of 40 images."""
    honest = {
        **{"eps": 0.1, "clean_correct": True, "declared": False, "classes": 10, "edge": 1.0, "single": 1.0, "flips": 0.0},
        **dict.fromkeys(("randomised", "probabilities", "zero_gradient", "dynamic", "stands_unbounded"), False),
        **{"margin_slope": 2.0, "ce_slope": 1e-6, "promised": 1.0, "delivered": 0.9, "gradients": "1111"},
        **{"margin_clean": -5.0, "margin_gradient": -1.0, "margin_random": -4.0, "margin_best": -3.0},
        **dict.fromkeys(("stands_4_1", "stands_12_1", "stands_12_3", "stands_plain"), True),
        **{"attacked_single": 1.0, "attacked_flips": 0.0},
    }
    columns = {name: [value] * 40 for name, value in honest.items()}
    columns |= {name: [value] * first + columns[name][first:] for name, value in changes.items()}
    columns["declared"] = [changes.get("declared", False)] * 40
    told = findings(pd.DataFrame({"id": range(500, 540), **columns}), [(4, 1), (12, 1), (12, 3)], 10)
    assert len({finding.kind for finding in told}) == len(told)
    return {finding.kind: finding.evidence["images"] for finding in told}


@pytest.mark.parametrize(("margin", "first", "told"), [(-3.5, 20, True), (-3.5, 19, False), (-2.9, 40, False)])
def test_gradients_must_beat_the_best_random_direction_in_most_images(margin: float, first: int, told: bool) -> None:
    """-3.5 is better than most random directions, not than the best. Of honest networks a third may do so: TRADES on MNIST."""
    wanted = {"gradient_no_better_than_random": list(range(500, 520))} if told else {}
    assert made(first, margin_gradient=margin) == wanted


TWELVE = list(range(500, 512))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"margin_slope": 0.0, "ce_slope": 0.0}, ["zero_gradients"]),
        ({"ce_slope": 0.0}, ["saturated_loss"]),
        ({"gradients": "1000"}, ["zero_gradients"]),
        ({"gradients": "1vv-"}, []),  # short is not zero: the numbers tell it
        ({"stands_unbounded": True}, ["unbounded_stands"]),
        ({"stands_12_1": False, "stands_12_3": False}, ["not_converged"]),
        ({"stands_12_3": False}, ["not_converged"]),
        ({"stands_4_1": False, "stands_12_1": False, "stands_12_3": False, "stands_plain": False}, []),
        ({"randomised": True}, ["randomised", "noise_dependent"]),
        ({"randomised": True, "declared": True}, ["randomised"]),
        ({"flips": 0.1, "declared": True}, ["noise_dependent"]),
        ({"attacked_flips": 0.1, "declared": True}, ["noise_dependent"]),
        ({"flips": 0.02, "declared": True}, []),
        ({"stands_4_1": False, "stands_12_1": False, "stands_12_3": False, "declared": True}, ["noise_dependent"]),
        ({"probabilities": True}, ["probabilities"]),
        ({"dynamic": True}, ["dynamic"]),
        ({"zero_gradient": True}, []),  # of DLR: told with its reason by the margin's
    ],
)
def test_every_sign_comes_from_its_own_columns(changes: dict[str, Any], told: list[str]) -> None:
    found = made(**changes)
    assert list(found) == told and all(images == TWELVE for images in found.values())


@pytest.mark.parametrize(("first", "delivered", "told"), [(20, 0.4, False), (21, 0.4, True), (40, 0.5, False), (40, 0.4, True)])
def test_half_of_the_promises_must_be_kept_in_half_of_the_images(first: int, delivered: float, told: bool) -> None:
    assert list(made(first, delivered=delivered)) == ["shattered_gradients"] * told


def test_a_model_that_is_cut_off_from_the_image_has_no_gradient() -> None:
    signs = found(lambda mean: 0.9 - (10 * mean).long() / 10)
    assert {"zero_gradients", "unbounded_stands"} == set(signs) and signs["zero_gradients"].evidence["count"] == 6


def test_nothing_is_said_of_gradients_where_nothing_is_right() -> None:
    rows, outcome = probed(Valley(lambda mean: mean - 0.9), GREY)
    assert not rows.clean_correct.any() and outcome.findings == []
    assert {metric.metric for metric in outcome.metrics} >= {"robust_accuracy_after", "unbounded_accuracy", "flips"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"norm": "l1"}, "unknown 'l1'; known are linf, l2"),
        ({"eps": (2.0,)}, "out of range"),
        ({"steps": (50, 10)}, "steps: increasing"),
        ({"restarts": (0, 5)}, "restarts: increasing"),
    ],
)
def test_wrong_fields_are_refused(changes: dict[str, Any], text: str) -> None:
    fields = {"norm": "linf", "eps": (0.1,), "images": 10, **changes}
    with pytest.raises(ValueError, match=text):
        Probe(**fields).check("evals.probe", (1, 28, 28))


def test_no_image_depends_on_the_others(networks: list[Network], trained: Run) -> None:
    images = trained.test.first(6)
    whole, _ = probed(networks[0], images, norm="l2", eps=(0.5, 1.5), directions=3)
    part, _ = probed(networks[0], images.take(slice(4, 6)), norm="l2", eps=(0.5, 1.5), directions=3)
    same = whole[whole.id.isin(part.id)].reset_index(drop=True)
    exact = [name for name in part if part[name].dtype != float and name != "gradients"]
    assert same[exact].equals(part[exact])
    for name in ("margin_random", "margin_gradient", "promised", "delivered", "ce_slope"):
        assert same[name].to_numpy() == pytest.approx(part[name].to_numpy(), rel=1e-4, abs=1e-6)
