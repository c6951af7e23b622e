"""Randomised models: gradients over fixed draws, verdicts over fresh ones (methods 8.9, 9.2)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, tensor

from attacks import Bim, Eot, Fgsm, Pgd, Streams
from attacks.oracle import VERDICT_DRAWS, Oracle, decide
from attacks.streams import Draws

INNER = Bim(norm="linf", eps=0.1)


def streams_for(x):
    return Streams(0, "test", ids=range(len(x)))


class Scripted(nn.Module):
    """Draw k has logits (bias_k, slope_k x), over and over: noise whose every draw is known."""

    randomized = True

    def __init__(self, slopes, biases=None):
        super().__init__()
        self.slopes, self.biases, self.calls = tensor(slopes), tensor(biases or [0.0] * len(slopes)), 0
        self.eval()

    def forward(self, x):
        draw = self.calls % len(self.slopes)
        self.calls += 1
        return torch.stack([self.biases[draw].expand(len(x)), (x * self.slopes[draw]).sum(1)], 1)


def searched(attack, model):
    """Where the search alone goes from (.5,.5), without the verdicts before and after."""
    x = tensor([[0.5, 0.5]])
    return attack.run(Oracle(model, streams_for(x)), x, tensor([0]), None).x_adv - x


# --- which gradient


def test_gradients_are_averaged_and_not_their_signs():
    # First pixel: +3, -1, -1, -1 average to 0, their signs to -.5. The second pixel always pulls up.
    model = Scripted([(3.0, 1.0), (-1.0, 1.0), (-1.0, 1.0), (-1.0, 1.0)], [9.0] * 4)
    moved = searched(Eot(Fgsm(norm="linf", eps=0.1, loss="margin"), draws=4), model)
    torch.testing.assert_close(moved, tensor([[0.0, 0.1]]))


def test_without_eot_one_draw_decides():
    model = Scripted([(3.0, 1.0)], [9.0])
    torch.testing.assert_close(searched(Fgsm(norm="linf", eps=0.1, loss="margin"), model), tensor([[0.1, 0.1]]))


@pytest.mark.parametrize("average, direction", [("loss", (0.5 / (1 - 4.54e-5), 1.0)), ("probability", (1.0, 2 * 4.54e-5))])
def test_the_average_of_losses_and_the_loss_of_the_average_weigh_draws_differently(average, direction):
    # p(label) is 1/2 in draw 1, which the first pixel moves, and sigmoid(-10) = 4.54e-5 in draw 2, moved by the second pixel.
    # The loss -log p has slope 1 - p, so that lost draws dominate; -log mean p has slope p (1 - p), and gives them up.
    model = Scripted([(1.0, 0.0), (0.0, 1.0)], [0.5, -9.5])
    moved = searched(Eot(Fgsm(norm="l2", eps=0.1), draws=2, average=average), model)
    direction = tensor([direction])
    torch.testing.assert_close(moved, 0.1 * direction / direction.norm(), atol=1e-5, rtol=0)


def test_the_loss_form_averages_losses_over_draws():
    x = tensor([[0.5, 0.5]])
    oracle = Oracle(Scripted([(3.0, 1.0), (-1.0, 1.0)]), streams_for(x), draws=2)
    assert oracle(x, tensor([0])).tolist() == [[[0.0, 2.0]], [[0.0, 0.0]]]
    assert oracle.cost == 2


def test_a_deterministic_model_costs_no_draws():
    x = tensor([[0.5, 0.5]])
    model = nn.Sequential(nn.Linear(2, 3)).eval()
    y = model(x).argmax(1)
    plain, eot = INNER(model, x, y), Eot(INNER, draws=20)(model, x, y)
    assert torch.equal(plain.x_adv, eot.x_adv)
    assert torch.equal(plain.forwards, eot.forwards)


# --- which draws


class Noisy(Draws):
    """Wrong with probability ``flips`` whatever the image, by a margin that an attack along the pixels can only reduce."""

    randomized = True

    def __init__(self, flips):
        super().__init__()
        self.flips, self.drawn_numbers, self.asked = flips, [], []
        self.eval()

    def forward(self, x):
        u = self.drawn().uniform((1,))
        self.drawn_numbers.append(u[0].item())
        self.asked.append(x.detach().clone())
        sign = 1 - 2 * (u < self.flips).float()
        return torch.cat([sign, -sign], 1) + 0.1 * x.sum(1, keepdim=True) * tensor([0.0, 1.0])


def one_image(model, attack):
    x = tensor([[0.5, 0.5]])
    return attack(model, x, tensor([0]), streams_for(x))


def test_a_model_that_is_wrong_in_a_tenth_of_its_draws_is_not_broken():
    # In 11 iterates of 20 draws a wrong one is certain; as a break it would make any noise look fatal.
    model = Noisy(0.1)
    result = one_image(model, Eot(INNER))
    assert min(model.drawn_numbers[VERDICT_DRAWS:-VERDICT_DRAWS]) < 0.1, "the search must have met a wrong draw"
    assert not result.broken


def test_a_model_that_is_wrong_in_most_draws_is_wrong_before_the_attack():
    result = one_image(Noisy(0.7), Eot(INNER))
    assert result.broken and result.forwards == 0


def test_the_verdict_is_the_mean_softmax_and_not_the_majority_of_draws():
    # Six of ten draws are wrong by a little, four are right by much: the mean of softmax says right.
    model = Scripted([(0.0, 0.0)] * 10, [-0.1] * 6 + [5.0] * 4)
    x = tensor([[0.5, 0.5]])
    assert decide(model, x, streams_for(x)).tolist() == [0]
    assert model.calls == VERDICT_DRAWS == 100


@pytest.mark.parametrize("attack", [Eot(INNER, draws=7), Eot(INNER, draws=7, average="probability")])
def test_the_search_never_stops_early_and_its_cost_is_counted(attack):
    result = one_image(Noisy(0.45), attack)
    assert (result.forwards, result.backwards) == (11 * 7, 10 * 7)


def test_restarts_all_run():
    result = one_image(Noisy(0.1), Eot(Pgd(norm="linf", eps=0.1, steps=3, restarts=4), draws=5))
    assert (result.forwards, result.backwards) == (4 * 4 * 5, 4 * 3 * 5)


def test_a_search_uses_the_same_draws_throughout_and_verdicts_use_fresh_ones():
    model = Noisy(0.1)
    one_image(model, Eot(Pgd(norm="linf", eps=0.1, steps=3, restarts=2), draws=5))
    before, search, after = (model.drawn_numbers[:100], model.drawn_numbers[100:-100], model.drawn_numbers[-100:])
    assert search == search[:5] * 8, "common random numbers: 2 restarts of 4 questions"
    assert len({*before, *search, *after}) == 100 + 5 + 100, "no draw of the search is used for a verdict"


def test_the_point_that_is_judged_is_the_point_that_is_returned():
    model = Noisy(0.1)
    result = one_image(model, Eot(INNER, draws=3))
    assert all(torch.equal(asked[:1], result.x_adv) for asked in model.asked[-VERDICT_DRAWS:])


class InputNoise(Draws):
    """Gaussian noise on the image, standard deviation .1."""

    def forward(self, x):
        return x + 0.1 * self.drawn().normal(x.shape[1:]).to(x)


class Randomised(nn.Sequential):
    randomized = True


def noisy_net():
    """Two noise layers around a small convolution, and images that it decides rightly in the mean, some of them narrowly."""
    gen = torch.Generator().manual_seed(1)
    net = Randomised(
        InputNoise(), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), InputNoise(), nn.Linear(36, 4)
    ).eval()  # fmt: skip
    for weight in net.parameters():
        weight.data = torch.randn(weight.shape, generator=gen) * 0.3
    x = torch.rand(32, 1, 8, 8, generator=gen)
    net[-1].bias.data -= nn.Sequential(*net[1:5], net[-1])(x).mean(0).detach()  # lest one class take all
    return net, x, decide(net, x, Streams(0, "label", ids=range(32)))


NET, IMAGES, LABELS = noisy_net()
CASES = {
    "eot pgd linf": Eot(Pgd(norm="linf", eps=0.03, steps=3, restarts=2), draws=4),
    "eot pgd l2": Eot(Pgd(norm="l2", eps=0.12, steps=3, restarts=2, loss="margin"), draws=4, average="probability"),
    "one draw": Pgd(norm="linf", eps=0.03, steps=3, restarts=2),
}
CASE = pytest.mark.parametrize("name", CASES)
_WHOLE = {}


def attacked(name, rows):
    return CASES[name](NET, IMAGES[rows], LABELS[rows], Streams(0, "test", ids=100 + rows))


def assert_same(name, rows):
    if name not in _WHOLE:
        _WHOLE[name] = attacked(name, torch.arange(32))
    result, reference = attacked(name, rows), _WHOLE[name]
    for field in ("x_adv", "broken", "forwards", "backwards", "distance"):
        assert torch.equal(getattr(result, field), getattr(reference, field)[rows]), field


@CASE
def test_batches_and_their_order_change_no_bit(name):
    for rows in torch.arange(32).split(7):
        assert_same(name, rows)
    assert_same(name, torch.arange(32).flip(0))
    for row in range(3):
        assert_same(name, tensor([row]))
    assert 3 < _WHOLE[name].broken.sum() < 29, "the example must have images of both fates"


@CASE
@settings(max_examples=8, deadline=None)
@given(rows=st.lists(st.integers(0, 31), min_size=1, max_size=20, unique=True))
def test_any_selection_of_images_gives_the_same_bits(name, rows):
    assert_same(name, tensor(rows))


def test_the_noise_layers_are_left_without_streams():
    attacked("one draw", torch.arange(3))
    with pytest.raises(RuntimeError, match="no streams are in force"):
        NET(IMAGES[:1])


def test_more_draws_estimate_the_gradient_better():
    # Logit 1 is x + noise with a slope of random sign, up in 60 % of the draws: one draw is often misled, many are not.
    class Fickle(Draws):
        randomized = True

        def forward(self, x):
            up = (self.drawn().uniform((1,)) < 0.6).float() * 2 - 1
            return torch.cat([torch.full_like(up, 9.0), up * x], 1)

    x, y = torch.full((100, 1), 0.5), torch.zeros(100, dtype=torch.int64)
    model, inner = Fickle().eval(), Fgsm(norm="linf", eps=0.1, loss="margin")
    rise = {k: (Eot(inner, draws=k)(model, x, y, streams_for(x)).x_adv > x).float().mean() for k in (1, 101)}
    assert 0.5 < rise[1] < 0.7, "as often as a draw points up"
    assert rise[101] > 0.95, "a majority of 101 fair-ish draws points up with probability .98"


# --- errors


@pytest.mark.parametrize("attack", [INNER, Eot(INNER)])
def test_a_randomised_model_needs_streams(attack):
    with pytest.raises(ValueError, match="the model is randomised: pass streams"):
        attack(NET, IMAGES, LABELS)


def test_settings_are_refused_when_they_are_written():
    with pytest.raises(ValueError, match="at least one draw, got 0"):
        Eot(INNER, draws=0)
    with pytest.raises(ValueError, match="unknown average 'logit'; known are loss, probability"):
        Eot(INNER, average="logit")


def test_norm_and_radius_are_those_of_the_inner_attack():
    eot = Eot(Fgsm(norm="l2", eps=0.25))
    assert (eot.norm, eot.eps) == ("l2", 0.25)
