"""The Square attack: its schedule, its shapes, and what its questions have in common (methods 8.8)."""

import pytest
import torch
from torch import nn, tensor

from attacks import Apgd, Pgd, Square, Streams
from attacks.square import HALVINGS, MOVES, _bump, _hill

NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
CIFAR = torch.Size([3, 32, 32])
HALF = tensor(0.5, dtype=torch.float64)
PICTURE = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(0)).round(decimals=1).double()


class Hills(nn.Module):
    """Label 0 holds by far; the score is linear in the pixels, with weights of many sizes. Notes what it was asked."""

    def __init__(self, shape, bias=1e3):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)).double())
        self.bias, self.asked = bias, []
        self.eval()

    def forward(self, x):
        self.asked.append(x.detach()[0].clone())
        return torch.stack([torch.full((len(x),), self.bias).double(), self.score(x)], 1)

    def score(self, x):
        return (x * self.weight.detach()).flatten(1).sum(1)


def searched(norm, x, eps=0.1, **options):
    """The questions of a search around one image (without both verdicts), and its result.

    With a limit, which is never reached here, a search asks about one proposal at a time.
    """
    model = Hills(x.shape)
    result = Square(norm=norm, eps=eps, **options)(model, x[None], tensor([0]), Streams(0, ids=[7]), queries=10**6)
    return model, torch.stack(model.asked[1:-1]), result


def walk(model, asked):
    """Pairs of (present best point, question) as accepting what scores higher makes them."""
    scores, here = model.score(asked), 0
    for number in range(1, len(asked)):
        yield asked[here], asked[number]
        here = number if scores[number] > scores[here] else here


# --- schedule


def test_sides_on_32_by_32_are_those_of_the_paper():
    # Share .8 / 2^i of 1,024 pixels: roots 28.6, 20.2, 14.3, 10.1, 7.2, 5.1, 3.6, 2.5, 1.8, 1.3.
    attack = Square(norm="linf", eps=0.1, proposals=10_000)
    assert HALVINGS == (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
    after = [attack.side(limit + 1, CIFAR) for limit in (0, *HALVINGS)]
    assert after == [29, 20, 14, 10, 7, 5, 4, 3, 2, 1]
    assert [attack.side(limit, CIFAR) for limit in HALVINGS] == after[:-1], "a side halves after its limit, not at it"
    assert attack.side(0, CIFAR) == 29


def test_fewer_proposals_see_the_beginning_of_the_schedule_unless_they_rescale():
    few, scaled = (Square(norm="linf", eps=0.1, proposals=1000, rescale=rescale) for rescale in (False, True))
    assert few.side(999, CIFAR) == 7
    assert [scaled.side(n, CIFAR) for n in (0, 1, 2, 5, 6, 20, 21, 999)] == [29, 29, 20, 20, 14, 14, 10, 1]


def test_sides_in_l2_are_odd_and_at_least_three():
    attack = Square(norm="l2", eps=1, proposals=10_000)
    assert [attack.side(limit + 1, CIFAR) for limit in (0, *HALVINGS)] == [29, 21, 15, 11, 7, 5, 5, 3, 3, 3]


def test_a_side_never_exceeds_the_image():
    flat = torch.Size([1, 2, 100])
    assert Square(norm="linf", eps=1).side(0, flat) == 2 and Square(norm="l2", eps=1).side(0, flat) == 2
    assert Square(norm="linf", eps=1, area=1.0).side(0, CIFAR) == 32
    assert Square(norm="linf", eps=1, area=0.001).side(5000, CIFAR) == 1


# --- shapes of l2


@pytest.mark.parametrize("side", [2, 3, 4, 5, 7, 11, 29])
def test_a_bump_is_a_hill_above_its_negative_and_has_norm_one(side):
    bump = _bump(side)
    assert bump.shape == (side, side) and bump.norm().item() == pytest.approx(1)
    assert (bump[: side // 2] > 0).all() and (bump[side // 2 :] < 0).all()
    if side % 2:
        torch.testing.assert_close(bump, bump.flip(1))
    else:
        torch.testing.assert_close(bump[side // 2 :], -bump[: side // 2])
    assert _bump(1).item() == 1


def test_an_l2_window_gets_a_bump_of_any_turn_and_a_sign_for_each_channel():
    # Numbers below one half are +1, or a bump as it is; others -1, or its transpose. Windows of 3 at (0, 0) and (3, 3) of 6 by
    # 6: from nothing each of three channels gets a third of the square of the radius.
    propose, centre, bump = MOVES["l2"][1], HALF.expand(2, 3, 6, 6), _bump(3)
    spot = tensor([[0.0, 0.0, 0.99, 0.99, 0.1, 0.1, 0.9, 0.1], [0.0, 0.0, 0.99, 0.99, 0.9, 0.9, 0.9, 0.1]], dtype=torch.float64)
    points, changed = propose(centre, centre, 0.3, 3, spot)
    delta, share = points - centre, 0.3 / 3**0.5
    assert changed.all() and (delta[:, :, 3:] == 0).all() and (delta[:, :, :, 3:] == 0).all()
    torch.testing.assert_close(delta[0, :, :3, :3], share * torch.stack([bump, -bump, bump]))
    torch.testing.assert_close(delta[1, :, :3, :3], share * torch.stack([-bump.T, -bump.T, bump.T]))


def test_a_hill_sums_inverse_squares_of_its_rings():
    # 3 x 5, middle (1, 2): rings of 1, then 1/4 around it, then 1/9 in the outermost columns.
    edge, near, top = 1 / 9, 1 / 4 + 1 / 9, 1 + 1 / 4 + 1 / 9
    rings = tensor([[edge, near, near, near, edge], [edge, near, top, near, edge], [edge, near, near, near, edge]]).double()
    torch.testing.assert_close(_hill(3, 5), rings / rings.norm())


# --- questions


def test_the_linf_search_starts_with_vertical_stripes_at_the_edge_of_the_ball():
    x = HALF.expand(3, 8, 8)
    _, asked, _ = searched("linf", x, proposals=1)
    delta = asked[0] - x
    torch.testing.assert_close(delta.abs(), torch.full_like(x, 0.1))
    assert torch.equal(delta, delta[:, :1].expand_as(x)) and len(delta[:, 0].flatten().sign().unique()) == 2


def test_the_l2_search_starts_with_tiles_on_the_sphere():
    x = HALF.expand(1, 16, 17)
    _, asked, _ = searched("l2", x, proposals=1)
    delta = (asked[0] - x)[0]
    assert delta.norm().item() == pytest.approx(0.1, rel=1e-5)
    # Tiles of 16 // 5 = 3: five by five of them in the middle, each a bump of either sign.
    assert (delta[15] == 0).all() and (delta[:, [0, 16]] == 0).all()
    tiles = delta[:15, 1:16].reshape(5, 3, 5, 3).transpose(1, 2).reshape(25, 9)
    share = tiles @ _bump(3).flatten()
    torch.testing.assert_close(tiles, share[:, None] * _bump(3).flatten())
    torch.testing.assert_close(share.abs(), torch.full_like(share, 0.1 / 5))
    assert len(share.sign().unique()) == 2


def test_every_linf_question_is_at_the_edge_of_ball_or_box():
    x = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    _, asked, _ = searched("linf", x, eps=0.2, proposals=600)
    low, high = (x - 0.2).clamp_min(0), (x + 0.2).clamp_max(1)
    nearest = torch.minimum((asked - low).abs(), (asked - high).abs())
    assert nearest.max() < 1e-6 and ((asked - high).abs() < 1e-6).any() and ((asked - low).abs() < 1e-6).any()


def test_a_linf_question_differs_from_the_best_point_in_one_window_and_never_in_nothing():
    # The last 500 windows are single pixels: a quarter has the sign that both channels have already.
    x = HALF.expand(2, 7, 7)
    attack = Square(norm="linf", eps=8 / 255, proposals=1500)
    model, asked, result = searched("linf", x, eps=8 / 255, proposals=1500)
    assert len(asked) == result.forwards < 1420, "what changes nothing is not asked, nor counted"
    places, signs, corners = set(), set(), set()
    for here, there in walk(model, asked):
        changed = (there - here).abs() > 8 / 255
        assert changed.any(), "a question about the present point"
        rows, columns = changed.any(0).any(1).nonzero().flatten(), changed.any(0).any(0).nonzero().flatten()
        height, width = (int(span[-1] - span[0]) + 1 for span in (rows, columns))
        assert max(height, width) <= attack.side(0, x.shape)
        signs.add(tuple((there - here).sum((1, 2)).sign().tolist()))
        if height == width == 1:
            places.add((int(rows[0]), int(columns[0])))
        corners.add((int(rows[0]) == 0, int(columns[0]) == 0, int(rows[-1]) == 6, int(columns[-1]) == 6))
    assert len(signs) == 8, "each channel has a sign of its own: all pairs of -1, 0 (nothing to do) and 1 but (0, 0)"
    assert (True, True, False, False) in corners and (False, False, True, True) in corners
    assert {row for row, _ in places} == {column for _, column in places} == set(range(7)), "the last row and column too"


@NORMS
def test_a_better_question_is_kept_and_a_worse_one_forgotten(norm):
    x = HALF.expand(1, 6, 6)
    model, asked, result = searched(norm, x, proposals=300)
    scores = model.score(asked)
    best = scores.cummax(0).values
    assert model.score(result.x_adv) == best[-1] > best[0] and (scores < best).sum() > 30


def test_every_l2_question_lies_on_the_sphere():
    x = HALF.expand(3, 9, 9)
    model, asked, result = searched("l2", x, eps=0.7, proposals=400)
    length = (asked - x).flatten(1).norm(dim=1)
    torch.testing.assert_close(length, torch.full_like(length, 0.7), rtol=1e-5, atol=0)
    assert len(asked) == result.forwards == 400
    for here, there in walk(model, asked):
        # Windows trade their mass in each channel for itself.
        mass, before = ((point - x).square().sum((1, 2)) for point in (there, here))
        torch.testing.assert_close(mass, before)


def test_an_l2_question_leaves_the_sphere_only_where_the_box_cuts_it():
    _, asked, _ = searched("l2", PICTURE, eps=1.5, proposals=200)
    length = (asked - PICTURE).flatten(1).norm(dim=1)
    assert asked.min() >= 0 and asked.max() <= 1 and length.max() <= 1.5 * (1 + 1e-6) and length.min() < 1.4


@pytest.mark.parametrize("eps, x", [(0.7, HALF.expand(3, 9, 9)), (1.5, PICTURE)])
def test_an_l2_question_leaves_everything_outside_two_windows_as_it_was(eps, x):
    # What they get is what they had, and what the box had cut off from the sphere: then no other pixel need be rescaled.
    model, asked, _ = searched("l2", x, eps=eps, proposals=400)
    for number, (here, there) in enumerate(walk(model, asked)):
        changed = ((there - here).abs() > 1e-9).any(0).sum()
        assert 0 < changed <= 2 * Square(norm="l2", eps=1).side(number, x.shape) ** 2


@NORMS
def test_longer_searches_and_restarts_go_on_where_shorter_ones_end(norm):
    # Random numbers are drawn 500 proposals at a time; 700 cross that border.
    x = HALF.expand(1, 5, 5)
    _, short, _ = searched(norm, x, proposals=450)
    _, long, _ = searched(norm, x, proposals=700)
    assert torch.equal(long[: len(short)], short)
    _, twice, result = searched(norm, x, proposals=20, restarts=2)
    _, once, _ = searched(norm, x, proposals=20)
    assert torch.equal(twice[: len(once)], once) and not torch.equal(twice[len(once)], once[0])
    assert result.forwards == len(twice)


def test_images_have_proposals_of_their_own():
    model, x = Hills((1, 6, 6)), HALF.expand(2, 1, 6, 6)
    result = Square(norm="linf", eps=0.1, proposals=5)(model, x, tensor([0, 0]), Streams(0, ids=[1, 2]))
    assert not torch.equal(result.x_adv[0], result.x_adv[1])


@NORMS
@pytest.mark.parametrize(
    "options", [{"proposals": 700}, {"proposals": 300, "rescale": True}, {"proposals": 30, "rescale": True}]
)
def test_asking_ahead_changes_nothing_but_the_number_of_questions(norm, options):
    # Without a limit several proposals may be asked about at once. Rescaled to 30, the schedule skips halvings.
    x = HALF.expand(1, 6, 6)
    limited = searched(norm, x, **options)[2]
    free = Square(norm=norm, eps=0.1, **options)(Hills(x.shape), x[None], tensor([0]), Streams(0, ids=[7]))
    assert torch.equal(limited.x_adv, free.x_adv) and limited.forwards <= free.forwards < 2 * limited.forwards


@NORMS
def test_a_limit_ends_the_search_with_what_it_has_found(norm):
    x = HALF.expand(1, 6, 6)
    model, asked, _ = searched(norm, x, proposals=300)
    limited = Square(norm=norm, eps=0.1)(Hills(x.shape), x[None], tensor([0]), Streams(0, ids=[7]), queries=50)
    assert limited.forwards == 50 and torch.equal(limited.x_adv[0], asked[model.score(asked[:50]).argmax()])


def test_images_without_three_axes_are_pictures_too():
    for shape in ((12,), (4, 5)):
        model, x = Hills(shape), HALF.expand(1, *shape)
        result = Square(norm="linf", eps=0.1, proposals=200)(model, x, tensor([0]), Streams(0, ids=[7]))
        assert result.x_adv.shape == x.shape
        assert model.score(result.x_adv) > model.score(x) + 0.7 * 0.1 * model.weight.abs().sum()


# --- what it is for


def small_net(front):
    """Input -> front -> linear -> tanh -> 3 classes."""
    gen = torch.Generator().manual_seed(3)
    net = nn.Sequential(front, nn.Flatten(), nn.Linear(36, 24), nn.Tanh(), nn.Linear(24, 3)).eval()
    for weight in net.parameters():
        weight.data = torch.randn(weight.shape, generator=gen) * (0.5 if weight.ndim > 1 else 0.1)
    x = torch.rand(60, 1, 6, 6, generator=gen)
    return net, x, net(x).argmax(1)


class Quantised(nn.Module):
    def forward(self, x):
        return (x * 8).round() / 8


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.6)])
def test_quantised_inputs_stop_gradients_but_not_square(norm, eps):
    net, x, y = small_net(Quantised())
    noise = Streams(0, ids=range(60))
    square = Square(norm=norm, eps=eps, proposals=300)(net, x, y, noise)
    assert square.backwards.sum() == 0
    for kind in (Pgd, Apgd):
        masked = kind(norm=norm, eps=eps, restarts=1)(net, x, y, noise)
        assert torch.equal(masked.zeros, masked.backwards) and masked.zeros.max() > 0, "zero gradients are noted"
        assert square.broken.sum() > 1.5 * masked.broken.sum(), "a random start breaks some"
    assert square.broken.sum() > 10


def test_without_masking_square_finds_about_what_gradients_find():
    net, x, y = small_net(nn.Identity())
    noise = Streams(0, ids=range(60))
    square = Square(norm="linf", eps=0.1, proposals=1000)(net, x, y, noise).broken
    apgd = Apgd(norm="linf", eps=0.1, loss="margin", restarts=3)(net, x, y, noise).broken
    assert 10 < 0.8 * apgd.sum() < square.sum() < 50


def test_a_broken_image_costs_no_more():
    x = HALF.expand(1, 1, 6, 6)
    model = Hills((1, 6, 6))
    model.bias = float(model.score(x)) + 0.01
    result = Square(norm="linf", eps=0.1, restarts=3)(model, x, tensor([0]), Streams(0, ids=[7]))
    assert result.broken and result.forwards < 20 and len(model.asked) == result.forwards + 2


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"norm": "l1"}, "Square knows the norms linf, l2, got 'l1'"),
        ({"eps": 0}, "eps must be positive and finite, got 0"),
        ({"eps": float("inf")}, "positive and finite"),
        ({"proposals": 0}, "got 0, 1, 0.8"),
        ({"restarts": 0}, "got 5000, 0, 0.8"),
        ({"area": 0}, "got 5000, 1, 0"),
        ({"area": 1.5}, "got 5000, 1, 1.5"),
    ],
)
def test_a_wrong_setting_is_refused_when_it_is_written(wrong, text):
    with pytest.raises(ValueError, match=text):
        Square(**{"norm": "linf", "eps": 0.1, **wrong})


def test_without_streams_there_is_no_search():
    with pytest.raises(ValueError, match="Square searches at random: pass streams"):
        Square(norm="linf", eps=0.1)(Hills((2, 2)), torch.rand(1, 2, 2), tensor([0]))
