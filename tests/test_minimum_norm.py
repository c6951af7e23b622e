"""DDN and FMN: how their radii move, worked out by hand, and what their distances mean (methods 8.11a)."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn, tensor

from attacks import Ddn, Fab, Fmn, Streams
from attacks.minimum_norm import cosine

BOTH = pytest.mark.parametrize("kind, norm", [(Ddn, "l2"), (Fmn, "l2"), (Fmn, "linf")])
MIDDLE = torch.full((1, 1), 0.5, dtype=torch.float64)


class Wall(nn.Module):
    """Label 0 holds while the sum of slope (x - 1/2) stays below ``gap``; notes what it was asked."""

    def __init__(self, gap, slope=(1.0,)):
        super().__init__()
        self.gap, self.slope, self.asked = gap, nn.Parameter(tensor(slope, dtype=torch.float64)), []
        self.eval()

    def forward(self, x):
        self.asked.append(x.detach()[0].clone())
        score = ((x.flatten(1) - 0.5) * self.slope).sum(1) - self.gap
        return torch.stack([torch.zeros_like(score), score], 1)


def walked(attack, gap, x=MIDDLE, slope=(1.0,)):
    """Displacements of the points of a search around an image of label 0, and its result."""
    model = Wall(gap, slope)
    result = attack(model, x, tensor([0]))
    return torch.stack(model.asked[1:-1]) - x[0], result


# --- schedules


def test_half_a_cosine_leads_from_the_first_to_the_last_step():
    assert [cosine(1, 0.01, step, 101) for step in (0, 50, 100)] == pytest.approx([1, 0.505, 0.01])
    assert cosine(1, 0.01, 25, 101) == pytest.approx(0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2)
    assert cosine(1, 0.01, 0, 1) == 1


def test_the_settings_are_those_of_the_papers():
    assert (Ddn().norm, Ddn().steps, Ddn().gamma, Ddn().eps) == ("l2", 100, 0.05, math.inf)
    assert [Ddn(steps=101).stride(step) for step in (0, 100)] == pytest.approx([1, 0.01])
    assert [Fmn(norm="l2", steps=101).stride(step) for step in (0, 100)] == pytest.approx([1, 0.01])
    assert [Fmn(norm="linf", steps=101).stride(step) for step in (0, 100)] == pytest.approx([10, 0.1])
    assert Fmn(norm="linf", first=2.0).stride(0) == 2


# --- DDN's radius


def test_the_radius_of_ddn_grows_where_the_label_holds_and_shrinks_where_not():
    # One pixel with a wall at .3, room for .5. From a radius of 1 the first point asked is the image itself, which holds:
    # 1.05, cut to .5 by the box, is wrong: 1.05 * .95 = .9975, cut again, and so on: .95 times smaller until below .3.
    delta, result = walked(Ddn(steps=60), 0.3)
    radius, expected = 1.0, [0.0]
    for _ in range(60):
        radius *= 0.95 if expected[-1] > 0.3 else 1.05
        expected.append(min(radius, 0.5))
    assert delta.flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert result.broken and result.distance.item() == pytest.approx(min(d for d in expected if d > 0.3), rel=1e-5)
    assert (result.forwards, result.backwards) == (61, 60)


def test_gamma_is_the_relative_change_of_the_radius():
    delta, _ = walked(Ddn(steps=30, gamma=0.5), 0.3)
    # 1.5 -> .75 -> .375 -> .1875 -> .28125 -> .421875 -> ...
    assert delta[:7].flatten().tolist() == pytest.approx([0, 0.5, 0.5, 0.375, 0.1875, 0.28125, 0.421875])


def test_ddn_turns_along_the_gradient_by_its_stride_and_back_onto_its_sphere():
    # Gradients always point along (3, 4)/5: from nothing the first step lies on the sphere there, cut to half the box.
    delta, _ = walked(Ddn(steps=3, gamma=0.5), 10.0, torch.full((1, 2), 0.5, dtype=torch.float64), (3.0, 4.0))
    assert delta[1].tolist() == pytest.approx([0.5, 0.5])  # 1.5 (.6, .8), cut
    turned = delta[1] + cosine(1, 0.01, 1, 3) * tensor([0.6, 0.8])
    assert delta[2].tolist() == pytest.approx((2.25 * turned / turned.norm()).clamp(max=0.5).tolist())


def test_ddn_climbs_the_cross_entropy():
    # Each wrong class looks at a pixel, and the first is e times as likely: the cross entropy rises along (e, 1), the margin
    # along (1, 0). The first step goes 1.05 far, with .5 of room.
    asked = []

    def model(x):
        asked.append(x.detach()[0] - 0.5)
        return torch.stack([torch.full_like(x[:, 0], 9.0), x[:, 0], x[:, 1] - 1], 1)

    Ddn(steps=1)(model, torch.full((1, 2), 0.5, dtype=torch.float64), tensor([0]))
    assert asked[2].tolist() == pytest.approx([0.5, 1.05 / math.hypot(math.e, 1)], rel=1e-5)


# --- FMN's radius


def test_fmn_jumps_to_where_the_linear_margin_is_zero_and_then_narrows_down():
    # Wall at .3: the jump goes 1.01 of the way. From then on gamma falls along a cosine from .05 to .001 within 40 steps.
    delta, result = walked(Fmn(norm="l2", steps=40), 0.3)
    expected, known, radius = [0.0, 0.303], 0.303, 0.303
    for step in range(1, 40):
        gamma = cosine(0.05, 0.001, step, 40)
        if expected[-1] > 0.3:
            known = min(known, expected[-1])
            radius = min(radius, known) * (1 - gamma)
        else:
            radius *= 1 + gamma
        # A step is at least .01 long; it only falls short of the ball where that is less than what the radius grew.
        expected.append(min(radius, expected[-1] + cosine(1, 0.01, step, 40)))
    assert delta.flatten().tolist() == pytest.approx(expected, abs=1e-9)
    assert result.distance.item() == pytest.approx(known) and known < 0.3 * 1.003
    assert (result.forwards, result.backwards) == (41, 40)


@pytest.mark.parametrize("norm, dual, far", [("linf", 7.0, [0.1, 0.1]), ("l2", 5.0, [0.14 * 0.6, 0.14 * 0.8])])
def test_the_jump_of_fmn_goes_by_the_dual_norm_of_the_gradient(norm, dual, far):
    # 3a + 4b = .7: in linf .7 / 7 = .1, in l2 .7 / 5 = .14. In linf a step of 10 along (3, 4)/5 is cut to the ball.
    delta, result = walked(Fmn(norm=norm, steps=30), 0.7, torch.full((1, 2), 0.5, dtype=torch.float64), (3.0, 4.0))
    assert delta[1].tolist() == pytest.approx([1.01 * d for d in far])
    assert 0.7 / dual < result.distance < 1.003 * 0.7 / dual


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_step_of_fmn_has_its_length_in_l2_in_both_norms(norm):
    delta, _ = walked(Fmn(norm=norm, steps=30, first=0.01), 0.7, torch.full((1, 2), 0.5, dtype=torch.float64), (3.0, 4.0))
    assert delta[1].tolist() == pytest.approx([0.006, 0.008])


def test_fmn_goes_on_until_it_crosses_where_the_first_jump_falls_short():
    # The score is a root, so that tangents are too steep. At 0: .18377 / 1.58114 = .11623, and 1.01 times as much is .11739; at
    # .11739 sqrt(.21739) = .46625 is left: .03375 / 1.07238 = .03147, and .11739 + 1.01 * .03147 = .14918 still falls short.
    asked = []

    def model(x):
        asked.append(x.detach()[0, 0].item() - 0.5)
        score = (x.flatten(1).sum(1) - 0.4).sqrt() - 0.5
        return torch.stack([torch.zeros_like(score), score], 1)

    result = Fmn(norm="linf", steps=50)(model, MIDDLE, tensor([0]))
    assert asked[1:4] == pytest.approx([0, 0.11739, 0.14918], abs=2e-5)
    assert result.broken and 0.15 < result.distance < 0.15 * 1.01


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fmn_crosses_where_the_box_stops_a_part_of_every_jump(norm):
    # Gradient (4, 3), the second pixel at the edge: only the first can move, and has to by .6 / 4 = .15. The linear jump in l2
    # goes .6 / 5 = .12 along (4, 3)/5, of which .096 are left, the next .096 + .216 / 5 = .139 in about that direction, and so
    # on. With d left of r = d + (.6 - 4d) / 5 = .12 + d / 5 and d = .8 r they end at d = .114: the wall is never reached.
    x = tensor([[0.5, 1.0]], dtype=torch.float64)
    _, result = walked(Fmn(norm=norm), 0.6 + 3 * 0.5, x, (4.0, 3.0))
    assert result.broken and result.distance.item() == pytest.approx(0.15, rel=0.01)


# --- what they find


def small_net():
    """A net with curved boundaries, and images near them."""
    gen = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4)).eval()
    for weight in net.parameters():
        weight.data = torch.randn(weight.shape, generator=gen) * (0.8 if weight.ndim > 1 else 0.1)
    x = torch.rand(80, 1, 4, 4, generator=gen)
    return net, x, net(x).argmax(1)


@BOTH
def test_points_are_adversarial_at_the_distance_reported(kind, norm):
    net, x, y = small_net()
    found = kind(norm=norm)(net, x, y)
    assert found.broken.all() and (net(found.x_adv).argmax(1) != y).all()
    delta = (found.x_adv - x).flatten(1)
    torch.testing.assert_close(found.distance, delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1))
    assert (found.distance > 0).all() and len(found.distance.unique()) > 70
    # FAB looks for the same points in another way. Single images may end at a farther boundary, even at 2.7 times the distance.
    ratio = found.distance / Fab(norm=norm, restarts=3)(net, x, y, Streams(0, ids=range(80))).distance
    assert 0.98 < ratio.median() < 1.02 and ((ratio > 0.9) & (ratio < 1.1)).double().mean() > 0.8


@BOTH
def test_the_share_of_larger_distances_falls_with_the_radius_as_robust_accuracy_does(kind, norm):
    net, x, y = small_net()
    free = kind(norm=norm)(net, x, y)
    radii = free.distance.quantile(tensor([0.0, 0.2, 0.5, 0.8, 1.0])).tolist()
    shares = [(free.distance > eps).double().mean().item() for eps in (0, *radii, 10)]
    assert shares[0] == 1 and shares[-1] == 0 and all(more >= less for more, less in pairwise(shares))
    for eps in radii[1:4]:
        within = kind(norm=norm, eps=eps)(net, x, y)
        assert within.broken[free.distance <= eps].all(), "the same walk, which a radius only ends"
        assert (within.broken & (free.distance > eps)).sum() <= 2, "by luck, the projection of what is farther"


@BOTH
def test_a_radius_ends_the_search_at_the_first_point_within_it(kind, norm):
    net, x, y = small_net()
    free = kind(norm=norm)(net, x, y)
    eps = free.distance.median().item()
    found = kind(norm=norm, eps=eps)(net, x, y)
    assert (free.forwards == 101).all() and (free.backwards == 100).all()
    assert (found.forwards[~found.broken] == 101).all() and found.forwards[found.broken].double().mean() < 50
    assert (found.distance <= eps * (1 + 1e-6)).all(), "what is farther is projected"


@BOTH
def test_a_model_without_gradients_is_never_crossed_and_says_so(kind, norm):
    def model(x):
        return torch.stack([x.round().flatten(1).sum(1) * 0 + 5, x.flatten(1).sum(1) * 0], 1)

    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = kind(norm=norm)(model, x, torch.zeros(3, dtype=torch.int64))
    assert not found.broken.any() and torch.equal(found.zeros, found.backwards) and found.zeros.min() == 100
    assert torch.equal(found.x_adv, x) and (found.distance == 0).all()


@pytest.mark.parametrize(
    "kind, wrong, text",
    [
        (Ddn, {"norm": "linf"}, "DDN is an l2 attack, got norm 'linf'; use fmn"),
        (Ddn, {"eps": 0}, "needed: eps > 0, steps >= 1, 0 < gamma < 1; got 0, 100, 0.05"),
        (Ddn, {"steps": 0}, "got inf, 0, 0.05"),
        (Fmn, {"gamma": 1}, "got inf, 100, 1"),
        (Fmn, {"gamma": 0}, "got inf, 100, 0"),
        (Fmn, {"norm": "l1"}, "known are linf, l2"),
    ],
)
def test_a_wrong_setting_is_refused_when_it_is_written(kind, wrong, text):
    with pytest.raises(ValueError, match=text):
        kind(**{"norm": "l2", **wrong})
