"""APGD against a second implementation of the paper, its losses against worked examples (methods 8.7)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn, tensor

from attacks import Apgd, ApgdT, Streams
from attacks.apgd import likely_classes
from attacks.losses import dlr, dlr_targeted, targeted
from attacks.oracle import Oracle

CHECKPOINTS = {100: (22, 41, 57, 70, 80, 87, 93, 99), 20: (4, 7, 9, *range(10, 21)), 5: (1, 2, 3, 4, 5)}
PIXELS = 6
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


class Script(nn.Module):
    """Two classes, label 0 always holds; call number k has a margin loss and a gradient that were written down before."""

    def __init__(self, losses, gradients):
        super().__init__()
        self.losses, self.gradients, self.asked = losses, gradients, []
        self.eval()

    def forward(self, x):
        turn = len(self.asked) - 2  # after the verdict on the image, and the question for the number of classes
        self.asked.append(x.detach()[0].clone())
        k = min(max(turn, 0), len(self.losses) - 1)
        score = ((x - x.detach()).flatten(1) * self.gradients[k]).sum(1) + self.losses[k]
        return torch.stack([torch.zeros_like(score), score], 1)


def questions(attack, losses, gradients, x):
    """Points that a run asks about, in order."""
    model = Script(losses, gradients)
    result = attack(model, x[None], tensor([0]), Streams(0, ids=[1]))
    assert result.forwards == attack.steps + 1 and not result.broken
    return model.asked[2:-1], result


def by_the_paper(attack, losses, gradients, x, start):
    """The points of Auto-PGD, as its Algorithm 1 is written, with the conditions of the authors' code (methods 8.7)."""
    x, start, eps = x.double().numpy(), start.double().numpy(), attack.eps

    def project(z):
        d = z - x
        if attack.norm == "linf":
            d = np.clip(d, -eps, eps)
        elif np.linalg.norm(d) > eps:
            d = d * eps / np.linalg.norm(d)
        return np.clip(x + d, 0, 1)

    def climb(z, g, step):
        length = np.linalg.norm(g)
        return project(z + step * (np.sign(g) if attack.norm == "linf" else g / length if length else g))

    losses, gradients = losses.tolist(), gradients.double().numpy()
    points, step, best, checked, last = [start], 2 * eps, 0, 0, 0
    best_at_check, halved = losses[0], True
    for k in range(attack.steps):
        here, gradient = points[k], gradients[k]
        best = k if losses[k] > losses[best] else best
        if k in CHECKPOINTS[attack.steps]:
            rises = sum(losses[j] > losses[j - 1] for j in range(checked + 1, k + 1))
            halve = rises <= 0.75 * (k - checked) or (not halved and best_at_check >= losses[best])
            if halve:
                step, here, gradient = step / 2, points[best], gradients[best]
            halved, best_at_check, checked = halve, losses[best], k
        there = climb(here, gradient, step)
        if k:
            there = project(here + 0.75 * (there - here) + 0.25 * (here - last))
        last = here
        points.append(there)
    return points


def script(seed, steps, style):
    """Losses that fall, rise, stay or jump at random, and gradients of random signs and lengths, some zero."""
    gen = np.random.default_rng(seed)
    up = {"never": 0.0, "seldom": 0.5, "three quarters": 0.76, "often": 0.9, "always": 1.0}[style]
    moves = np.where(gen.random(steps + 1) < up, 1.0, gen.choice([0.0, -1.0, -3.0], steps + 1))
    losses = -1000 + np.cumsum(moves)
    gradients = gen.normal(size=(steps + 1, PIXELS)) * gen.choice([0, 1e-3, 1, 50], (steps + 1, 1), p=[0.02, 0.2, 0.58, 0.2])
    return tensor(losses), tensor(gradients)


# --- the walk


@NORMS
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    steps=st.sampled_from(sorted(CHECKPOINTS)),
    style=st.sampled_from(["never", "seldom", "three quarters", "often", "always"]),
    eps=st.sampled_from([0.03, 0.2, 0.7]),
)
@example(seed=0, steps=100, style="three quarters", eps=0.2)
def test_every_point_is_the_papers(norm, seed, steps, style, eps):
    losses, gradients = script(seed, steps, style)
    x = torch.rand(PIXELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    attack = Apgd(norm=norm, eps=eps, loss="margin", steps=steps)
    asked, result = questions(attack, losses, gradients, x)
    expected = by_the_paper(attack, losses, gradients, x, asked[0])
    torch.testing.assert_close(torch.stack(asked), tensor(np.array(expected)), rtol=0, atol=1e-9)
    assert any(torch.equal(result.x_adv[0], asked[k]) for k in (losses == losses.max()).nonzero()), "the best comes back"


def step_after(moves, k):
    """The step that the point number k takes, in units of the first step, where losses change by ``moves``.

    Gradients are zero, so that the walk rests at its start, but for that of point k: it points away from the edge of the ball
    at the pixel that lies there, which has just the room for the first step, 2 eps.
    """
    losses = -1000 + torch.tensor([0.0, *moves], dtype=torch.float64).cumsum(0)
    x, gradients = torch.full((PIXELS,), 0.5, dtype=torch.float64), torch.zeros(101, PIXELS, dtype=torch.float64)
    attack = Apgd(norm="linf", eps=0.2, loss="margin")
    delta = questions(replace(attack, steps=1), losses, gradients, x)[0][0] - x
    gradients[k] = -delta
    points, _ = questions(attack, losses, gradients, x)
    assert all(torch.equal(point, points[0]) for point in points[: k + 1])
    edge = delta.abs().argmax()
    return float((points[k + 1] - points[k]).abs()[edge] / 0.4 / (0.75 if k else 1))


def test_without_a_rise_the_step_halves_at_the_eight_checkpoints_of_a_hundred_steps():
    for halvings, checkpoint in enumerate(CHECKPOINTS[100][:7]):
        assert step_after([0] * 100, checkpoint - 1) == pytest.approx(0.5**halvings)
        assert step_after([0] * 100, checkpoint + 1) == pytest.approx(0.5 ** (halvings + 1))


def test_with_a_rise_in_every_step_it_never_halves():
    assert [step_after([1] * 100, k) for k in (0, 40, 98, 99)] == pytest.approx([1, 1, 1, 1])


def test_the_first_step_has_no_momentum_and_the_second_has():
    # From edge to opposite edge without; three quarters of that with, where the walk rested before.
    assert step_after([0] * 100, 0) == pytest.approx(1)
    assert 0.75 * step_after([0] * 100, 1) == pytest.approx(0.75)


@pytest.mark.parametrize("rises, halved", [(16, True), (17, False)])
def test_a_step_halves_where_three_quarters_of_the_interval_or_fewer_rose(rises, halved):
    # The first interval has 22 steps: 16 are 73 %, 17 are 77 %.
    moves = [1] * rises + [0] * (22 - rises) + [1] * 78
    assert step_after(moves, 23) == pytest.approx(0.5 if halved else 1)


@pytest.mark.parametrize("rises, halved", [(12, True), (13, False)])
def test_three_quarters_exactly_are_too_few(rises, halved):
    moves = [1] * 41 + [1] * rises + [0] * (16 - rises) + [1] * 43
    assert step_after(moves, 58) == pytest.approx(0.5 if halved else 1)


def test_a_step_also_halves_where_an_interval_brought_nothing_new_unless_the_last_checkpoint_halved_it():
    # From 22 on each interval begins with a fall of 100 and rises ever after, in 94 % of its steps or so, but not to the top.
    moves = [1] * 100
    for start in CHECKPOINTS[100]:
        moves[start] = -100
    after = [step_after(moves, k) for k in (23, 42, 58, 71, 81)]
    assert after == pytest.approx([1, 0.5, 0.5, 0.25, 0.25])


def test_the_first_checkpoint_does_not_ask_for_something_new():
    assert step_after([-100] + [1] * 99, 23) == pytest.approx(1)


def test_a_halved_step_starts_from_the_best_point_and_its_gradient():
    # Point 3 is the best and lies at the start, with a gradient of its own; point 6 has gone away, and rests there.
    losses, gradients = torch.full((101,), -1000.0).double(), torch.zeros(101, PIXELS).double()
    losses[3], x = -999, torch.full((PIXELS,), 0.5, dtype=torch.float64)
    attack = Apgd(norm="linf", eps=0.2, loss="margin")
    start = questions(attack, losses, gradients, x)[0][0]
    inward, edge = x - start, (x - start).abs().argmax()
    gradients[5] = inward
    points, _ = questions(attack, losses, gradients, x)
    assert torch.equal(points[3], start) and not torch.equal(points[22], start)
    # The pixel at the edge: .25 of the way from point 21 to the start is left of the momentum, outwards: the ball stops it.
    assert points[23][edge] == start[edge]
    gradients[3] = inward * 1e-3
    points, _ = questions(attack, losses, gradients, x)
    moved = start[edge] + 0.75 * 0.2 * inward[edge].sign() + 0.25 * (start[edge] - points[21][edge])
    assert points[23][edge] == pytest.approx(float(moved), abs=1e-9)


@pytest.mark.parametrize("norm, length", [("linf", lambda d: d.abs().amax(1)), ("l2", lambda d: d.norm(dim=1))])
def test_the_random_start_lies_on_the_edge_of_the_ball(norm, length):
    starts, x = [], torch.full((60, 100), 0.5)

    def model(points):
        starts.append(points.detach())
        return torch.stack([torch.zeros(len(points)), -10 - points.sum(1)], 1)

    Apgd(norm=norm, eps=0.1, restarts=2, steps=1)(model, x, torch.zeros(60, dtype=torch.int64), Streams(0, ids=range(60)))
    first, second = starts[2] - x, starts[4] - x  # verdict, number of classes, start, step, start of the next run, step
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    for start in (first, second):
        torch.testing.assert_close(length(start), torch.full((60,), 0.1), rtol=1e-4, atol=0)
        # Of 6,000 pixels the mean is 0 within five standard errors of at most .1 / sqrt(3 * 6000); few lie near a corner.
        assert start.mean().abs() < 0.004 and (start.abs() > 0.09).float().mean() < 0.2


# --- losses


def test_the_worked_examples_of_both_losses():
    # Margins -2 and 2; over 3 - .5 = 2.5; over 3 - (.5 - 1) / 2 = 3.25.
    z, y = tensor([(3, 1, 0.5, -1), (1, 3, 0.5, -1)], dtype=torch.float64), tensor([0, 0])
    assert dlr(z, y).tolist() == pytest.approx([-0.8, 0.8])
    assert dlr_targeted(z, y, tensor([1, 1])).tolist() == pytest.approx([-0.615385, 0.615385], abs=1e-6)
    assert dlr_targeted(z, y, tensor([2, 3])).tolist() == pytest.approx([-2.5 / 3.25, -2 / 3.25])


@given(
    z=st.lists(st.integers(-320, 320).map(lambda i: i / 16), min_size=5, max_size=5, unique=True),
    shift=st.floats(-50, 50),
    scale=st.floats(0.1, 10),
    target=st.integers(1, 4),
)
def test_shift_and_scale_of_the_logits_change_neither(z, shift, scale, target):
    z, y, t = tensor([z], dtype=torch.float64), tensor([0]), tensor([target])
    torch.testing.assert_close(dlr(z * scale + shift, y), dlr(z, y), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dlr_targeted(z * scale + shift, y, t), dlr_targeted(z, y, t), rtol=1e-6, atol=1e-6)


def test_the_other_targeted_losses():
    z, y, t = tensor([[3.0, 1.0, 0.0]]), tensor([0]), tensor([1])
    assert targeted("margin")(z, y, t).item() == -2
    assert targeted("ce")(z, y, t).item() == pytest.approx(z.softmax(1)[0, 1].log().item())
    with pytest.raises(ValueError, match="at least 4 classes, the model has 3; use 'margin'"):
        targeted("dlr")(z, y, t)
    with pytest.raises(ValueError, match="unknown targeted loss 'cw'; known are ce, margin, dlr"):
        Apgd(norm="linf", eps=0.1, loss="cw", targets=1)


@pytest.mark.parametrize(
    "attack, names",
    [
        (Apgd(norm="linf", eps=1, loss="dlr"), {2: "margin", 3: "dlr", 4: "dlr"}),
        (ApgdT(norm="linf", eps=1), {2: "margin", 3: "margin", 4: "dlr"}),
        (Apgd(norm="linf", eps=1), {2: "ce", 10: "ce"}),
    ],
)
def test_the_margin_takes_the_place_of_a_loss_that_too_few_classes_do_not_define(attack, names):
    assert {classes: attack.loss_for(classes) for classes in names} == names


# --- targets


def logits_are_pixels(x):
    return 10 * x.flatten(1)


def test_targets_are_the_likeliest_wrong_classes_in_order():
    x, y = tensor([[0.1, 0.9, 0.4, 0.3], [0.2, 0.5, 0.5, 0.8]]), tensor([1, 3])
    oracle = Oracle(logits_are_pixels)
    assert likely_classes(oracle, x, y, 2).tolist() == [[2, 3], [1, 2]], "of equals the one of the lower number"
    assert likely_classes(oracle, x, y, 9).tolist() == [[2, 3, 0], [1, 2, 0]]
    assert likely_classes(oracle, x, tensor([0, 0]), 1).tolist() == [[1], [3]], "never the label"
    assert likely_classes(oracle, x, y, 0).shape == (2, 0)


@pytest.mark.parametrize("classes, runs", [(2, 1), (3, 2), (4, 3), (10, 9), (12, 9)])
def test_there_is_a_run_for_each_of_nine_targets_or_of_fewer_where_classes_are_few(classes, runs):
    x = torch.full((1, classes), 0.2)
    x[0, 1] = 0.9
    result = ApgdT(norm="linf", eps=0.1, steps=6)(logits_are_pixels, x, tensor([1]), Streams(0, ids=[0]))
    assert not result.broken and (result.forwards, result.backwards) == (1 + 7 * runs, 6 * runs)


def test_the_first_target_is_the_likeliest_class():
    # Margin of one class: only its pixel and the label's have a gradient. The others stay where the random start put them.
    x, y = tensor([[0.2, 0.9, 0.3, 0.25]]), tensor([1])
    found = ApgdT(norm="linf", eps=0.01, loss="margin", targets=1, steps=8)(logits_are_pixels, x, y, Streams(0, ids=[0]))
    assert (found.x_adv - x)[0, [1, 2]].tolist() == pytest.approx([-0.01, 0.01])
    assert (found.x_adv - x)[0, [0, 3]].abs().min() < 0.0099


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"eps": 0}, "eps must be positive and finite, got 0"),
        ({"eps": float("inf")}, "positive and finite"),
        ({"steps": 0}, "steps and restarts >= 1, targets >= 0; got 0, 1, 0"),
        ({"targets": -1}, "got 100, 1, -1"),
        ({"norm": "l1"}, "known are linf, l2"),
        ({"loss": "cw"}, "known are ce, margin, dlr"),
    ],
)
def test_a_wrong_setting_is_refused_when_it_is_written(wrong, text):
    with pytest.raises(ValueError, match=text):
        Apgd(**{"norm": "linf", "eps": 0.1, **wrong})


def test_without_streams_there_is_no_start():
    with pytest.raises(ValueError, match="Apgd starts at random: pass streams"):
        Apgd(norm="linf", eps=0.1)(logits_are_pixels, tensor([[0.9, 0.2]]), tensor([0]))
