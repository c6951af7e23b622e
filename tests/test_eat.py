"""Ensemble adversarial training: the numbers of methods 6.3, who is attacked, and what a modifier leaves alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from test_joint import Linear, batch, smooth
from test_training import Bench, task
from torch import Tensor, nn

from attacks.streams import generator
from bench.registry import RegistryError, registered, resolve
from defenses.api import Classifier, Part, Task, Weights
from defenses.combine import Mean
from defenses.dverge import dverge
from defenses.eat import EPS, EnsembleAdversarial, crafted
from defenses.ensemble import Ensemble
from defenses.joint import EnsembleLoss, TrainedTogether, plain
from defenses.naive import Separate, naive
from defenses.smd import smd
from defenses.training import Batch

ENSEMBLES = {name: own for name, (own, _) in registered().items() if isinstance(own, TrainedTogether)}


class Shop:
    """Parts in memory."""

    def __init__(self, one: Task) -> None:
        self.one, self.made = one, {}

    def get(self, part: Part) -> Weights:
        key = part.key(self.one)
        if key not in self.made:
            self.made[key] = part.make(self.one, [self.get(need) for need in part.needs], Bench())
        return self.made[key]


def test_the_loss_is_half_clean_and_half_adversarial() -> None:
    """Cross-entropy .2 on clean and 1.0 on adversarial images is .6; what else a loss has stays whole."""

    class Two(EnsembleLoss):
        def __call__(self, net: Ensemble, batch: Batch, needs: Sequence[Classifier]) -> dict[str, Tensor]:
            return {"ce": torch.tensor(0.2), "rest": torch.tensor(0.3)}

        def errors(self, net: Ensemble, x: Tensor, batch: Batch) -> Tensor:
            return torch.tensor(1.0)

    parts = EnsembleAdversarial(Two(), 0.1, 2)(smooth(), batch(), [])
    assert {name: round(float(part), 6) for name, part in parts.items()} == {"ce": 0.1, "rest": 0.3, "ce_adversarial": 0.5}


def test_every_source_is_drawn_equally_often() -> None:
    """Three held-out ensembles and the one in training: 1/4 each, within three standard errors."""
    asked: Counter[str] = Counter()

    class Told(Classifier):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.weight = name, nn.Parameter(torch.eye(4, 36, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad:
                asked[self.name] += 1
            return x.flatten(1) @ self.weight.T

    sources = [Ensemble([Told(name)], Mean()) for name in ("a", "b", "c")]
    own, one, rounds = Ensemble([Told("own")], Mean()), batch(n=1), 2000
    loss = EnsembleAdversarial(Separate(), 0.1, 1)
    for _ in range(rounds):
        loss(own, one, sources)
    assert asked.keys() == {"a", "b", "c", "own"} and sum(asked.values()) == rounds
    assert all(abs(count / rounds - 0.25) < 3 * (0.25 * 0.75 / rounds) ** 0.5 for count in asked.values())


def test_images_go_up_the_loss_of_what_the_source_says() -> None:
    """A linear source of two classes: every pixel ends at its bound, away from what the source says, not the label."""
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.0, 0.0, 0.0, 0.0]])
    source, x = Linear(weight).train(), torch.tensor([[0.5, 0.5, 0.9, 0.1], [0.3, 0.8, 0.2, 0.9]]).view(2, 1, 2, 2)
    found = crafted(source, x, 0.05, 10, generator(0, "test"))
    said = source(x).argmax(-1)
    assert said.tolist() == [0, 1]
    signs = torch.where(said == 0, -1.0, 1.0).view(2, 1) * weight[0].sign()
    assert torch.allclose(found.flatten(1), x.flatten(1) + 0.05 * signs, atol=1e-6)
    assert source.training and source.weight.grad is None


def test_starts_are_new_in_every_call_and_inside_the_ball() -> None:
    net, x, gen = smooth(), batch().x, generator(0, "test")
    found = [crafted(net, x, 0.1, 1, gen) for _ in range(2)]
    assert not torch.equal(*found)
    assert all(bool(((own - x).abs() <= 0.1 + 1e-12).all() and (own >= 0).all() and (own <= 1).all()) for own in found)


@pytest.mark.parametrize("name", ENSEMBLES)
def test_errors_are_the_cross_entropy_of_the_loss(name: str) -> None:
    """On the same images, `errors` is the part "ce" of every loss: sum, mean and weight agree."""
    defense = ENSEMBLES[name]
    one = task()
    model = defense.build(one)
    gen = generator(0, "test")
    x, y = torch.rand(4, 1, 28, 28, generator=gen), torch.arange(4)
    seen = Batch(x, y, gen, partner=lambda: (1 - x, y))
    loss, share = defense.loss(one), 1
    if isinstance(defense, type(dverge)):  # distilled images in a ball of radius 0 are the images themselves
        loss, share = replace(loss, eps=1e-12), len(model.members) - 1
    if name == "gal":
        loss = replace(loss, noise=0.0)

    def fresh() -> Batch:
        return replace(seen, gen=generator(1, "masks"))

    ce, errors = loss(model, fresh(), [])["ce"], loss.errors(model, seen.x, fresh())
    assert float(ce.detach()) == pytest.approx(share * float(errors.detach()), rel=1e-4)


def test_a_modified_defense_is_trained_on_sources_that_nobody_else_has() -> None:
    one = task()
    hardened = replace(smd, members=2, eat=True, eat_sources=2)
    part = hardened.part(one, 0)
    assert part.sources == 2 and part.loss == EnsembleAdversarial(smd.loss(one), EPS[1], 10)
    roles = [need.role for need in part.needs]
    assert roles == ["held out"] * 4 and {need.key(one) for need in part.needs}.isdisjoint(
        plain(one, 0, member).key(one) for member in range(8)
    )
    begun = replace(dverge, members=2, eat=True, eat_sources=1).part(one, 0)
    assert [need.role for need in begun.needs] == ["plain"] * 2 + ["held out"] * 2


@pytest.mark.parametrize("name", ["naive", "dverge", "pdd_deg"])
def test_training_with_it_gives_an_ensemble_that_is_another(name: str) -> None:
    one = task(n=32)
    shop = Shop(one)
    own = replace(ENSEMBLES[name], members=2)
    models = [own.build(one), own.build(one)]
    for defense, model in zip([own, replace(own, eat=True, eat_sources=1, eat_steps=1)], models, strict=True):
        defense.fit(model, one, shop, 0)
    weights = [torch.cat([value.flatten().float() for value in model.state_dict().values()]) for model in models]
    assert weights[1].isfinite().all() and not torch.equal(*weights)


def test_sources_stay_as_they_are() -> None:
    one = task(n=32)
    shop = Shop(one)
    part = replace(naive, members=2, eat=True, eat_sources=1, eat_steps=1).part(one, 0)
    before = [{name: value.clone() for name, value in shop.get(need).items()} for need in part.needs]
    shop.get(part)
    for need, old in zip(part.needs, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in shop.get(need).items())


def test_a_modifier_is_written_with_a_plus() -> None:
    (variant,) = resolve("smd+eat@members=5,eat_eps=0.2", {})
    assert variant.label == "smd+eat@eat_eps=0.2,members=5" and variant.name == "smd"
    assert variant.defense == replace(smd, eat=True, members=5, eat_eps=0.2)
    assert [v.label for v in resolve("smd@eat=true,naive", {})] == ["smd+eat", "naive"]
    assert {v.name for v in resolve("all+eat", {})} == set(ENSEMBLES)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("smd+eet", "smd has no modifier 'eet'; it has eat"),
        ("randsmooth+eat", "randsmooth has no modifier 'eat'; it has none"),
        ("smd@eat_eps=0.2", r"belong to the modifier: write NAME\+eat@eat_eps"),
        ("smd+eat@eat_eps=2.0", "eat_eps: a radius in pixels up to 1"),
        ("smd+eat@eat_steps=0", "eat_steps >= 1"),
    ],
)
def test_wrong_modifiers_are_refused(spec: str, text: str) -> None:
    with pytest.raises(RegistryError, match=text):
        resolve(spec, {})


def test_without_it_nothing_of_it_is_in_keys_or_records() -> None:
    from defenses.recipe import settings

    assert settings(smd).keys() == {"members", "weight", "saliency"}
    assert settings(replace(smd, eat=True)).keys() == {"members", "weight", "saliency", "eat"}
