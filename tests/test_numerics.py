"""Numerics change speed and, where they say so, the network; never the caller's model."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

from attacks.streams import Streams, generator
from defenses.api import Images, Recipe, Task
from defenses.combine import Weighted
from defenses.ensemble import Ensemble
from defenses.nets import Network, network
from defenses.numerics import under
from defenses.smoothing import certify


def net(architecture: str = "lenet5") -> tuple[Network, torch.Tensor]:
    gen = generator(0, "numerics")
    pixels = torch.randint(0, 256, (300, 1, 28, 28), generator=gen, dtype=torch.uint8)
    images = Images(pixels, torch.zeros(300, dtype=torch.int64), torch.arange(300), "random")
    return network(
        Task("random", images, images, 10, (0.5,), (0.5,), architecture, Recipe(epochs=1)), gen
    ).eval(), images.floats()


def trio() -> tuple[Ensemble, torch.Tensor]:
    """Three members under a weighted vote."""
    one, x = net()
    gen = generator(1, "numerics")
    members = [one]
    for _ in range(2):
        other = copy.deepcopy(one)
        with torch.no_grad():
            for weight in other.parameters():
                weight.add_(0.2 * weight.std() * torch.randn(weight.shape, generator=gen))
        members.append(other)
    ensemble = Ensemble(members, Weighted(3)).eval()
    ensemble.rule.set(torch.tensor([0.5, 0.3, 0.2]))
    return ensemble, x


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def test_float32_is_the_model_itself() -> None:
    model, _ = net()
    assert under(model, "float32") is model


def test_bfloat16_is_a_copy_whose_rule_stays_in_float32() -> None:
    model, x = trio()
    fast = under(model, "bfloat16")
    logits = fast.member_logits(x)
    assert logits.dtype == torch.float32 and torch.equal(logits, logits.bfloat16().float())
    assert not torch.equal(logits, model.member_logits(x))
    assert torch.equal(fast.predict(x), model.rule.decide(logits))
    assert (fast.predict(x) == model.predict(x)).float().mean() > 0.8
    assert next(model.parameters()).dtype == torch.float32 and not model.training
    assert model.rule.weights.dtype == torch.float32


@pytest.mark.parametrize("numerics", ["bfloat16", pytest.param("float32 compiled", marks=needs_compiler)])
def test_no_answer_depends_on_the_batch(numerics: str) -> None:
    model, x = net()
    fast = under(model, numerics, batch=128)
    assert torch.equal(fast(x[:5]), fast(x)[:5]) and fast(x[:0]).shape == (0, 10)
    assert torch.equal(fast(x[[7, 250, 3]]), fast(x)[[7, 250, 3]])


@needs_compiler
@pytest.mark.parametrize("architecture", ["lenet5", "resnet20"])
def test_compiled_float32_is_the_model_to_rounding(architecture: str) -> None:
    model, x = net(architecture)
    fast = under(model, "float32 compiled")
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


@needs_compiler
def test_compiled_members_vote_as_eager_ones_and_more_than_eight_are_no_problem() -> None:
    model, x = trio()
    fast = under(model, "float32 compiled")
    assert (fast.predict(x) == model.predict(x)).float().mean() >= 0.99
    one, x = net()
    for number in range(10):  # torch gives up after eight compilations of one code object, and silently runs it eagerly
        own = copy.deepcopy(one)
        with torch.no_grad():
            own.body[-1].bias.add_(number)
        torch.testing.assert_close(under(own, "float32 compiled")(x), own(x), rtol=1e-4, atol=1e-4)


def test_a_network_is_converted_once() -> None:
    model, _ = trio()
    again = Ensemble([model.members[1], model.members[0]], Weighted(2)).eval()
    first, second = under(model, "bfloat16"), under(again, "bfloat16")
    assert first.members[0] is second.members[1] and first.members[0] is not second.members[0]


def test_certificates_under_numerics_are_of_that_classifier() -> None:
    model, x = trio()
    fast = under(model, "bfloat16")
    found = certify(fast, x[:4], 0.5, n=300, streams=Streams(0, ids=range(4)))
    asked: list[torch.Tensor] = []

    def whole(images: torch.Tensor) -> torch.Tensor:
        asked.append(images)
        return fast.predict(images)

    alone = certify(whole, x[:4], 0.5, n=300, streams=Streams(0, ids=range(4)))
    assert torch.equal(found.count, alone.count) and torch.equal(found.radius, alone.radius)
    assert asked[0].dtype == torch.float32  # noise is added before the cast


def test_what_cannot_be_converted_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown numerics 'float16'; known are float32"):
        under(net()[0], "float16")

    class Own(Network):
        def predict(self, x: torch.Tensor) -> torch.Tensor:
            return self(x).argmin(-1)

    one = net()[0]
    with pytest.raises(ValueError, match="Own decides in its own way"):
        under(Own(one.normalise, one.body, one.architecture).eval(), "bfloat16")
