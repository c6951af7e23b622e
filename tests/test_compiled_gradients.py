"""Compiled second-order gradients are the eager ones, or torch refuses: older versions dropped the second order silently.

torch.compile may raise; what must never happen is another number without a word (pytorch issues 91469 and 181581).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from attacks.streams import generator
from defenses.combine import Mean
from defenses.edlcm import LocalCurvature, cosines, cross_entropy, sizes
from defenses.ensemble import Ensemble
from defenses.gal import GradientAlignment, alignment
from defenses.joint import EnsembleLoss
from defenses.nets import Network, Normalise
from defenses.training import Batch

LOSSES: dict[str, EnsembleLoss] = {
    "gal": GradientAlignment(weight=0.5, noise=0.0),
    "edlcm": LocalCurvature(alpha=1.0, beta=0.5, h=0.3, ramp=0, norm_power=2),
}

Weights = list[dict[str, Tensor]]
"""Parameters of every member by name."""

Score = Callable[[Tensor], Tensor]
"""Logits (n k) -> a number for each image (n)."""


def ensemble() -> Ensemble:
    """Two members of a convolution and a linear layer, for images of 1x6x6 and four classes."""
    members = []
    for member in range(2):
        body = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(12, 4))
        gen = generator(member, "compiled")
        with torch.no_grad():
            for weight in body.parameters():
                weight.copy_(torch.randn(weight.shape, generator=gen))
        members.append(Network(Normalise((0.5,), (0.5,)), body, "tiny"))
    return Ensemble(members, Mean())


def batch() -> Batch:
    gen = generator(0, "compiled images")
    return Batch(torch.rand(5, 1, 6, 6, generator=gen), torch.arange(5) % 4, gen)


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


def eager(name: str) -> list[Tensor]:
    """Gradients of the loss that training minimises, as training takes them."""
    net = ensemble()
    return list(torch.autograd.grad(total(LOSSES[name](net, batch(), [])), list(net.parameters())))


# The same losses with torch.func.grad inside


def weights(net: Ensemble) -> Weights:
    return [dict(member.named_parameters()) for member in net.members]


def slope(member: nn.Module, own: dict[str, Tensor], score: Score, x: Tensor) -> tuple[Tensor, Tensor]:
    """Input gradients (n d) of one member, and its logits (n k)."""

    def summed(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = functional_call(member, own, (x,))
        return score(logits).sum(), logits

    gradient, logits = grad(summed, has_aux=True)(x)
    return gradient.flatten(1), logits


def gal(net: Ensemble, given: Weights, x: Tensor, y: Tensor) -> Tensor:
    score = partial(F.cross_entropy, target=y, reduction="none")
    found = [slope(member, own, score, x) for member, own in zip(net.members, given)]
    ce = torch.stack([F.cross_entropy(logits, y) for _, logits in found]).mean()
    return ce + 0.5 * alignment(torch.stack([gradient for gradient, _ in found])).mean()


def edlcm(net: Ensemble, given: Weights, x: Tensor, y: Tensor) -> Tensor:
    score = partial(cross_entropy, y=y)
    changes, ce = [], []
    for member, own in zip(net.members, given):
        here, logits = slope(member, own, score, x)
        signs = here.detach().sign()
        way = 0.3 * signs / signs.norm(dim=-1, keepdim=True).clamp_min(1)
        changes.append(slope(member, own, score, x + way.view_as(x))[0] - here)
        ce.append(F.cross_entropy(logits, y))
    change = torch.stack(changes)
    return torch.stack(ce).sum() + sizes(change).sum(0).mean() + 0.5 * cosines(change).sum(0).mean()


FUNCTIONAL = {"gal": gal, "edlcm": edlcm}


def functional(name: str, **options: Any) -> list[Tensor]:
    """Gradients of a loss by torch.func.grad around torch.func.grad, all compiled."""
    net, seen = ensemble(), batch()
    fast = torch.compile(grad(partial(FUNCTIONAL[name], net)), **options)
    found = fast(weights(net), seen.x, seen.y)
    return [gradient for member in found for gradient in member.values()]


def backwards(name: str, **options: Any) -> list[Tensor]:
    """Gradients of a compiled loss of torch.func.grad, backward outside, as a training loop would have it."""
    net, seen = ensemble(), batch()
    torch.compile(partial(FUNCTIONAL[name], net), **options)(weights(net), seen.x, seen.y).backward()
    return [weight.grad for weight in net.parameters()]  # type: ignore[misc]


def as_it_is(name: str, **options: Any) -> list[Tensor]:
    """Gradients of the project's own loss, compiled with the torch.autograd.grad that is in it."""
    net, seen = ensemble(), batch()
    torch.compile(lambda: total(LOSSES[name](net, seen, [])), **options)().backward()
    return [weight.grad for weight in net.parameters()]  # type: ignore[misc]


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative error of a parameter's gradient."""
    errors = [(a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(errors).detach().max())


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """Nothing that was compiled before counts."""
    torch._dynamo.reset()


def equal_or_refused(way: Callable[..., list[Tensor]], name: str, **options: Any) -> str:
    """Compile, and compare; returns what torch said if it refused."""
    try:
        found = way(name, **options)
    except Exception as refusal:  # torch's own classes differ from version to version
        assert len(str(refusal)) > 20, f"torch refuses without a word: {refusal!r}"
        return str(refusal)
    assert distance(found, eager(name)) < 1e-4, "torch.compile changes a second-order gradient without a word"
    return ""


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_without_its_second_order_is_another_one(name: str) -> None:
    """So the comparisons below would see it missing. And the losses written anew are those of training."""
    net, seen = ensemble(), batch()
    found = torch.autograd.grad(LOSSES[name](net, seen, [])["ce"], list(net.parameters()))
    assert distance(found, eager(name)) > 0.05
    whole = torch.autograd.grad(FUNCTIONAL[name](net, weights(net), seen.x, seen.y), list(net.parameters()))
    assert distance(whole, eager(name)) < 1e-5


@pytest.mark.parametrize(("name", "fullgraph"), [("gal", True), ("gal", False), ("edlcm", True)])
def test_the_losses_as_they_are_give_the_eager_gradients_or_are_refused(name: str, fullgraph: bool) -> None:
    equal_or_refused(as_it_is, name, backend="aot_eager", fullgraph=fullgraph)


@pytest.mark.parametrize(
    ("way", "name"), [(backwards, "gal"), (backwards, "edlcm"), pytest.param(functional, "edlcm", marks=pytest.mark.slow)]
)
def test_traced_gradients_are_the_eager_ones_or_refused(way: Callable[..., list[Tensor]], name: str) -> None:
    said_or_equal(equal_or_refused(way, name, backend="aot_eager", fullgraph=True))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["gal", pytest.param("edlcm", marks=pytest.mark.slow)])
def test_compiled_gradients_are_the_eager_ones_or_refused(name: str) -> None:
    said_or_equal(equal_or_refused(functional, name, fullgraph=True))


def said_or_equal(refusal: str) -> None:
    """A refusal is no failure, but shall be seen."""
    if refusal:
        pytest.skip(f"torch {torch.__version__} refuses: {refusal.splitlines()[0]}")
