"""Details of training, certification and robust weights that a small change of the code would break unseen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor

from attacks.streams import Streams, drawing, generator
from defenses.api import Classifier, Images, Recipe, Task
from defenses.bounds import two_sided
from defenses.cear import CertifiedAccuracies
from defenses.median import median_weights
from defenses.nets import network
from defenses.smoothing import Smoothed, certify, count_votes
from defenses.training import CrossEntropy, Trained


def random_images(n: int, labels: list[int]) -> Images:
    pixels = torch.randint(0, 256, (n, 1, 28, 28), generator=generator(n, "gaps"), dtype=torch.uint8)
    return Images(pixels, torch.tensor(labels), torch.arange(n), "random")


TASK = Task(
    "random", random_images(17, [1] * 17), random_images(8, [0, 0, 0, 1] * 2), 10, (0.5,), (0.5,), "lenet5", Recipe(epochs=2)
)


class Silent:
    def load(self) -> None:
        return None

    def save(self, weights: object, state: dict) -> None:  # type: ignore[type-arg]
        self.log = state["log"]

    def report(self, done: int, total: int, facts: object) -> None:
        pass


class Pixel(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1)[:, 0]
        return torch.stack([torch.zeros_like(score), score], 1)


def test_the_median_leaves_a_data_point_that_is_not_the_median() -> None:
    # The mean, where the iteration starts, is the last member; the median is no member at all.
    four = torch.tensor([[0.9, 0.05, 0.05], [0.8, 0.15, 0.05], [0.85, 0.05, 0.10], [0.05, 0.05, 0.9]], dtype=torch.float64)
    p = torch.cat([four, four.mean(0, keepdim=True)]).unsqueeze(1)
    q = median_weights(p)[:, 0] @ p[:, 0]
    units = (p[:, 0] - q) / (p[:, 0] - q).norm(dim=1, keepdim=True)
    assert (p[:, 0] - q).norm(dim=1).min() > 1e-3 and units.sum(0).norm() < 1e-4


def test_a_majority_point_gets_all_the_weight_exactly() -> None:
    p = torch.tensor([[0.2, 0.8], [0.2, 0.8], [0.2, 0.8], [0.9, 0.1]], dtype=torch.float64).unsqueeze(1)
    assert torch.equal(median_weights(p)[:, 0], torch.tensor([1 / 3, 1 / 3, 1 / 3, 0], dtype=torch.float64))


def test_draws_are_those_of_the_look_at_which_the_image_stopped() -> None:
    x = torch.tensor([9.0, 0.25]).view(2, 1, 1, 1)
    found = certify(Pixel().eval(), x, 1.0, n=1000, estimator="grid", radii=(0.0,))
    assert found.draws[0] == 100 < found.draws[1]


def test_predict_abstains_exactly_where_the_test_says_so() -> None:
    x, streams = torch.linspace(-0.3, 0.3, 300).view(-1, 1, 1, 1), Streams(2, ids=range(300))
    counts = count_votes(Pixel().eval(), x, 1.0, 400, streams.child("prediction")).numpy()
    p = two_sided(counts.max(1), counts.min(1))
    assert ((p > 0.001) & (p <= 0.002)).any()
    expected = [int(row.argmax()) if q <= 0.001 else -1 for row, q in zip(counts, p)]
    assert Smoothed(Pixel().eval(), 1.0).predict(x, n=400, streams=streams).tolist() == expected


def test_the_soft_score_averages_probabilities_under_noise_of_sigma() -> None:
    x, streams, smoothed = torch.zeros(9, 1, 2, 2), Streams(3, ids=range(9)), Smoothed(Pixel().eval(), 5.0)
    answers = []
    for draw in range(20):
        with drawing(smoothed, streams.child("draw", draw)):
            answers.append(smoothed(x))
    torch.testing.assert_close(smoothed.soft(x, 20, streams).exp(), torch.stack(answers).softmax(-1).mean(0))
    assert 3 < torch.stack(answers)[..., 1].std() < 7
    with pytest.raises(RuntimeError, match="no streams are in force"):
        smoothed(x)


def test_negative_radii_are_refused() -> None:
    with pytest.raises(ValueError, match="non-negative"):
        certify(Pixel().eval(), torch.zeros(1, 1, 1, 1), 1.0, estimator="grid", radii=(-0.1, 0.0))


def test_certified_accuracies_are_right_answers_on_the_first_validation_images() -> None:
    nets = [network(TASK) for _ in range(2)]
    for label, net in enumerate(nets):
        with torch.no_grad():
            net.body[-1].weight.zero_()
            net.body[-1].bias.copy_(torch.eye(10)[label])
    parts = [Trained(role="constant", seed=0, member=m, architecture="lenet5", recipe=TASK.recipe) for m in range(2)]
    weights = [net.state_dict() for net in nets]
    for images, expected in [(1000, [0.75, 0.25]), (3, [1.0, 0.0])]:
        part = CertifiedAccuracies(role="weights", seed=0, needs=tuple(parts), sigma=0.25, images=images, n0=10, n=100)
        assert part.make(TASK, weights, Silent())["accuracy"].tolist() == pytest.approx(expected)  # type: ignore[arg-type]


def train(recipe: Recipe, one: Task = TASK, loss: object = None) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    part, shop = (
        Trained(role="gaps", seed=0, architecture=one.architecture, recipe=recipe, loss=loss or CrossEntropy()),
        Silent(),
    )
    return part.make(one, [], shop), shop.log  # type: ignore[arg-type]


def test_the_schedule_nesterov_and_the_rate_reach_the_optimiser() -> None:
    base = Recipe(epochs=2, batch=4, lr=0.01)
    others = [replace(base, nesterov=True), replace(base, decay_at=(0.5,)), replace(base, momentum=0.5)]
    ends = [train(recipe)[0]["body.0.weight"] for recipe in [base, *others]]
    assert all(not torch.equal(ends[0], other) for other in ends[1:])


def test_epochs_see_the_images_in_different_orders_and_batchnorm_in_training_mode() -> None:
    orders: list[Tensor] = []
    modes: list[bool] = []

    def watch(net: Classifier, batch: object, needs: object) -> dict[str, Tensor]:
        orders.append(batch.x.flatten(1).sum(1).clone())  # type: ignore[attr-defined]
        modes.append(net.training)
        return {"ce": torch.nn.functional.cross_entropy(net(batch.x), batch.y)}  # type: ignore[attr-defined]

    _, log = train(Recipe(epochs=2, batch=16, lr=0.01), replace(TASK, architecture="resnet20"), watch)
    assert all(modes) and [len(rows) for rows in orders] == [16, 16]  # a last step of one image is left out
    assert not torch.equal(orders[0], orders[1])
    assert len(log) == 2


def test_validation_accuracy_is_of_validation_images() -> None:
    _, log = train(Recipe(epochs=2, batch=4, lr=0.05))
    assert log[-1]["validation_accuracy"] == pytest.approx(0.25)  # all training labels are 1, a quarter of validation's


def test_convolution_biases_start_at_zero() -> None:
    assert not network(TASK, generator(1)).body[0].bias.any()
    assert (
        stats.kstest(
            network(TASK, generator(1)).body[-1].weight.flatten().tolist(), stats.uniform(-(84**-0.5), 2 * 84**-0.5).cdf
        ).pvalue
        > 1e-4
    )
