"""Members trained together, ADP and GAL: the numbers of methods 4.1 to 4.3, gradients against differences, exact baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_nets import GREY
from test_training import Bench, resumed, task
from torch import Tensor, nn

from attacks.streams import generator
from defenses.adp import AdaptiveDiversity, Adp, adp, entropy, log_diversity
from defenses.api import Classifier, Part, Task, Weights
from defenses.combine import Mean
from defenses.dispersed import deg
from defenses.edlcm import edlcm
from defenses.ensemble import Ensemble
from defenses.gal import Gal, GradientAlignment, alignment, gal
from defenses.joint import TrainedTogether, cross_entropies, input_gradients, pair_cosines
from defenses.naive import Naive, naive, plain
from defenses.nets import ARCHITECTURES, Network, Normalise, leaky, network
from defenses.smd import smd
from defenses.training import Batch, TrainingDiverged


class Fixed(Classifier):
    """The same logits for every image; they are its parameter."""

    def __init__(self, logits: Sequence[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


class Linear(Classifier):
    """One linear layer on the pixels."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def fixed(*probabilities: Sequence[float]) -> Ensemble:
    """Members with these softmaxes."""
    return Ensemble([Fixed(torch.tensor(p, dtype=torch.float64).log().tolist()) for p in probabilities], Mean())


def smooth(members: int = 3, classes: int = 4) -> Ensemble:
    """Tiny float64 networks without kinks, about 80 parameters each."""
    nets = []
    for member in range(members):
        body = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, classes)
        )
        gen = generator(0, "smooth", member)
        for p in body.parameters():
            p.data = torch.randn(p.shape, generator=gen) * 0.7
        nets.append(Network(Normalise([0.5], [0.5]), body, "smooth"))
    return Ensemble(nets, Mean()).double()


def batch(n: int = 3, classes: int = 4, side: int = 6, seed: int = 0) -> Batch:
    """Random float64 images for :func:`smooth`; a fresh generator every time."""
    gen = generator(seed, "batch")
    x = torch.rand(n, 1, side, side, generator=gen, dtype=torch.float64)
    return Batch(x, torch.arange(n) % classes, generator(seed, "own"))


def assert_gradients(net: nn.Module, value: Callable[[], Tensor], step: float = 1e-5) -> None:
    """Every derivative of ``value()`` by a parameter is the central difference."""
    parameters = list(net.parameters())
    found = torch.autograd.grad(value(), parameters)
    for parameter, gradient in zip(parameters, found):
        flat = parameter.data.view(-1)
        for place in range(len(flat)):
            kept = float(flat[place])
            values = []
            for moved in (kept + step, kept - step):
                flat[place] = moved
                values.append(value().item())
            flat[place] = kept
            expected = (values[0] - values[1]) / (2 * step)
            assert float(gradient.reshape(-1)[place]) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


def vectors(*rows: Sequence[float]) -> Tensor:
    """One image's gradients (m 1 d)."""
    return torch.tensor(rows, dtype=torch.float64).unsqueeze(1)


def at(*degrees: float) -> Tensor:
    return vectors(*[(math.cos(math.radians(d)), math.sin(math.radians(d))) for d in degrees])


# What the members have in common (methods 4.1)


def test_sum_of_cross_entropies_and_score_of_the_mean() -> None:
    net = fixed((0.5, 0.5), (0.25, 0.75))
    logits = net.member_logits(torch.zeros(1, 1, 2, 2))
    assert cross_entropies(list(logits), torch.tensor([0])).sum().item() == pytest.approx(2.079442, abs=1e-6)
    assert net(torch.zeros(1, 1, 2, 2))[0, 0].item() == pytest.approx(-0.980829, abs=1e-6)


def test_label_smoothing_reaches_every_member() -> None:
    logits = torch.randn(3, 5, 4, generator=generator(0))
    y = torch.tensor([0, 1, 2, 3, 0])
    expected = [F.cross_entropy(own, y, label_smoothing=0.1) for own in logits]
    assert torch.equal(cross_entropies(list(logits), y, 0.1), torch.stack(expected))


def test_input_gradients_are_those_of_one_image_and_one_member() -> None:
    one = task()
    nets = [network(one, generator(member)) for member in range(3)]
    x, y = one.train.floats(slice(0, 7)), one.train.labels[:7]
    logits, found = input_gradients(nets, x, lambda own: F.cross_entropy(own, y, reduction="none"))
    assert found.shape == (3, 7, 28 * 28) and found.requires_grad
    for member, net in enumerate(nets):
        assert torch.equal(logits[member], net(x))
        for image in range(7):
            leaf = x[image : image + 1].clone().requires_grad_()
            F.cross_entropy(net(leaf), y[image : image + 1]).backward()
            torch.testing.assert_close(found[member, image], leaf.grad.flatten(), rtol=1e-4, atol=1e-7)
    few, _ = input_gradients(nets, x[:2], lambda own: F.cross_entropy(own, y[:2], reduction="none"))
    assert few[0].shape == (2, 10) and not x.requires_grad


def test_cosines_of_all_pairs_in_order() -> None:
    found = pair_cosines(at(0, 60, 90)).flatten()
    assert found.tolist() == pytest.approx([0.5, 0, 3**0.5 / 2])
    big = torch.randn(4, 6, 9, generator=generator(0), dtype=torch.float64)
    expected = [F.cosine_similarity(big[a], big[b], dim=-1) for a in range(4) for b in range(a + 1, 4)]
    torch.testing.assert_close(pair_cosines(big), torch.stack(expected))


def test_cosine_of_a_zero_vector_is_zero_with_finite_gradients() -> None:
    weight = vectors((0.0, 0.0), (1.0, 2.0), (3.0, -1.0)).requires_grad_()
    cosines = pair_cosines(weight)
    assert cosines[:2].tolist() == [[0.0], [0.0]] and cosines[2].item() != 0
    (found,) = torch.autograd.grad(cosines.sum(), weight)
    assert found.isfinite().all()


# ADP (methods 4.2)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (((0.7, 0.3, 0, 0), (0.7, 0, 0.3, 0), (0.7, 0, 0, 0.3)), 3.0000e-06),
        (((0.7, 0.1, 0.1, 0.1), (0.4, 0.2, 0.2, 0.2), (0.1, 0.3, 0.3, 0.3)), -26.532408),
        (((0.5, 0.5, 0), (0.3, 0.3, 0.4)), -0.446284),
        (((0.7, 0.2, 0.1, 0), (0.6, 0.1, 0.1, 0.2)), -0.356672),
    ],
)
def test_log_diversity(p: Any, expected: float) -> None:
    found = log_diversity(torch.tensor(p, dtype=torch.float64).unsqueeze(1), torch.tensor([0]))
    assert found.tolist() == pytest.approx([expected], abs=1e-6, rel=1e-4 if abs(expected) < 1e-5 else 1e-6)


def test_the_true_class_is_left_out_even_if_it_is_not_the_largest() -> None:
    p = torch.tensor([[0.1, 0.8, 0.1], [0.2, 0.1, 0.7]], dtype=torch.float64).unsqueeze(1)
    by_hand = 0.8 * 0.1 + 0.1 * 0.7
    cosine = by_hand / (math.hypot(0.8, 0.1) * math.hypot(0.1, 0.7))
    assert float(log_diversity(p, torch.tensor([0]))) == pytest.approx(math.log((1 + 1e-6) ** 2 - cosine**2))


def test_entropy_of_a_uniform_and_of_a_certain_mean() -> None:
    p = torch.stack([torch.full((10,), 0.1), torch.eye(10)[3]])
    assert entropy(p).tolist() == pytest.approx([math.log(10), 0], abs=1e-6)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (((0.7, 0.2, 0.1, 0), (0.6, 0.1, 0.1, 0.2)), {"ce": 0.867501, "entropy": -2 * 1.025094, "diversity": 0.5 * 0.356672}),
        (((0.7, 0.3, 0, 0), (0.7, 0, 0.3, 0)), {}),
    ],
)
def test_adp_loss_of_four_classes(p: Any, expected: dict[str, float]) -> None:
    one = Batch(torch.zeros(1, 1, 2, 2), torch.tensor([0]), generator(0))
    parts = AdaptiveDiversity(2.0, 0.5)(fixed(*p), one, [])
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value, abs=2e-6)
    assert total(parts).item() == pytest.approx(-1.004351 if expected else -0.924268, abs=1e-6)


def test_adp_is_a_mean_over_the_batch() -> None:
    net, loss = smooth(), AdaptiveDiversity(2.0, 0.5)
    whole = batch(3)
    single = [total(loss(net, replace(whole, x=whole.x[i : i + 1], y=whole.y[i : i + 1]), [])) for i in range(3)]
    assert total(loss(net, whole, [])).item() == pytest.approx(torch.stack(single).mean().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adp_of_very_confident_members_is_finite(dtype: torch.dtype) -> None:
    sure = [[200.0, 0, 0, 0], [0, 200.0, 0, 0], [-200.0, 0, 100.0, 0]]
    net = Ensemble([Fixed(logits) for logits in sure], Mean()).to(dtype)
    for truth in range(4):
        one = Batch(torch.zeros(2, 1, 2, 2), torch.tensor([truth, 0]), generator(0))
        parts = AdaptiveDiversity(2.0, 0.5)(net, one, [])
        gradients = torch.autograd.grad(total(parts), list(net.parameters()))
        assert all(value.isfinite() for value in parts.values())
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_adp_needs_more_classes_than_members() -> None:
    p = torch.full((3, 2, 3), 1 / 3)
    with pytest.raises(ValueError, match="diversity of 3 members needs 4 classes, there are 3"):
        log_diversity(p, torch.tensor([0, 1]))
    assert log_diversity(torch.full((3, 2, 4), 0.25), torch.tensor([0, 1])).shape == (2,)
    with pytest.raises(ValueError, match="needs 5 classes"):
        AdaptiveDiversity(2.0, 0.5)(smooth(members=4), batch(), [])


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_gradients_of_adp_are_central_differences(alpha: float, beta: float) -> None:
    net, loss = smooth(), AdaptiveDiversity(alpha, beta)
    assert_gradients(net, lambda: total(loss(net, batch(), [])))


# GAL (methods 4.3)


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        (at(30, 30, 30), 2.098612),
        (vectors((1, 0, 0), (0, 2, 0), (0, 0, 3)), 1.098612),
        (at(0, 120, 240), 0.598612),
        (at(10, 190), -1),
        (at(0, 0, 90), 1.551445),
        (at(0, 45, 90), 1.620621),
    ],
)
def test_alignment(gradients: Tensor, expected: float) -> None:
    assert float(alignment(gradients)) == pytest.approx(expected, abs=1e-6)
    assert float(alignment(gradients * torch.tensor([5.0, 0.1, 2])[: len(gradients), None, None])) == pytest.approx(expected)


@given(st.integers(2, 6), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_alignment_is_a_smooth_maximum_of_the_cosines(members: int, seed: int) -> None:
    gradients = torch.randn(members, 4, 5, generator=generator(seed), dtype=torch.float64)
    largest = pair_cosines(gradients).amax(0)
    found = alignment(gradients)
    assert (found >= largest - 1e-12).all()
    assert (found <= largest + math.log(members * (members - 1) / 2) + 1e-12).all()


def test_gal_of_very_confident_members_is_finite() -> None:
    gen = generator(0)
    net = Ensemble([Linear(torch.randn(4, 36, generator=gen) * 100) for _ in range(3)], Mean())
    one = batch(6)
    one = replace(one, x=one.x.float(), y=net.member_logits(one.x.float())[0].argmax(-1))
    parts = GradientAlignment(0.5, 0.0)(net, one, [])
    gradients = torch.autograd.grad(total(parts), list(net.parameters()))
    assert all(value.isfinite() for value in parts.values())
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_gradients_of_gal_are_central_differences(noise: float) -> None:
    net, loss = smooth(), GradientAlignment(0.5, noise)
    assert_gradients(net, lambda: total(loss(net, batch(), [])))


def test_half_of_the_batches_carry_the_same_noise_for_all_members() -> None:
    seen: list[Tensor] = []

    class Spy(Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return super().forward(x)

    net = Ensemble([Spy(torch.randn(4, 36, generator=generator(m), dtype=torch.float64)) for m in range(2)], Mean())
    one, before = batch(), torch.random.get_rng_state()
    for _ in range(200):
        GradientAlignment(0.5, 0.045)(net, one, [])
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = list(zip(seen[::2], seen[1::2]))
    assert all(torch.equal(a, b) for a, b in pairs)
    moved = [a - one.x for a, _ in pairs if not torch.equal(a, one.x)]
    assert 70 < len(moved) < 130
    assert float(torch.stack(moved).std()) == pytest.approx(0.045, rel=0.05)  # not clipped to the pixels' range


def test_the_regulariser_alone_moves_the_first_convolution() -> None:
    one = task()
    net = gal.build(one).train()
    parts = GradientAlignment(0.5, 0.0)(net, Batch(one.train.floats(slice(0, 8)), one.train.labels[:8], generator(0)), [])
    parts["alignment"].backward()
    for member in net.members:
        assert float(member.body[0].weight.grad.abs().max()) > 0


def test_gal_without_alignment_has_the_naive_gradients_over_the_number_of_members() -> None:
    one = task()
    defense = Gal(weight=0.0, noise=0.0, leak=0.0)
    net = defense.build(one).train()
    x, y = one.train.floats(slice(0, 16)), one.train.labels[:16]
    parts = defense.loss(one)(net, Batch(x, y, generator(0)), [])
    found = torch.autograd.grad(total(parts), list(net.parameters()))
    logits = net.member_logits(x)
    alone = torch.autograd.grad(torch.stack([F.cross_entropy(own, y) for own in logits]).sum(), list(net.parameters()))
    for a, b in zip(found, alone):
        torch.testing.assert_close(a, b / 3, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_leaky_replaces_every_relu(architecture: str) -> None:
    shape = (1, 28, 28) if architecture in GREY else (3, 32, 32)
    one = task(shape, architecture, 20)
    net = network(one, generator(0))
    kinks = sum(isinstance(module, nn.ReLU) for module in net.modules())
    x = one.train.floats(slice(0, 2))
    with torch.inference_mode():
        before = net(x)
        leaky(net, 0.0)
        assert torch.equal(net(x), before) and kinks
        leaky(net, 0.1)
        assert not torch.allclose(net(x), before)
    slopes = [module.negative_slope for module in net.modules() if isinstance(module, nn.LeakyReLU)]
    assert slopes == [0.1] * kinks
    assert not any(isinstance(module, nn.ReLU) for module in net.modules())


def test_members_of_gal_leak_and_those_of_adp_do_not() -> None:
    one = task()
    assert any(isinstance(module, nn.LeakyReLU) for module in gal.build(one).modules())
    assert not any(isinstance(module, nn.LeakyReLU) for module in adp.build(one).modules())


# Training


class Shelf:
    """Parts in memory, made at the first request."""

    def __init__(self, one: Task) -> None:
        self.task = one
        self.made: dict[str, Weights] = {}

    def get(self, part: Part) -> Weights:
        key = part.key(self.task)
        if key not in self.made:
            self.made[key] = part.make(self.task, [self.get(need) for need in part.needs], Bench())
        return self.made[key]


def recipe(**changes: Any) -> Task:
    one = task()
    return replace(one, recipe=replace(one.recipe, **changes))


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def member(weights: Weights, index: int) -> Weights:
    prefix = f"networks.{index}."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


@pytest.mark.parametrize(
    "changes", [{"optimizer": "adam", "lr": 1e-3, "augment": "crop_flip"}, {"nesterov": True, "label_smoothing": 0.1}]
)
def test_adp_without_its_terms_gives_the_naive_networks_bit_for_bit(changes: dict[str, Any]) -> None:
    one = recipe(epochs=2, **changes)
    if "label_smoothing" in changes:  # the naive members see it through the recipe, too
        assert plain(one, 0, 0).recipe.label_smoothing == 0.1
    together = Adp(alpha=0.0, beta=0.0).part(one, seed=3).make(one, [], Bench())
    for index in range(3):
        assert same(member(together, index), plain(one, 3, index).make(one, [], Bench()))


def test_the_order_of_images_is_that_of_the_naive_members_and_own_noise_another_stream() -> None:
    one = task()
    for epoch in (0, 1):
        order, own = gal.part(one, 3).generators(epoch, one.device)
        assert order.initial_seed() == plain(one, 3, 1).generators(epoch, one.device)[0].initial_seed()
        assert own.initial_seed() != order.initial_seed()
    seeds = {gal.part(one, seed).generators(epoch, one.device)[1].initial_seed() for seed in (0, 1) for epoch in (0, 1)}
    assert len(seeds) == 4


def test_untrained_members_begin_as_the_naive_ones_and_needs_take_their_place() -> None:
    one = recipe(epochs=0)
    begun = Adp(members=2).part(one, seed=5).make(one, [], Bench())
    naive_ones = [plain(one, 5, index).make(one, [], Bench()) for index in range(2)]
    assert all(same(member(begun, index), naive_ones[index]) for index in range(2))
    given_ones = Adp(members=2).part(one, seed=5).make(one, naive_ones[::-1], Bench())
    assert all(same(member(given_ones, index), naive_ones[1 - index]) for index in range(2))
    with pytest.raises(ValueError, match="zip"):
        Adp(members=2).part(one, seed=5).make(one, naive_ones[:1], Bench())


def test_a_smaller_naive_ensemble_is_the_beginning_of_a_larger_one() -> None:
    one = recipe(epochs=1)
    shelf = Shelf(one)
    states = []
    for members in (3, 2):
        model = Naive(members=members).build(one)
        Naive(members=members).fit(model, one, shelf, 0)
        states.append(model.state_dict())
    assert len(shelf.made) == 3
    assert all(same(member(states[0], index), member(states[1], index)) for index in range(2))
    assert not same(member(states[0], 0), member(states[0], 1))
    assert naive == Naive(members=3)


@pytest.mark.parametrize(("defense", "parts"), [(adp, {"ce", "entropy", "diversity"}), (gal, {"ce", "alignment"})])
def test_the_log_has_loss_parts_accuracy_and_robustness_of_every_epoch(defense: TrainedTogether, parts: set[str]) -> None:
    one, bench = recipe(epochs=2, optimizer="adam"), Bench()
    defense.part(one, 0).make(one, [], bench)
    facts = {"epoch", "lr", "loss", "validation_accuracy", "validation_robust", "seconds"}
    assert [set(log) for log in bench.reports] == [parts | facts] * 2
    for log in bench.reports:
        assert log["loss"] == pytest.approx(sum(log[name] for name in parts), rel=1e-5)
        assert 0 <= log["validation_robust"] <= log["validation_accuracy"] + 1e-6 <= 1 + 1e-6


@pytest.mark.parametrize("defense", [adp, gal])
def test_continued_training_ends_with_the_same_bits(defense: TrainedTogether) -> None:
    one = recipe(epochs=3, optimizer="adam")
    assert len(resumed(defense.part(one, 0), one).reports) == 2


def test_the_fitted_model_has_the_trained_weights_and_another_seed_gives_others() -> None:
    one = recipe(epochs=1)
    shelf = Shelf(one)
    models = [gal.build(one) for _ in range(2)]
    for seed, model in enumerate(models):
        gal.fit(model, one, shelf, seed)
        assert same(model.state_dict(), shelf.get(gal.part(one, seed)))
    assert not same(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize("defense", [adp, gal])
def test_a_diverging_run_says_which_part(defense: TrainedTogether) -> None:
    one = recipe(lr=1e6)
    name = type(defense).__name__.lower()
    with pytest.raises(TrainingDiverged, match=rf"{name} 0 \(seed 0\): .*not finite in epoch \d of 4 at learning rate 1e\+06"):
        defense.part(one, 0).make(one, [], Bench())


def test_impossible_numbers_of_members_are_refused() -> None:
    with pytest.raises(ValueError, match="members: at least 1, got 0"):
        Adp(members=0)
    with pytest.raises(ValueError, match="in pairs, so at least 2, got 1"):
        Gal(members=1)


@pytest.mark.parametrize("defense", [gal, replace(gal, eat=True), smd, deg], ids=["gal", "gal+eat", "smd", "deg"])
def test_second_order_losses_train_normalised_networks_with_channels_first(defense: Any) -> None:
    """Only the layout differs from the ensemble that is attacked: the same weights, and the same gradients but for rounding."""
    one = task((3, 32, 32), "resnet20", 20)
    begun, usual = defense.part(one, 0).untrained(one), defense.build(one)
    usual.load_state_dict(begun.state_dict())
    found = []
    for net, last in ((begun, False), (usual, True)):
        net.double().train()
        weight = net.members[0].body[0].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == last and weight.is_contiguous() != last
        batch = Batch(one.train.floats(slice(0, 6)).double(), one.train.labels[:6], generator(0))
        found.append(torch.autograd.grad(total(defense.loss(one)(net, batch, [])), list(net.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("defense", "architecture"),
    [(gal, "lenet5"), (naive, "resnet20"), (edlcm, "resnet20"), (replace(deg, beta=0.0), "resnet20")],
)
def test_other_trainings_keep_channels_last(defense: Any, architecture: str) -> None:
    one = task((3, 32, 32), architecture, 20)
    weight = defense.part(one, 0).untrained(one).members[0].body[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
