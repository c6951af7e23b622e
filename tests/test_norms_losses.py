"""Losses and norms against values worked out by hand, and against what defines them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from attacks.losses import LOSSES, loss
from attacks.norms import NORMS, norm
from attacks.oracle import mean_log_softmax
from attacks.streams import Streams

LABEL0 = tensor([0])
# Multiples of 1/16: far enough apart that no difference of two underflows.
logits_of_five = st.lists(st.integers(-320, 320).map(lambda i: i / 16), min_size=5, max_size=5, unique=True)


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual, tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)


# --- losses


@pytest.mark.parametrize("z, expected", [((3, 1, 0.5, -1), -0.8), ((1, 3, 0.5, -1), 0.8)])
def test_dlr_of_the_worked_examples(z, expected):
    close(loss("dlr")(tensor([z]), LABEL0), [expected])


@given(logits_of_five, st.floats(-50, 50), st.floats(0.1, 10))
def test_dlr_does_not_change_with_shift_and_scale(z, shift, scale):
    z = tensor([z], dtype=torch.float64)
    torch.testing.assert_close(loss("dlr")(z * scale + shift, LABEL0), loss("dlr")(z, LABEL0), rtol=1e-6, atol=1e-6)


def test_dlr_with_two_classes_says_what_to_use_instead():
    with pytest.raises(ValueError, match="at least 3 classes, the model has 2; use 'margin'"):
        loss("dlr")(tensor([[1.0, 2.0]]), LABEL0)


def test_margin_is_the_best_other_logit_minus_the_labels():
    close(loss("margin")(tensor([[3.0, 1.0, 0.5], [1.0, 3.0, 0.5]]), tensor([0, 0])), [-2.0, 2.0])


@given(logits_of_five, st.integers(0, 4))
def test_margin_and_dlr_are_positive_exactly_where_the_model_is_wrong(z, y):
    z, y = tensor([z]), tensor([y])
    wrong = z.argmax(-1) != y
    assert torch.equal(loss("margin")(z, y) > 0, wrong)
    assert torch.equal(loss("dlr")(z, y) > 0, wrong)


def test_cross_entropy_is_minus_the_log_of_the_labels_probability():
    close(loss("ce")(tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 200.0, 0.0, 0.0]]), tensor([2, 0])), [1.386294, 200.0])


@pytest.mark.parametrize("name", LOSSES)
def test_leading_axes_are_draws_that_share_the_labels(name):
    z, y = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)), tensor([0, 4, 2])
    together = loss(name)(z, y)
    assert together.shape == (4, 3)
    torch.testing.assert_close(together, torch.stack([loss(name)(one, y) for one in z]))


@pytest.mark.parametrize("name", LOSSES)
def test_images_do_not_interact(name):
    z, y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), tensor([0, 1, 2, 3, 4, 0])
    together = loss(name)(z, y)
    assert torch.equal(together[2:3], loss(name)(z[2:3], y[2:3])), "nothing is averaged over the batch"


def test_an_unknown_loss_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown loss 'cw'; known are ce, margin, dlr"):
        loss("cw")


# --- mean of probabilities in log space (methods G2)


@pytest.mark.parametrize(
    "members, expected",
    [
        ([(200.0, 0.0), (200.0, 0.0)], [(0.0, -200.0)]),  # clamped at 1e-40 it would be -92.1 with a gradient of zero
        ([(10.0, 0.0, 0.0), (0.0, 0.0, 0.0)], [(-0.4055, -1.7916, -1.7916)]),
    ],
)
def test_the_log_of_the_mean_softmax_is_stable(members, expected):
    close(mean_log_softmax(tensor(members)[:, None]), expected, atol=1e-4)


def test_the_log_of_an_underflowing_probability_still_has_a_gradient():
    z = tensor([[[200.0, 0.0]], [[200.0, 0.0]]], requires_grad=True)
    mean_log_softmax(z)[0, 1].backward()
    close(z.grad[:, 0], [[-0.5, 0.5], [-0.5, 0.5]])


# --- norms


def test_lengths_of_three_and_four():
    delta = tensor([[3.0, -4.0]])
    close(norm("linf").length(delta), [4.0])
    close(norm("l2").length(delta), [5.0])


def test_projections_of_three_and_four():
    delta = tensor([[3.0, -4.0], [0.3, -0.4], [0.0, 0.0]])
    close(norm("linf").project(delta, 1.0), [[1.0, -1.0], [0.3, -0.4], [0.0, 0.0]])
    close(norm("l2").project(delta, 1.0), [[0.6, -0.8], [0.3, -0.4], [0.0, 0.0]])


@pytest.mark.parametrize("name", NORMS)
@given(rows=st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=1, max_size=4), radius=st.floats(0.01, 3))
def test_projection_is_the_nearest_point_of_the_ball(name, rows, radius):
    delta = tensor(rows, dtype=torch.float64)
    there = norm(name).project(delta, radius)
    assert (norm(name).length(there) <= radius * (1 + 1e-12)).all()
    torch.testing.assert_close(norm(name).project(there, radius), there)
    # p is nearest to d in a convex set if and only if (d - p)(v - p) <= 0 for each of its points v.
    points = norm(name).start(Streams(0, ids=range(20)), (3,), radius).double()
    for d, p in zip(delta, there, strict=True):
        assert (((points - p) * (d - p)).sum(1) <= 1e-5).all()


@pytest.mark.parametrize("name, dual", [("linf", 1), ("l2", 2)])
def test_the_steepest_direction_has_length_one_and_gains_the_dual_norm(name, dual):
    gradient = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    direction = norm(name).steepest(gradient)
    torch.testing.assert_close(norm(name).length(direction), torch.ones(5))
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), gradient.flatten(1).norm(p=dual, dim=1))


@pytest.mark.parametrize("name", NORMS)
def test_a_zero_gradient_has_no_direction(name):
    assert torch.equal(norm(name).steepest(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("name", NORMS)
def test_the_scale_of_a_gradient_does_not_matter(name):
    gradient = tensor([[3.0, -4.0], [3e-4, -4e-4]])
    a, b = norm(name).steepest(gradient)
    torch.testing.assert_close(a, b)


def test_the_linf_start_is_uniform_in_the_cube():
    start = norm("linf").start(Streams(0, ids=range(200)), (100,), 0.5)
    assert start.abs().max() <= 0.5
    assert abs(start.mean()) < 0.005 and abs(start.var() - 1 / 12) < 0.003


def test_the_l2_start_has_a_uniform_radius_and_no_preferred_direction():
    start = norm("l2").start(Streams(0, ids=range(2000)), (3,), 0.5)
    radius = norm("l2").length(start)
    assert radius.max() <= 0.5 * (1 + 1e-6)
    # Uniform radius: quartiles at 1/4, 1/2, 3/4 of 0.5, five standard errors allowed. Uniform in volume has its median at .4.
    quartiles = torch.quantile(radius, tensor([0.25, 0.5, 0.75]))
    close(quartiles, [0.125, 0.25, 0.375], atol=0.025)
    assert (start / radius[:, None]).mean(0).abs().max() < 0.07


def test_an_unknown_norm_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown norm 'l1'; known are linf, l2"):
        norm("l1")
