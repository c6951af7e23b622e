"""The training loop, networks and recipes: exact continuation, honest divergence, true augmentation (methods 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.streams import generator
from defenses.api import Images, Part, Recipe, Task, Weights
from defenses.nets import ARCHITECTURES, network
from defenses.recipe import settings
from defenses.training import CrossEntropy, Trained, TrainingDiverged, augment


def task(shape: tuple[int, int, int] = (1, 28, 28), architecture: str = "lenet5", n: int = 48) -> Task:
    gen = generator(0, "training test")
    labels = torch.randint(0, 10, (n,), generator=gen)
    pixels = torch.randint(0, 100, (n, *shape), generator=gen, dtype=torch.uint8)
    pixels[:, :, :5, :5] += (labels * 15).to(torch.uint8).view(-1, 1, 1, 1)
    images = Images(pixels, labels, torch.arange(n), "random")
    mean = (0.5,) * shape[0]
    return Task("random", images, images.first(20), 10, mean, mean, architecture, Recipe(epochs=4, batch=16, lr=0.01))


class Bench:
    """A workshop in memory that can stop the work after some checkpoints."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.kept: tuple[Weights, dict[str, Any]] | None = None
        self.stop_after = stop_after
        self.reports: list[dict[str, float]] = []

    def load(self) -> tuple[Weights, dict[str, Any]] | None:
        return self.kept

    def save(self, weights: Weights, state: dict[str, Any]) -> None:
        self.kept = {name: tensor.detach().clone() for name, tensor in weights.items()}, {"log": list(state["log"])}
        self.stop_after -= 1
        if self.stop_after == 0:
            raise KeyboardInterrupt

    def report(self, done: int, total: int, facts: dict[str, float]) -> None:
        self.reports.append(facts)


def resumed(part: Part, one: Task, needs: Sequence[Weights] = (), stop_after: int = 1) -> Bench:
    """Make a part at once, and again with a stop, and assert that both end with the same bits and touch no global randomness.

    Returns:
        the workshop, with the reports after the stop.
    """
    before = torch.random.get_rng_state()
    whole = part.make(one, needs, Bench())
    bench = Bench(stop_after)
    with pytest.raises(KeyboardInterrupt):
        part.make(one, needs, bench)
    bench.reports.clear()
    again = part.make(one, needs, bench)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert torch.equal(before, torch.random.get_rng_state())
    return bench


def part(one: Task, **recipe: Any) -> Trained:
    changed = replace(one.recipe, **recipe)
    return Trained(role="plain", seed=0, architecture=one.architecture, recipe=changed, loss=CrossEntropy(sigma=0.1))


@pytest.mark.parametrize("recipe", [{"optimizer": "adam"}, {"optimizer": "sgd", "nesterov": True, "decay_at": (0.5,)}])
@pytest.mark.parametrize("stop", [1, 3])
def test_continued_training_ends_with_the_same_bits(recipe: dict[str, Any], stop: int) -> None:
    one = task()
    assert len(resumed(part(one, **recipe), one, stop_after=stop).reports) == 4 - stop


def test_batchnorm_statistics_continue_too() -> None:
    one = task((3, 32, 32), "resnet20")
    resumed(part(one, epochs=2), one)


def test_training_lowers_the_loss_and_reports_every_epoch() -> None:
    one, bench = task(), Bench()
    part(one, optimizer="adam", epochs=30).make(one, [], bench)
    assert bench.reports[-1]["loss"] < 0.5 * bench.reports[0]["loss"]
    assert {"epoch", "lr", "ce", "loss", "validation_accuracy", "seconds"} <= bench.reports[0].keys()


def test_seed_and_member_decide_the_network() -> None:
    one = task()
    weights = [
        replace(part(one, epochs=1), seed=s, member=m).make(one, [], Bench()) for s, m in [(0, 0), (0, 0), (1, 0), (0, 1)]
    ]
    first = [w["body.0.weight"] for w in weights]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2]) and not torch.equal(first[0], first[3])


def test_divergence_names_part_epoch_rate_and_remedy() -> None:
    one = task()
    with pytest.raises(TrainingDiverged, match=r"plain 0 \(seed 0\).*not finite in epoch 1 of 4.*1e\+30; lower recipe\.lr"):
        part(one, lr=1e30).make(one, [], Bench())


def test_global_generators_are_untouched() -> None:
    one, before = task(), torch.random.get_rng_state()
    part(one, epochs=1, augment="crop_flip").make(one, [], Bench())
    assert torch.equal(before, torch.random.get_rng_state())


def test_unknown_optimizer_and_architecture_are_refused() -> None:
    one = task()
    with pytest.raises(ValueError, match="unknown optimizer 'lion'"):
        part(one, optimizer="lion").make(one, [], Bench())
    with pytest.raises(ValueError, match="unknown architecture 'lenet6'"):
        network(one, architecture="lenet6")


def test_the_rate_follows_shares_of_the_epochs() -> None:
    recipe = Recipe(epochs=90, lr=0.1, decay_at=(1 / 3, 2 / 3))
    assert [round(recipe.rate(e), 6) for e in (0, 29, 30, 59, 60, 89)] == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    short = Recipe(epochs=9, lr=0.1, decay_at=(1 / 3, 2 / 3))
    assert [round(short.rate(e), 6) for e in (2, 3, 6)] == [0.1, 0.01, 0.001]


def test_a_cosine_goes_from_the_first_rate_to_the_last() -> None:
    """Halfway it is their mean; torch's scheduler with eta_min gives the same rate in every epoch."""
    recipe = Recipe(epochs=40, lr=0.02, schedule="cosine", final_lr=1e-4)
    assert recipe.rate(0) == 0.02 and recipe.rate(20) == pytest.approx((0.02 + 1e-4) / 2)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, eta_min=1e-4)
    for epoch in range(40):
        assert recipe.rate(epoch) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"schedule": "linear"}, "schedule: unknown 'linear'; known are steps, cosine"),
        ({"schedule": "cosine", "decay_at": (0.5,)}, "decay_at: steps belong to the schedule 'steps'"),
        ({"final_lr": 1e-4}, "final_lr: where the schedule 'cosine' ends"),
    ],
)
def test_a_schedule_takes_only_its_own_settings(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Recipe(epochs=2, **fields)


def test_a_field_that_came_later_leaves_old_keys_as_they_are() -> None:
    one = task()
    old, new = part(one), part(one, schedule="cosine")
    assert "schedule" not in settings(old.recipe) and settings(new.recipe)["schedule"] == "cosine"
    assert "schedule" not in str(old.identity(one)) and old.key(one) != new.key(one)


def windows(image: Tensor) -> list[Tensor]:
    """All crops of the padded image, as they are and flipped."""
    padded = nn.functional.pad(image, (4, 4, 4, 4))
    h, w = image.shape[1:]
    crops = [padded[:, i : i + h, j : j + w] for i in range(9) for j in range(9)]
    return crops + [crop.flip(2) for crop in crops]


def test_crop_and_flip_gives_windows_of_the_padded_image() -> None:
    x = torch.rand(40, 3, 12, 10, generator=generator(1))
    out = augment(x, "crop_flip", generator(2))
    which = [next(i for i, window in enumerate(windows(image)) if torch.equal(window, found)) for image, found in zip(x, out)]
    assert len(set(which)) > 25  # every image is cut by itself
    assert 8 < sum(i >= 81 for i in which) < 32
    assert torch.equal(out, augment(x, "crop_flip", generator(2)))
    assert augment(x, "none", generator(2)) is x
    with pytest.raises(ValueError, match="unknown augmentation 'cutout'"):
        augment(x, "cutout", generator(2))


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("architecture", "shape", "parameters"),
    [
        ("lenet5", (1, 28, 28), 61_706),
        ("resnet18", (3, 32, 32), 11_173_962),
        ("resnet20", (3, 32, 32), 272_474),
        ("resnet110", (3, 32, 32), 1_730_714),
    ],
)
def test_networks_have_the_known_number_of_parameters(architecture: str, shape: tuple[int, int, int], parameters: int) -> None:
    """Known counts: 272,474 = 269,722 with identity shortcuts plus two 1x1 convolutions with BatchNorm (2,752)."""
    net = network(task(shape, architecture, 20))
    assert count(net) == parameters
    assert net(torch.rand(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_normalisation_is_the_first_layer(architecture: str) -> None:
    one = task((3, 32, 32), architecture, 20)
    other = replace(one, mean=(0.25,) * 3, std=(0.25,) * 3)
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        plain, scaled = network(one), network(other)
        assert torch.allclose(plain(0.5 + 0.5 * x), scaled(0.25 + 0.25 * x), atol=1e-4)


def test_weights_come_from_the_generator_alone() -> None:
    one, before = task((3, 32, 32), "resnet20", 20), torch.random.get_rng_state()
    a, b, c = (network(one, generator(s)).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["body.0.weight"], c["body.0.weight"])
    assert torch.equal(before, torch.random.get_rng_state())
    fan_out = 16 * 9
    assert a["body.0.weight"].std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
