"""The regressions of methods 12.4: models that look robust to some attack, and what gives them away."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn, tensor

from attacks import Apgd, AutoAttack, Eot, Pgd, Square, Streams
from attacks.checks import CHECKS, inspect
from attacks.streams import Draws
from defenses.combine import Mean

CLASSES, SIDE, IMAGES = 4, 8, 40


class Net(nn.Sequential):
    """A small network with sigmoids, trained on nothing: its own decisions are the labels."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(SIDE * SIDE, 24), nn.Sigmoid(), nn.Linear(24, CLASSES))
        gen = torch.Generator().manual_seed(4)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=gen) * (3 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.1)
        self[-1].weight.data *= 4
        self.eval()
        self[-1].bias.data -= self(torch.rand(500, 1, SIDE, SIDE, generator=gen)).mean(0).detach()


NET = Net()
X = torch.rand(IMAGES, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
Y = NET(X).argmax(1)
EPS = 0.04


def streams() -> Streams:
    return Streams(0, "masking", ids=range(IMAGES))


class Changed(nn.Module):
    """The network behind a change of its input and of its logits."""

    def __init__(self, before=lambda x: x, after=lambda z: z) -> None:
        super().__init__()
        self.net, self.before, self.after = NET, before, after
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


def accuracy(attack, model) -> float:
    return float((~attack(model, X, Y, streams()).broken).double().mean())


PGD = Pgd(norm="linf", eps=EPS, steps=20, restarts=1)
CASCADE = AutoAttack(norm="linf", eps=EPS, proposals=500, steps=50)


def test_logits_times_a_thousand_blind_the_cross_entropy_and_not_autoattack():
    scaled = Changed(after=lambda z: 1e4 * z)
    assert abs(accuracy(CASCADE, scaled) - accuracy(CASCADE, NET)) <= 1 / IMAGES
    assert accuracy(PGD, scaled) > accuracy(PGD, NET) + 0.2
    result = PGD(scaled, X, Y, streams())
    assert result.zeros.sum() > 0.2 * result.backwards.sum(), "the zero gradients are counted, and give it away"
    plain = PGD(NET, X, Y, streams())
    assert plain.zeros.sum() == 0


class Noisy(Draws):
    """Adds noise at inference, and says so."""

    randomized = True

    def __init__(self) -> None:
        super().__init__()
        self.net = NET
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.1 * self.drawn().normal(x.shape[1:]))


def test_noise_at_inference_falls_to_expectation_over_it():
    model = Noisy()
    attack = Pgd(norm="linf", eps=EPS, steps=20, restarts=1, start="clean")
    # The same draw in every step fits that draw; twenty of them fit what all draws have in common.
    assert accuracy(Eot(attack, draws=20), model) <= accuracy(attack, model)
    assert inspect(model, X, Y, streams())["randomised"].all()
    assert AutoAttack(norm="linf", eps=EPS).plan(CLASSES, model.randomized).version == "rand"


def test_noise_that_a_model_hides_is_noticed_and_leaves_the_global_generator_alone():
    model = Changed(before=lambda x: x + 0.1 * torch.randn_like(x))
    before = torch.get_rng_state()
    assert inspect(model, X, Y)["randomised"].all()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_quantised_input_stops_gradients_and_not_square():
    model = Changed(before=lambda x: (8 * x).round() / 8)
    assert inspect(model, X, model(X).argmax(1))["zero_gradient"].all()
    right = model(X).argmax(1) == Y
    gradient = Apgd(norm="linf", eps=0.1)(model, X, Y, streams())
    square = Square(norm="linf", eps=0.1, proposals=1000)(model, X, Y, streams())
    assert gradient.zeros[right].sum() == gradient.backwards[right].sum()
    # A random start alone moves some pixels over a step; the search moves those that matter.
    assert (~square.broken).sum() < (~gradient.broken).sum() - 0.2 * IMAGES
    cascade = AutoAttack(norm="linf", eps=0.1, proposals=1000, steps=20)(model, X, Y, streams())
    assert (cascade.details["broken_by"] == 3).sum() > 0.2 * IMAGES, "Square broke what gradients left standing"


def clamped_mean(members: Tensor) -> Tensor:
    """The mean of probabilities, then the log of what is at least 1e-12: no gradient beyond."""
    return members.softmax(-1).mean(0).clamp_min(1e-12).log()


def test_a_clamped_logarithm_hides_gradients_that_log_space_keeps():
    def over_confident(x: Tensor) -> Tensor:
        return torch.stack([28 * NET(x), 24 * NET(x)])

    class Members(nn.Module):
        def __init__(self, rule) -> None:
            super().__init__()
            self.net, self.rule = NET, rule
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.rule(over_confident(x))

    right, clamped = Members(Mean()), Members(clamped_mean)
    assert accuracy(PGD, clamped) > accuracy(PGD, right) + 0.1
    blind, seeing = (PGD(model, X, Y, streams()) for model in (clamped, right))
    assert blind.zeros.sum() > 5 * seeing.zeros.sum() and blind.zeros.sum() > 0.5 * blind.backwards.sum()


@pytest.mark.parametrize(
    "model, shown",
    [
        (NET, set()),
        (Changed(after=lambda z: z.softmax(1)), {"probabilities"}),
        (Changed(after=lambda z: z.log_softmax(1)), set()),
        (Changed(after=lambda z: z.detach()), {"zero_gradient"}),
    ],
    ids=["plain", "softmax", "log-softmax", "detached"],
)
def test_each_sign_is_told_from_the_others(model, shown):
    found = inspect(model, X, Y)
    assert set(found) == set(CHECKS)
    assert {name for name, mask in found.items() if mask.any()} == shown


def test_a_label_that_comes_third_is_no_sign():
    labels = NET(X).topk(3).indices[:, 2]  # of a wrong image: there DLR is constant
    assert not inspect(NET, X, labels)["zero_gradient"].any()


def test_a_forward_pass_that_differentiates_is_noticed():
    def purified(x: Tensor) -> Tensor:
        with torch.enable_grad():
            here = x.detach().requires_grad_()
            slope = torch.autograd.grad(NET(here).logsumexp(1).sum(), here)[0]
        return x + 0.001 * slope

    assert inspect(Changed(before=purified), X, Y)["dynamic"].all()


def test_two_classes_are_checked_by_their_margin():
    model = Changed(after=lambda z: z[:, :2])
    assert not inspect(model, X, model(X).argmax(1))["zero_gradient"].any()
    assert not inspect(model, X[:1], tensor([0]))["dynamic"].any()
