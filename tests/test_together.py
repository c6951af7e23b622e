"""Members run as one network: the loop's numbers, gradients of both orders and running statistics, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_training import task
from torch import Tensor, nn

from attacks.streams import generator
from defenses.api import Classifier, Wrapped
from defenses.combine import Mean
from defenses.ensemble import Ensemble
from defenses.joint import pair_cosines
from defenses.nets import BasicBlock, Network, Normalise, leaky, network
from defenses.together import KEPT, grouped, obstacle, one_by_one, pays, run

CLASSES = 4
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def body(kind: str) -> nn.Sequential:
    """A body for images of 2x8x8."""
    if kind == "plain":
        layers: list[nn.Module] = [nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(3, 5, 2, dilation=2)]
        layers += [nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, CLASSES, bias=False)]
    elif kind == "residual":
        # Shortcuts of stride 2 from fewer than 8 channels crash torch 2.15 on AVX2 (their weights' gradient, channels last).
        layers = [nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.1), BasicBlock(8, 8, 1)]
        layers += [nn.Sequential(BasicBlock(8, 12, 2)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES)]
    else:  # the first layer is none that could see the images once for all
        layers = [nn.BatchNorm2d(2), nn.MaxPool2d(2), nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, CLASSES)]
    return nn.Sequential(*layers)


def layers_of(net: Network) -> nn.Sequential:
    assert isinstance(net.body, nn.Sequential)
    return net.body


def ensemble(kind: str, members: int, dtype: torch.dtype = torch.float64, slope: float = 0.0) -> list[Network]:
    """Networks of unequal weights and running statistics, in train mode."""
    nets = []
    for member in range(members):
        net = Network(Normalise((0.5, 0.4), (0.3, 0.2)), body(kind), kind).to(dtype).to(memory_format=torch.channels_last)
        gen = generator(member, "together", kind)
        with torch.no_grad():
            for name, tensor in net.body.state_dict().items():
                if tensor.is_floating_point():
                    noise = torch.randn(tensor.shape, generator=gen, dtype=torch.float64)
                    tensor.copy_(1 + 0.3 * noise.abs() if name.endswith(("running_var", "bn1.weight")) else 0.4 * noise)
        leaky(net, slope)
        nets.append(net.train())
    return nets


def images(n: int = 7, dtype: torch.dtype = torch.float64, own: int = 0) -> Tensor:
    shape = ([own] if own else []) + [n, 2, 8, 8]
    return torch.rand(shape, generator=generator(0, "together images"), dtype=torch.float64).to(dtype)


def labels(n: int = 7) -> Tensor:
    return torch.arange(n) % CLASSES


Run = Callable[[Sequence[Classifier], Any], Tensor]


def errors(logits: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(own, labels(len(own)), reduction="none") for own in logits])


def weight_gradients(arrangement: Run, nets: Sequence[Network], x: Any) -> list[Tensor]:
    return list(torch.autograd.grad(errors(arrangement(nets, x)).sum(), [p for net in nets for p in net.parameters()]))


def second_order(arrangement: Run, nets: Sequence[Network], x: Tensor) -> list[Tensor]:
    """What GAL needs: each member's logits and input gradients, and the weights' gradients of a loss over both."""
    leaves = [x.clone().requires_grad_() for _ in nets]
    found = errors(arrangement(nets, leaves))
    gradients = torch.autograd.grad(found.sum(), leaves, create_graph=True)
    aligned = pair_cosines(torch.stack([gradient.flatten(1) for gradient in gradients])).logsumexp(0).mean()
    total = found.mean() + aligned + sum(gradient.square().sum() for gradient in gradients)
    return [*gradients, *torch.autograd.grad(total, [p for net in nets for p in net.parameters()])]


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal up to a share of the largest number of each tensor."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert float((a - b).detach().abs().max()) <= TOLERANCES[a.dtype] * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("members", [1, 3, 5, 8])
@pytest.mark.parametrize("kind", ["plain", "residual", "other"])
def test_logits_and_gradients_are_the_loops(kind: str, members: int, dtype: torch.dtype) -> None:
    nets = ensemble(kind, members, dtype)
    for x in (images(dtype=dtype), images(dtype=dtype, own=members), list(images(dtype=dtype, own=members))):
        close([grouped(nets, x)], [one_by_one(nets, x)])
        close(weight_gradients(grouped, nets, x), weight_gradients(one_by_one, nets, x))
    close(second_order(grouped, nets, images(dtype=dtype)), second_order(one_by_one, nets, images(dtype=dtype)))
    for net in nets:
        net.eval()
    close([grouped(nets, images(dtype=dtype))], [one_by_one(nets, images(dtype=dtype))])
    close(second_order(grouped, nets, images(dtype=dtype)), second_order(one_by_one, nets, images(dtype=dtype)))


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_every_member_has_its_own_input_gradient(kind: str) -> None:
    nets = [net.eval() for net in ensemble(kind, 3)]
    x = images().requires_grad_()
    leaves = images().expand(3, -1, -1, -1, -1).clone().requires_grad_()
    (found,) = torch.autograd.grad(errors(grouped(nets, leaves)).sum(), leaves)
    for net, own in zip(nets, found):
        (alone,) = torch.autograd.grad(errors(net(x).unsqueeze(0)).sum(), x)
        close([own], [alone])
    (shared,) = torch.autograd.grad(errors(grouped(nets, x)).sum(), x)
    close([shared], [found.sum(0)])


@pytest.mark.parametrize("own", [False, True])
def test_running_statistics_are_moved_as_by_each_member_alone(own: bool) -> None:
    nets = ensemble("residual", 3)
    others = copy.deepcopy(nets)
    x = images(own=3 if own else 0)
    for step in range(3):
        grouped(nets, x + step)
        one_by_one(others, x + step)
    for net, other in zip(nets, others):
        state, expected = net.state_dict(), other.state_dict()
        assert state.keys() == expected.keys() and int(state["body.1.num_batches_tracked"]) == 3
        close([value.double() for value in state.values()], [value.double() for value in expected.values()])
    before = {name: value.clone() for name, value in nets[0].state_dict().items()}
    for net in nets:
        net.eval()
    grouped(nets, x)
    assert all(torch.equal(value, before[name]) for name, value in nets[0].state_dict().items())


def test_statistics_that_are_not_tracked_stay() -> None:
    nets = ensemble("residual", 3)
    for net in nets:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = False  # as `dverge.crafting` does it
    before = copy.deepcopy([net.state_dict() for net in nets])
    close([grouped(nets, images())], [one_by_one(nets, images())])
    for net, state in zip(nets, before):
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("architecture", ["lenet5", "resnet20"])
def test_architectures_of_the_project(architecture: str) -> None:
    one = task((1, 28, 28) if architecture == "lenet5" else (3, 32, 32), architecture, 20)
    nets = [network(one, generator(member)).double() for member in range(3)]
    for net in nets:
        leaky(net, 0.1)
    x = one.train.floats(slice(0, 4)).double()
    assert obstacle(nets) == ""
    close([grouped(nets, x)], [one_by_one(nets, x)])


def test_a_step_moves_the_members_own_weights() -> None:
    nets = ensemble("plain", 3)
    others = copy.deepcopy(nets)
    for arrangement, own in ((grouped, nets), (one_by_one, others)):
        optimizer = torch.optim.SGD([p for net in own for p in net.parameters()], 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            errors(arrangement(own, images())).sum().backward()
            optimizer.step()
    for net, other, start in zip(nets, others, ensemble("plain", 3)):
        close(list(net.parameters()), list(other.parameters()))
        assert not any(torch.equal(weight, begun) for weight, begun in zip(net.parameters(), start.parameters()))
        assert list(net.parameters())[2].is_contiguous(memory_format=torch.channels_last)


# What is refused, and what is chosen


def changed(change: Callable[[Network], object]) -> list[Network]:
    """Three members, the last of which is changed."""
    nets = ensemble("residual", 3)
    change(nets[2])
    return nets


def appended(layer: nn.Module) -> list[Network]:
    """Three members with one more layer at the front."""
    nets = ensemble("plain", 3)
    for net in nets:
        net.body = nn.Sequential(copy.deepcopy(layer), *layers_of(net))
    return nets


def hooked() -> list[Network]:
    nets = ensemble("plain", 2)
    layers_of(nets[0])[0].register_forward_pre_hook(lambda *_: None)
    return nets


def cut(net: Network) -> Network:
    net.body = layers_of(net)[:-1]
    return net


REFUSED: dict[str, tuple[Callable[[], Sequence[Classifier]], str]] = {
    "nobody": (list, "one or more networks"),
    "foreign": (lambda: [Wrapped(net) for net in ensemble("plain", 2)], "got .*Wrapped"),
    "dropout": (lambda: appended(nn.Dropout(0.5)), "plain holds Dropout.*known are plain Sequential, BasicBlock, Conv2d"),
    "groups": (lambda: appended(nn.Conv2d(2, 2, 3, groups=2)), "holds Conv2d.*groups=2"),
    "padding": (lambda: appended(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")), "padding_mode=reflect"),
    "no statistics": (lambda: appended(nn.BatchNorm2d(2, track_running_stats=False)), "holds BatchNorm2d"),
    "cumulative": (lambda: appended(nn.BatchNorm2d(2, momentum=None)), "holds BatchNorm2d.*momentum=None"),
    "no weights": (lambda: appended(nn.BatchNorm2d(2, affine=False)), "holds BatchNorm2d.*affine=False"),
    "part of a shape": (lambda: appended(nn.Flatten(2)), "holds Flatten"),
    "slope": (lambda: changed(lambda net: leaky(net, 0.2)), "member 3 has other layers"),
    "mode": (lambda: changed(lambda net: net.eval()), "member 3 .*in another mode"),
    "depth": (lambda: [*ensemble("residual", 1), *ensemble("plain", 1)], "member 2 has other layers"),
    "normalisation": (lambda: changed(lambda net: net.normalise.std.mul_(2)), "member 3 normalises"),
    "hook": (hooked, "holds"),
    "no logits": (lambda: [cut(net) for net in ensemble("plain", 2)], "ends in a linear one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_and_run_one_by_one(name: str) -> None:
    make, reason = REFUSED[name]
    nets = make()
    with pytest.raises(ValueError, match=f"(?s)cannot be run as one network: .*{reason}.*Run them one by one"):
        grouped(nets, images())
    if name in ("mode", "slope", "normalisation", "hook"):
        assert torch.equal(run(nets, images()), one_by_one(copy.deepcopy(nets), images()))


def test_another_number_of_batches_than_of_members_is_refused() -> None:
    for arrangement in (grouped, one_by_one):
        with pytest.raises(ValueError, match="zip"):
            arrangement(ensemble("plain", 3), images(own=2))


def test_tiny_members_that_see_the_same_images_are_grouped() -> None:
    one = task()
    nets = [network(one, generator(member)) for member in range(3)]
    x, cpu = one.train.floats(slice(0, 8)), torch.device("cpu")
    assert pays(nets, cpu) and torch.equal(run(nets, x), grouped(nets, x))
    assert torch.equal(Ensemble(nets, Mean()).member_logits(x), grouped(nets, x))
    assert not pays(nets[:1], cpu) and not pays(nets, torch.device("meta"))
    assert torch.equal(run(nets, [x] * 3), one_by_one(nets, [x] * 3))
    assert not pays([network(task((3, 32, 32), "resnet20", 20))] * 2, cpu)
    assert not pays([network(task((1, 28, 28), "lenet_wide", 20))] * 2, cpu)
    layers_of(nets[1])[0].train()
    assert not pays(nets, cpu) and torch.equal(run(nets, x), one_by_one(nets, x))


def test_logits_do_not_depend_on_the_pieces_of_a_large_batch() -> None:
    one = task(n=20)
    nets = [network(one, generator(member)) for member in range(3)]
    largest = KEPT // (3 * 6 * 28 * 28 * 4)
    x = torch.rand((largest + 40, 1, 28, 28), generator=generator(0, "large"))
    together = run(nets, x)
    close([together], [one_by_one(nets, x)])
    for rows in (slice(0, 4), slice(largest - 20, largest + 20), slice(largest, None)):
        assert torch.equal(run(nets, x[rows]), together[:, rows])
