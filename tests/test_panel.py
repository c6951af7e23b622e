"""Members are asked once per noise draw, and only where their answer could matter: the same verdicts, for less."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attacks.streams import Streams, generator
from defenses.api import Classifier, Images, Recipe, Task
from defenses.combine import Adaptive, Consensus, GeometricMedian, Majority, Mean, MeanLogits, Rule, Weighted
from defenses.ensemble import Ensemble, Panel, share
from defenses.estimators import Question
from defenses.nets import network
from defenses.smoothing import certify, certify_together


def weighted(members: int, seed: int = 0, kind: type[Weighted] = Weighted) -> Weighted:
    rule = kind(members)
    rule.set(torch.rand(members, generator=generator(seed, "weights")).square().softmax(0))
    return rule


def rules(members: int, seed: int = 0) -> list[Rule]:
    consensus = Consensus(MeanLogits(), max(1, members // 2))
    return [Mean(), weighted(members, seed), Weighted(members), Majority(), GeometricMedian(), MeanLogits(), consensus]


def opinions(seed: int, members: int, images: int, classes: int, scale: float) -> Tensor:
    """Logits (m n k) of members that agree on most images, more or less sharply."""
    gen = generator(seed, "opinions")
    common = torch.randn(1, images, classes, generator=gen) * scale
    return common + torch.randn(members, images, classes, generator=gen) * scale * torch.rand(1, images, 1, generator=gen)


class Counter:
    """Member logits (m n k) that remember who was asked about what."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.asked = logits, torch.zeros(logits.shape[:2], dtype=torch.int64)

    def __call__(self, member: int, rows: Tensor) -> Tensor:
        self.asked[member, rows] += 1
        return self.logits[member, rows]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(2, 12), st.sampled_from([0.3, 2.0, 10.0, 60.0]))
def test_every_rule_elects_what_it_decides_from_all_answers(seed: int, members: int, classes: int, scale: float) -> None:
    logits = opinions(seed, members, 40, classes, scale)
    for rule in [*rules(members, seed), weighted(members, seed, Adaptive)]:
        ask = Counter(logits)
        assert torch.equal(rule.elect(ask, members, 40), rule.decide(logits)), type(rule).__name__
        assert ask.asked.max() <= 1


@pytest.mark.parametrize("rule", [Mean(), Weighted(5), Majority(), GeometricMedian()], ids=lambda rule: type(rule).__name__)
def test_three_sure_members_of_five_settle_a_vote(rule: Rule) -> None:
    logits = torch.zeros(5, 4, 10)
    logits[:, :, 3] = 30.0
    logits[3:, :, 3], logits[3:, :, 7] = 0.0, 30.0
    ask = Counter(logits)
    assert rule.elect(ask, 5, 4).tolist() == [3] * 4
    assert ask.asked.sum(1).tolist() == [4, 4, 4, 0, 0]


def test_two_sure_members_of_five_do_not_settle_a_vote() -> None:
    logits = torch.zeros(5, 1, 3)
    logits[:2, :, 0] = 30.0
    logits[2:, :, 1] = 30.0
    for rule in (Mean(), Weighted(5), Majority(), GeometricMedian()):
        assert rule.elect(Counter(logits), 5, 1).tolist() == [1]


def test_the_heaviest_member_is_asked_first_and_alone_if_it_outweighs_the_rest() -> None:
    rule = Weighted(3)
    rule.set(torch.tensor([0.15, 0.7, 0.15]))
    logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]]).unsqueeze(1)
    ask = Counter(logits)
    assert rule.elect(ask, 3, 1).tolist() == [1]
    assert ask.asked.flatten().tolist() == [0, 1, 0]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 7), st.integers(2, 6), st.sampled_from([0.05, 0.3, 1.0]))
def test_a_settled_median_stays_whatever_the_others_say(seed: int, members: int, classes: int, spread: float) -> None:
    """Adversarial rest: the unasked members all put everything on the strongest rival."""
    gen = generator(seed, "median")
    logits = torch.randn(1, 30, classes, generator=gen) * 2 + spread * torch.randn(members, 30, classes, generator=gen)
    rule = GeometricMedian()
    for asked in range(rule.earliest(members), members):
        label, sure = rule.settled(logits[:asked], members)
        rival = logits[:asked].softmax(-1).mean(0).scatter(-1, label.unsqueeze(-1), -1.0).argmax(-1)
        against = logits.clone()
        against[asked:] = torch.nn.functional.one_hot(rival, classes) * 50.0
        assert torch.equal(rule(against).argmax(-1)[sure], label[sure])


def test_consensus_costs_what_the_paper_says() -> None:
    """k = 10, K = 5, consensus on 90 % of the samples: 5.5 evaluations a sample (methods 3.2)."""
    logits = torch.zeros(10, 100, 4)
    logits[:, :, 2] = 5.0
    logits[4, 90:, 1] = 20.0
    ask = Counter(logits)
    rule = Consensus(MeanLogits(), 5)
    assert rule.elect(ask, 10, 100).tolist() == rule.decide(logits).tolist()
    assert ask.asked.sum() / 100 == 5.5


def test_hard_voting_breaks_ties_towards_the_lowest_class() -> None:
    votes = torch.tensor([2, 1, 2, 1])
    logits = torch.nn.functional.one_hot(votes, 3).float().unsqueeze(1) * torch.tensor([1.0, 9, 1, 9]).view(4, 1, 1)
    assert Majority().decide(logits).tolist() == [1]


def test_adaptive_prediction_of_sween() -> None:
    """cw = (.5, .3), p_L = (.9, .8): mean .8625, threshold .569160, so the second member is the last (methods 3.3)."""
    rule = Adaptive(3)
    rule.set(torch.tensor([0.5, 0.3, 0.2]))
    p = torch.tensor([[[0.9, 0.1]], [[0.8, 0.2]], [[0.0, 1.0]]]).clamp(1e-6, 1 - 1e-6)
    threshold = rule.threshold(p[:2, :, 0], torch.tensor([0.5, 0.3]))
    assert threshold.item() == pytest.approx(0.569160, abs=1e-6)
    ask = Counter(p.log())
    assert rule.elect(ask, 3, 1).tolist() == [0]
    assert ask.asked.flatten().tolist() == [1, 1, 0]


def family(members: int = 5) -> tuple[list[Ensemble], list[Classifier], Tensor]:
    """Ensembles over separately loaded copies of the same networks, as several defenses of one run hold them."""
    gen = generator(0, "panel test")
    pixels = torch.randint(0, 256, (6, 1, 28, 28), generator=gen, dtype=torch.uint8)
    images = Images(pixels, torch.zeros(6, dtype=torch.int64), torch.arange(6), "random")
    task = Task("random", images, images, 10, (0.5,), (0.5,), "lenet5", Recipe(epochs=1))

    def nets() -> list[Classifier]:
        made = [network(task, generator(1, member)) for member in range(members)]
        for net in made:
            net.body[-1].weight.data.mul_(20)  # opinions sharp enough for early exits
        return list(made)

    ensembles = [Ensemble(nets(), rule).eval() for rule in (Mean(), weighted(members), GeometricMedian(), MeanLogits())]
    return ensembles, nets(), images.floats()


def test_equal_networks_become_one_object_and_different_ones_do_not() -> None:
    ensembles, nets, _ = family(3)
    nets[1].body[0].bias.data[0] += 1
    *shared, single, other = share([*ensembles, nets[0], nets[1]])
    assert single is ensembles[0].members[0] and other is nets[1]
    assert all(ensemble.members[2] is ensembles[0].members[2] for ensemble in shared)
    assert ensembles[0].members[0] is not ensembles[0].members[1]


@pytest.mark.parametrize("estimator", ["fixed", "grid"])
def test_certificates_made_together_equal_those_made_alone(estimator: str) -> None:
    ensembles, nets, x = family()
    question = Question(0.5, 0.001, 400, (0.0, 0.2, 0.4, 0.6))
    streams = Streams(3, "certified", ids=range(6))
    options = {"n0": 50, "estimator": estimator, "streams": streams}
    alone = [certify_together([model], x, question, **options)[0] for model in [*ensembles, nets[0]]]
    calls = []
    together = share([*ensembles, nets[0]])
    for net in ensembles[0].members:
        net.register_forward_hook(lambda net, inputs, output: calls.append(len(inputs[0])))
    for one, other in zip(alone, certify_together(together, x, question, **options), strict=True):
        for column in ("label", "radius", "count", "draws", "evaluations"):
            assert torch.equal(getattr(one, column), getattr(other, column)), column
    separately = sum(int(one.evaluations.sum()) for one in alone)
    assert sum(calls) < 0.5 * separately
    looked = int(alone[3].draws.sum()) + 6 * 50
    assert sum(calls) <= 5 * looked * 1.2  # soft voting needs all five everywhere; padding may add a little
    assert int(alone[0].evaluations.sum()) < 5 * (int(alone[0].draws.sum()) + 6 * 50)


def test_votes_of_members_are_those_of_predict() -> None:
    ensembles, _, x = family()
    rows = torch.tensor([5, 0, 3])
    for ensemble in ensembles:
        labels, asked = Panel(x, 100).vote(ensemble, rows)
        assert torch.equal(labels, ensemble.predict(x)[rows])
        assert ((asked >= 3) & (asked <= 5)).all()


def test_a_class_that_decides_in_its_own_way_is_not_taken_apart() -> None:
    class Contrary(Ensemble):
        def predict(self, x: Tensor) -> Tensor:
            return torch.full((len(x),), 4)

    ensembles, _, x = family()
    model = Contrary(ensembles[0].members, Mean()).eval()
    found = certify(model, x, 0.5, n=100)
    assert found.label.tolist() == [4] * 6
    assert found.evaluations.tolist() == [5 * 200] * 6


def test_images_whose_question_is_answered_cost_nothing_more() -> None:
    """Under the grid estimator one base stops early; the others go on alone."""
    sure = _Constant(1).eval()
    unsure = _Pixel().eval()
    x = torch.zeros(2, 1, 2, 2)
    question = Question(1.0, 0.001, 2000, (0.0,))
    one, other = certify_together([sure, unsure], x, question, estimator="grid")
    assert one.draws.tolist() == [100, 100] and (other.draws > 100).all()
    assert sure.seen < unsure.seen
    assert np.allclose(other.evaluations.numpy(), other.draws.numpy() + 100)


class _Constant(Classifier):
    seen = 0

    def __init__(self, label: int) -> None:
        super().__init__()
        self.label = label

    def predict(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return torch.full((len(x),), self.label)


class _Pixel(Classifier):
    seen = 0

    def predict(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return (x.flatten(1)[:, 0] > 0.05).long()


def test_members_changed_on_their_way_are_asked_as_a_whole() -> None:
    class Inverted(Ensemble):
        def member_logits(self, x: Tensor) -> Tensor:
            return super().member_logits(1 - x)

    ensembles, _, x = family()
    model = Inverted(ensembles[0].members, Mean()).eval()
    labels, _ = Panel(x, 100).vote(model, torch.arange(6))
    assert torch.equal(labels, model.predict(x))
