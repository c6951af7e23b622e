"""DVERGE, SMD and SMD+: the numbers of methods 4.4 to 4.6, exact gradients, crafting without a trace, all networks' layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_training import Bench, resumed
from torch import Tensor, nn

from attacks.streams import generator
from bench.registry import resolve
from bench.request import Request
from bench.runner import Run
from defenses.api import Images, Recipe, Task
from defenses.combine import Mean
from defenses.dverge import (
    CRAFT_BN,
    Dverge,
    SmdPlus,
    VulnerabilityAndSaliency,
    VulnerabilityDiversity,
    crafting,
    distil,
    transferred,
)
from defenses.ensemble import Ensemble
from defenses.features import ACTIVATIONS, features, layers
from defenses.gal import GradientAlignment, alignment
from defenses.joint import input_gradients
from defenses.nets import ARCHITECTURES, BasicBlock, Network, Normalise, network
from defenses.smd import SALIENCIES, SaliencyDiversity, Smd
from defenses.training import Batch

Loss = Callable[[Ensemble, Batch, Sequence[Network]], dict[str, Tensor]]


def task(architecture: str = "lenet5", n: int = 40, shape: tuple[int, int, int] = (3, 32, 32)) -> Task:
    gen = generator(0, "dverge test")
    labels = torch.randint(0, 10, (n,), generator=gen)
    pixels = torch.randint(0, 256, (n, *shape), generator=gen, dtype=torch.uint8)
    images = Images(pixels, labels, torch.arange(n), "random")
    mean = (0.5,) * shape[0]
    return Task("random", images, images.first(20), 10, mean, mean, architecture, Recipe(epochs=2, batch=16, lr=0.01))


def smooth(seed: int, norm: bool = False) -> Network:
    """A float64 network of 1x6x6 images and four classes without kinks, so that finite differences tell the truth."""
    layer = [nn.BatchNorm2d(3)] if norm else []
    body = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), *layer, nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Softplus(), nn.Linear(5, 4)
    )
    gen = generator(seed, "smooth")
    with torch.no_grad():
        for weight in body.parameters():
            weight.normal_(0, 0.6, generator=gen)
    return Network(Normalise((0.5,), (0.25,)), body, "smooth").double()


def ensemble(members: int = 3, norm: bool = False) -> Ensemble:
    return Ensemble([smooth(member, norm) for member in range(members)], Mean()).train()


def batch(n: int = 5, seed: int = 0) -> Batch:
    gen = generator(seed, "batch")
    x, other = torch.rand(2, n, 1, 6, 6, generator=gen).double()
    y, y_other = torch.randint(0, 4, (2, n), generator=gen)
    return Batch(x, y, gen, partner=lambda: (other, y_other))


def total(loss: Loss, net: Ensemble, seen: Batch) -> Tensor:
    return torch.stack(list(loss(net, seen, []).values())).sum()


def gradients(value: Tensor, net: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(net.parameters()), materialize_grads=True))


# The diversity of saliency maps (methods 4.5)


def test_diversity_has_the_values_of_the_methods_reference() -> None:
    same, apart = torch.ones(1, 1, 8).double(), torch.eye(8).double().unsqueeze(1)
    assert alignment(same.expand(2, 1, 8)).item() == pytest.approx(1, abs=1e-6)
    assert alignment(same.expand(3, 1, 8)).item() == pytest.approx(2.098612, abs=1e-6)
    assert alignment(same.expand(5, 1, 8)).item() == pytest.approx(3.302585, abs=1e-6)
    assert alignment(apart[:3]).item() == pytest.approx(1.098612, abs=1e-6)


def betas(s: Tensor, member: int) -> dict[int, float]:
    """beta_j of eq. 4 for unit vectors (m d), from its definition."""
    exp = torch.exp(s @ s.T)
    pairs = sum(exp[a, b].item() for a in range(len(s)) for b in range(a + 1, len(s)))
    return {j: exp[member, j].item() / pairs for j in range(len(s)) if j != member}


def test_a_member_is_pushed_away_from_the_others_by_beta() -> None:
    s = torch.eye(3).double()[[0, 0, 1]]
    assert betas(s, 0) == pytest.approx({1: 0.576117, 2: 0.211942}, abs=1e-6)
    raw = torch.randn(4, 1, 6, generator=generator(3)).double().requires_grad_()
    (found,) = torch.autograd.grad(alignment(raw).sum(), raw)
    unit = F.normalize(raw.detach().squeeze(1), dim=-1)
    for member, own in enumerate(unit):
        wanted = sum(beta * (unit[j] - (unit[j] @ own) * own) for j, beta in betas(unit, member).items())
        assert torch.allclose(found[member, 0], wanted / raw[member].norm(), atol=1e-12)


def test_saliencies_of_a_linear_model() -> None:
    x, y = torch.zeros(1, 2), torch.tensor([0])
    scores = {**SALIENCIES, "ce": lambda logits, y: F.cross_entropy(logits, y, reduction="none")}
    found = {}
    for name, score in scores.items():
        _, gradient = input_gradients([nn.Identity()], x, lambda own, score=score: score(own, y))  # type: ignore[misc, list-item]
        found[name] = gradient.flatten().tolist()
    assert found == {"logit": [1, 0], "prob": [0.25, -0.25], "ce": [-0.5, 0.5]}


def test_saliencies_of_probabilities_are_gradient_alignment() -> None:
    """Where images are independent. In training BatchNorm mixes their gradients, and probabilities weight the mixture."""
    net, seen = ensemble(norm=True).eval(), batch()
    ours = SaliencyDiversity(1.0, "prob")(net, seen, [])
    gal = GradientAlignment(1.0, 0.0)(net, seen, [])
    assert ours["ce"].item() == gal["ce"].item()
    assert ours["diversity"].item() == pytest.approx(gal["alignment"].item(), abs=1e-10)
    for a, b in zip(gradients(ours["diversity"], net), gradients(gal["alignment"], net), strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    logit = SaliencyDiversity(1.0, "logit")(net, seen, [])["diversity"]
    assert abs(logit.item() - gal["alignment"].item()) > 1e-3


@pytest.mark.parametrize("saliency", SALIENCIES)
def test_without_weight_smd_is_the_members_mean_cross_entropy(saliency: str) -> None:
    net, seen = ensemble(), batch()
    value = total(SaliencyDiversity(0.0, saliency), net, seen)
    wanted = torch.stack([F.cross_entropy(member(seen.x), seen.y) for member in net.members]).mean()
    assert value.item() == pytest.approx(wanted.item(), abs=1e-12)
    for a, b in zip(gradients(value, net), gradients(wanted, net), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_diversity_alone_reaches_the_first_convolution_of_every_member() -> None:
    net = Ensemble([network(task(), generator(member)) for member in range(2)], Mean()).train()
    x = task().train.floats(slice(0, 4))
    SaliencyDiversity(1.0, "logit")(net, Batch(x, torch.arange(4), generator(0)), [])["diversity"].backward()
    found = [dict(member.named_parameters())["body.0.weight"].grad for member in net.members]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found)


# Gradients with respect to the weights


LOSSES: dict[str, Loss] = {
    "smd": SaliencyDiversity(1.0, "logit"),
    "smd of probabilities": SaliencyDiversity(1.0, "prob"),
    "dverge": VulnerabilityDiversity(0.07),
    "smd_plus": VulnerabilityAndSaliency(0.07, weight=0.7),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """Whole losses, crafting included: its steps are signs, which a small change of a weight leaves as they are."""
    net, seen, step = ensemble(), batch(), 1e-5
    found = gradients(total(LOSSES[name], net, seen), net)
    for weight, gradient in zip(net.parameters(), found, strict=True):
        for place in range(0, weight.numel(), max(1, weight.numel() // 3)):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    weight.view(-1)[place] += sign * step
                values.append(total(LOSSES[name], net, seen).item())
                with torch.no_grad():
                    weight.view(-1)[place] -= sign * step
            assert gradient.view(-1)[place].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-7)


# Distillation (methods 4.4)


@pytest.mark.parametrize(("target", "found"), [(0.8, 0.27), (0.22, 0.207), (0.2, 0.2)])
def test_a_scalar_feature_is_distilled_as_in_the_methods_reference(target: float, found: float) -> None:
    x, other = torch.tensor([[[0.2]], [[target]]], dtype=torch.float64)
    assert distil(lambda z: z, x, other, 0.07).item() == pytest.approx(found, abs=1e-12)


def test_distilled_images_stay_in_the_ball_and_the_box() -> None:
    x, target = torch.rand(2, 6, 1, 4, 4, generator=generator(1))
    images = distil(lambda z: z.flatten(1), x, target, 0.3)
    assert ((images - x).abs() <= 0.3 + 1e-6).all() and ((images >= 0) & (images <= 1)).all()
    assert torch.allclose(
        images[(target - x).abs() > 0.3], (x + 0.3 * (target - x).sign())[(target - x).abs() > 0.3], atol=1e-6
    )


def test_the_first_step_follows_a_linear_feature() -> None:
    w = torch.randn(7, 12, generator=generator(2)).double()
    x, target = torch.rand(2, 5, 12, generator=generator(3)).double()
    images = distil(lambda z: z @ w.T, x, target, 0.01, steps=1)
    wanted = -((x - target) @ w.T @ w).sign()
    inside = (x > 0.001) & (x < 0.999)
    assert torch.equal((images - x).sign()[inside], wanted[inside])


def test_images_are_distilled_each_by_itself_and_nearer_to_the_target() -> None:
    net = smooth(0)
    x, target = torch.rand(2, 6, 1, 6, 6, generator=generator(4)).double()
    for layer in range(1, layers(net) + 1):
        together = distil(lambda z: features(net, z, layer), x, target, 0.07)  # noqa: B023
        alone = distil(lambda z: features(net, z, layer), x[2:3], target[2:3], 0.07)  # noqa: B023
        assert torch.allclose(together[2:3], alone, atol=1e-12)
        wanted, before, after = (features(net, z, layer).flatten(1) for z in (target, x, together))
        assert ((after - wanted).norm(dim=1) < (before - wanted).norm(dim=1)).all()


def noisy() -> Ensemble:
    """An ensemble with BatchNorm and dropout, one norm of which somebody froze, and gradients that wait for their step."""
    nets = [network(task("resnet18_dropout"), generator(0)), network(task("resnet20"), generator(1))]
    net = Ensemble(nets, Mean()).train()
    net.get_submodule("networks.1.body.1").eval()
    for weight in net.parameters():
        weight.grad = torch.ones_like(weight)
    return net


@pytest.mark.parametrize("craft_bn", CRAFT_BN)
def test_crafting_leaves_no_trace(craft_bn: str) -> None:
    net, images = noisy(), task().train.floats(slice(0, 4))
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    drawn = torch.random.get_rng_state()
    seen = Batch(images[:2], torch.arange(2), generator(0), partner=lambda: (images[2:], torch.arange(2)))
    crafted = VulnerabilityDiversity(0.07, steps=2, craft_bn=craft_bn).distilled(net, seen)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert modes == [module.training for module in net.modules()]
    assert all(weight.grad is not None and (weight.grad.unique() == 1).all() for weight in net.parameters())
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert all(module.track_running_stats for module in net.modules() if isinstance(module, nn.BatchNorm2d))
    assert not any(image.requires_grad for image in crafted) and not torch.equal(crafted[0], crafted[1])


def test_every_member_sees_the_partners_in_its_images() -> None:
    net, seen = ensemble(norm=True), replace(batch(), epoch=7)
    assert seen.partner is not None
    target, found = seen.partner()[0], {}
    for craft_bn in CRAFT_BN:
        loss = VulnerabilityDiversity(0.05, craft_bn=craft_bn, seed=1)
        found[craft_bn] = loss.distilled(net, seen)
        for images, member in zip(found[craft_bn], net.members, strict=True):
            assert isinstance(member, Network)
            layer = loss.layer(member, 7)
            with crafting(member, craft_bn):
                wanted = distil(lambda z: features(member, z, layer), seen.x, target, 0.05)  # noqa: B023
            assert torch.equal(images, wanted)
    assert not torch.equal(found["eval"][0], found["train"][0])


def test_batchnorm_normalises_by_the_batch_only_if_asked() -> None:
    net, x = noisy(), task().train.floats(slice(0, 4))
    with torch.no_grad():
        with crafting(net):
            assert not any(module.training for module in net.modules())
            assert torch.allclose(net(x)[:2], net(x[:2]), atol=1e-4)
        with crafting(net, "train"):
            assert torch.equal(net(x), net(x))  # dropout is silent
            assert not torch.allclose(net(x)[:2], net(x[:2]), atol=1e-4)
    with pytest.raises(ZeroDivisionError), crafting(net):
        raise ZeroDivisionError
    assert net.members[1].training and not net.get_submodule("networks.1.body.1").training


# The losses of DVERGE and SMD+ (methods 4.4 and 4.6)


def test_every_member_learns_from_all_images_but_its_own() -> None:
    net, seen = ensemble(), replace(batch(), label_smoothing=0.1)
    images = [torch.rand_like(seen.x) for _ in net.members]
    found = transferred(net.members, images, seen)
    for i, member in enumerate(net.members):
        wanted = sum(F.cross_entropy(member(x), seen.y, label_smoothing=0.1) for j, x in enumerate(images) if j != i)
        assert found[i].item() == pytest.approx(wanted.item(), abs=1e-12)  # type: ignore[union-attr]


def test_smd_plus_without_weight_has_dverges_gradients_by_members() -> None:
    net, seen = ensemble(), batch()
    plus = gradients(total(VulnerabilityAndSaliency(0.07, weight=0.0), net, seen), net)
    alone = gradients(total(VulnerabilityDiversity(0.07), net, seen), net)
    assert all(torch.allclose(a, b / 3, rtol=1e-9, atol=1e-12) for a, b in zip(plus, alone, strict=True))


@pytest.mark.parametrize("saliency", SALIENCIES)
def test_smd_plus_of_two_members_and_undistilled_images_is_smd(saliency: str) -> None:
    net, seen = ensemble(2, norm=True), batch()
    plus = total(VulnerabilityAndSaliency(0.0, weight=0.8, saliency=saliency), net, seen)
    assert plus.item() == pytest.approx(total(SaliencyDiversity(0.8, saliency), net, seen).item(), abs=1e-12)


def optimizer(kind: str, parameters: Any) -> torch.optim.Optimizer:
    if kind == "adam":
        return torch.optim.Adam(parameters, 0.01, weight_decay=1e-4)
    return torch.optim.SGD(parameters, 0.1, 0.9, weight_decay=1e-4)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_one_optimizer_steps_as_one_for_each_member_would(kind: str) -> None:
    """As the released code: craft for all, then member after member with an optimiser of its own."""
    joint = ensemble(norm=True)
    apart = copy.deepcopy(joint)
    one, many = optimizer(kind, joint.parameters()), [optimizer(kind, member.parameters()) for member in apart.members]
    loss = VulnerabilityDiversity(0.07)
    for step in range(3):
        seen = batch(seed=step)
        one.zero_grad()
        total(loss, joint, seen).backward()
        one.step()
        images = loss.distilled(apart, seen)
        for i, (member, own) in enumerate(zip(apart.members, many, strict=True)):
            own.zero_grad()
            torch.stack([F.cross_entropy(member(x), seen.y) for j, x in enumerate(images) if j != i]).sum().backward()
            own.step()
    both = zip(joint.state_dict().items(), apart.state_dict().values(), strict=True)
    assert [name for (name, a), b in both if not torch.equal(a, b)] == []


def test_layers_are_drawn_uniformly_one_an_epoch() -> None:
    loss, net = VulnerabilityDiversity(0.07, seed=3), network(task("resnet20"))
    drawn = [loss.layer(net, epoch) for epoch in range(400)]
    assert drawn == [loss.layer(net, epoch) for epoch in range(400)]
    assert set(drawn) == set(range(1, 21)) and max(drawn.count(layer) for layer in set(drawn)) < 45
    assert drawn != [replace(loss, seed=4).layer(net, epoch) for epoch in range(400)]
    assert drawn == [VulnerabilityAndSaliency(0.05, seed=3).layer(net, epoch) for epoch in range(400)]


# Layers of networks


COUNTS = {
    "lenet5": 5,
    "lenet_wide": 4,
    "cear_cnn": 7,
    "alexnet": 6,
    "vgg16": 14,
    "vgg19": 17,
    "resnet20": 20,
    "resnet26": 26,
    "resnet32": 32,
    "resnet110": 110,
    "resnet18": 18,
    "resnet18_squares": 18,
    "resnet18_x4": 18,
    "resnet18_dropout": 18,
    "cnn1": 2,
    "cnn2": 3,
    "cnn3": 4,
    "cnn2_16": 3,
    "cnn2_400": 3,
    "resnet34": 34,
    "preactresnet18": 18,
    "densenet100": 100,
}
"""Convolutions and linear layers on the way, without shortcuts; the VGGs here have one linear layer instead of three."""


def entering(net: Network, x: Tensor) -> list[Tensor]:
    """What enters each activation in a forward pass, and the logits."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for module in net.modules()
        if isinstance(module, ACTIVATIONS)
    ]
    logits = net(x)
    for hook in hooks:
        hook.remove()
    return [*seen, logits]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_what_enters_the_activations_and_the_logits(architecture: str) -> None:
    net, x = network(task(architecture)), torch.rand(1, 3, 32, 32, generator=generator(5))
    with torch.no_grad():
        seen = entering(net, x)
        count = layers(net)
        assert count == len(seen) == COUNTS[architecture]
        for layer in range(1, count + 1) if count <= 20 else (1, 2, 3, count // 2, count - 2, count - 1, count):
            found = features(net, x, layer)
            assert found.shape == seen[layer - 1].shape and torch.equal(found, seen[layer - 1])
        assert torch.equal(features(net, x, count), net(x))
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("architecture", ["resnet20", "preactresnet18", "vgg16"])
def test_features_have_a_graph_back_to_the_image(architecture: str) -> None:
    net, x = network(task(architecture)), torch.rand(1, 3, 32, 32).requires_grad_()
    for layer in (1, 2, layers(net) // 2, layers(net)):
        (gradient,) = torch.autograd.grad(features(net, x, layer).square().sum(), x)
        assert gradient.abs().sum() > 0


def test_layers_of_a_resnet_are_those_of_dverge() -> None:
    net, x = network(task("resnet20")), torch.rand(2, 3, 32, 32)
    modules = list(net.body.children())
    stem, block = nn.Sequential(*modules[:2]), modules[3]
    assert isinstance(block, BasicBlock)
    shapes = [tuple(features(net, x, layer).shape[1:]) for layer in range(1, 21)]
    assert shapes == [(16, 32, 32)] * 7 + [(32, 16, 16)] * 6 + [(64, 8, 8)] * 6 + [(10,)]
    first = stem(net.normalise(x))
    assert torch.allclose(features(net, x, 1), first, atol=1e-5)
    inner = block.bn1(block.conv1(first.relu()))
    assert torch.allclose(features(net, x, 2), inner, atol=1e-5)
    assert torch.allclose(features(net, x, 3), block.bn2(block.conv2(inner.relu())) + first.relu(), atol=1e-5)


def test_absent_layers_and_unknown_networks_are_refused() -> None:
    net = network(task())
    for layer in (0, 6):
        with pytest.raises(ValueError, match=rf"lenet5 has 1 to 5, got {layer}"):
            features(net, torch.rand(1, 3, 32, 32), layer)
    foreign = network(task("torchvision/resnet18"))
    with pytest.raises(
        ValueError, match=r"layers of torchvision/resnet18 are not known \(it holds ResNet\); known are .*lenet5"
    ):
        layers(foreign)
    assert "not of torchvision/resnet18" in Dverge().unsuited(task("torchvision/resnet18"))
    assert not Dverge().unsuited(task())


# The defenses


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Smd(members=1), "at least 2, got 1"),
        (lambda: Dverge(members=1), "at least 2, got 1"),
        (lambda: Smd(saliency="logits"), "unknown saliency 'logits'; known are logit, prob"),
        (lambda: SmdPlus(saliency="logits"), "unknown saliency 'logits'"),
        (lambda: Dverge(craft_bn="off"), "unknown craft_bn 'off'; known are eval, train"),
        (lambda: Dverge(eps=-0.1), "eps: a positive radius"),
        (lambda: Dverge(eps=math.nan), "eps: a positive radius"),
    ],
)
def test_impossible_fields_are_refused(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_the_radius_depends_on_the_members_unless_it_is_given() -> None:
    radii = {members: Dverge(members=members).radius for members in range(2, 10)}
    assert radii == {2: 0.07, 3: 0.07, 4: 0.07, 5: 0.07, 6: 0.07, 7: 0.07, 8: 0.05, 9: 0.05}
    assert Dverge(members=8, eps=0.03).radius == SmdPlus(eps=0.03).part(task(), 0).loss.eps == 0.03
    (variant,) = resolve("dverge@members=8,eps=0.03", {})
    assert variant.defense == Dverge(members=8, eps=0.03)


def test_fields_of_the_defenses_reach_their_losses() -> None:
    assert Smd(weight=0.5, saliency="prob").part(task(), 2).loss == SaliencyDiversity(0.5, "prob")
    assert Dverge(craft_bn="train").part(task(), 2).loss == VulnerabilityDiversity(0.07, craft_bn="train", seed=2)
    plus = SmdPlus(members=8, craft_bn="train", weight=0.5, saliency="prob").part(task(), 2)
    assert plus.loss == VulnerabilityAndSaliency(0.05, craft_bn="train", seed=2, weight=0.5, saliency="prob")
    assert len(plus.needs) == plus.members == 8


def test_members_begin_as_those_of_the_naive_ensemble() -> None:
    part = Dverge().part(task(), 5)
    assert [(need.role, need.seed, need.member) for need in part.needs] == [("plain", 5, member) for member in range(3)]
    assert part.loss == VulnerabilityDiversity(0.07, seed=5)
    begin = [network(task(), generator(9, member)).state_dict() for member in range(3)]
    made = replace(part, recipe=replace(part.recipe, lr=0.0)).make(task(), begin, Bench())
    assert all(torch.equal(made[f"networks.{m}.{name}"], value) for m in range(3) for name, value in begin[m].items())


@pytest.mark.parametrize("defense", [Dverge(members=2), SmdPlus(members=2)])
def test_continued_training_ends_with_the_same_bits(defense: Dverge) -> None:
    one = task(n=20)
    begin = [network(one, generator(member)).state_dict() for member in range(2)]
    resumed(defense.part(one, 0), one, begin)


def test_a_run_trains_the_naive_members_once_for_both(tiny: Path) -> None:
    runs = tiny.parent / "runs"
    only = ("clean", "pgd")
    request = Request(defense="smd,dverge,smd_plus", suite=str(tiny), runs=runs, device="cpu", only=only)
    records = Run(request).execute()
    assert [record.status for record in records] == ["success"] * 6
    assert {record.facts.get("distillation_eps") for record in records} == {None, 0.07}
    made = (runs / "tiny/parts/log.jsonl").read_text()
    assert made.count('"role": "plain"') == 3 and len(made.splitlines()) == 6
