"""Networks: published parameter counts, initialisation from a generator, independent rows, isolated dropout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import StochasticDepth

from attacks.streams import generator
from bench import environment
from defenses.api import Images, Recipe, Task
from defenses.nets import ARCHITECTURES, initialise, network
from defenses.plain_nets import MaxPool2x2
from defenses.training import Trained, _dropout_from

PARAMETERS = {
    "lenet5": 61_706,
    "lenet_wide": 431_080,
    "cear_cnn": 503_114,
    "cnn1": 5_626,
    "cnn2": 192_538,
    "cnn3": 379_450,
    "cnn2_16": 2_970,
    "cnn2_400": 1_456_410,
    "alexnet": 2_472_266,
    "vgg16": 14_728_266,
    "vgg19": 20_040_522,
    "resnet20": 272_474,
    "resnet26": 369_690,
    "resnet32": 466_906,
    "resnet110": 1_730_714,
    "resnet18": 11_173_962,
    "resnet18_squares": 11_864_505,
    "resnet18_x4": 178_585_866,
    "resnet18_dropout": 11_173_962,
    "resnet34": 21_282_122,
    "preactresnet18": 11_172_170,
    "densenet100": 769_162,
}
"""Ten classes; greyscale 28x28 for the first three, colour for the others. The papers: DenseNet-BC 0.8 M, ResNet-110 1.7 M."""

GREY = ("lenet5", "lenet_wide", "cear_cnn")


class Nowhere:
    """A workshop without a disk."""

    def load(self) -> None:
        return None

    def save(self, weights: object, state: object) -> None:
        pass

    def report(self, done: int, total: int, facts: dict[str, float]) -> None:
        pass


def task(name: str, side: int = 0, n: int = 4) -> Task:
    shape = (1, 28, 28) if name in GREY else (3, side or 32, side or 32)
    pixels = torch.randint(0, 256, (n, *shape), generator=generator(0, "pixels"), dtype=torch.uint8)
    images = Images(pixels, torch.arange(n) % 10, torch.arange(n), "random")
    return Task("random", images, images, 10, (0.5,) * shape[0], (0.25,) * shape[0], name, Recipe(epochs=1, batch=2, lr=0.01))


def test_every_architecture_has_its_count_here() -> None:
    assert set(PARAMETERS) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_shape_and_initialisation(name: str) -> None:
    one, same, other = (network(task(name), generator(seed, "init")) for seed in (1, 1, 2))
    assert sum(p.numel() for p in one.parameters()) == PARAMETERS[name]
    assert one.architecture == name
    x = task(name).train.floats()
    with torch.inference_mode():
        logits = one(x)
        assert logits.shape == (4, 10) and torch.isfinite(logits).all()
        assert torch.equal(logits, same(x)) and not torch.equal(logits, other(x))


@pytest.mark.parametrize("name", PARAMETERS)
def test_an_answer_does_not_depend_on_the_rest_of_the_batch(name: str) -> None:
    net = network(task(name), generator(3, "init"))
    x = task(name, n=20).train.floats()
    with torch.inference_mode():
        whole, part = net(x)[5:15], net(x[5:15])
    assert torch.allclose(whole, part, rtol=1e-5, atol=1e-6 * float(whole.abs().max()))
    # DenseNet's long 1x1 convolutions, and those of 529 channels, are cut up differently for other batch sizes: equal but for
    # float rounding.
    assert name in ("densenet100", "resnet18_squares") or torch.equal(whole, part)


@pytest.mark.parametrize("name", ["lenet5", "lenet_wide", "resnet20"])
def test_an_answer_is_the_same_among_few_and_many(name: str) -> None:
    net = network(task(name), generator(4, "init"))
    x = task(name, n=130).train.floats()
    with torch.inference_mode():
        whole = net(x)
        for n in (1, 2, 7, 15, 16, 55, 68):
            few = net(x[:n])
            assert torch.allclose(few, whole[:n], rtol=1e-5, atol=1e-6 * float(whole.abs().max()))
            # oneDNN cuts up the last convolutions of ResNet-20 (8 x 8) in another way for a single image.
            assert not environment.intel() or (name, n) == ("resnet20", 1) or torch.equal(few, whole[:n])


@pytest.mark.parametrize("name", sorted({*PARAMETERS} - {*GREY}))
def test_tiny_imagenet_s_side_fits(name: str) -> None:
    own = dataclasses.replace(task(name, 64, n=2), classes=200)
    with torch.inference_mode():
        logits = network(own)(own.train.floats())
    assert logits.shape == (2, 200) and torch.isfinite(logits).all()


@pytest.mark.parametrize("name", GREY)
def test_networks_for_digits_take_colour_images_too(name: str) -> None:
    """LeNet is a member of SWEEN-7 on CIFAR-10."""
    own = dataclasses.replace(task("resnet20"), architecture=name)
    with torch.inference_mode():
        assert network(own)(own.train.floats()).shape == (4, 10)


def test_pre_activation_blocks_pass_their_input_on_unchanged() -> None:
    """With zero convolutions a block without a change of shape is the identity (He et al. 2016b); a basic block is its ReLU."""
    x = torch.randn(2, 64, 4, 4, generator=generator(5))
    for name, expected in (("preactresnet18", x), ("resnet18", x.relu())):
        blocks = [m for m in network(task(name)).modules() if type(m).__name__ in ("PreActBlock", "BasicBlock")]
        for convolution in (blocks[0].conv1, blocks[0].conv2):
            nn.init.zeros_(convolution.weight)
        assert torch.allclose(blocks[0].eval()(x), expected)


def test_dropout_of_cear_s_resnet_follows_every_block_and_precedes_the_linear_layer() -> None:
    layers = list(network(task("resnet18_dropout")).body)
    after = [type(layers[i - 1]).__name__ for i, layer in enumerate(layers) if isinstance(layer, nn.Dropout)]
    assert after == ["BasicBlock"] * 8 + ["Flatten"] and isinstance(layers[-1], nn.Linear)
    assert {layer.p for layer in layers if isinstance(layer, nn.Dropout)} == {0.025}


def test_an_unknown_architecture_gets_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'resnet1[18]0?'"):
        network(dataclasses.replace(task("resnet20"), architecture="resnet11"))


@pytest.mark.parametrize("given", ["torchvision/resnet19", "torchvison/resnet18"])
def test_an_unknown_name_of_torchvision_s_gets_the_nearest(given: str) -> None:
    with pytest.raises(ValueError, match=r"did you mean 'torchvision/resnet1\d+'"):
        network(task("resnet20"), architecture=given)


@pytest.mark.parametrize("name", ["fcn_resnet50", "quantized_resnet18"])
def test_only_classifiers_of_torchvision_are_architectures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **options: pytest.fail("a download"))
    with pytest.raises(ValueError, match="unknown architecture"):
        network(task("resnet20"), architecture=f"torchvision/{name}")


@pytest.mark.parametrize("name", ["torchvision/swin_t", "torchvision/squeezenet1_1"])
def test_torchvision_s_networks_are_initialised_from_the_generator_alone(name: str) -> None:
    """Swin's position biases are of no kind that ``initialise`` draws."""
    states = []
    for world, seed in ((1, 5), (2, 5), (2, 6)):
        with torch.random.fork_rng():
            torch.manual_seed(world)
            before = torch.get_rng_state()
            states.append(network(task("resnet20"), generator(seed, "init"), name).state_dict())
            assert torch.equal(torch.get_rng_state(), before)
    one, same, other = states
    assert all(torch.equal(one[key], same[key]) for key in one)
    drawn = [key for key in one if key.endswith(("position_bias_table", "conv.weight", "head.weight", "squeeze.weight"))]
    assert drawn and not any(torch.equal(one[key], other[key]) for key in drawn)


@pytest.mark.parametrize("layer", [lambda: nn.Dropout(0.5), lambda: StochasticDepth(0.5, "row")])
def test_dropout_repeats_with_the_seed_and_leaves_the_global_generator_alone(
    layer: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dropping(shape: object, classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), layer(), nn.Linear(8, classes))

    # The state of a GPU that the task is not on is not kept, so it must not be seeded.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds every GPU"))
    monkeypatch.setitem(ARCHITECTURES, "dropping", dropping)
    own = task("dropping", n=8)
    part = Trained(role="plain", seed=3, architecture="dropping", recipe=own.recipe)
    torch.default_generator.manual_seed(1)
    before = torch.get_rng_state()
    first = part.make(own, [], Nowhere())
    assert torch.equal(torch.get_rng_state(), before)
    torch.default_generator.manual_seed(2)
    again = part.make(own, [], Nowhere())
    assert all(torch.equal(first[name], again[name]) for name in first)
    monkeypatch.setattr(type(layer()), "forward", lambda self, x: x)
    assert not torch.equal(part.make(own, [], Nowhere())["body.1.weight"], first["body.1.weight"])


@pytest.mark.parametrize(("layer", "draws"), [(nn.Identity(), False), (nn.Dropout(0.1), True), (nn.Dropout2d(0.1), True)])
def test_only_networks_with_dropout_take_a_number_from_the_epoch_s_generator(layer: nn.Module, draws: bool) -> None:
    """So that all others train as they did before there was dropout."""
    gen = generator(3, "train")
    before = gen.get_state()
    with _dropout_from(gen, nn.Sequential(nn.Flatten(), layer)):
        assert torch.equal(gen.get_state(), before) is not draws


@pytest.mark.gpu
def test_dropout_on_a_gpu_repeats_and_leaves_its_global_generator_alone() -> None:
    drop = nn.Dropout(0.5)
    x = torch.ones(1000, device="cuda")
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    drawn = []
    for seed in (1, 1, 2):
        with _dropout_from(generator(seed, "train", device=x.device), drop):
            drawn.append(drop(x))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(torch.cuda.get_rng_state(), before[1])


def test_initialise_reaches_every_weight() -> None:
    for name in ("densenet100", "cear_cnn"):
        net = network(task(name))
        for p in net.parameters():
            nn.init.constant_(p, 7.0)
        initialise(net, generator(0))
        left = [key for key, p in net.named_parameters() if p.ndim > 1 and (p == 7).any()]
        assert not left


@settings(max_examples=40)
@given(st.integers(0, 3), st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.integers(0, 2**31))
def test_maxima_of_2x2_are_torchs(n: int, channels: int, height: int, width: int, seed: int) -> None:
    x = torch.randint(-2, 3, (n, channels, height, width), generator=generator(seed)).float()  # ties within most windows
    x = torch.where(x == 2, torch.inf, torch.where(x == -2, -torch.inf, x))
    if n == 3:
        x[0, 0, 0, 0] = torch.nan
    wanted = F.max_pool2d(x, 2)
    for given_x in (x, x.to(memory_format=torch.channels_last)):
        assert torch.equal(MaxPool2x2()(given_x).nan_to_num(7), wanted.nan_to_num(7))


def test_gradients_through_maxima_of_2x2_are_torchs_and_nothing_of_torchs_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randint(0, 3, (4, 3, 7, 8), generator=generator(0)).float().requires_grad_()
    (wanted,) = torch.autograd.grad(F.max_pool2d(x, 2).square().sum(), x)
    (got,) = torch.autograd.grad(MaxPool2x2()(x).square().sum(), x)
    assert torch.equal(got, wanted)
    monkeypatch.setattr(F, "max_pool2d", None)
    with pytest.raises(TypeError):
        MaxPool2x2()(x)
    with torch.no_grad():
        assert MaxPool2x2()(x).shape == MaxPool2x2()(x.detach()).shape == (4, 3, 3, 4)
