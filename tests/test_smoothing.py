"""CERTIFY and PREDICT against linear classifiers, whose smoothed versions are known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from attacks.oracle import ContractError
from attacks.streams import Streams, generator
from defenses.api import Classifier, Images, Recipe, Task
from defenses.bounds import ceiling, lower
from defenses.combine import GeometricMedian, Mean
from defenses.ensemble import Ensemble
from defenses.estimators import ESTIMATORS
from defenses.nets import network
from defenses.smoothing import POOLED, Smoothed, Voting, certify, count_votes


class Halfspace(Classifier):
    """Class 1 where w x > b, else class 0; its smoothed version is itself, with radius |w x - b| / ||w||."""

    def __init__(self, w: Tensor, b: float) -> None:
        super().__init__()
        self.w, self.b = w, b

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w - self.b
        return torch.stack([-score, score], 1)


def halfspace(n: int, dimension: int, sigma: float, seed: int = 0) -> tuple[Halfspace, Tensor, np.ndarray]:
    """A random half-space and images at true distances of 0.8 to 2.3 sigma from its border."""
    gen = generator(seed, "halfspace", dimension)
    w = torch.randn(dimension, generator=gen)
    centre = torch.full((dimension,), 0.5)
    base = Halfspace(w, float(w @ centre)).eval()
    distance = sigma * (0.8 + 1.5 * torch.rand(n, generator=gen))
    side = torch.randint(0, 2, (n, 1), generator=gen) * 2 - 1
    x = centre + side * distance.unsqueeze(1) * w / w.norm()
    return base, x.view(n, 1, 1, dimension), distance.double().numpy()


@pytest.mark.parametrize("dimension", [1, 2, 4])
@pytest.mark.parametrize("estimator", ["fixed", "grid"])
def test_certificates_of_2000_images_exceed_the_truth_no_more_often_than_alpha(dimension: int, estimator: str) -> None:
    sigma, alpha, n = 0.1, 0.01, 500
    base, x, truth = halfspace(2000, dimension, sigma)
    radii = tuple(np.arange(0, 0.3, 0.002)) if estimator == "grid" else ()
    found = certify(base, x, sigma, n=n, alpha=alpha, estimator=estimator, radii=radii, batch=100_000)
    wrong = int((found.radius.numpy() > truth).sum())
    assert wrong <= stats.binom.ppf(0.9999, 2000, alpha)
    right = found.label == base.predict(x)
    assert (right | (found.label == -1)).all()
    assert found.radius.max() <= ceiling(sigma, n, alpha)
    assert (found.radius[found.label == -1] == 0).all()


def test_certificates_come_within_two_percent_of_the_truth() -> None:
    base, x, truth = halfspace(12, 3, 0.1)
    found = certify(base, x, 0.1, n=100_000, alpha=0.001, batch=100_000)
    ratio = found.radius.numpy() / truth
    # At 0.8 sigma the bound itself costs 1.7 %, one standard deviation of the votes another 0.6 %.
    assert (ratio <= 1).all() and ratio.mean() >= 0.98 and ratio.min() >= 0.965


def small() -> tuple[Ensemble, Tensor]:
    gen = generator(0, "smoothing test")
    pixels = torch.randint(0, 256, (12, 1, 28, 28), generator=gen, dtype=torch.uint8)
    images = Images(pixels, torch.zeros(12, dtype=torch.int64), torch.arange(12), "random")
    one = Task("random", images, images, 10, (0.5,), (0.5,), "lenet5", Recipe(epochs=1))
    members = [network(one, generator(1, member)) for member in range(3)]
    return Ensemble(members, GeometricMedian()).eval(), images.floats()


@pytest.mark.parametrize("estimator", ["fixed", "grid", "randomised", "union_bound", "anytime", "phases", POOLED])
def test_batches_order_and_company_change_nothing(estimator: str) -> None:
    base, x = small()

    def ask(rows: list[int], batch: int) -> list[tuple[int, float, int, int]]:
        streams = Streams(5, "certify", ids=[100 + row for row in rows])
        radii = (0.0,) if estimator in ESTIMATORS and ESTIMATORS[estimator].preset else (0.0, 0.1, 0.2)
        options = {"n0": 20, "n": 150, "estimator": estimator, "radii": radii}
        found = certify(base, x[rows], 0.5, streams=streams, batch=batch, **options)
        columns = (found.label, found.radius, found.count, found.draws)
        return list(zip(*[column.tolist() for column in columns]))

    everyone = list(range(12))
    reference = ask(everyone, 100)
    assert len({row[2] for row in reference}) > 3  # undecided enough that a changed draw would show
    for batch in (7, 64, 1000):
        assert ask(everyone, batch) == reference
    shuffled = [3, 11, 0, 7, 5, 1, 2, 10, 4, 9, 6, 8]
    assert ask(shuffled, 64) == [reference[row] for row in shuffled]
    assert ask([4], 1) == [reference[4]]


class Coin(Classifier):
    """Votes for class 1 where the first pixel of the noisy image exceeds a threshold."""

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1)[:, 0]
        return torch.stack([torch.zeros_like(score), score], 1)


def coins(p: list[float], sigma: float = 1.0) -> Tensor:
    """Images whose vote for class 1 has these probabilities."""
    shifts = torch.tensor([stats.norm.ppf(q) * sigma for q in p], dtype=torch.float32)
    return shifts.view(-1, 1, 1, 1)


def test_predict_returns_a_class_only_where_the_lead_is_significant() -> None:
    smoothed = Smoothed(Coin().eval(), 1.0)
    assert smoothed.predict(coins([0.9, 0.1, 0.5]), n=1000).tolist() == [1, 0, -1]


def test_a_fair_coin_is_an_abstention_of_radius_zero() -> None:
    found = certify(Coin().eval(), coins([0.5]), 1.0, n=1000)
    assert (found.label.item(), found.radius.item()) == (-1, 0.0)


def test_the_radius_is_the_bound_of_the_count() -> None:
    found = certify(Coin().eval(), coins([0.8, 0.95]), 0.25, n=1000)
    expected = 0.25 * stats.norm.ppf(lower(found.count.numpy(), 1000, 0.001))
    np.testing.assert_allclose(found.radius.numpy(), expected)
    assert found.radius.dtype == torch.float64


def test_selection_and_estimation_use_different_noise() -> None:
    seen: list[Tensor] = []

    def base(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.zeros(len(x), dtype=torch.int64)

    certify(base, torch.zeros(1, 1, 1, 1), 1.0, n0=100, n=100)
    selection, estimation = seen
    assert not set(selection.flatten().tolist()) & set(estimation.flatten().tolist())


def test_more_draws_extend_fewer() -> None:
    x, streams = coins([0.7]), Streams(1, ids=[9])
    few = count_votes(Coin().eval(), x, 1.0, 250, streams)
    voting = Voting([Coin().eval()], x, 1.0, 100)
    seen = [labels[0] for *_, labels in voting.ballots(streams, torch.ones(1, 1, dtype=torch.bool), (250, 730))]
    many = count_votes(Coin().eval(), x, 1.0, 730, streams)
    assert int(many[0, 1]) == int(few[0, 1]) + sum(int(labels.sum()) for labels in seen)
    assert sum(labels.numel() for labels in seen) == 480


def test_many_blocks_of_few_images_fill_a_batch() -> None:
    sizes: list[int] = []

    def base(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return torch.zeros(len(x), dtype=torch.int64)

    count_votes(base, torch.zeros(1, 1, 2, 2), 1.0, 2050, Streams(0, ids=[0]), batch=1000)
    assert sorted(sizes) == [50, 1000, 1000]


def test_every_estimator_draws_the_same_votes_and_only_says_something_else_about_them() -> None:
    base, x = small()
    streams, votes = Streams(5, ids=range(12)), {}
    for name, rule in ESTIMATORS.items():
        radii = (0.0,) if rule.preset else (0.0, 0.1, 0.2)
        found = certify(base, x, 0.5, n=600, estimator=name, radii=radii, streams=streams)
        assert (found.radius <= rule.ceiling(found.question, float(found.chance.min())) * (1 + 1e-12)).all(), name
        assert torch.equal(found.chance, certify(base, x, 0.5, n=100, streams=streams).chance)
        votes[name] = found
    whole = votes["fixed"]
    assert torch.equal(whole.count, votes["randomised"].count)
    assert (votes["randomised"].radius >= whole.radius).all() and (votes["anytime"].radius <= whole.radius).all()
    full = votes["grid"].draws == 600
    assert torch.equal(whole.count[full], votes["grid"].count[full])


def test_images_whose_selected_class_is_wrong_may_cost_nothing() -> None:
    base, x = small()
    alone = certify(base, x, 0.5, n=200)
    labels = torch.where(torch.arange(12) % 3 == 0, 9 - alone.label, alone.label)
    spared = certify(base, x, 0.5, n=200, labels=labels)
    wrong = alone.label != labels
    kept = ~wrong & (alone.label >= 0)
    assert wrong.any() and kept.any()
    assert (spared.draws[wrong & (alone.label >= 0)] == 0).all() and (spared.label[wrong] == -1).all()
    for name in ("label", "radius", "count", "draws", "evaluations"):
        assert torch.equal(getattr(spared, name)[kept], getattr(alone, name)[kept]), name


def test_pooled_votes_are_counted_as_draws_and_say_so() -> None:
    """Three copies of a network: the pooled bound believes in three times the draws (methods 3.4)."""
    copies = Ensemble([Coin(), Coin(), Coin()], Mean()).eval()
    sound = certify(copies, coins([0.9]), 0.25, n=1000)
    pooled = certify(copies, coins([0.9]), 0.25, n=1000, estimator=POOLED)
    assert pooled.estimator == "pooled (unsound)"
    assert pooled.count.item() == 3 * sound.count.item() and pooled.draws.item() == 1000
    assert pooled.evaluations.item() == 3 * 1100
    expected = 0.25 * stats.norm.ppf(lower(pooled.count.item(), 3000, 0.001))
    assert pooled.radius.item() == pytest.approx(expected) and pooled.radius > sound.radius
    alone = certify(Coin().eval(), coins([0.9]), 0.25, n=1000, estimator=POOLED)
    assert torch.equal(alone.radius, certify(Coin().eval(), coins([0.9]), 0.25, n=1000).radius)


def test_noise_has_the_stated_deviation_and_is_not_clipped() -> None:
    seen: list[Tensor] = []

    def base(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.zeros(len(x), dtype=torch.int64)

    count_votes(base, torch.full((1, 1, 8, 8), 0.9), 0.5, 1000, Streams(0, ids=[0]))
    noisy = torch.cat(seen)
    assert noisy.mean().item() == pytest.approx(0.9, abs=4 * 0.5 / math.sqrt(noisy.numel()))
    assert noisy.std().item() == pytest.approx(0.5, rel=0.02)
    assert noisy.max() > 1


def test_memory_does_not_grow_with_draws_or_images() -> None:
    sizes: list[int] = []

    def base(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return torch.zeros(len(x), dtype=torch.int64)

    count_votes(base, torch.zeros(30, 1, 2, 2), 1.0, 1000, Streams(0, ids=range(30)), batch=400)
    assert max(sizes) == 400 and sum(sizes) >= 30_000
    sizes.clear()
    count_votes(base, torch.zeros(2, 1, 2, 2), 1.0, 1000, Streams(0, ids=range(2)), batch=32)
    assert max(sizes) == 32


def test_the_soft_score_is_the_mean_softmax_of_its_draws() -> None:
    base, x = small()
    smoothed = Smoothed(base, 0.3).eval()
    streams = Streams(3, ids=range(12))
    one, many = smoothed.soft(x, 1, streams), smoothed.soft(x, 40, streams)
    assert torch.allclose(many.exp().sum(1), torch.ones(12), atol=1e-5)
    assert not torch.allclose(one, many)
    assert torch.equal(many, smoothed.soft(x, 40, streams))
    wanted = smoothed.soft(x.clone().requires_grad_(), 3, streams)
    assert wanted.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "fixd"}, "unknown estimator 'fixd'; known are fixed, randomised, grid, .*pooled"),
        ({"estimator": "grid"}, "the grid estimator needs radii"),
        ({"estimator": "phases", "radii": (0.0, 0.1)}, "Phases decides one radius a run"),
        ({"radii": (0.2, 0.1)}, "non-negative and increasing"),
        ({"alpha": 0.7}, "alpha"),
        ({"n": 0}, "n >= 1"),
        ({"streams": Streams(0, ids=[1, 2, 3])}, "streams have 3 rows for 1 images"),
    ],
)
def test_a_wrong_question_is_refused(options: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        certify(Coin().eval(), coins([0.9]), 1.0, **options)
    with pytest.raises(ValueError, match="sigma > 0"):
        certify(Coin().eval(), coins([0.9]), 0.0)


def test_an_ensemble_has_one_vote_a_draw_not_one_a_member() -> None:
    """Pooling the votes of identical members would turn 1,000 draws into 3,000 and overstate the radius."""
    _, x = small()
    single = small()[0].members[0]
    copies = Ensemble([single] * 3, GeometricMedian()).eval()
    one, three = certify(single, x[:3], 0.5, n=1000), certify(copies, x[:3], 0.5, n=1000)
    assert torch.equal(one.count, three.count) and torch.equal(one.radius, three.radius)


@pytest.mark.parametrize(("options", "message"), [({"n0": 0}, "n0 >= 1"), ({"batch": 0}, "batch >= 1")])
def test_nothing_to_select_from_is_refused(options: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        certify(Coin().eval(), coins([0.9]), 1.0, **options)


def test_a_radius_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="non-negative and increasing"):
        certify(Coin().eval(), coins([0.9]), 1.0, radii=(float("nan"),))


def test_a_base_in_training_mode_is_refused() -> None:
    base, x = small()
    with pytest.raises(ValueError, match="training mode"):
        certify(base.train(), x, 0.5, n=100)


class Broken(Classifier):
    """A model whose logits are NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((len(x), 10), torch.nan)


def test_nan_is_never_certified_alone_or_in_an_ensemble() -> None:
    base, x = small()
    for model in (Broken().eval(), Ensemble([base.members[0], Broken()], GeometricMedian()).eval()):
        with pytest.raises(ContractError, match="NaN"):
            certify(model, x[:2], 0.5, n=100)
