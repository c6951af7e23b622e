"""Kernel pooling: the sheets of methods 5, one function in three forms, noise only where asked for, and its training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import Bench, resumed, task
from torch import Tensor, nn

from attacks.oracle import Oracle, decide
from attacks.streams import Shared, Streams, drawing, generator
from bench.registry import resolve
from bench.request import Request
from bench.runner import Run
from defenses.kap import Kap, kap, kmp, nt, nt_sigma
from defenses.kernels import (
    KernelConv2d,
    KernelNetwork,
    folded,
    loudness,
    recalibrated,
    with_noise,
)
from defenses.nets import network
from defenses.pooling import POOLS, BoxSum, Pool, sheet
from defenses.smoothing import Smoothed
from defenses.training import Trained

MEAN, MAX = Pool("average"), Pool("max")


def pooled(values: list[float], pool: Pool) -> list[float]:
    return pool(torch.tensor(values, dtype=torch.float64)).tolist()


# The sheets of methods 5


def test_nine_channels() -> None:
    # With padding counted, the corner would be .888889.
    assert pooled(list(range(9)), MEAN) == [2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6]
    assert pooled(list(range(9)), MAX) == [4, 5, 5, 7, 8, 8, 7, 8, 8]


def test_eight_channels_lie_two_by_four() -> None:
    assert pooled(list(range(8)), MEAN) == [2.5, 3, 4, 4.5] * 2


def test_sheets_are_the_closest_factors() -> None:
    found = [sheet(channels) for channels in (64, 128, 256, 512, 144, 529, 7)]
    assert found == [(8, 8), (8, 16), (16, 16), (16, 32), (12, 12), (23, 23), (1, 7)]


def test_one_dimension_averages_along_the_channels() -> None:
    assert pooled([0, 3, 6, 9], Pool("average", dims=1)) == [1.5, 3, 6, 7.5]
    # eq. 2: the windows of stride S are centred at S i; what is left is padded to the old length
    assert pooled([0, 3, 6, 9, 12], Pool("average", stride=2, dims=1)) == [0, 1.5, 6, 10.5, 0]


def test_a_stride_pads_symmetrically() -> None:
    z = torch.arange(144.0)
    found = Pool("average", kernel=3, stride=3)(z).view(12, 12)
    assert found[:4].abs().sum() == found[8:].abs().sum() == found[:, :4].abs().sum() == found[:, 8:].abs().sum() == 0
    square = z.view(12, 12)
    assert found[5, 6] == square[2:5, 5:8].mean() and found[4, 4] == square[:2, :2].mean()  # centred at 3 i


def test_variance_of_independent_channels() -> None:
    z = torch.randn((64, 40_000), generator=generator(0, "variance"), dtype=torch.float64)
    variance = MEAN(z).var(1).view(8, 8)
    for cell, expected in (((3, 4), 1 / 9), ((0, 3), 1 / 6), ((7, 7), 1 / 4)):
        assert float(variance[cell]) == pytest.approx(expected, rel=0.05)


SIDES = st.sampled_from([1, 3, 5])
DIMS = st.sampled_from([1, 2])


@settings(max_examples=60)
@given(kind=st.sampled_from(sorted(POOLS)), channels=st.integers(1, 40), kernel=SIDES, dims=DIMS)
def test_a_constant_is_a_fixed_point_and_shapes_stay(kind: str, channels: int, kernel: int, dims: int) -> None:
    pool = Pool(kind, kernel, dims=dims)
    z = torch.full((channels, 2, 3), 0.7, dtype=torch.float64)
    assert torch.allclose(pool(z), z, atol=1e-15)


@settings(max_examples=60)
@given(channels=st.sampled_from([9, 12, 16, 36, 64]), kernel=SIDES, dims=DIMS, kind=st.sampled_from(["average", "max"]))
def test_pools_are_those_of_a_plain_loop(channels: int, kernel: int, dims: int, kind: str) -> None:
    z = torch.rand((channels, 2), generator=generator(channels, "loop"), dtype=torch.float64)
    rows, columns = (1, channels) if dims == 1 else sheet(channels)
    half = kernel // 2
    found = Pool(kind, kernel, dims=dims)(z)
    for channel in range(channels):
        row, column = divmod(channel, columns)
        near = [
            r * columns + c
            for r in range(max(0, row - half), min(rows, row + half + 1))
            for c in range(max(0, column - half), min(columns, column + half + 1))
        ]
        expected = z[near].mean(0) if kind == "average" else z[near].amax(0)
        assert torch.allclose(found[channel], expected)


# One function in three forms


def noisy_statistics(net: KernelNetwork) -> KernelNetwork:
    """BatchNorm with statistics of its own, as after training."""
    for number, module in enumerate(net.modules()):
        if isinstance(module, nn.BatchNorm2d):
            gen = generator(number, "statistics")
            with torch.no_grad():
                for tensor in (module.running_mean, module.weight, module.bias):
                    assert isinstance(tensor, Tensor)
                    tensor.add_(0.1 * torch.randn(tensor.shape, generator=gen))
                module.running_var.mul_(1 + 0.2 * torch.rand(module.running_var.shape, generator=gen))  # type: ignore[union-attr]
    return net


def made(defense: Kap = kap, architecture: str = "resnet18", biased: bool = False) -> KernelNetwork:
    one = task((3, 32, 32), architecture, 20)
    net = network(one, generator(3, "kap"))
    if biased:
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.bias = nn.Parameter(torch.randn(module.out_channels, generator=generator(1, "bias")))
    return noisy_statistics(KernelNetwork(net, defense.kernels()))


def images(n: int = 8) -> Tensor:
    return torch.rand((n, 3, 32, 32), generator=generator(0, "kap images"))


def explicit(net: KernelNetwork) -> KernelNetwork:
    """Answers are pooled, not weights."""

    def forward(layer: KernelConv2d, x: Tensor) -> Tensor:
        answers = layer._conv_forward(x, layer.weight, layer.bias)
        return layer.pool(answers.transpose(0, 1)).transpose(0, 1)

    for layer in net.convolutions():
        layer.forward = forward.__get__(layer)  # type: ignore[method-assign]
    return net


@pytest.mark.parametrize(
    ("defense", "architecture"),
    [
        (kap, "resnet18"),
        (kap, "cnn3"),
        (Kap(dims=1), "cnn3"),
        (Kap(stride=3), "cnn3"),
        (Kap(norm_first=True), "cnn3"),
    ],
)
def test_the_folded_network_answers_the_same(defense: Kap, architecture: str) -> None:
    net = made(defense, architecture, biased=architecture == "cnn3")
    x = images()
    with torch.inference_mode():
        pooling, plain = net(x), folded(net)
        assert not any(isinstance(module, KernelConv2d) for module in plain.modules())
        scale = float(pooling.abs().max())
        assert float((plain(x) - pooling).abs().max()) <= 1e-5 * scale
        if not defense.norm_first:
            assert float((explicit(net)(x) - pooling).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize(("reach", "shape"), [((1, 1), (3, 4, 2)), ((0, 2), (2, 5, 3)), ((3, 3), (2, 3, 1))])
def test_sums_over_windows_have_their_gradients_to_the_second_order(reach: tuple[int, int], shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, generator=generator(0, "sheet"), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda sheet: BoxSum.apply(sheet, reach), (z,))
    assert torch.autograd.gradgradcheck(lambda sheet: BoxSum.apply(sheet, reach) ** 2, (z,))


def test_layouts_are_kept_and_change_nothing() -> None:
    weight = torch.randn(144, 16, 3, 3, generator=generator(0, "weight"))
    last = MEAN(weight.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last) and MEAN(weight).is_contiguous()
    assert torch.equal(last, MEAN(weight))


def test_gradients_of_weights_are_those_of_pooled_answers() -> None:
    found = []
    for net in (made(kap, "cnn3").double(), explicit(made(kap, "cnn3").double())):
        net.train()
        net(images().double()).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None and torch.allclose(a, b, rtol=1e-8, atol=1e-10)


def test_the_maximum_cannot_be_folded() -> None:
    with pytest.raises(ValueError, match="pooling by max is not linear"):
        folded(made(kmp, "cnn2"))


def test_no_pool_and_no_noise_is_the_plain_network_to_the_bit() -> None:
    one = task((3, 32, 32), "resnet18", 20)
    plain, same = network(one, generator(3, "kap")), KernelNetwork(network(one, generator(3, "kap")), nt.kernels())
    with torch.inference_mode():
        assert torch.equal(plain(images()), same(images()))
    assert plain.state_dict().keys() == same.state_dict().keys()
    assert torch.equal(folded(same)(images()), plain(images()))


# Noise


@pytest.mark.parametrize("defense", [nt_sigma, Kap(noise=0.2), Kap(pool="max", noise=0.1)])
def test_noise_is_a_matter_of_training(defense: Kap) -> None:
    net, x = made(defense, "cnn2"), images()
    assert not net.randomized and torch.equal(net(x), net(x))
    net.train()
    with pytest.raises(RuntimeError, match="with drawing"):
        net(x)
    before = torch.random.get_rng_state()
    with drawing(net, Shared(generator(0, "noise"))):
        assert not torch.equal(net(x), net(x))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("place", ["input", "activations", "both"])
def test_noise_in_evaluation(place: str) -> None:
    net, x = made(Kap(noise=0.1), "cnn2"), images()
    noisy = with_noise(net, place, 0.3)
    assert noisy.randomized and not net.randomized
    streams = Streams(0, "noise", ids=range(8))
    with drawing(noisy, streams):
        once, again = noisy(x), noisy(x)
    with drawing(noisy, streams.child("other")):
        assert torch.equal(once, again) and not torch.equal(once, noisy(x))
    # of an image alone the noise is the same
    rows = torch.tensor([5])
    oracle = Oracle(noisy, streams, 2)
    assert torch.allclose(oracle(x, torch.arange(8))[:, rows], oracle.take(rows)(x[rows], torch.arange(1)), atol=1e-5)


def test_noise_on_the_image_is_smoothing() -> None:
    """The same distribution as Smoothed: mean and spread of one logit."""
    one = task((3, 32, 32), "cnn2", 20)
    plain = network(one, generator(3, "kap"))
    x, streams = images(1), Streams(0, "same", ids=range(1))
    draws = []
    for model in (with_noise(plain, "input", 0.2), Smoothed(plain, 0.2)):
        with torch.inference_mode():
            logits = Oracle(model, streams, 400)(x, torch.arange(1))[:, 0, 0]
        draws.append((float(logits.mean()), float(logits.std())))
    (mean, spread), (expected, width) = draws
    assert mean == pytest.approx(expected, abs=5 * width / 20) and spread == pytest.approx(width, rel=0.2)


def test_a_plain_network_can_be_asked_under_noise() -> None:
    plain = network(task((3, 32, 32), "cnn2", 20), generator(3, "kap"))
    quiet = with_noise(plain, "none", 0.1)
    assert not quiet.randomized and torch.equal(quiet(images()), plain(images()))
    assert decide(with_noise(plain, "both", 0.1), images(), Streams(0, "a", ids=range(8))).shape == (8,)
    with pytest.raises(ValueError, match="unknown 'act'; known are none, input, activations, both"):
        with_noise(plain, "act", 0.1)


def test_recalibration_has_the_statistics_of_quiet_images() -> None:
    one = task((3, 32, 32), "cnn1", 60)
    net = noisy_statistics(KernelNetwork(network(one, generator(3, "kap")), Kap(noise=0.5).kernels()))
    quiet = recalibrated(net, one.train, batch=30)
    first, x = net.convolutions()[0], one.train.floats()
    with torch.no_grad():
        answers = first(net.normalise(x)).transpose(0, 1).flatten(1)
    norm = next(module for module in quiet.modules() if isinstance(module, nn.BatchNorm2d))
    assert torch.allclose(norm.running_mean, answers.mean(1), atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(norm.running_var, answers.var(1), rtol=0.05)  # type: ignore[arg-type]
    assert norm.momentum == 0.1 and not any(module.training for module in quiet.modules())
    changed = [name for name, value in net.state_dict().items() if not torch.equal(value, quiet.state_dict()[name])]
    assert changed and all("running" in name or "tracked" in name for name in changed)


def test_attackers_see_the_folded_the_quiet_and_the_noisy_network() -> None:
    one, defense, x = task((3, 32, 32), "cnn1", 60), Kap(noise=0.5), images()
    net = noisy_statistics(KernelNetwork(network(one, generator(3, "kap")), defense.kernels())).eval()
    seen = {name: view.model for name, view in defense.views(net, one).items()}
    assert torch.allclose(seen["folded"](x), net(x), atol=1e-4)
    quiet = recalibrated(net, one.train)
    assert torch.equal(seen["recalibrated"](x), quiet(x)) and not torch.allclose(quiet(x), net(x), atol=1e-2)
    assert seen["noise on"].randomized and not seen["folded"].randomized  # type: ignore[attr-defined]


def test_loudness_is_the_spread_of_answers_over_that_of_noise() -> None:
    net = made(Kap(noise=0.1), "cnn1")
    with torch.no_grad():
        answers = net.convolutions()[0](net.normalise(images()))
    channels = [float(answers[:, channel].std()) for channel in range(answers.shape[1])]
    assert loudness(net, images()) == [pytest.approx(sum(channels) / len(channels) / 0.1, rel=1e-5)]
    assert len(loudness(made(Kap(noise=0.1), "cnn3"), images())) == 3


# The defense


def test_registered_instances() -> None:
    for name, (pool, noise) in {"kap": ("average", 0), "kmp": ("max", 0), "nt": ("none", 0), "nt_sigma": ("none", 0.1)}.items():
        (variant,) = resolve(name, {})
        assert isinstance(variant.defense, Kap) and (variant.defense.pool, variant.defense.noise) == (pool, noise)
        assert variant.defense.kernel == 3 and variant.defense.stride == 1 and variant.defense.inference_noise == "none"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kernel": 2}, "an odd number"),
        ({"pool": "mean"}, "unknown 'mean'; known are average, max, none"),
        ({"pool": "max", "stride": 3}, "pooled with stride 1"),
        ({"dims": 3}, "dims: 1 or 2"),
        ({"noise": -0.1}, "noise: a standard deviation"),
        ({"inference_noise": "both"}, "give noise as well"),
        ({"inference_noise": "act", "noise": 0.1}, "unknown 'act'"),
        ({"architecture": "cnn9"}, "did you mean 'cnn"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Kap(**fields)


def test_sheets_that_are_too_small_are_skipped_with_the_reason() -> None:
    assert "lenet5: a sheet of 2 x 3 channels is smaller than a kernel of 3" in kap.unsuited(task())
    assert nt.unsuited(task()) == "" and kap.unsuited(task((3, 32, 32), "resnet18", 20)) == ""
    wide = task((3, 32, 32), "cnn2", 20)
    assert Kap(stride=3).unsuited(wide) == ""
    assert "an odd number short" in Kap(kernel=3, stride=3, architecture="resnet18").unsuited(wide)


@pytest.mark.parametrize("defense", [Kap(noise=0.1), Kap(pool="max", noise=0.1, norm_first=True)])
def test_continued_training_ends_with_the_same_bits(defense: Kap) -> None:
    one = task((3, 32, 32), "cnn2", 20)
    bench = resumed(defense.part(one, 0), one)
    assert all(report[f"validation_signal_to_noise_{layer}"] > 0 for report in bench.reports for layer in (1, 2))


def test_noise_and_pool_change_what_is_trained() -> None:
    one = replace(task((3, 32, 32), "cnn2", 20))
    keys = {defense.part(one, 0).key(one) for defense in (kap, kmp, nt, nt_sigma, Kap(kernel=5), Kap(stride=3), Kap(noise=0.1))}
    assert len(keys) == 7
    assert Kap(noise=0.1, inference_noise="both").part(one, 0).key(one) == Kap(noise=0.1).part(one, 0).key(one)


def test_a_run_of_the_family(tmp_path: Path) -> None:
    suite = tmp_path / "kernels.toml"
    suite.write_text(
        'name = "kernels"\nversion = 1\ndataset = "digits"\narchitecture = "cnn2_16"\n'
        "train_images = 128\nvalidation_images = 20\n"
        '[recipe]\nepochs = 5\nbatch = 32\noptimizer = "adam"\nlr = 0.01\n'
        '[evals.clean]\nkind = "clean"\nimages = 20\n'
        '[evals.fgsm]\nkind = "robust"\nattack = "fgsm"\nnorm = "linf"\neps = ["0.02"]\nimages = 5\n'
    )
    spec = "kap@noise=0.1,kmp,nt,nt_sigma,kap@noise=0.1,inference_noise=both"
    records = Run(Request(defense=spec, suite=str(suite), device="cpu", runs=tmp_path / "runs")).execute()
    assert {record.status for record in records} == {"success"} and len(records) == 10
    clean = {r.defense["variant"]: r.metrics[0].value for r in records if r.eval["name"] == "clean"}
    assert len(clean) == 5 and max(clean.values()) > 0.2


@pytest.mark.parametrize(
    "chosen", [{"dilation": 2}, {"groups": 3}, {"padding_mode": "reflect", "padding": 1}, {"stride": 2, "padding": "valid"}]
)
def test_a_convolution_keeps_its_settings(chosen: dict[str, Any]) -> None:
    plain, x = nn.Conv2d(6, 9, 3, **chosen), torch.rand((2, 6, 11, 11), generator=generator(0, "settings"))
    assert torch.equal(KernelConv2d(plain, Pool("none"), 0.0)(x), plain(x))
    if chosen.get("groups", 1) == 1:
        layer = KernelConv2d(plain, MEAN, 0.0).eval()
        assert torch.allclose(layer.plain()(x), layer(x), atol=1e-6)


def test_grouped_kernels_are_not_pooled() -> None:
    one = task((3, 64, 64), "torchvision/resnext50_32x4d", 20)
    assert "resnext50_32x4d: kernels of grouped convolutions see different channels" in kap.unsuited(one)
    assert nt.unsuited(one) == ""


def test_every_convolution_of_a_residual_network_has_a_pool_and_noise() -> None:
    net = kap.build(task((3, 32, 32), "resnet18", 20))
    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert len(layers) == 20 and all(type(layer) is KernelConv2d and layer.pool == kap.kernels().pool for layer in layers)
    assert sum(layer.kernel_size == (1, 1) for layer in layers) == 3  # the shortcuts


def test_without_pool_and_noise_training_is_that_of_a_plain_network() -> None:
    one = task((3, 32, 32), "cnn2", 20)
    own = nt.part(one, 0)
    plain = Trained(role=own.role, seed=own.seed, member=own.member, architecture=own.architecture, recipe=own.recipe)
    ours, theirs = own.make(one, [], Bench()), plain.make(one, [], Bench())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
