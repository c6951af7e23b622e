"""AutoAttack: its versions as data, who attacks whom, noise, and work that survives a kill (methods 8.10)."""

import os
from dataclasses import dataclass

import pytest
import torch
from torch import nn, tensor

from attacks import ATTACKS, Apgd, ApgdT, Attack, AutoAttack, ContractError, Eot, Fab, FabT, Square, Streams
from attacks.api import Search
from attacks.autoattack import COMPONENTS, RAND_DRAWS, VERSIONS
from attacks.streams import Draws
from defenses.smoothing import Smoothed

FIELDS = ("x_adv", "broken", "forwards", "backwards", "zeros", "distance")


class Net(nn.Module):
    """A small net that notes how often it was asked, and can be told to stop, or to answer NaN, at a call."""

    def __init__(self, classes=5):
        super().__init__()
        gen = torch.Generator().manual_seed(3)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, classes))
        for weight in self.layers.parameters():
            weight.data = torch.randn(weight.shape, generator=gen) * (0.8 if weight.ndim > 1 else 0.1)
        self.calls, self.stop, self.spoil, self.watch = 0, None, None, lambda: None
        self.eval()

    def forward(self, x):
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.watch()
        self.calls += 1
        logits = self.layers(x)
        return logits * torch.nan if self.calls == self.spoil else logits


X = torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(5))
Y = Net()(X).argmax(1)
Y[3] = (Y[3] + 1) % 5  # wrong from the start
SMALL = AutoAttack(norm="linf", eps=0.02, steps=4, proposals=20)


def attacked(attack, model=None, x=X, y=Y, seed=0, **options):
    return attack(model or Net(), x, y, Streams(seed, "test", ids=range(len(x))), **options)


def with_state(folder, **changes):
    # Square breaks some, APGD others, FAB asks about what is left.
    settings = {"norm": "linf", "eps": 0.02, "version": "custom", "attacks": ("square", "apgd_ce", "fab_t"), "steps": 2}
    return AutoAttack(**{**settings, "proposals": 5, "pieces": 8, "state": folder, **changes})


def assert_same(a, b):
    for field in FIELDS:
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    assert torch.equal(a.details["broken_by"], b.details["broken_by"])


# --- plans


def described(plan):
    return [(name, type(attack), getattr(attack, "loss", ""), getattr(attack, "targets", 0), attack.restarts)
            for name, attack in plan.components]  # fmt: skip


CE, DLR, T = ("apgd_ce", Apgd, "ce", 0, 1), ("apgd_dlr", Apgd, "dlr", 0, 1), ("apgd_t", ApgdT, "dlr", 9, 1)
FAB, FAB_T, SQUARE = ("fab", Fab, "", 0, 1), ("fab_t", FabT, "", 9, 1), ("square", Square, "", 0, 1)


def five(component):
    return (*component[:-1], 5)


PLANS = {
    "standard": [CE, T, FAB_T, SQUARE],
    "plus": [five(CE), five(DLR), five(FAB), SQUARE, T, FAB_T],
    "rand": [CE, DLR],
    "cear": [CE, DLR, FAB],
}


@pytest.mark.parametrize("version", PLANS)
def test_versions_are_those_of_the_authors_and_of_cear(version):
    assert VERSIONS.keys() == PLANS.keys()
    plan = AutoAttack(norm="l2", eps=0.5, version=version).plan(10)
    assert (plan.version, described(plan), plan.notes) == (version, PLANS[version], ())
    for _, attack in plan.components:
        assert (attack.norm, attack.eps) == ("l2", 0.5)
        assert attack.proposals == 5000 if isinstance(attack, Square) else attack.steps == 100


def test_a_custom_version_runs_what_it_names_in_that_order():
    plan = AutoAttack(norm="linf", eps=0.1, version="custom", attacks=("square", "apgd_dlr"), steps=7, proposals=9).plan(10)
    assert described(plan) == [SQUARE, DLR]
    assert (plan.components[0][1].proposals, plan.components[1][1].steps) == (9, 7)


def test_few_classes_get_fewer_targets_and_the_margin_and_the_plan_says_so():
    three, two = (AutoAttack(norm="linf", eps=0.1, version="plus").plan(classes) for classes in (3, 2))
    assert described(three) == [
        five(CE), five(DLR), five(FAB), SQUARE, ("apgd_t", ApgdT, "margin", 2, 1), ("fab_t", FabT, "", 2, 1),
    ]  # fmt: skip
    assert three.notes == (
        "apgd_t: 2 targets instead of 9, there are 3 classes",
        "apgd_t: loss margin instead of dlr, which 3 classes do not define",
        "fab_t: 2 targets instead of 9, there are 3 classes",
    )
    assert described(two)[1] == ("apgd_dlr", Apgd, "margin", 0, 5)
    assert two.notes[0] == "apgd_dlr: loss margin instead of dlr, which 2 classes do not define" and len(two.notes) == 4
    assert AutoAttack(norm="linf", eps=0.1).plan(9).notes == (
        "apgd_t: 8 targets instead of 9, there are 9 classes", "fab_t: 8 targets instead of 9, there are 9 classes",
    )  # fmt: skip
    with pytest.raises(ValueError, match="at least two classes, the model has 1"):
        AutoAttack(norm="linf", eps=0.1).plan(1)


@pytest.mark.parametrize("classes", [2, 3])
def test_models_of_few_classes_are_attacked(classes):
    net = Net(classes)
    result = attacked(SMALL, net, X, net(X).argmax(1))
    assert 0 < result.broken.sum() < len(X)


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"version": "fast"}, "unknown version 'fast'; known are standard, plus, rand, cear and custom"),
        ({"version": "custom"}, r"`attacks` are for version 'custom' only, and it needs them; got 'custom', \(\)"),
        ({"attacks": ("fab",)}, "for version 'custom' only"),
        ({"version": "custom", "attacks": ("fab", "pgd")}, "unknown component 'pgd'; known are apgd_ce, .*, square"),
        ({"norm": "l1"}, "known are linf, l2"),
        ({"eps": 0}, "eps must be positive and finite, got 0"),
        ({"pieces": 0}, "got 0, None, None"),
        ({"steps": -1}, "got 50, -1, None"),
        ({"steps": 0}, "got 50, 0, None"),
        ({"proposals": 0}, "got 50, None, 0"),
    ],
)
def test_a_wrong_setting_is_refused_when_it_is_written(wrong, text):
    with pytest.raises(ValueError, match=text):
        AutoAttack(**{"norm": "linf", "eps": 0.1, **wrong})


# --- the cascade


def test_it_is_what_its_components_do_in_turn_on_what_the_others_left():
    cascade = with_state(None)
    plan = cascade.plan(5)
    x_adv, broken_by, spent = X.clone(), torch.full_like(Y, -1), torch.zeros(3, len(X), dtype=torch.int64)
    standing = (Net()(X).argmax(1) == Y).nonzero().flatten()
    for number, (name, attack) in enumerate(plan.components):
        streams = Streams(0, "test", ids=range(len(X))).take(standing).child(name)
        found = attack(Net(), X[standing], Y[standing], streams)
        x_adv[standing[found.broken]], broken_by[standing[found.broken]] = found.x_adv[found.broken], number
        if number == 0:
            x_adv[standing] = found.x_adv
        spent[:, standing] += torch.stack([found.forwards, found.backwards, found.zeros])
        standing = standing[~found.broken]
    result = attacked(cascade)
    assert torch.equal(result.x_adv, x_adv) and torch.equal(result.details["broken_by"], broken_by)
    assert torch.equal(result.broken, (broken_by >= 0) | (torch.arange(24) == 3))
    assert torch.equal(torch.stack([result.forwards, result.backwards, result.zeros]), spent)
    assert len(broken_by.unique()) > 2 and len(standing), "the example must have work for several, and survivors"


def test_pieces_change_nothing():
    assert_same(attacked(SMALL), attacked(AutoAttack(norm="linf", eps=0.02, steps=4, proposals=20, pieces=5)))


def test_every_component_can_be_run_by_itself():
    for name in COMPONENTS:
        attack = AutoAttack(norm="l2", eps=0.1, version="custom", attacks=(name,), steps=10, proposals=30)
        result = attacked(attack)
        assert result.details["broken_by"].unique().tolist() == [-1, 0], name


# --- noise


class Flips(Draws):
    """Decides for class 0 by far, but for class 1 in some draws, one of twenty; no gradient changes that."""

    randomized = True

    def __init__(self, share=0.05):
        super().__init__()
        self.share = share

    def forward(self, x):
        flipped = self.drawn().uniform((1,)) < self.share
        sure = tensor([10.0, -10.0, -20.0]).expand(len(x), 3) + x.flatten(1).sum(1, keepdim=True) * 0
        return torch.where(flipped, sure.flip(1).roll(-1, 1), sure)


def test_unlucky_noise_breaks_nothing():
    # One pass a component would break about 5 % of 100 images, or 10 % after two: 10 of them.
    x, y, model = X.repeat(5, 1, 1, 1)[:100], torch.zeros(100, dtype=torch.int64), Flips().eval()
    result = attacked(SMALL, model, x, y)
    assert not result.broken.any() and (result.details["broken_by"] == -1).all()
    assert (result.forwards == 2 * 5 * RAND_DRAWS).all() and RAND_DRAWS == 20, "both components of rand, five questions each"


def test_luck_gets_one_verdict_and_not_one_for_every_component():
    # With 45 % of draws flipped the mean of 100 is wrong for about 14 % of images, whatever the points: of 170 that were right
    # before, 24, with a standard deviation of 4.6. Were every component's verdict final, these would be twice as many.
    x, y = X[:1].expand(200, -1, -1, -1), torch.zeros(200, dtype=torch.int64)
    result = attacked(AutoAttack(norm="linf", eps=0.02, steps=1), Flips(0.45).eval(), x, y)
    right = result.forwards > 0
    assert 150 < right.sum() < 190 and 10 <= result.broken[right].sum() <= 38


def test_a_randomised_model_gets_version_rand_whatever_was_asked():
    plan = AutoAttack(norm="linf", eps=0.1, version="plus").plan(10, randomized=True)
    assert described(plan) == PLANS["rand"]
    assert plan.notes == ("the model draws noise: version rand instead of plus",)
    assert AutoAttack(norm="linf", eps=0.1, version="rand").plan(10, randomized=True).notes == ()


@pytest.mark.parametrize("draws", [1, 3])
def test_eot_around_the_cascade_decides_how_many_draws(draws):
    x, y = X[:4], torch.zeros(4, dtype=torch.int64)
    assert (attacked(Eot(SMALL, draws=draws), Flips().eval(), x, y).forwards == 2 * 5 * draws).all()


class Noisy(Draws):
    """Noise of .1 before the net."""

    randomized = True

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return self.net(x + 0.1 * self.drawn().normal(x.shape[1:]))


def test_a_noisy_model_is_broken_where_its_mean_prediction_is():
    model = Noisy().eval()
    result = attacked(AutoAttack(norm="linf", eps=0.1, steps=6), model)
    assert 10 < result.broken.sum() < 24
    weak = attacked(AutoAttack(norm="linf", eps=1e-6, steps=2), model)
    assert weak.broken.sum() < 8, "what stays next to its image is not broken by luck"


# --- a state on disk


def test_a_kill_at_any_question_loses_only_the_piece_under_way(tmp_path):
    # Number of files at each call of a whole run: the first call at which there were as many begins the piece under way.
    net, files = Net(), []
    net.watch = lambda: files.append(len(list((tmp_path / "whole").glob("*.npz"))))
    whole = attacked(with_state(tmp_path / "whole"), net)
    assert len(list((tmp_path / "whole").glob("*.npz"))) == 8 and net.calls == len(files)
    assert_same(whole, attacked(with_state(None)))
    for stop in range(1, len(files)):
        folder, killed, resumed = tmp_path / str(stop), Net(), Net()
        killed.stop = stop
        with pytest.raises(KeyboardInterrupt):
            attacked(with_state(folder), killed)
        assert_same(attacked(with_state(folder), resumed), whole)
        # Two questions come first in any run: the verdict on the images, and the number of classes.
        assert resumed.calls == 2 + len(files) - max(2, files.index(files[stop])), "finished work is not asked again"


def test_finished_work_is_not_asked_again_however_often_or_in_other_pieces(tmp_path):
    whole = attacked(with_state(tmp_path))
    for pieces in (8, 4, 100):
        net = Net()
        assert_same(attacked(with_state(tmp_path, pieces=pieces), net), whole)
        assert net.calls == 2, "the verdict before the attack and the number of classes"


def test_pieces_may_change_after_a_kill_in_the_middle_of_a_file(tmp_path, monkeypatch):
    writes = []

    def dies(handle):
        writes.append(handle)
        if len(writes) == 4:  # what the question is, and two pieces, are on disk
            os.ftruncate(handle, 100)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", dies)
        attacked(with_state(tmp_path))
    assert len(list(tmp_path.glob("*.npz"))) == 2
    assert_same(attacked(with_state(tmp_path, pieces=3)), attacked(with_state(None)))


def test_a_randomised_model_resumes_too(tmp_path):
    attack = AutoAttack(norm="linf", eps=0.1, steps=2, pieces=9, state=tmp_path)
    whole, killed = attacked(AutoAttack(norm="linf", eps=0.1, steps=2), Noisy().eval()), Noisy().eval()
    killed.net.stop = 700
    with pytest.raises(KeyboardInterrupt):
        attacked(attack, killed)
    assert list(tmp_path.glob("*.npz"))
    assert_same(attacked(attack, Noisy().eval()), whole)


def other_weights():
    net = Net()
    net.layers[1].bias.data[0] += 1e-6
    return net


@pytest.mark.parametrize(
    "field, changes, call",
    [
        ("weights", {}, {"model": other_weights()}),
        ("data", {}, {"x": X * 0.999}),
        ("data", {}, {"y": (Y + (torch.arange(24) == 5)) % 5}),
        ("norm", {"norm": "l2"}, {}),
        ("eps", {"eps": 0.03}, {}),
        ("version", {"version": "cear", "attacks": ()}, {}),
        ("components", {"attacks": ("apgd_ce", "square")}, {}),
        ("components", {"steps": 3}, {}),
        ("seed", {}, {"seed": 1}),
        ("queries", {}, {"queries": 1000}),
        ("dtype", {}, {"model": Net().double(), "x": X.double()}),
    ],
)
def test_a_state_of_another_question_is_refused_and_says_what_differs(tmp_path, field, changes, call):
    attacked(with_state(tmp_path))
    with pytest.raises(ValueError, match=rf"holds work on another question: .*\b{field} was .*, now "):
        attacked(with_state(tmp_path, **changes), **call)


def test_a_state_knows_settings_of_a_model_that_are_no_weights(tmp_path):
    attack = AutoAttack(norm="linf", eps=0.1, steps=1, state=tmp_path)
    attacked(attack, Smoothed(Net(), 0.25).eval())
    with pytest.raises(ValueError, match="weights was"):
        attacked(attack, Smoothed(Net(), 0.5).eval())


def test_a_state_needs_a_model_whose_weights_have_a_name(tmp_path):
    with pytest.raises(ValueError, match="a state names the weights it belongs to"):
        attacked(with_state(tmp_path), Net().forward)


def test_work_on_answers_of_nan_is_not_kept(tmp_path):
    # A run that ends in this error must not be taken for finished work when it is called again.
    for _ in range(2):
        net = Net()
        net.spoil = 5
        with pytest.raises(ContractError, match="the model returned NaN"):
            attacked(with_state(tmp_path), net)
    assert_same(attacked(with_state(tmp_path)), attacked(with_state(None)))


# --- a limit on questions


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("queries", [1, 2, 5, 14, 60])
def test_no_attack_asks_more_than_it_may(name, queries):
    norm = "l2" if name == "ddn" else "linf"
    options = {"eps": 1e-4} if name in ("ddn", "fmn") else {"eps": 0.004}
    result = attacked(ATTACKS[name](norm=norm, **options), queries=queries)
    assert result.forwards.max() <= queries and (result.forwards.max() > 0 or queries < 2), "FAB's steps are two questions"


@pytest.mark.parametrize("queries", [2, 5, 31])
@pytest.mark.parametrize("name", ["apgd", "apgd_t", "fab_t", "square", "pgd", "fmn", "autoattack"])
def test_every_draw_of_noise_counts(name, queries):
    result = attacked(Eot(ATTACKS[name](norm="linf", eps=1e-3), draws=3), Noisy().eval(), queries=queries)
    assert result.forwards.max() <= queries and (result.forwards % 3 == 0).all()


@pytest.mark.parametrize("name", ["apgd_t", "fab", "fmn", "autoattack"])
def test_a_limit_that_is_never_reached_changes_no_point(name):
    attack = SMALL if name == "autoattack" else ATTACKS[name](norm="linf", eps=0.02, steps=10)
    assert torch.equal(attacked(attack, queries=10**6).x_adv, attacked(attack).x_adv)


@dataclass(frozen=True)
class Nosy(Attack):
    """Asks about the first image three times."""

    norm: str = "linf"
    eps: float = 0.1

    def run(self, oracle, x, y, streams):
        for _ in range(3):
            oracle(x[:1], tensor([0]))
        return Search(x)


def test_an_attack_that_asks_more_than_it_may_is_a_breach_of_its_contract():
    assert attacked(Nosy(), queries=3).forwards.tolist() == [3] + 23 * [0]
    with pytest.raises(ContractError, match="the attack asked 3 times about an image; 2 were allowed"):
        attacked(Nosy(), queries=2)


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="queries must be at least 1, got 0"):
        attacked(SMALL, queries=0)
