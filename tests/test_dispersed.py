"""DEG and PDD: the numbers of methods 4.7 and 4.8, keep probabilities against a slow reference, masks from one generator."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_joint import Fixed, Linear, assert_gradients, at, batch, recipe, same, smooth, total, vectors
from test_nets import GREY
from test_training import Bench, resumed, task
from torch import Tensor, nn

from attacks.streams import generator
from bench.request import Request
from bench.runner import Run
from defenses.combine import Mean
from defenses.dispersed import (
    Dispersed,
    DispersedGradients,
    deg,
    dispersion,
    diversified,
    head,
    keep_probabilities,
    masks,
    own_bins,
    pdd,
    pdd_deg,
    penultimate,
    scale_ratio,
)
from defenses.ensemble import Ensemble
from defenses.joint import input_gradients
from defenses.nets import ARCHITECTURES, Network, Normalise, network
from defenses.training import Batch, TrainingDiverged

LOSSES = [DispersedGradients(1.0, 0.5), DispersedGradients(1.0, 0.0, 10), DispersedGradients(1.0, 0.5, 10)]
NAMES = ["deg", "pdd", "pdd_deg"]


# DEG (methods 4.7)


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        (at(20, 20, 20), 3.0),
        (at(0, 120, 240), -1.5),
        (vectors((1, 0, 0), (0, 2, 0), (0, 0, 3)), 0.0),
        (at(0, 60), 0.5),
        (vectors((0, 0), (1, 1), (1, 1)), 1.0),
    ],
)
def test_dispersion_is_the_plain_sum_of_cosines(gradients: Tensor, expected: float) -> None:
    assert dispersion(gradients).tolist() == pytest.approx([expected], abs=1e-9)


def test_cosines_are_per_image_and_averaged_and_cross_entropies_are_means_of_members() -> None:
    net, one = smooth(), batch(5)
    parts = DispersedGradients(2.0, 0.3)(net, one, [])
    logits, found = input_gradients(net.members, one.x, lambda own: F.cross_entropy(own, one.y, reduction="none"))
    cosines = [F.cosine_similarity(found[a], found[b], dim=1).mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert parts["cosines"].item() == pytest.approx(0.3 * sum(c.item() for c in cosines))
    alone = [F.cross_entropy(own, one.y).item() for own in logits]
    assert parts["ce"].item() == pytest.approx(2.0 * sum(alone) / 3)


def test_gradients_are_taken_in_the_mode_of_the_networks_and_statistics_move_once() -> None:
    one = task((3, 32, 32), "resnet20", 20)
    net = Ensemble([network(one, generator(member)) for member in range(2)], Mean()).train()
    x, y = one.train.floats(slice(0, 6)), one.train.labels[:6]
    for count, loss in enumerate((*LOSSES, DispersedGradients(1.0, 0.0)), 1):
        loss(net, Batch(x, y, generator(0)), [])
        assert {int(layer.num_batches_tracked) for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)} == {count}


def test_weight_zero_is_the_mean_cross_entropy() -> None:
    net, one = smooth(), batch(5)
    one = replace(one, label_smoothing=0.1)
    parts = DispersedGradients(1.0, 0.0)(net, one, [])
    expected = torch.stack([F.cross_entropy(own, one.y, label_smoothing=0.1) for own in net.member_logits(one.x)]).mean()
    assert list(parts) == ["ce"] and torch.equal(parts["ce"], expected)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_gradients_are_central_differences(loss: DispersedGradients) -> None:
    """Masks included: with the same generator they are the same on both sides of a small step, and constants in between."""
    net = smooth()
    assert_gradients(net, lambda: total(loss(net, batch(), [])))


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[2]], ids=["deg", "pdd_deg"])
def test_the_regulariser_alone_moves_the_first_convolution(loss: DispersedGradients) -> None:
    one = task()
    net = deg.build(one).train()
    parts = loss(net, Batch(one.train.floats(slice(0, 8)), one.train.labels[:8], generator(0)), [])
    parts["cosines"].backward()
    for member in net.members:
        assert member.body[0].weight.grad.abs().max().item() > 0


@pytest.mark.parametrize("right", [True, False])
def test_very_confident_members_are_finite(right: bool) -> None:
    nets = [Linear(torch.randn(4, 36, generator=generator(member)) * 100) for member in range(3)]
    net, x = Ensemble(nets, Mean()), batch(6).x.float()
    y = net.member_logits(x)[0].argmax(-1) if right else net.member_logits(x)[0].argmin(-1)
    parts = DispersedGradients(1.0, 1.0)(net, Batch(x, y, generator(0)), [])
    gradients = torch.autograd.grad(total(parts), list(net.parameters()))
    assert all(value.isfinite() for value in parts.values())
    assert all(gradient.isfinite().all() for gradient in gradients)


# PDD (methods 4.8): probabilities


def slow(features: Tensor, bins: int) -> list[list[list[Fraction]]]:
    """Keep probabilities as the text has them, an image and a feature at a time, in exact numbers."""
    members, images, width = features.shape
    keep = [[[Fraction(0)] * width for _ in range(images)] for _ in range(members)]
    for i in range(images):
        values = [[Fraction(v) for v in features[m, i].tolist()] for m in range(members)]
        low, high = min(map(min, values)), max(map(max, values))
        if low == high:
            for m in range(members):
                keep[m][i] = [Fraction(9, 10)] * width
            continue
        place = [[min(int((v - low) * bins / (high - low)), bins - 1) for v in row] for row in values]
        total_count = Counter(b for row in place for b in row)
        ranking = sorted(total_count, key=lambda b: (-total_count[b], b))  # the fullest first, the lower of two as full
        for m in range(members):
            mine = ranking[m] if m < len(ranking) else ranking[0]
            for j in range(width):
                r = place[m].count(place[m][j])
                keep[m][i][j] = Fraction(9, 10) if place[m][j] == mine else Fraction(1, 10) * (1 - Fraction(r, width))
    return keep


@st.composite
def features(draw: st.DrawFn) -> Tensor:
    """Features (m n d) that are whole numbers, so that many share a value, a bin, or a bin's edge."""
    members, images, width = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    top = draw(st.integers(0, 20))
    count = members * images * width
    values = draw(st.lists(st.integers(-top, top), min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float32).view(members, images, width)


def test_the_example_of_the_reference() -> None:
    two = torch.tensor([[[0, 0.05, 0.95, 1]], [[0.02, 0.03, 0.55, 1]]])
    expected = torch.tensor([[[0.9, 0.9, 0.05, 0.05]], [[0.05, 0.05, 0.075, 0.9]]])
    torch.testing.assert_close(keep_probabilities(two, 10), expected)
    torch.testing.assert_close(keep_probabilities(two * 7 - 3, 10), expected)  # only places between the extremes count


@given(features(), st.sampled_from([1, 2, 5, 10, 20]))
@settings(max_examples=300, deadline=None)
def test_keep_probabilities_are_those_of_the_slow_reference(some: Tensor, bins: int) -> None:
    expected = torch.tensor([[[float(p) for p in row] for row in rows] for rows in slow(some, bins)])
    torch.testing.assert_close(keep_probabilities(some, bins), expected)


@given(features(), st.sampled_from([10, 20]))
@settings(max_examples=100, deadline=None)
def test_keep_probabilities_are_0_9_in_one_bin_and_at_most_0_1_outside(some: Tensor, bins: int) -> None:
    keep = keep_probabilities(some, bins)
    assert keep.shape == some.shape
    high = keep == torch.tensor(0.9)
    assert (keep[~high] <= 0.1).all() and (keep >= 0).all()
    extremes = some.amin((0, 2)), some.amax((0, 2))
    for image in range(some.shape[1]):
        if extremes[0][image] == extremes[1][image]:
            assert high[:, image].all()
            continue
        for member in range(len(some)):
            mine = some[member, image][high[member, image]]
            if len(mine):  # all of them within one bin
                assert mine.max() - mine.min() <= (extremes[1][image] - extremes[0][image]) / bins * (1 + 1e-6)
    assert torch.equal(keep, torch.cat([keep_probabilities(row, bins) for row in some.split(1, 1)], 1))  # image by image


def test_bins_go_to_members_by_count_and_of_equal_ones_the_lower_first() -> None:
    counts = torch.tensor([[[1.0, 0, 2, 0, 3, 0]], [[0, 0, 1, 3, 0, 1]], [[0.0, 3, 0, 0, 1, 0]]])  # sums 1 3 3 3 4 1
    assert own_bins(counts).flatten().tolist() == [4, 1, 2]
    assert own_bins(torch.ones(4, 2, 6)).T.tolist() == [[0, 1, 2, 3]] * 2


def test_more_members_than_bins_in_use_share_the_fullest() -> None:
    counts = torch.zeros(5, 1, 4)
    counts[:, 0, 3], counts[0, 0, 1] = 2, 1
    assert own_bins(counts).flatten().tolist() == [3, 1, 3, 3, 3]
    assert own_bins(torch.ones(3, 1, 1)).flatten().tolist() == [0, 0, 0]  # fewer bins than members
    keep = keep_probabilities(torch.tensor([[[0.0, 0, 1]]]).repeat(4, 1, 1), 10)
    assert keep[0].tolist() == keep[2].tolist() == keep[3].tolist()
    assert keep[0, 0].tolist() == pytest.approx([0.9, 0.9, 0.1 * 2 / 3])
    assert keep[1, 0].tolist() == pytest.approx([0.1 / 3, 0.1 / 3, 0.9])


def test_equal_features_are_all_kept_with_0_9() -> None:
    some = torch.full((3, 2, 4), -2.5)
    some[0, 1, 0] = 1
    keep = keep_probabilities(some, 10)
    assert (keep[:, 0] == torch.tensor(0.9)).all() and not (keep[:, 1] == torch.tensor(0.9)).all()


def test_the_largest_value_lies_in_the_last_bin() -> None:
    some = torch.tensor([[[0.0, 0, 0, 0.95, 1]], [[0.0, 0, 0, 0.95, 1]]])
    assert keep_probabilities(some, 10)[1, 0].tolist() == pytest.approx([0.04, 0.04, 0.04, 0.9, 0.9])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_give_probabilities_nevertheless(bad: float) -> None:
    """So that a diverging training ends with the message of its loss, not with an index out of range."""
    some = torch.rand(3, 2, 4, generator=generator(0))
    some[1, 0, 2] = bad
    keep = keep_probabilities(some, 10)
    assert ((keep >= 0) & (keep <= 1)).all()
    assert torch.equal(keep[:, 1], keep_probabilities(some[:, 1:], 10)[:, 0])


# PDD: masks


def test_masks_come_from_the_given_generator_alone() -> None:
    some, before = torch.rand(3, 4, 50, generator=generator(0)), torch.random.get_rng_state()
    first, second, other = (masks(some, 10, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    gen = generator(1)
    assert not torch.equal(masks(some, 10, gen), masks(some, 10, gen))
    assert torch.equal(before, torch.random.get_rng_state())


def test_masks_are_drawn_with_the_keep_probabilities() -> None:
    some = torch.randn(3, 1, 6, generator=generator(0))
    gen = generator(1)
    drawn = torch.stack([masks(some, 10, gen) for _ in range(4000)]).float()
    assert drawn.shape == (4000, 3, 1, 6)
    torch.testing.assert_close(drawn.mean(0), keep_probabilities(some, 10), rtol=0, atol=0.03)
    correlation = torch.corrcoef(drawn.flatten(1).T)  # independent features
    assert correlation.fill_diagonal_(0).nan_to_num(0).abs().max() < 0.08


def test_features_are_multiplied_by_masks_without_rescaling() -> None:
    net, one = smooth(), batch(4)
    found = diversified(net.members, [one.x] * 3, 10, generator(7))
    hidden = torch.stack([penultimate(member, one.x) for member in net.members])
    kept = masks(hidden, 10, generator(7))
    for member, (own, row) in enumerate(zip(found, hidden * kept)):
        torch.testing.assert_close(own, F.linear(row, head(net.members[member]).weight, head(net.members[member]).bias))
    assert 0 < kept.float().mean() < 1


def test_cross_entropy_and_gradients_have_the_same_masks() -> None:
    net, one = smooth(), batch(4)
    parts = DispersedGradients(1.0, 1.0, 10)(net, replace(one, gen=generator(7)), [])
    leaves = [one.x.clone().requires_grad_() for _ in range(3)]
    logits = diversified(net.members, leaves, 10, generator(7))
    found = torch.autograd.grad(torch.stack([F.cross_entropy(own, one.y) for own in logits]).sum(), leaves)
    assert parts["ce"].item() == pytest.approx(sum(F.cross_entropy(own, one.y).item() for own in logits) / 3)
    expected = sum(F.cosine_similarity(found[a].flatten(1), found[b].flatten(1)).mean() for a, b in ((0, 1), (0, 2), (1, 2)))
    assert parts["cosines"].item() == pytest.approx(float(expected))


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in ("resnet110", "vgg19", "resnet34")])
def test_features_and_head_are_the_network(architecture: str) -> None:
    shape = (1, 28, 28) if architecture in GREY else (3, 32, 32)
    one = task(shape, architecture, 20)
    net, x = network(one, generator(0)), one.train.floats(slice(0, 2))
    with torch.inference_mode():
        assert torch.equal(head(net)(penultimate(net, x)), net(x))
        assert penultimate(net, x).shape == (2, head(net).in_features)


@pytest.mark.parametrize("defense", [deg, pdd, pdd_deg])
def test_the_finished_model_has_no_masks(defense: Dispersed) -> None:
    model = defense.build(task()).eval()
    x = task().train.floats(slice(0, 5))
    with torch.no_grad():
        assert torch.equal(model(x), model(x)) and not model.randomized
        expected = torch.stack([member(x).softmax(-1) for member in model.members]).mean(0).log()
        torch.testing.assert_close(model(x), expected)


def test_networks_without_a_last_linear_layer_are_refused() -> None:
    for net in (Fixed([0.0, 1]), Network(Normalise([0.5], [0.5]), nn.Conv2d(1, 2, 1), "torchvision/resnet18")):
        with pytest.raises(
            ValueError, match=r"last linear layer, which is not known of '(Fixed|torchvision/resnet18)'; use an"
        ):
            diversified([net], [torch.zeros(1, 1, 2, 2)], 10, generator(0))
    foreign = replace(task((3, 32, 32)), architecture="torchvision/resnet18")
    assert "not known of torchvision/resnet18" in pdd.unsuited(foreign) and pdd_deg.unsuited(foreign)
    assert not deg.unsuited(foreign) and not pdd.unsuited(task())
    model = deg.build(foreign).train()
    with pytest.raises(ValueError, match="not known of 'torchvision/resnet18'"):
        pdd.loss(foreign)(model, Batch(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]), generator(0)), [])


# PDD: how much larger logits are at evaluation


def test_scale_ratio_is_the_inverse_share_of_features_that_are_kept() -> None:
    """Equal members whose features all share an image's one value are kept with 0.9, so the logits shrink to 0.9."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(4, 3000), nn.Linear(3000, 5, bias=False))
    nn.init.zeros_(body[1].weight)
    nn.init.ones_(body[1].bias)
    nn.init.ones_(body[2].weight[:2].data)
    nn.init.zeros_(body[2].weight[2:].data)
    nets = [Network(Normalise([0.0], [1.0]), copy.deepcopy(body), "flat") for _ in range(3)]
    ratio = scale_ratio(Ensemble(nets, Mean()).eval(), torch.rand(8, 1, 2, 2), 10, generator(0))
    assert ratio == pytest.approx(1 / 0.9, rel=0.01)


def test_scale_ratio_of_a_network_is_above_one_and_moves_nothing() -> None:
    one = task((3, 32, 32), "resnet20", 20)
    net = Ensemble([network(one, generator(member)) for member in range(3)], Mean()).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ratios = [scale_ratio(net, one.train.floats(slice(0, 10)), 10, generator(seed)) for seed in (1, 1, 2)]
    assert ratios[0] > 1.2 and ratios[0] == ratios[1] != ratios[2]
    assert same(before, net.state_dict()) and not net.training


# Defenses


@pytest.mark.parametrize(("defense", "watched"), [(deg, False), (pdd, True), (replace(pdd_deg, eat=True, eat_sources=0), True)])
def test_the_ratio_is_in_the_log_of_every_epoch_where_there_are_masks(defense: Dispersed, watched: bool) -> None:
    one, bench = task(n=32), Bench()
    replace(defense, members=2).part(one, 0).make(one, [], bench)
    assert len(bench.reports) == 4 and all(("validation_scale_ratio" in line) == watched for line in bench.reports)


def test_hyper_parameters_are_those_of_the_reference() -> None:
    one = task()
    assert deg.loss(one) == DispersedGradients(1.0, 0.01, 0)
    assert pdd.loss(one) == DispersedGradients(1.0, 0.0, 10)
    assert pdd_deg.loss(one) == DispersedGradients(1.0, 0.01, 10)
    assert [replace(pdd, members=members).bins for members in (1, 4, 5, 8)] == [10, 10, 20, 20]
    assert len({defense.part(one, 0).key(one) for defense in (deg, pdd, pdd_deg)}) == 3
    with pytest.raises(ValueError, match="in pairs, so at least 2, got 1"):
        replace(deg, members=1)


@pytest.mark.parametrize("defense", [deg, pdd, pdd_deg], ids=NAMES)
def test_continued_training_ends_with_the_same_bits(defense: Dispersed) -> None:
    one = recipe(epochs=3, optimizer="adam")
    bench = resumed(defense.part(one, 0), one)
    parts = {"ce"} | ({"cosines"} if defense.beta else set())
    assert all(parts <= set(log) for log in bench.reports)


def test_training_lowers_the_cosines() -> None:
    one = recipe(epochs=12, optimizer="adam")
    logs: dict[float, list[dict[str, float]]] = {}
    for beta in (0.01, 1.0):
        bench = Bench()
        replace(deg, beta=beta).part(one, 0).make(one, [], bench)
        logs[beta] = bench.reports
    assert logs[1.0][-1]["cosines"] < logs[0.01][-1]["cosines"] / 0.01 - 0.5


@pytest.mark.parametrize("defense", [deg, pdd, pdd_deg], ids=NAMES)
def test_a_diverging_run_says_so(defense: Dispersed) -> None:
    one = recipe(lr=1e6)
    with pytest.raises(TrainingDiverged, match=r"dispersed 0 \(seed 0\): .*not finite in epoch \d of 4"):
        defense.part(one, 0).make(one, [], Bench())


def test_a_run_of_all_three_succeeds(tiny: Path) -> None:
    fields: dict[str, Any] = {"suite": str(tiny), "runs": tiny.parent / "runs", "device": "cpu"}
    records = Run(Request(defense="deg,pdd,pdd_deg", **fields)).execute()
    found = {(record.defense["name"], record.eval["name"]): record.status for record in records}
    statuses = {"clean": "success", "pgd": "success", "certified": "skipped"}  # the last: no smoothed classifier
    assert found == {(name, asked): status for name in NAMES for asked, status in statuses.items()}
    assert len({record.hashes["weights"] for record in records if record.status == "success"}) == 3
