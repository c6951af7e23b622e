"""EDLCM: its numbers by hand, its derivatives by differences, and what must not move while it looks (methods 4.9)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_training import Bench, resumed, task
from torch import Tensor, nn

from attacks.streams import generator
from bench.request import Request
from bench.runner import Run
from defenses import edlcm as module
from defenses.api import Classifier, Recipe, Wrapped
from defenses.combine import Mean
from defenses.edlcm import (
    Edlcm,
    LocalCurvature,
    changes,
    cosines,
    cross_entropy,
    edlcm,
    edlcm_lg,
    edlcm_lr,
    evaluating,
    modeless,
    odds_against,
    sizes,
)
from defenses.ensemble import Ensemble
from defenses.joint import TrainedTogether, assembled
from defenses.naive import plain
from defenses.training import Batch, Trained

FULL = LocalCurvature(alpha=0.7, beta=0.3, h=0.4, ramp=0, norm_power=2)


class Quadratic(Classifier):
    """Loss (x'Ax) / 2 of points (n 1 1 2), as a single logit."""

    def __init__(self, *diagonal: float) -> None:
        super().__init__()
        self.a = torch.tensor(diagonal)  # of A

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1).square() * self.a).sum(1, keepdim=True) / 2


def test_quadratic_losses_give_the_numbers_by_hand() -> None:
    x = torch.ones(3, 1, 1, 2)
    _, change = changes([Quadratic(2.0, 1.0), Quadratic(1.0, 2.0)], x, lambda own: own[:, 0], 0.1)
    assert torch.allclose(change[:, 0], torch.tensor([[0.141421, 0.070711], [0.070711, 0.141421]]), atol=1e-6)
    assert torch.allclose(sizes(change).sum(0), torch.full((3,), 0.05))
    assert torch.allclose(sizes(change, 1), torch.full((2, 3), 0.025**0.5))
    assert torch.allclose(cosines(change), torch.full((1, 3), 0.8))
    assert torch.allclose(sizes(change)[0] / 0.1**2, torch.full((3,), 2.5))


def test_a_gradient_of_zero_gives_zeros_and_no_nan() -> None:
    members = [Quadratic(2.0, 1.0), Quadratic(1.0, 2.0), Quadratic(3.0, 1.0)]
    for one in members:
        one.a.requires_grad_()
    _, change = changes(members, torch.zeros(2, 1, 1, 2), lambda own: own[:, 0], 0.1)
    for power in (1, 2):
        total = sizes(change, power).sum() + cosines(change).sum()
        assert total == 0
        assert all(not g.any() for g in torch.autograd.grad(total, [one.a for one in members], retain_graph=True))


def smooth(members: int = 3, seed: int = 0) -> Ensemble:
    """Tiny networks without kinks, in float64, with BatchNorm whose running statistics are not those of any batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        nets: list[Classifier] = []
        for _ in range(members):
            norm = nn.BatchNorm2d(3)
            norm.running_mean, norm.running_var = torch.randn(3) * 0.1, torch.rand(3) + 0.5
            layers = nn.Conv2d(1, 3, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Softplus(), nn.Linear(5, 4)
            nets.append(Wrapped(nn.Sequential(*layers)))
    return Ensemble(nets, Mean()).double()


def batch(
    n: int = 6, shape: tuple[int, ...] = (1, 4, 4), classes: int = 4, dtype: torch.dtype = torch.float64, **rest: Any
) -> Batch:
    gen = generator(3, "edlcm")
    x, y = torch.rand(n, *shape, generator=gen, dtype=torch.float64), torch.randint(0, classes, (n,), generator=gen)
    return Batch(x, y, gen, **rest)


def plainly(net: Ensemble, seen: Batch, loss: LocalCurvature) -> dict[str, Tensor]:
    """The loss as methods 4.9 writes it: image by image, member by member, nothing shared."""
    ce = torch.stack([F.cross_entropy(m(seen.x), seen.y, label_smoothing=seen.label_smoothing) for m in net.members]).sum()
    net.eval()
    curvature, alignment = [], []
    for image, label in zip(seen.x, seen.y):
        moved = []
        for member in net.members:
            found = []
            point = image.clone()
            for _ in range(2):
                leaf = point.clone().requires_grad_()
                own = F.cross_entropy(member(leaf[None]), label[None])
                found += torch.autograd.grad(own, leaf, create_graph=True)
                g = found[0].detach().sign()
                point = image + loss.h * g / g.norm()
            moved.append((found[1] - found[0]).flatten())
        curvature.append(torch.stack([d.norm() ** loss.norm_power for d in moved]).sum())
        pairs = [F.cosine_similarity(a, b, 0) for i, a in enumerate(moved) for b in moved[:i]]
        alignment.append(torch.stack(pairs).sum())
    net.train()
    return {
        "ce": ce,
        "curvature": loss.alpha * torch.stack(curvature).mean(),
        "alignment": loss.beta * torch.stack(alignment).mean(),
    }


def grads(net: nn.Module, parts: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(torch.stack(list(parts.values())).sum(), list(net.parameters())))


@pytest.mark.parametrize("power", [1, 2])
def test_the_loss_is_the_one_written_plainly_with_its_derivatives(power: int) -> None:
    loss, seen = replace(FULL, norm_power=power), batch(label_smoothing=0.1)
    one, other = smooth().train(), smooth().train()
    found, expected = loss(one, seen, []), plainly(other, seen, loss)
    assert list(found) == list(expected)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-10) for name in found)
    for a, b in zip(grads(one, found), grads(other, expected), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-12)


def test_one_forward_pass_for_cross_entropy_and_base_point_changes_nothing() -> None:
    """LeNet-5 has no modes: what is shared there equals the plain form, which forwards twice."""
    net = assembled(replace(task(n=20), architecture="lenet5"), 2).double().train()
    assert all(modeless(member) for member in net.members)
    seen = batch(4, (1, 28, 28), 10)
    calls: list[int] = []
    net.members[0].register_forward_hook(lambda *_: calls.append(1))
    found = FULL(net, seen, [])
    assert len(calls) == 2
    expected = plainly(net, seen, FULL)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-9) for name in found)
    for a, b in zip(grads(net, found), grads(net, expected), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-10)


def test_derivatives_agree_with_differences_for_every_parameter() -> None:
    """What the derivative takes for constants is held: the direction g, whose signs do not flip under a nudge of a smooth
    network, and the running statistics, which the ordinary forward pass would move."""
    net, seen, loss = smooth(2).train(), batch(4), replace(FULL, alpha=2.0)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.0

    def value() -> float:
        return float(torch.stack(list(loss(net, seen, []).values())).sum().detach())

    for p, gradient in zip(list(net.parameters()), grads(net, loss(net, seen, [])), strict=True):
        for place in range(p.numel()):
            ends = []
            for nudge in (1e-5, -1e-5):
                p.data.view(-1)[place] += nudge
                ends.append(value())
                p.data.view(-1)[place] -= nudge
            assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(gradient.view(-1)[place]), rel=1e-4, abs=1e-7)


def test_the_regulariser_of_an_image_does_not_know_its_batch() -> None:
    net, seen = smooth().eval(), batch(8)

    def look(rows: slice) -> Tensor:
        y = seen.y[rows]
        return changes(net.members, seen.x[rows], lambda own: cross_entropy(own, y), 0.3)[1]

    whole = look(slice(0, 8))
    for row in range(8):
        assert torch.allclose(look(slice(row, row + 1))[:, 0], whole[:, row], rtol=1e-9, atol=1e-14)


def test_statistics_move_once_as_in_ordinary_training_and_modes_come_back() -> None:
    one, other, seen = smooth().train(), smooth().train(), batch()
    one.members[1].eval()
    other.members[1].eval()
    modes = [part.training for part in one.modules()]
    FULL(one, seen, [])
    other.member_logits(seen.x)
    assert [part.training for part in one.modules()] == modes
    ours, plain_ones = one.state_dict(), other.state_dict()
    assert ours.keys() == plain_ones.keys() and any(name.endswith("num_batches_tracked") for name in ours)
    assert all(torch.equal(ours[name], plain_ones[name]) for name in ours)


def test_modes_come_back_after_an_error() -> None:
    net = smooth().train()
    with pytest.raises(RuntimeError, match="no"), evaluating(net):
        assert not any(part.training for part in net.modules())
        raise RuntimeError("no")
    assert all(part.training for part in net.modules())


def test_ablations_are_the_full_loss_with_a_weight_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    assert edlcm_lr == replace(edlcm, beta=0.0) and edlcm_lg == replace(edlcm, alpha=0.0)
    assert (edlcm.alpha, edlcm.beta, edlcm.h, edlcm.ramp, edlcm.norm_power) == (1.0, 0.01, 0.3, 5, 2)
    seen = batch()
    full = FULL(smooth().train(), seen, [])
    aligned = replace(FULL, alpha=0.0)(smooth().train(), seen, [])
    monkeypatch.setattr(module, "pair_cosines", None)  # only L_r asks for no cosine
    curved = replace(FULL, beta=0.0)(smooth().train(), seen, [])
    assert list(full) == ["ce", "curvature", "alignment"]
    assert curved.keys() == {"ce", "curvature"} and aligned.keys() == {"ce", "alignment"}
    for some in (curved, aligned):
        assert all(torch.equal(some[name], full[name]) for name in some)


@pytest.mark.parametrize("architecture", ["lenet5", "resnet20"])
def test_both_weights_zero_is_the_naive_ensemble_to_the_bit(architecture: str) -> None:
    """A sum of cross-entropies gives every member the gradient that it has alone, and the optimiser knows no members."""
    one = task((3, 32, 32), architecture, 24)
    one = replace(one, recipe=replace(one.recipe, epochs=2, batch=8, augment="crop_flip"))
    made = replace(edlcm, alpha=0.0, beta=0.0, members=2).part(one, 0).make(one, [], Bench())
    for member in range(2):
        alone = plain(one, 0, member).make(one, [], Bench())
        assert all(torch.equal(made[f"networks.{member}.{name}"], tensor) for name, tensor in alone.items())


def test_the_step_grows_over_the_first_epochs_and_stays() -> None:
    loss = edlcm.loss(task())
    assert [round(loss.step(epoch), 9) for epoch in (0, 1, 3, 4, 5, 100)] == [0.06, 0.12, 0.24, 0.3, 0.3, 0.3]
    assert replace(loss, ramp=0).step(0) == 0.3
    net, first, late = smooth().train(), batch(epoch=0), batch(epoch=4)
    assert loss(net, first, [])["curvature"] < loss(net, late, [])["curvature"]


def test_a_sure_image_has_a_true_gradient() -> None:
    """With a margin of 25, float32 rounds p_y to 1: the usual gradient loses its largest part."""
    logits = torch.tensor([[26.0, 0.0, 1.0], [0.0, 3.0, 2.5]], requires_grad=True)
    y = torch.tensor([0, 2])
    exact = logits.detach().double().requires_grad_()
    (true,) = torch.autograd.grad(F.cross_entropy(exact, y, reduction="sum"), exact)
    (found,) = torch.autograd.grad(cross_entropy(logits, y).sum(), logits, create_graph=True)
    (usual,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), logits)
    assert torch.allclose(found.double(), true, rtol=1e-4, atol=0) and usual[0, 0] == 0
    assert torch.allclose(cross_entropy(exact, y), F.cross_entropy(exact, y, reduction="none"), rtol=1e-9)
    assert torch.autograd.grad(found.square().sum(), logits)[0].isfinite().all()
    p = exact.detach().softmax(-1)[1, 2]
    assert float(odds_against(exact, y)[1].detach()) == pytest.approx(float(((1 - p) / p).log()))


@pytest.mark.parametrize("architecture", ["lenet5", pytest.param("resnet20", marks=pytest.mark.slow)])
def test_continued_training_ends_with_the_same_bits(architecture: str) -> None:
    one = task((3, 32, 32), architecture, 20)
    one = replace(one, recipe=Recipe(epochs=3, batch=8, lr=0.01))
    bench = resumed(replace(edlcm, members=2).part(one, 0), one)
    assert len(bench.reports) == 2 and {"curvature", "alignment", "ce"} <= bench.reports[0].keys()


def test_training_flattens() -> None:
    one = task(n=48)
    one = replace(one, recipe=Recipe(epochs=12, batch=16, lr=0.003, optimizer="adam"))
    ends = []
    for defense in (Edlcm(members=2, alpha=0.0, beta=0.0), Edlcm(members=2, ramp=0)):
        net = assembled(one, 2)
        net.load_state_dict(defense.part(one, 0).make(one, [], Bench()))
        x, y = one.train.floats(), one.train.labels
        _, change = changes(net.members, x, partial(cross_entropy, y=y), 0.3)
        ends.append(float(sizes(change.detach()).mean()))
    assert ends[1] < 0.5 * ends[0]


def test_weights_and_seed_decide_the_part() -> None:
    one = task()
    keys = [
        edlcm.part(one, 0),
        edlcm.part(one, 1),
        edlcm_lr.part(one, 0),
        edlcm_lg.part(one, 0),
        replace(edlcm, h=0.1).part(one, 0),
    ]
    assert len({part.key(one) for part in keys}) == len(keys)
    assert isinstance(keys[0], Trained) and isinstance(edlcm, TrainedTogether)


def test_one_member_is_curved_but_not_aligned() -> None:
    alone = Edlcm(members=1, beta=0.0)
    one = replace(task(n=20), recipe=Recipe(epochs=1, batch=8, lr=0.01))
    assert alone.part(one, 0).make(one, [], Bench()).keys() == assembled(one, 1).state_dict().keys()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"members": 1}, "members: curvatures are aligned in pairs, so at least 2 unless beta is 0, got 1"),
        ({"h": 0.0}, "h: a length in pixels above 0, got 0.0"),
        ({"ramp": -1}, "ramp: a number of epochs, 0 for none, got -1"),
        ({"norm_power": 3}, "norm_power: 1 or 2, got 3"),
    ],
)
def test_values_that_make_no_sense_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(edlcm, **fields)


def test_all_three_train_and_are_evaluated(tiny: Path, tmp_path: Path) -> None:
    run = Run(Request(defense="edlcm,edlcm_lr,edlcm_lg", suite=str(tiny), runs=tmp_path / "runs", only=("clean", "pgd")))
    records = run.execute()
    assert [record.status for record in records] == ["success"] * 6, [record.error for record in records]
    assert {record.defense["name"] for record in records} == {"edlcm", "edlcm_lr", "edlcm_lg"}
