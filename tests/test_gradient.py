"""FGSM, R-FGSM, BIM, PGD and MIM against worked examples (methods 8.1 to 8.6) and the known optimum of linear classifiers."""

from itertools import pairwise

import pytest
import torch
from torch import nn, tensor

from attacks import ATTACKS, Bim, Fgsm, Mim, Pgd, RFgsm, Streams, ascend
from attacks.gradient import CONVENTIONS, STARTS, Walk, step_size

DUAL = {"linf": 1, "l2": 2}


class Linear(nn.Module):
    """Images -> W x + b."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.eval()

    def forward(self, x):
        return x.flatten(1) @ self.weight.T + self.bias


def rising(*slope):
    """Two classes with a difference of logits 1 -> 0 of slope x - 10: label 0 always holds, the loss rises along slope."""
    slope = tensor(slope)
    return Linear(torch.stack([torch.zeros_like(slope), slope]), tensor([10.0, 0.0]))


def uphill(*slope):
    """A linear objective that never finishes."""
    return lambda x, rows: ((x * tensor(slope)).sum(1), None)


def attacked(attack, model, x, streams=None):
    """The adversarial points of one-dimensional images with label 0."""
    return attack(model, x, torch.zeros(len(x), dtype=torch.int64), streams).x_adv


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual.detach(), tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)


# --- worked examples


def test_fgsm_is_clipped_at_the_box():
    close(attacked(Fgsm(norm="linf", eps=0.1), rising(2.0, -2.0), tensor([[0.95, 0.05]])), [[1.0, 0.0]])


def test_fgsm_in_l2_moves_along_the_gradient():
    x = tensor([[0.5, 0.5]])
    close(attacked(Fgsm(norm="l2", eps=0.5), rising(3.0, 4.0), x) - x, [[0.3, 0.4]])


def test_fgsm_does_not_move_where_the_gradient_is_zero():
    close(attacked(Fgsm(norm="linf", eps=0.1), rising(2.0, 0.0), tensor([[0.5, 0.5]])), [[0.6, 0.5]])


@pytest.mark.parametrize("a, against, along", [(0.05, 0.7, 0.8), (0.15, 0.5, 0.8)])
def test_r_fgsm_ends_where_its_random_sign_and_the_gradient_send_it(a, against, along):
    x = torch.full((1, 400), 0.5)
    ends = attacked(RFgsm(norm="linf", eps=0.3, step=0.3 - a), rising(*[0.01] * 400), x, Streams(0, ids=[1]))
    close(ends.unique().sort().values[[0, -1]], [against, along])
    there = torch.isclose(ends, tensor(along))
    assert (there | torch.isclose(ends, tensor(against))).all(), "no third place to end"
    assert 150 < there.sum() < 250, "five standard errors around half of 400 fair signs"


@pytest.mark.parametrize("rule, ends", [("eps/5", (0.1, -0.1)), ("eps/10", (0.0, 0.0))])
def test_pgd_from_the_worst_start_needs_steps_of_more_than_a_tenth(rule, ends):
    x, worst = tensor([[0.5, 0.5]]), tensor([[0.4, 0.6]])
    walk = Walk("linf", 0.1, step_size(rule, 0.1, 10), 10)
    close(ascend(uphill(1.0, -2.0), x, walk, worst).last - x, [ends])


def test_bim_reaches_the_corner_with_steps_of_a_tenth():
    x = tensor([[0.5, 0.5]])
    close(attacked(Bim(norm="linf", eps=0.1), rising(1.0, -2.0), x) - x, [[0.1, -0.1]])


def turning(first=(3.0, 1.0), second=(-1.0, 3.0)):
    """An objective whose gradient depends on the question, at the third it is zero."""
    gradients = iter([first, second, (0.0, 0.0)])
    return lambda x, rows: ((x * tensor(next(gradients))).sum(1), None)


@pytest.mark.parametrize("momentum, ends", [(1.0, (0.02, 0.02)), (0.0, (0.0, 0.02))], ids=["MIM", "BIM"])
def test_momentum_keeps_the_sign_that_bim_turns_round(momentum, ends):
    x = tensor([[0.5, 0.5]])
    close(ascend(turning(), x, Walk("linf", 0.1, 0.01, 2, momentum)).last - x, [ends])


def test_momentum_sums_l1_normalised_gradients():
    x = tensor([[0.5, 0.5]])
    # In l2 the step shows the momentum itself: (.75,.25), then (.75,.25) + (-.25,.75) = (.5,1).
    first = tensor([0.75, 0.25]) / 0.625**0.5
    second = tensor([0.5, 1.0]) / 1.25**0.5
    close(ascend(turning(), x, Walk("l2", 0.1, 0.01, 2, 1.0)).last - x, [(0.01 * (first + second)).tolist()])


def test_momentum_normalises_by_l1_and_not_by_l2():
    x = tensor([[0.5, 0.5]])
    # (1,0) + (-3,4)/7 = (4,4)/7; divided by the l2 norm 5 the sum would be (.4,.8), undivided (-2,4).
    expected = 0.01 * (tensor([1.0, 0.0]) + tensor([0.5, 0.5]).sqrt())
    close(ascend(turning((1.0, 0.0), (-3.0, 4.0)), x, Walk("l2", 0.1, 0.01, 2, 1.0)).last - x, [expected.tolist()])


def test_momentum_decays_by_its_factor():
    x = tensor([[0.5, 0.5]])
    first, second = tensor([0.75, 0.25]), tensor([0.5 * 0.75 - 0.25, 0.5 * 0.25 + 0.75])
    expected = 0.01 * (first / first.norm() + second / second.norm())
    close(ascend(turning(), x, Walk("l2", 0.1, 0.01, 2, 0.5)).last - x, [expected.tolist()])


def test_mim_has_a_decay_of_one_and_starts_at_the_image():
    assert (Mim(norm="linf", eps=1).momentum, Mim(norm="linf", eps=1).start) == (1.0, "clean")


def test_every_iterate_stays_in_ball_and_box():
    x = tensor([[0.95, 0.5], [0.5, 0.02]])
    close(ascend(uphill(1.0, -1.0), x, Walk("linf", 0.1, 0.03, 10)).last, [[1.0, 0.4], [0.6, 0.0]])
    last = ascend(uphill(1.0, -1.0), x, Walk("l2", 0.1, 0.03, 40)).last
    close((last - x).norm(dim=1), [0.1, 0.1])
    assert last.min() >= 0 and last.max() <= 1
    # Clip, then projection: where the box stops one pixel the other takes over most of the radius.
    close((last - x).abs().amax(1), [0.0075**0.5, 0.0096**0.5], atol=0.005)


# --- step-size conventions


@pytest.mark.parametrize(
    "name, step, steps, restarts",
    [("eps/10", 0.03, 10, 1), ("eps/5", 0.06, 50, 5), ("2.5eps/T", 0.015, 50, 5), ("kap", 4 / 255, 100, 1)],
)
def test_published_step_conventions(name, step, steps, restarts):
    convention = CONVENTIONS[name]
    assert (convention.steps, convention.restarts) == (steps, restarts)
    assert step_size(convention.step, 0.3, convention.steps) == pytest.approx(step)
    assert convention.source


def test_kap_travels_further_than_its_radius_of_one():
    kap = CONVENTIONS["kap"]
    assert kap.steps * step_size(kap.step, 1.0, kap.steps) == pytest.approx(1.57, abs=0.005)


def test_the_defaults_are_the_conventions_of_the_harness():
    pgd, default = Pgd(norm="linf", eps=0.3), CONVENTIONS["2.5eps/T"]
    assert (pgd.step, pgd.steps, pgd.restarts, pgd.start) == (default.step, default.steps, default.restarts, "random")
    assert Bim(norm="linf", eps=0.3).walk().step == pytest.approx(0.03)
    assert RFgsm(norm="linf", eps=0.3).walk().step == pytest.approx(0.15)


@pytest.mark.parametrize("rule, expected", [("8/255", 8 / 255), ("0.01", 0.01), (0.01, 0.01), ("eps", 0.3), ("eps/2", 0.15)])
def test_steps_may_be_rules_or_numbers(rule, expected):
    assert step_size(rule, 0.3, 7) == pytest.approx(expected)


@pytest.mark.parametrize("rule", ["eps/7", "1/0", "fast", ""])
def test_an_unknown_step_lists_what_is_allowed(rule):
    with pytest.raises(ValueError, match=r"unknown step .*allowed are eps, eps/10.*4/255"):
        Pgd(norm="linf", eps=0.3, step=rule)


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"eps": 0.0}, "eps must be positive"),
        ({"eps": float("nan")}, "eps must be positive"),
        ({"eps": float("inf")}, "eps must be positive"),
        ({"norm": "l1"}, "known are linf, l2"),
        ({"loss": "cw"}, "known are ce, margin, dlr"),
        ({"steps": 0}, "at least 1, got 0"),
        ({"restarts": 0}, "at least 1, got 50 and 0"),
        ({"start": "corner"}, "known are clean, random"),
    ],
)
def test_a_wrong_setting_is_refused_when_it_is_written(wrong, text):
    with pytest.raises(ValueError, match=text):
        Pgd(**{"norm": "linf", "eps": 0.3, **wrong})


# --- the least perturbation of a linear classifier


def least(model, x, y, norm):
    """min over i != y of (z_y - z_i) / ||w_y - w_i||_q, q dual to the norm: exact while the box does not interfere."""
    z, w = model(x), model.weight
    gaps = z.gather(1, y[:, None]) - z
    lengths = (w[y][:, None] - w[None]).norm(p=DUAL[norm], dim=-1)
    return (gaps / lengths).masked_fill(torch.nn.functional.one_hot(y, z.shape[1]).bool(), torch.inf).amin(1).detach()


def problem(norm, classes, weight, distance=0.02, count=40):
    """Images of which every one is exactly ``distance`` from the decision boundary and well inside the box.

    All logits are equal at the centre of the box, so that moving an image along the ray from there scales its distance.
    """
    gen = torch.Generator().manual_seed(classes)
    model = Linear(weight, -weight.sum(1) / 2)
    rays = torch.rand(40 * count, weight.shape[1], generator=gen, dtype=weight.dtype) - 0.5
    y = model(0.5 + rays).argmax(1)
    x = 0.5 + rays * (distance / least(model, 0.5 + rays, y, norm))[:, None]
    inside = ((x > 0.1) & (x < 0.9)).all(1).nonzero().flatten()[:count]
    assert len(inside) == count
    x, y = x[inside], y[inside]
    torch.testing.assert_close(least(model, x, y, norm), torch.full((count,), distance, dtype=x.dtype), rtol=1e-3, atol=0)
    return model, x.view(count, 1, 2, -1), y


def random_weights(classes, pixels=12):
    return torch.randn(classes, pixels, generator=torch.Generator().manual_seed(5))


def disjoint_weights(classes, each=4):
    """Every class looks at pixels of its own with equally large weights.

    Then the nearest boundary is that of the runner-up, and going there raises no other class: greedy ascent is optimal.
    """
    signs = torch.randn(classes, each, generator=torch.Generator().manual_seed(5)).sign()
    return torch.block_diag(*(signs * torch.arange(1, each + 1)).split(1))


def broken(attack, model, x, y):
    return attack(model, x, y, Streams(0, ids=range(len(x)))).broken


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("kind", [Fgsm, Bim, Mim, Pgd])
def test_two_classes_break_just_beyond_the_least_perturbation(kind, loss, norm):
    model, x, y = problem(norm, 2, random_weights(2))
    assert broken(kind(norm=norm, eps=1.05 * 0.02, loss=loss), model, x, y).all()
    assert not broken(kind(norm=norm, eps=0.95 * 0.02, loss=loss), model, x, y).any()


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("classes", [3, 10])
@pytest.mark.parametrize("kind", [Fgsm, Bim, Mim, Pgd])
def test_many_classes_break_just_beyond_the_least_perturbation(kind, classes, norm):
    model, x, y = problem(norm, classes, disjoint_weights(classes))
    # A random start may climb towards a farther class, a local maximum; enough restarts leave none standing.
    options = {"restarts": 30} if kind is Pgd else {}
    assert broken(kind(norm=norm, eps=1.05 * 0.02, loss="margin", **options), model, x, y).all()
    assert not broken(kind(norm=norm, eps=0.95 * 0.02, loss="margin"), model, x, y).any()


@pytest.mark.parametrize("kind", [Fgsm, Bim, Mim, Pgd])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("classes", [3, 10])
def test_in_linf_other_losses_do_as_well_where_classes_share_no_pixels(kind, loss, classes):
    # Their gradients also move third classes, on pixels of their own: in linf that costs nothing, in l2 it would cost radius.
    model, x, y = problem("linf", classes, disjoint_weights(classes))
    options = {"restarts": 30} if kind is Pgd else {}
    assert broken(kind(norm="linf", eps=1.05 * 0.02, loss=loss, **options), model, x, y).all()
    assert not broken(kind(norm="linf", eps=0.95 * 0.02, loss=loss), model, x, y).any()


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("classes", [3, 10])
def test_pgd_misses_the_nearest_of_many_boundaries_only_in_a_local_maximum(classes, norm):
    # With general weights the runner-up need not be the nearest class; the margin, a maximum, then has local maxima.
    model, x, y = problem(norm, classes, random_weights(classes))
    eps, image = 1.05 * 0.02, torch.arange(len(x))
    result = Pgd(norm=norm, eps=eps, loss="margin")(model, x, y, Streams(0, ids=image))
    there = model(result.x_adv) - model(result.x_adv)[image, y][:, None]
    other = there.scatter(1, y[:, None], -torch.inf).argmax(1)
    slope = (model.weight[other] - model.weight[y]).norm(p=DUAL[norm], dim=1)
    most = model(x)[image, other] - model(x)[image, y] + eps * slope
    missed = ~result.broken
    torch.testing.assert_close(there[image, other][missed], most[missed], rtol=0, atol=2e-3)
    assert missed.sum() <= len(x) // 10, "and rarely"
    assert not broken(Pgd(norm=norm, eps=0.95 * 0.02, loss="margin"), model, x, y).any()


@pytest.mark.parametrize("start", sorted(STARTS))
@pytest.mark.parametrize("norm", DUAL)
def test_every_start_reaches_the_boundary_and_none_oversteps_it(norm, start):
    model, x, y = problem(norm, 2, random_weights(2))
    assert broken(Pgd(norm=norm, eps=1.05 * 0.02, start=start), model, x, y).all()
    assert not broken(Pgd(norm=norm, eps=0.95 * 0.02, start=start), model, x, y).any()


@pytest.mark.parametrize("norm", DUAL)
def test_in_double_precision_the_least_perturbation_is_met_to_a_thousandth(norm):
    model, x, y = problem(norm, 3, disjoint_weights(3).double())
    assert broken(Bim(norm=norm, eps=1.001 * 0.02, loss="margin"), model, x, y).all()
    assert not broken(Bim(norm=norm, eps=0.999 * 0.02, loss="margin"), model, x, y).any()


def test_r_fgsm_needs_about_twice_the_radius():
    # Equal weights, a = eps/2: pixels whose random sign agrees move eps, the others not at all. Of 400 pixels between 40 and
    # 60 % agree (4 standard errors), so that between 1/.6 and 1/.4 of the least perturbation is needed.
    gen = torch.Generator().manual_seed(0)
    signs = torch.randn(400, generator=gen).sign()
    model = Linear(torch.stack([torch.zeros(400), signs]), tensor([0.02 * 400, -signs.sum() / 2]))
    x, y = torch.full((40, 400), 0.5), torch.zeros(40, dtype=torch.int64)
    torch.testing.assert_close(least(model, x, y, "linf"), torch.full((40,), 0.02))
    assert not broken(RFgsm(norm="linf", eps=0.02 / 0.6), model, x, y).any()
    assert broken(RFgsm(norm="linf", eps=0.02 / 0.4), model, x, y).all()


def test_only_steps_that_an_image_needed_are_counted():
    # Slope 1, gap .045, .005 and .2 to the boundary, steps of .01: five steps, one step, never within ten.
    model = Linear(tensor([[0.0], [1.0]]), tensor([0.5, 0.0]))
    result = Bim(norm="linf", eps=0.1)(model, tensor([[0.455], [0.495], [0.3]]), torch.zeros(3, dtype=torch.int64))
    assert result.broken.tolist() == [True, True, False]
    assert result.forwards.tolist() == [6, 2, 11]
    assert result.backwards.tolist() == [5, 1, 10]
    close(result.distance, [0.05, 0.01, 0.1])


def test_an_image_that_broke_takes_no_part_in_later_restarts():
    model = Linear(tensor([[0.0], [1.0]]), tensor([0.5, 0.0]))
    attack = Pgd(norm="linf", eps=0.1, steps=10, step="eps/10", restarts=3, start="clean")
    result = attack(model, tensor([[0.455], [0.3]]), torch.zeros(2, dtype=torch.int64))
    assert result.forwards.tolist() == [6, 33]
    assert result.backwards.tolist() == [5, 30]


# --- more effort never helps the defender


def small_net():
    """A net with sigmoids, so that losses have local maxima, and images of which a share is near its boundaries."""
    gen = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4)).eval()
    for weight in net.parameters():
        weight.data = torch.randn(weight.shape, generator=gen) * (1.5 if weight.ndim > 1 else 0.1)
    x = torch.rand(150, 1, 4, 4, generator=gen)
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize("norm, eps", [("linf", 0.02), ("l2", 0.06)])
def test_more_restarts_break_a_superset(norm, eps):
    net, x, y = small_net()
    sets = [broken(Pgd(norm=norm, eps=eps, steps=2, step="eps/5", restarts=r), net, x, y) for r in (1, 2, 4, 8)]
    for fewer, more in pairwise(sets):
        assert not (fewer & ~more).any()
    assert 0 < sets[0].sum() < sets[-1].sum() < len(x), "the example must leave restarts something to do"


@pytest.mark.parametrize("kind", [Bim, Mim, Pgd])
def test_more_steps_of_the_same_length_break_a_superset(kind):
    net, x, y = small_net()
    sets = [broken(kind(norm="linf", eps=0.03, steps=t, step=0.004, restarts=1), net, x, y) for t in (1, 3, 9)]
    for fewer, more in pairwise(sets):
        assert not (fewer & ~more).any()
    assert 0 < sets[0].sum() < sets[-1].sum() < len(x)


def test_a_larger_radius_never_leaves_bim_weaker_on_a_linear_model():
    model, x, y = problem("l2", 3, disjoint_weights(3))
    counts = [broken(Bim(norm="l2", eps=f * 0.02, loss="margin"), model, x, y).sum() for f in (0.5, 0.95, 1.05, 2)]
    assert counts == sorted(counts)


def test_suites_find_the_attacks_by_name():
    names = {"fgsm": Fgsm, "r_fgsm": RFgsm, "bim": Bim, "pgd": Pgd, "mim": Mim}
    assert {name: ATTACKS[name] for name in names} == names


@pytest.mark.parametrize("options", [{"step": 0}, {"step": -0.1}, {"step": 0.5, "start": "signs"}])
def test_a_step_that_goes_nowhere_or_too_far_is_refused(options):
    with pytest.raises(ValueError, match="step must be positive"):
        Pgd(norm="linf", eps=0.1, **options)
