"""Numerics change speed and, where they say so, the network; never the caller's model."""

from __future__ import annotations

import shutil

import pytest
import torch

from attacks.streams import generator
from defenses.api import Images, Recipe, Task
from defenses.nets import Network, network
from defenses.numerics import voter


def net() -> tuple[Network, torch.Tensor]:
    gen = generator(0, "numerics")
    pixels = torch.randint(0, 256, (300, 1, 28, 28), generator=gen, dtype=torch.uint8)
    images = Images(pixels, torch.zeros(300, dtype=torch.int64), torch.arange(300), "random")
    return network(Task("random", images, images, 10, (0.5,), (0.5,), "lenet5", Recipe(epochs=1)), gen), images.floats()


def test_float32_is_the_model_itself() -> None:
    model, x = net()
    assert torch.equal(voter(model)(x), model.predict(x))


def test_bfloat16_is_a_copy_that_mostly_agrees() -> None:
    model, x = net()
    labels = voter(model, "bfloat16")(x)
    assert (labels == model.predict(x)).float().mean() > 0.8
    assert next(model.parameters()).dtype == torch.float32 and not model.training


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_compiled_float32_agrees_whatever_the_batch() -> None:
    model, x = net()
    fast = voter(model, "float32 compiled", batch=128)
    assert (fast(x) == model.predict(x)).float().mean() >= 0.99
    assert torch.equal(fast(x[:5]), fast(x)[:5])


def test_unknown_numerics_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown numerics 'float16'; known are float32"):
        voter(net()[0], "float16")
