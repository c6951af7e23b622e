"""Other engines: the same verdicts, and none of their traps reaches a user."""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from attacks import Apgd, ApgdT, AutoAttack, Bim, Ddn, Fab, FabT, Fgsm, Mim, Pgd, RFgsm, Square, Streams
from attacks.reference import COUNTERPARTS, EngineError, check, installed
from bench.request import Request
from bench.runner import Run

CLASSES, SIDE, IMAGES = 5, 20, 60


class Net(nn.Sequential):
    """A small convolutional network; its own decisions are the labels."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, classes),
        )  # fmt: skip
        gen = torch.Generator().manual_seed(1)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=gen) * (
                (2 / weight[0].numel()) ** 0.5 if weight.ndim > 1 else 0.1
            )
        self.eval()
        self[-1].bias.data -= self(torch.rand(500, 1, SIDE, SIDE, generator=gen)).mean(0).detach()


NET = Net()
X = torch.rand(IMAGES, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
Y = NET(X).argmax(1)
LINF, L2 = 0.012, 0.1

needs = {engine: pytest.mark.skipif(engine not in installed(), reason=f"{engine} is not installed") for engine in COUNTERPARTS}
PAIRS = [
    pytest.param(attack, engine, marks=needs[engine], id=f"{engine} {type(attack).__name__} {attack.norm}")
    for engine, attacks in {
        "autoattack": [
            *(kind(norm="linf", eps=LINF) for kind in (Apgd, ApgdT, Fab, FabT)),
            *(kind(norm="l2", eps=L2) for kind in (Apgd, ApgdT, Fab, FabT)),
            Apgd(norm="linf", eps=LINF, loss="dlr", restarts=2),
            Square(norm="linf", eps=0.015, proposals=1000),
            Square(norm="l2", eps=0.25, proposals=1000),
            AutoAttack(norm="linf", eps=LINF, proposals=200),
        ],
        "advertorch": [
            Fgsm(norm="linf", eps=LINF),
            *(kind(norm="linf", eps=LINF) for kind in (Bim, Mim, Pgd, Fab)),
            *(kind(norm="l2", eps=L2) for kind in (Bim, Fab)),
            Pgd(norm="l2", eps=L2, start="random_images", loss="margin"),
            Ddn(eps=L2),
        ],
    }.items()
    for attack in attacks
]
PAIR = pytest.mark.parametrize("attack, engine", PAIRS)


def streams() -> Streams:
    return Streams(0, "reference", ids=range(IMAGES))


def by(engine, attack, model=NET, x=X, y=Y):
    fields = {name: getattr(attack, name) for name in attack.__dataclass_fields__}
    return type(attack)(**{**fields, "engine": engine})(model, x, y, Streams(0, "reference", ids=range(len(x))))


@PAIR
def test_verdicts_agree_image_by_image(attack, engine):
    ours, theirs = attack(NET, X, Y, streams()), by(engine, attack)
    assert 0.2 * IMAGES < ours.broken.sum() < 0.9 * IMAGES, "the example must have images of both fates"
    assert (theirs.broken & ~ours.broken).sum() <= 1, "ours is as strong"
    allowed = 0.15 * IMAGES if isinstance(attack, Square) else 2  # random searches differ more, and ours breaks more
    assert (ours.broken & ~theirs.broken).sum() <= allowed
    assert theirs.forwards[0] > 0 and (theirs.backwards[0] > 0) != isinstance(attack, Square)


@needs["advertorch"]
@pytest.mark.parametrize("kind, norm", [(Fgsm, "linf"), (Bim, "linf")])
def test_deterministic_attacks_end_at_the_same_point(kind, norm):
    attack = kind(norm=norm, eps=LINF)
    ours, theirs = attack(NET, X, Y, streams()), by("advertorch", attack)
    still = ~ours.broken  # ours stops as soon as an image breaks
    torch.testing.assert_close(theirs.x_adv[still], ours.x_adv[still], atol=1e-6, rtol=0)


@PAIR
def test_nothing_global_is_touched(attack, engine, capsys):
    model = Net()
    model(X).sum().backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    state = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    traced, shown = [], builtins.print

    def trace(*_):
        traced.append(1)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        by(engine, attack, model, X[:8], Y[:8])
        assert sys.gettrace() is trace, "coverage and debuggers go on"
    finally:
        sys.settrace(before)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (str(np.random.get_state()), random.getstate()) == state[1:]
    assert all(torch.equal(weight.grad, old) for weight, old in zip(model.parameters(), gradients))
    assert all(weight.requires_grad for weight in model.parameters())
    assert capsys.readouterr().out == "" and builtins.print is shown


@needs["autoattack"]
@pytest.mark.parametrize("classes, names", [(2, ["apgd_ce", "fab_t", "square"]), (3, ["apgd_ce", "fab_t", "square"])])
def test_few_classes_leave_out_what_the_authors_code_cannot_do(classes, names):
    model = Net(classes)
    attack = AutoAttack(norm="linf", eps=LINF, engine="autoattack", proposals=100)
    plan = attack.plan(classes)
    assert [name for name, _ in plan.components] == names
    assert any("left out" in note for note in plan.notes)
    y = model(X).argmax(1)
    native = AutoAttack(norm="linf", eps=LINF, proposals=100)(model, X, y, streams())
    theirs = attack(model, X, y, streams())
    assert (theirs.broken & ~native.broken).sum() <= 1


@needs["autoattack"]
def test_the_same_seed_gives_the_same_points_and_another_others():
    attack = Apgd(norm="linf", eps=LINF, engine="autoattack", steps=5)
    one, two, other = (attack(NET, X, Y, Streams(seed, "reference", ids=range(IMAGES))) for seed in (0, 0, 1))
    assert torch.equal(one.x_adv, two.x_adv) and not torch.equal(one.x_adv, other.x_adv)


@pytest.mark.parametrize(
    "attack, text",
    [
        (Square(norm="linf", eps=0.1, engine="advertorch"), "Square has no engine 'advertorch'; it has native, autoattack"),
        (Pgd(norm="linf", eps=0.1, engine="torchattacks"), "Pgd has no engine 'torchattacks'; it has native, advertorch"),
    ],
)
def test_an_engine_without_the_attack_is_refused_and_the_others_are_named(attack, text):
    with pytest.raises(EngineError, match=text):
        check(attack)


@needs["advertorch"]
@pytest.mark.parametrize(
    "attack, text",
    [
        (
            RFgsm(norm="linf", eps=0.1, engine="advertorch"),
            "one-step attack is linf and starts at the image|starts at clean or random",
        ),
        (Pgd(norm="l2", eps=0.1, engine="advertorch"), "AdverTorch starts at clean or random_images, got 'random'"),
        (FabT(norm="l2", eps=0.1, engine="advertorch"), "FAB is untargeted"),
        (Mim(norm="l2", eps=0.1, engine="advertorch"), "divides by pixels that did not move"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_and_never_replaced(attack, text):
    with pytest.raises(EngineError, match=text):
        attack(NET, X[:2], Y[:2], Streams(0, ids=range(2)))


@needs["advertorch"]
def test_limits_and_noisy_models_are_for_the_native_engine():
    attack = Bim(norm="linf", eps=0.1, engine="advertorch")
    with pytest.raises(EngineError, match="keeps no limit of queries"):
        attack(NET, X, Y, streams(), queries=5)

    class Noisy(nn.Module):
        randomized = True

        def forward(self, x):
            return NET(x)

    with pytest.raises(EngineError, match="judges a noisy model by single passes"):
        attack(Noisy().eval(), X, Y, streams())


@pytest.mark.slow
@needs["autoattack"]
@pytest.mark.parametrize("train, threat", [(0.0, "linf:0.1"), (0.2, "linf:0.2"), (0.2, "l2:1.5")])
def test_autoattack_and_the_authors_agree_on_real_mnist(real_data, tmp_path, train, threat):
    """100 images, a normally and an adversarially trained LeNet-5; the whole standard version. Minutes each."""
    place = Path(__file__).parent / "speed" / "attacks.py"
    spec = importlib.util.spec_from_file_location("speed_attacks", place)
    speed = importlib.util.module_from_spec(spec)
    sys.modules["speed_attacks"] = speed
    spec.loader.exec_module(speed)
    run = Run(Request(defense="randsmooth@sigma=0.1", suite="mnist", only=("clean",), data=real_data, runs=tmp_path))
    model = speed.hardened(run, train) if train else speed.plain(run)
    norm, _, eps = threat.partition(":")
    note = speed.compare(
        model, run.test.first(100), norm, float(eps), argparse.Namespace(device="cpu", spread=True, alone=False)
    )
    assert 0.2 <= note["reference"] <= 0.8
    # Near the radius the seed decides: two engines may differ as much as one of them from itself, and be equally strong.
    near = note["spread"]
    assert note["differ"] <= max(1, near["ours_differs_from_itself"][2], near["reference_differs_from_itself"][2])
    survivors = [sum(near[f"survive_{engine}"]) / near["seeds"] for engine in ("ours", "reference")]
    assert abs(survivors[0] - survivors[1]) <= 1


def test_an_engine_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("attacks.reference.installed", dict)
    with pytest.raises(EngineError, match=r"'autoattack' is not installed: pip install 'cear-bench\[reference\]'"):
        check(Apgd(norm="linf", eps=0.1, engine="autoattack"))
