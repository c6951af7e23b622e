"""Smoothed ensembles and SWEEN: shared parts, learned weights, adaptive phases, the variance view (methods 3.2 and 3.3)."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import optimize, stats
from test_nets import Nowhere
from torch import Tensor

from attacks.streams import Streams, generator
from bench import metrics
from bench.parts import PartStore
from bench.progress import Progress
from bench.registry import resolve
from bench.request import Request
from bench.runner import Run
from bench.store import Store
from bench.suites import load_suite
from bench.tasks import prepare
from defenses.api import Classifier, Images, Recipe, Task
from defenses.bounds import lower
from defenses.cear import cear_gm, cear_minus_gm, cear_minus_rw, cear_rw
from defenses.combine import Adaptive, Consensus, Majority, Mean, MeanLogits
from defenses.ensemble import Ensemble
from defenses.estimators import Question
from defenses.nets import network
from defenses.randsmooth import gaussian, randsmooth
from defenses.smoothed_ensemble import SmoothedEnsemble, smoothed_ensemble
from defenses.smoothing import certify, certify_together
from defenses.sween import LearnedWeights, Sween, TrueClassProbabilities, mixture_loss, sween, sween3, sween_cear
from defenses.variance import Noise, prefixes

EIGHT = (randsmooth, smoothed_ensemble, sween, sween_cear, cear_rw, cear_gm, cear_minus_rw, cear_minus_gm)


def test_eight_defenses_at_one_sigma_share_every_network(tiny: Path, tmp_path: Path) -> None:
    """One teacher, five students with variable noise, five without, five networks trained on noise."""
    task, _ = prepare(load_suite(str(tiny)), "cpu", None)
    task = dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, epochs=1))
    parts = PartStore(tmp_path / "parts", task, Progress(None))
    (tmp_path / "parts").mkdir()
    models = []
    for defense in EIGHT:
        models.append(defense.build(task))
        defense.fit(models[-1], task, parts, 0)
    made = Counter(text.split()[0] for event, text in parts.events if event == "made")
    trained = {role: made[role] for role in ("teacher", "student", "gaussian")}
    assert trained == {"teacher": 1, "student": 10, "gaussian": 5}
    with torch.inference_mode():
        x = task.train.floats()
        for ensemble in models[1:4]:
            assert torch.equal(models[0](x), ensemble.members[0](x))
    assert abs(models[2].rule.weights.sum() - 1) < 1e-6


def test_sween_weights_of_the_worked_example() -> None:
    w = torch.tensor([0.0, math.log(2), math.log(3)], dtype=torch.float64, requires_grad=True)
    assert torch.allclose(w.softmax(0), torch.tensor([1 / 6, 1 / 3, 1 / 2], dtype=torch.float64))
    loss = mixture_loss(w, torch.tensor([[0.9], [0.4], [0.5]], dtype=torch.float64))
    loss.backward()
    assert loss.item() == pytest.approx(0.628609, abs=1e-6)
    twice = torch.tensor([[0.9, 0.9], [0.4, 0.4], [0.5, 0.5]], dtype=torch.float64)
    assert mixture_loss(w, twice).item() == pytest.approx(loss.item())  # a mean over images, not a sum
    assert torch.allclose(w.grad, torch.tensor([-0.114583, 0.083333, 0.031250], dtype=torch.float64), atol=1e-6)


def answers(n: int = 2000) -> Tensor:
    """Probabilities (m draws n) of the true class: a good member, a middling one, a bad one."""
    logit = torch.tensor([1.5, 0.5, -0.5]).view(3, 1, 1) + torch.randn(3, 4, n, generator=generator(0, "answers"))
    return logit.sigmoid()


def test_learned_weights_minimise_the_mixture_s_cross_entropy() -> None:
    p = answers()
    part = LearnedWeights(role="ensemble weights", seed=0)
    weights = part.make(None, [{"probability": p}], Nowhere())["weights"]  # type: ignore[arg-type]
    assert weights.sum().item() == pytest.approx(1) and weights[0] > weights[1] > weights[2]
    flat = p.flatten(1).double()

    def regularised(w: np.ndarray) -> float:
        return float(mixture_loss(torch.tensor(w), flat)) + 5e-4 / 2 * float((w**2).sum())

    best = optimize.minimize(regularised, np.zeros(3)).fun
    found = weights.double().log()
    # SGD stops with its schedule, short of the optimum but far from where it began.
    reached = regularised((found - found.mean()).numpy())
    assert reached - best < 0.25 * (regularised(np.zeros(3)) - best)


def task_of(n: int = 40) -> Task:
    pixels = torch.randint(0, 256, (n, 1, 28, 28), generator=generator(0, "pixels"), dtype=torch.uint8)
    images = Images(pixels, torch.arange(n) % 10, torch.arange(n) + 500, "random")
    return Task("random", images, images, 10, (0.5,), (0.5,), "lenet5", Recipe(epochs=1))


def test_members_are_asked_about_the_same_noise_and_their_accuracy_is_counted() -> None:
    task = task_of()
    nets = [network(task, generator(1, member)) for member in range(2)]
    needs = tuple(gaussian(task, 0, member, 0.5) for member in range(2))
    part = TrueClassProbabilities(role="p", seed=3, sigma=0.5, images=30, draws=2, needs=needs)
    found = part.make(task, [net.state_dict() for net in nets], Nowhere())
    assert found["probability"].shape == (2, 2, 30)
    shown, streams = task.validation.take(slice(0, 30)), Streams(3, "ensemble weights", ids=range(500, 530))
    right = 0
    for draw in range(2):
        with torch.inference_mode():
            logits = nets[1](shown.floats() + 0.5 * streams.normal((1, 28, 28), block=draw))
        own = logits.softmax(-1)[torch.arange(30), shown.labels]
        assert torch.allclose(found["probability"][1, draw], own, atol=1e-6)
        right += int((logits.argmax(-1) == shown.labels).sum())
    assert found["accuracy"][1].item() == pytest.approx(right / 60)


def test_the_reading_of_cear_weighs_by_accuracy() -> None:
    task = task_of()
    defense = Sween(members=2, weighting="accuracy")

    class Given:
        def get(self, part):  # type: ignore[no-untyped-def]
            if part.role == "gaussian":
                return network(task, generator(2, part.member)).state_dict()
            return {"accuracy": torch.tensor([0.6, 0.2]), "probability": torch.zeros(2, 1, 1)}

    model = defense.build(task)
    defense.fit(model, task, Given(), 0)
    assert torch.allclose(model.rule.weights, torch.tensor([0.75, 0.25]))
    assert defense.facts(model)["largest_weight_deviation"] == pytest.approx(0.25)


def test_votes_and_variants() -> None:
    task = task_of()
    rules = {"logits": MeanLogits, "hard": Majority, "softmax": Mean}
    for vote, rule in rules.items():
        assert type(SmoothedEnsemble(vote=vote).build(task).rule) is rule
    assert isinstance(SmoothedEnsemble(consensus=2).build(task).rule, Consensus)
    assert isinstance(Sween(adaptive=True).build(task).rule, Adaptive)
    (variant,) = resolve("sween@architectures=lenet5+lenet_wide,sigma=0.5", {"sigma": (0.25, 1.0)})
    assert variant.label == "sween@architectures=lenet5+lenet_wide,sigma=0.5"
    assert [net.architecture for net in variant.defense.build(task).members] == ["lenet5", "lenet_wide"]
    with pytest.raises(ValueError, match="known are logits, hard, softmax"):
        SmoothedEnsemble(vote="loud")
    with pytest.raises(ValueError, match="consensus <= members"):
        SmoothedEnsemble(members=3, consensus=4)
    for kind in (Sween, SmoothedEnsemble):
        with pytest.raises(ValueError, match="did you mean 'resnet20'"):
            kind(architectures=("resnet20", "resnt20"))
    with pytest.raises(ValueError, match="known are learned, accuracy"):
        Sween(weighting="guessed")


def test_a_member_set_for_colour_images_is_no_part_of_all_on_greyscale_and_skipped_by_name(tiny: Path, tmp_path: Path) -> None:
    assert "colour" in sween3.unsuited(task_of()) and not sween.unsuited(task_of())
    assert not Sween(architectures=("lenet5", "resnet20")).unsuited(task_of())
    everything = Run(Request(defense="all", suite=str(tiny), runs=tmp_path))
    assert not {"sween3", "sween7"} & {variant.name for variant in everything.variants}
    assert {"sween", "smoothed_ensemble", "cear_rw"} <= {variant.name for variant in everything.variants}
    (record,) = Run(Request(defense="sween3", suite=str(tiny), runs=tmp_path, only=("certified",))).execute()
    assert record.status == "skipped" and "colour" in record.error
    assert record.members == 3 and Store(tmp_path).frame().members.tolist() == [3], "as many as it names"


class Coin(Classifier):
    """Class 1 where the first pixel of the noisy image is positive."""

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1)[:, 0]
        return torch.stack([torch.zeros_like(score), score], 1)


def test_phases_certify_clear_cases_early_and_give_hopeless_ones_up() -> None:
    """A half-space at distance d is robust at r < d; sigma = 1, asked at r = 1; phases of 100, 1,000 and 12,500 draws."""
    x = torch.tensor([2.5, 0.2, 1.16, -2.5]).view(-1, 1, 1, 1)
    ask = partial(certify, Coin().eval(), sigma=1.0, n=10_000, estimator="phases", radii=(1.0,))
    found = ask(x, streams=Streams(0, "phases", ids=range(4)))
    assert found.label.tolist() == [1, -1, 1, 0]
    assert found.radius.tolist() == [1, 0, 1, 1]
    assert found.draws.tolist() == [100, 100, 13_600, 100]
    assert found.evaluations.tolist() == [200, 200, 13_900, 200]  # every phase selects with draws of its own
    alone = ask(x[2:3], streams=Streams(0, "phases", ids=[2]))
    assert (alone.label, alone.draws, alone.count) == (found.label[2], found.draws[2], found.count[2])


def test_phases_certify_beyond_the_truth_no_more_often_than_alpha() -> None:
    x = torch.full((1500, 1, 1, 1), 0.999)
    found = certify(Coin().eval(), x, 1.0, n=400, alpha=0.05, estimator="phases", radii=(1.0,))
    assert 0 < (found.label == 1).sum() <= 1500 * 0.05 + 3 * math.sqrt(1500 * 0.05 * 0.95)


def test_variance_falls_towards_the_correlation() -> None:
    assert [round(metrics.variance_ratio(k, 0.2), 6) for k in (1, 3, 5, 10)] == [1, 0.466667, 0.36, 0.28]
    assert metrics.fit_correlation([metrics.variance_ratio(k, 0.37) for k in range(1, 6)]) == pytest.approx(0.37)
    with pytest.raises(ValueError, match="k = 2"):
        metrics.fit_correlation([1.0])


class Linear(Classifier):
    """Logits (0, w x)."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w
        return torch.stack([torch.zeros_like(score), score], 1)


def test_the_margin_s_variance_of_linear_members_is_known() -> None:
    """Weights c + u_l, all u orthogonal: correlation c^2 / (c^2 + u^2), variance sigma^2 (c^2 + u^2 / k)."""
    c, u = torch.eye(6)[0] * 2.0, torch.eye(6)[1:6] * 4.0
    members = [Linear(c + own).eval() for own in u]
    x = torch.ones(2, 1, 1, 6)
    found = prefixes(members, x, Noise(0.5, (20_000,)), Streams(0, "variance", ids=range(2)))
    for k in range(1, 6):
        assert found.variance[k - 1].numpy() == pytest.approx(0.25 * (4 + 16 / k), rel=0.05)
    assert (found.covariance / found.single).numpy() == pytest.approx(0.2, abs=0.02)
    ratios = (found.variance / found.single).mean(1).tolist()
    assert metrics.fit_correlation(ratios) == pytest.approx(0.2, abs=0.02)
    assert found.margin.numpy() == pytest.approx(6.0, abs=0.2)


def test_counts_of_the_variance_view_are_those_of_certificates() -> None:
    task = task_of(3)
    members = [network(task, generator(4, member)) for member in range(3)]
    x, streams = task.train.floats(), Streams(2, "certified", ids=range(3))
    found = prefixes(members, x, Noise(0.5, (150, 330), n0=60), streams)
    models = [Ensemble(members[:k], MeanLogits()).eval() for k in (1, 2, 3)]
    for look, n in enumerate((150, 330)):
        certificates = certify_together(models, x, Question(0.5, 0.001, n), n0=60, streams=streams)
        for k in range(3):
            assert torch.equal(found.count[k, look], certificates[k].count)


def test_the_variance_view_of_a_run(tiny: Path, tmp_path: Path) -> None:
    text = tiny.read_text() + '[evals.variance]\nkind = "variance"\nn = [50, 100]\nimages = 12\n'
    tiny.write_text(text)
    request = Request(defense="smoothed_ensemble@members=3,randsmooth", suite=str(tiny), runs=tmp_path, only=("variance",))
    found, skipped = Run(request).execute()
    assert skipped.status == "skipped" and "two members" in skipped.error
    ratios = [m for m in found.metrics if m.metric == "margin_variance_ratio"]
    assert [m.members for m in ratios] == [1, 2, 3] and all(m.n == 12 for m in ratios)
    acr = {(m.members, m.draws) for m in found.metrics if m.metric == "acr"}
    assert acr == {(k, n) for k in (1, 2, 3) for n in (50, 100)}
    assert found.metrics[3].metric == "margin_correlation_fitted"
    rows = pd.read_parquet(tmp_path / "tiny/smoothed_ensemble@members=3/quick/seed0/variance.parquet")
    part = rows[(rows.members == 2) & (rows.n == 100)]
    hits = (lower(part["count"], 100, 0.001) >= stats.norm.cdf(1)) & (part.prediction == part.label)
    (reported,) = [m for m in found.metrics if (m.members, m.draws, m.radius) == (2, 100, 0.25)]
    assert reported.metric == "certified_accuracy" and reported.value == pytest.approx(hits.mean())
