"""CEAR: distillation, variable noise, shared parts and robust weights (methods 3.4)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attacks.streams import generator
from defenses.api import Images, Part, Recipe, Task, Weights
from defenses.cear import (
    CertifiedAccuracies,
    Distillation,
    cear_gm,
    cear_minus_gm,
    cear_minus_rw,
    cear_rw,
    robust_weights,
)
from defenses.combine import Weighted
from defenses.nets import network
from defenses.training import Batch


def task() -> Task:
    gen = generator(0, "cear test")
    pixels = torch.randint(0, 256, (40, 1, 28, 28), generator=gen, dtype=torch.uint8)
    images = Images(pixels, torch.randint(0, 10, (40,), generator=gen), torch.arange(40), "random")
    return Task("random", images, images.first(20), 10, (0.5,), (0.5,), "lenet5", Recipe(epochs=1))


class Constant(torch.nn.Module):
    """A network that always gives the same logits."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def test_softened_labels() -> None:
    z = torch.tensor([2.0, 1.0, 0.0])
    expected = {1: (0.665241, 0.244728, 0.090031), 2: (0.506480, 0.307196, 0.186324), 4: (0.419229, 0.326496, 0.254275)}
    for t, p in expected.items():
        assert torch.allclose((z / t).softmax(-1), torch.tensor(p), atol=1e-6)


def test_the_distillation_loss_is_t_squared_kl() -> None:
    batch = Batch(torch.rand(6, 1, 4, 4), torch.zeros(6, dtype=torch.int64), generator(0))
    loss = Distillation(sigma=0.25, temperature=4.0)
    parts = loss(Constant([1.0, 2.0, 0.0]), batch, [Constant([2.0, 1.0, 0.0])])  # type: ignore[arg-type, list-item]
    assert parts["kl"].item() == pytest.approx(0.370932, abs=1e-6)
    assert parts["kl"].item() / 16 == pytest.approx(0.0231833, abs=1e-6)


class Recorder(torch.nn.Module):
    """Remembers what it was shown."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x.flatten(1)[:, :3]


def test_the_teacher_sees_the_clean_image_and_the_student_a_noisy_one() -> None:
    x = torch.rand(200, 1, 8, 8)
    batch = Batch(x, torch.zeros(200, dtype=torch.int64), generator(0))
    student, teacher = Recorder(), Recorder()
    Distillation(sigma=0.3, temperature=2.0)(student, batch, [teacher])  # type: ignore[arg-type, list-item]
    assert torch.equal(teacher.seen, x)
    assert (student.seen - x).std().item() == pytest.approx(0.3, rel=0.02)
    assert student.seen.min() < 0  # never clipped


def test_variable_noise_is_drawn_once_a_student_within_half_sigma() -> None:
    sigmas = torch.tensor([[cear_rw.student_sigma(seed, member) for member in range(5)] for seed in range(2000)])
    assert sigmas.min() >= 0.125 and sigmas.max() <= 0.375
    assert cear_rw.student_sigma(3, 1) == cear_rw.student_sigma(3, 1) != cear_rw.student_sigma(3, 2)
    rms = sigmas.square().mean().sqrt().item() / 0.25
    assert rms == pytest.approx(1.040833, abs=4 * 0.3 / math.sqrt(sigmas.numel()))
    assert {cear_minus_rw.student_sigma(seed, 0) for seed in range(5)} == {0.25}


def test_both_aggregations_share_students_and_all_share_the_teacher() -> None:
    one = task()
    keys = {d: [d.student(one, 0, m).key(one) for m in range(5)] for d in (cear_rw, cear_gm, cear_minus_rw, cear_minus_gm)}
    assert keys[cear_rw] == keys[cear_gm] != keys[cear_minus_rw] == keys[cear_minus_gm]
    assert len(set(keys[cear_rw] + keys[cear_minus_rw])) == 10
    teachers = {d.student(one, 0, m).needs[0].key(one) for d in keys for m in range(5)}
    assert len(teachers) == 1
    assert [cear_rw.student(one, 0, m).loss.temperature for m in range(5)] == [2, 3, 4, 5, 6]
    assert cear_rw.student(one, 1, 0).key(one) != cear_rw.student(one, 0, 0).key(one)


def test_robust_weights_are_shares_of_certified_accuracy() -> None:
    assert torch.allclose(robust_weights(torch.tensor([0.6, 0.5, 0.4])), torch.tensor([0.4, 1 / 3, 0.8 / 3]))
    close = robust_weights(torch.tensor([0.60, 0.62, 0.61, 0.58, 0.59]))
    assert torch.allclose(close, torch.tensor([0.2000, 0.2067, 0.2033, 0.1933, 0.1967]), atol=5e-5)
    assert torch.equal(robust_weights(torch.zeros(4)), torch.full((4,), 0.25))


class Shelf:
    """Parts that need no training: networks by seed, weights as they are made."""

    def __init__(self, one: Task) -> None:
        self.task = one
        self.asked: list[Part] = []

    def get(self, part: Part) -> Weights:
        self.asked.append(part)
        if isinstance(part, CertifiedAccuracies):
            return part.make(self.task, [self.get(need) for need in part.needs], Silent())
        return network(self.task, generator(part.seed, part.member)).state_dict()


class Silent:
    """A workshop without checkpoints."""

    def load(self) -> None:
        return None

    def save(self, weights: Weights, state: dict) -> None:  # type: ignore[type-arg]
        pass

    def report(self, done: int, total: int, facts: dict) -> None:  # type: ignore[type-arg]
        pass


def test_a_fitted_ensemble_carries_weights_from_validation_images() -> None:
    one = task()
    model = cear_rw.build(one)
    shelf = Shelf(one)
    cear_rw.fit(model, one, shelf, 0)
    assert isinstance(model.rule, Weighted)
    accuracy = shelf.get(next(p for p in shelf.asked if isinstance(p, CertifiedAccuracies)))["accuracy"]
    assert torch.allclose(model.rule.weights, robust_weights(accuracy))
    assert cear_rw.facts(model)["largest_weight_deviation"] == pytest.approx(float((model.rule.weights - 0.2).abs().max()))
    assert not any(module.training for module in model.modules())


def test_double_softmax_cannot_reach_a_one_hot_label() -> None:
    """Why softmax outputs must not be fed to a softmax cross-entropy, as the released MNIST code does."""
    one_hot = torch.zeros(10).index_fill(0, torch.tensor([0]), 1.0)
    assert one_hot.softmax(-1)[0].item() == pytest.approx(0.231969, abs=1e-6)
    assert (one_hot / 5).softmax(-1)[0].item() == pytest.approx(0.119495, abs=1e-6)
