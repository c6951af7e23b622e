"""Batch normalisation with its double backward pass written out: against differences, and against torch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attacks.streams import generator
from defenses.batch_norm import BatchNorm2d, written_out


def normal(*shape: int, seed: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(0, seed), dtype=dtype)


def layers(channels: int, dtype: torch.dtype) -> tuple[nn.Sequential, nn.Sequential]:
    """Torch's, and ours with the same weights and buffers."""
    theirs = nn.Sequential(nn.Conv2d(3, channels, 3, bias=False), nn.BatchNorm2d(channels), nn.Softplus()).to(dtype)
    for name, weight in theirs.named_parameters():
        weight.data = normal(*weight.shape, seed=name, dtype=dtype)
    ours = copy.deepcopy(theirs)
    written_out(ours)
    assert type(ours[1]) is BatchNorm2d and type(theirs[1]) is nn.BatchNorm2d
    return theirs, ours


def second_order(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of a loss that holds gradients by the images."""
    leaf = x.clone().requires_grad_()
    out = net(leaf)
    (slope,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    return list(torch.autograd.grad(slope.square().sum() + out.sum(), [leaf, *net.parameters()]))


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (2, 1, 3, 1)])
def test_both_derivatives_are_those_of_differences(shape: tuple[int, ...]) -> None:
    layer = BatchNorm2d(shape[1]).double()

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = {"weight": weight, "bias": bias}
        out: Tensor = torch.func.functional_call(copy.deepcopy(layer), given, (x,))
        return out

    x = normal(*shape, seed="x").add_(3).requires_grad_()
    weight, bias = (normal(shape[1], seed=seed).requires_grad_() for seed in ("weight", "bias"))
    assert torch.autograd.gradcheck(run, (x, weight, bias)) and torch.autograd.gradgradcheck(run, (x, weight, bias))


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_numbers_and_buffers_are_torch_s(dtype: torch.dtype, near: float, layout: torch.memory_format) -> None:
    theirs, ours = layers(8, dtype)
    x = normal(6, 3, 7, 7, seed="images", dtype=dtype).add_(2).contiguous(memory_format=layout)
    assert torch.equal(theirs(x), ours(x))
    for one, other in zip(second_order(theirs, x), second_order(ours, x), strict=True):
        assert float((one - other).norm() / one.norm()) < near
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert torch.equal(theirs.eval()(x), ours.eval()(x))


def without_statistics() -> nn.Module:
    return nn.BatchNorm2d(3, track_running_stats=False)


@pytest.mark.parametrize(
    "make", [without_statistics, lambda: nn.BatchNorm2d(3, momentum=None), lambda: nn.BatchNorm2d(3, affine=False)]
)
def test_kinds_that_it_does_not_know_are_torch_s(make: Callable[[], nn.Module]) -> None:
    theirs, x = nn.Sequential(make()).double(), normal(4, 3, 2, 2, seed="x")
    ours = copy.deepcopy(theirs)
    written_out(ours)
    leaf = x.clone().requires_grad_()
    assert torch.equal(theirs(x), ours(x))
    assert torch.autograd.gradgradcheck(lambda z: ours(z) ** 2, leaf)
