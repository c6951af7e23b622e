"""FAB's projection against linear programming and bisection, and its walk against arithmetic (methods 8.8)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn, tensor

from attacks import Fab, FabT, Streams
from attacks.fab import onto_plane

NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual, tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)


# --- the projection on a plane inside the box

pixel = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1).map(lambda v: round(v, 4)))
weight = st.one_of(st.just(0.0), st.floats(-3, 3).map(lambda v: round(v, 3)), st.sampled_from([1e-3, -40.0, 700.0]))
PLANE = {
    "pixels": st.lists(st.tuples(pixel, weight), min_size=1, max_size=8),
    "share": st.floats(0.001, 0.999),
    "up": st.booleans(),
}


def plane(pixels, share, up):
    """A point, a normal, and a gap that is this share of what the box allows."""
    x, w = (np.array(column) for column in zip(*pixels))
    most = np.where(w > 0, w * (1 - x), -w * x).sum() if up else -np.where(w > 0, w * x, -w * (1 - x)).sum()
    assume(abs(most) > 1e-6)
    return x, w, share * most


def projected(x, w, gap, norm, dtype=torch.float64):
    return onto_plane(tensor(x[None], dtype=dtype), tensor(w[None], dtype=dtype), tensor([gap], dtype=dtype), norm)[0]


@settings(max_examples=150, deadline=None)
@given(**PLANE)
def test_in_linf_the_step_is_as_short_as_linear_programming_finds(pixels, share, up):
    x, w, gap = plane(pixels, share, up)
    d = projected(x, w, gap, "linf").numpy()
    scale = np.abs(w).max()
    assert w @ d == pytest.approx(gap, rel=1e-5, abs=1e-9 * scale), "the plane is met"
    assert (x + d >= -1e-12).all() and (x + d <= 1 + 1e-12).all()
    n, eye = len(x), np.eye(len(x))
    above = np.block([[eye, -np.ones((n, 1))], [-eye, -np.ones((n, 1))]])
    known = linprog(
        np.append(np.zeros(n), 1), above, np.zeros(2 * n), np.append(w / scale, 0)[None], [gap / scale],
        bounds=[*((-v, 1 - v) for v in x), (0, 1)],
    )  # fmt: skip
    assert known.status == 0
    assert np.abs(d).max() == pytest.approx(known.fun, rel=1e-4, abs=1e-6)


@settings(max_examples=150, deadline=None)
@given(**PLANE)
def test_in_l2_the_step_is_the_one_that_bisection_finds(pixels, share, up):
    # The minimiser of |d|^2 / 2 - t (w d - gap) in the box is clip(t w): bisect t until w d meets the gap.
    x, w, gap = plane(pixels, share, up)
    d = projected(x, w, gap, "l2").numpy()

    def step(t):
        return np.clip(x + t * w, 0, 1) - x

    low, high = (0.0, 1e9) if gap > 0 else (-1e9, 0.0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if w @ step(middle) < gap else (low, middle)
    np.testing.assert_allclose(d, step((low + high) / 2), rtol=1e-4, atol=1e-6)
    assert w @ d == pytest.approx(gap, rel=1e-5, abs=1e-9 * np.abs(w).max())


@NORMS
@settings(max_examples=100, deadline=None)
@given(**{**PLANE, "share": st.floats(1.001, 50)})
@example(pixels=[(0.0, 1.0), (1.0, -2.0)], share=1.001, up=True)
def test_a_plane_outside_the_box_gives_the_furthest_corner(norm, pixels, share, up):
    x, w, gap = plane(pixels, share, up)
    corner = np.where(w == 0, x, np.where((w > 0) == up, 1.0, 0.0))
    np.testing.assert_allclose(x + projected(x, w, gap, norm).numpy(), corner, atol=1e-9)


@NORMS
@settings(max_examples=100, deadline=None)
@given(**{**PLANE, "share": st.floats(-2, 2)})
def test_no_float32_step_leaves_the_box_or_goes_the_wrong_way(norm, pixels, share, up):
    x, w, gap = plane(pixels, share, up)
    d = projected(x, w, gap, norm, torch.float32)
    there = tensor(x, dtype=torch.float32) + d
    assert there.min() >= 0 and there.max() <= 1
    assert (d.numpy() * w * gap >= 0).all() and (d.numpy()[w == 0] == 0).all()
    met = np.float64(d.numpy()) @ np.float32(w)
    assert abs(met) <= abs(gap) * (1 + 1e-4) + 1e-5 * np.abs(w).sum()


@NORMS
def test_no_gap_is_no_step(norm):
    assert torch.equal(onto_plane(tensor([[0.2, 0.8]]), tensor([[1.0, 2.0]]), tensor([0.0]), norm), torch.zeros(1, 2))
    assert torch.equal(onto_plane(tensor([[0.2, 0.8]]), tensor([[0.0, 0.0]]), tensor([1.0]), norm), torch.zeros(1, 2))


@NORMS
def test_a_row_is_projected_the_same_whatever_the_others_are(norm):
    # Their number of Newton steps differs: some planes are far, some near, some are missed.
    gen = torch.Generator().manual_seed(0)
    x, w = torch.rand(200, 1, 6, 6, generator=gen).round(decimals=1), torch.randn(200, 1, 6, 6, generator=gen) ** 3
    gap = torch.randn(200, generator=gen) * torch.logspace(-4, 2, 200)
    together = onto_plane(x, w, gap, norm)
    for row in range(0, 200, 7):
        assert torch.equal(onto_plane(x[row : row + 1], w[row : row + 1], gap[row : row + 1], norm)[0], together[row])
    few = torch.randperm(200, generator=gen)[:60]
    assert torch.equal(onto_plane(x[few], w[few], gap[few], norm), together[few])


def test_the_worked_example_of_the_plane():
    # 3x + 4y - 2.8 at (.5, .5) is .7: in l2 .7/5 = .14 along (3, 4)/5, in linf .7/7 = .10.
    x, w, gap = tensor([[0.5, 0.5]]), tensor([[3.0, 4.0]]), tensor([-0.7])
    close(onto_plane(x, w, gap, "l2"), [[-0.084, -0.112]])
    close(onto_plane(x, w, gap, "linf"), [[-0.1, -0.1]])


# --- the walk


class Rays(nn.Module):
    """Logits W x + b; notes what it was asked."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias, self.asked = nn.Parameter(tensor(weight)), nn.Parameter(tensor(bias)), []
        self.eval()

    def forward(self, x):
        self.asked.append(x.detach()[0].clone())
        return x.flatten(1) @ self.weight.T + self.bias


def worked():
    """Label 0 holds while 3x + 4y - 2.8 is above 0."""
    return Rays([[3.0, 4.0], [0.0, 0.0]], [0.0, 2.8]), tensor([[0.5, 0.5]]), tensor([0])


@pytest.mark.parametrize("norm, distance", [("l2", 0.14), ("linf", 0.10)])
@pytest.mark.parametrize("kind", [Fab, FabT])
def test_the_worked_example_is_found(kind, norm, distance):
    model, x, y = worked()
    # One step goes 1.05 of the way. The second starts from .9 of that, .945: it goes to .945 + 1.05 * .055 = 1.00275, mixed
    # with 1.05 of the image's own projection by .055 / (.055 + 1) = .0521: 1.0052.
    close(kind(norm=norm, steps=1)(model, x, y).distance, [1.05 * distance])
    mix = 0.055 / 1.055
    second = 1.00275 * (1 - mix) + 1.05 * mix
    close(kind(norm=norm, steps=2)(model, x, y).distance, [second * distance])
    found = kind(norm=norm)(model, x, y)
    assert found.broken and distance < found.distance < 1.006 * distance


@NORMS
def test_overshoot_backward_and_bias_are_what_they_say(norm):
    model, x, y = worked()
    distance = 0.14 if norm == "l2" else 0.10
    close(Fab(norm=norm, steps=1, overshoot=1.3)(model, x, y).distance, [1.3 * distance])
    # Back to .5 of 1.05, then .475 * 1.05 on; of the image's projection .475 / 1.475 = .32, but at most the bias.
    for bias in (0.1, 0.2, 0.0):
        there = (0.525 + 1.05 * 0.475) * (1 - bias) + 1.05 * bias
        close(Fab(norm=norm, steps=2, backward=0.5, bias=bias)(model, x, y).distance, [there * distance])


@NORMS
def test_a_radius_ends_the_search_at_the_first_point_within_it(norm):
    model, x, y = worked()
    distance = 0.14 if norm == "l2" else 0.10
    # Points lie at 1.05, 1.0052, ... of the distance.
    for eps, steps in ((1.06, 1), (1.02, 2)):
        found = Fab(norm=norm, eps=eps * distance)(model, x, y)
        assert found.broken and (found.forwards, found.backwards) == (2 * steps, steps)
    found = Fab(norm=norm, eps=0.9 * distance)(model, x, y)
    assert not found.broken and (found.forwards, found.backwards) == (200, 100)
    close(found.distance, [0.9 * distance])  # the nearest point, projected
    assert Fab(norm=norm)(model, x, y).forwards == 200, "without a radius nothing ends early"


def several():
    """Class 1 is likeliest and .2 / .5 = .4 away, class 2 is .3 / 3 = .1 away."""
    return Rays([[0.0], [0.5], [3.0]], [0.0, -0.45, -1.8]), tensor([[0.5]]), tensor([0])


@NORMS
def test_the_nearest_boundary_is_not_the_likeliest_class(norm):
    model, x, y = several()
    found = Fab(norm=norm, steps=20)(model, x, y)
    close(found.distance, [0.1005], atol=1e-4)
    assert (found.forwards, found.backwards) == (40, 40), "a gradient for each wrong class"
    close(FabT(norm=norm, steps=1, targets=1)(model, x, y).distance, [0.42])
    found = FabT(norm=norm, steps=20)(model, x, y)
    close(found.distance, [0.1005], atol=1e-4)
    assert (found.forwards, found.backwards) == (1 + 2 * 40, 40), "a run for each, and a question for the order"


def test_which_boundary_is_nearest_depends_on_the_norm():
    # Class 1: lead .44, slope (4, 0): .11 in both norms. Class 2: lead .6, slope (3, 3): .6 / 6 = .1 or .6 / 4.24 = .141.
    model, x, y = Rays([[0.0, 0.0], [4.0, 0.0], [3.0, 3.0]], [0.0, -2.44, -3.6]), tensor([[0.5, 0.5]]), tensor([0])
    for norm, label, distance in (("linf", 2, 0.1), ("l2", 1, 0.11)):
        found = Fab(norm=norm, steps=20)(model, x, y)
        assert model(found.x_adv).argmax() == label and found.distance.item() == pytest.approx(1.0053 * distance, rel=1e-3)


def test_a_point_of_any_wrong_class_counts():
    # On its way to class 1 the walk crosses class 2.
    model, x, y = several()
    found = FabT(norm="linf", eps=0.45, targets=1)(model, x, y)
    assert found.broken and model(found.x_adv).argmax() == 2


@NORMS
def test_restarts_begin_at_random_within_half_the_distance_found(norm):
    model, x, y = worked()
    found = Fab(norm=norm, steps=3, restarts=60)(model, x, y, Streams(0, ids=[4]))
    starts = torch.stack(model.asked[1:-1][0::6])  # after the verdict, two questions a step
    close(starts[0], [0.5, 0.5])
    delta = starts[1:] - 0.5
    length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    reach = (0.10 if norm == "linf" else 0.14) * 1.0055 / 2
    assert length.max() < reach and length.max() > 0.8 * reach and len(delta.unique(dim=0)) == 59
    assert found.distance <= Fab(norm=norm, steps=3)(model, x, y).distance


def test_where_nothing_is_known_restarts_begin_within_half_the_radius():
    x = torch.full((1, 4), 0.5)
    for eps, reach in ((0.2, 0.1), (math.inf, 0.5)):
        model = Rays([[0.0] * 4, [1.0] * 4], [100.0, 0.0])
        Fab(norm="linf", eps=eps, steps=1, restarts=40)(model, x, tensor([0]), Streams(0, ids=[4]))
        starts = torch.stack(model.asked[1:-1][2::2])
        assert 0.8 * reach < (starts - 0.5).abs().max() <= reach


def test_an_image_that_broke_takes_no_part_in_later_runs():
    model, x, y = worked()
    x, y = torch.cat([x, x + 0.3]), tensor([0, 0])  # distances .10 and .40
    found = Fab(norm="linf", eps=0.2, steps=5, restarts=3)(model, x, y, Streams(0, ids=[1, 2]))
    assert found.broken.tolist() == [True, False] and found.forwards.tolist() == [2, 30]


def test_only_restarts_need_streams():
    model, x, y = worked()
    assert Fab(norm="linf", steps=2)(model, x, y).broken
    with pytest.raises(ValueError, match="restarts of FAB are random: pass streams"):
        Fab(norm="linf", restarts=2)(model, x, y)


def test_a_model_without_gradients_stays_where_it_is_and_shows_it():
    x = tensor([[0.3, 0.6]])
    found = Fab(norm="l2", steps=7)(lambda z: torch.stack([z.round().sum(1), z.sum(1) * 0 - 1], 1), x, tensor([0]))
    assert not found.broken and torch.equal(found.x_adv, x)
    assert (found.zeros, found.backwards) == (7, 7)


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"eps": 0}, "eps must be positive, got 0"),
        ({"steps": 0}, "steps and restarts >= 1, targets >= 0; got 0, 1, 0"),
        ({"restarts": 0}, "got 100, 0, 0"),
        ({"targets": -1}, "got 100, 1, -1"),
        ({"norm": "l1"}, "known are linf, l2"),
    ],
)
def test_a_wrong_setting_is_refused_when_it_is_written(wrong, text):
    with pytest.raises(ValueError, match=text):
        Fab(**{"norm": "linf", **wrong})
