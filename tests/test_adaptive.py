"""Attacks through views: what hides gradients is left out, success is the model's own; the evaluation that tries them all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from attacks import Apgd, ApgdT, DiverseMim, Eot, Pgd, Square, Streams
from attacks.guided import ApgdAfter, Guided, View
from attacks.losses import half_margin
from attacks.streams import drawing, generator
from bench.evals import Adaptive, Subject
from bench.request import Request
from bench.runner import Run
from bench.store import Record
from defenses.api import Classifier, Images, Wrapped
from defenses.combine import Mean
from defenses.ensemble import Ensemble
from defenses.kernels import Noise
from defenses.views import SoftMaxPool2d, SoftReLU, smooth, views


class Linear(Classifier):
    """Two classes by the sign of w x - b, scaled; ``steps`` > 0 quantises the image, which kills gradients."""

    def __init__(self, scale: float = 1.0, steps: int = 0, threshold: float = 2.0) -> None:
        super().__init__()
        self.scale, self.steps, self.threshold = scale, steps, threshold
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        seen = (x * self.steps).round() / self.steps if self.steps else x
        score = self.scale * (seen.flatten(1).sum(1) - self.threshold)
        return torch.stack([score, -score, -2 * score.abs() - 1], 1)


def images(n: int = 12) -> tuple[Tensor, Tensor, Streams]:
    """4 pixels each, sums from 2.05 to 2.6: class 0, and the nearest point of class 1 at (sum - 2) / 4 in l_inf."""
    sums = torch.linspace(2.05, 2.6, n)
    x = sums.view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / 4 + torch.tensor([[-0.05, 0.05], [0.1, -0.1]])
    return x.contiguous(), torch.zeros(n, dtype=torch.int64), Streams(0, "guided", ids=range(n))


APGD = Apgd(norm="linf", eps=0.1, steps=20)


def test_gradients_of_the_view_break_what_the_model_hides() -> None:
    x, y, streams = images()
    blind, masked = APGD, Linear(steps=50)
    seeing = Guided(APGD, Linear())
    found, hidden = seeing(masked, x, y, streams), blind(masked, x, y, streams)
    assert not (hidden.broken & ~found.broken).any() and int(found.broken.sum()) > int(hidden.broken.sum())
    reach = x.flatten(1).sum(1) - 2 < 4 * 0.1 - 4 / 50  # beyond what rounding to 1/50 may hide
    assert found.broken[reach].all() and not found.broken[x.flatten(1).sum(1) - 2 > 4 * 0.1 + 4 / 50].any()


def test_what_fools_the_view_alone_is_no_success() -> None:
    x, y, streams = images()
    weak = Linear(threshold=2.5)  # falls long before the model
    found = Guided(APGD, weak)(Linear(), x, y, streams)
    expected = x.flatten(1).sum(1) - 2 < 0.4
    assert torch.equal(found.broken, expected) and 0 < int(expected.sum()) < len(x)
    assert torch.equal(Linear().predict(found.x_adv) != y, found.broken)


@pytest.mark.parametrize(
    "inner", [APGD, replace(APGD, loss="margin", restarts=2), Pgd(norm="l2", eps=0.15, steps=10, restarts=2)]
)
def test_no_image_depends_on_the_others(inner: Any) -> None:
    x, y, streams = images()
    attack, masked = Guided(inner, Noisy(), draws=3), Linear(steps=50)
    whole = attack(masked, x, y, streams)
    for rows in (torch.tensor([3]), torch.tensor([11, 2, 7])):
        some = attack(masked, x[rows], y[rows], streams.take(rows))
        assert torch.equal(some.x_adv, whole.x_adv[rows]) and torch.equal(some.broken, whole.broken[rows])


class Noisy(Linear):
    """Draws noise."""

    randomized = True

    def __init__(self) -> None:
        super().__init__()
        self.noise = Noise(0.05)
        self.noise.inference = True
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.noise(x))


def test_half_of_the_members() -> None:
    # margins of class 0: -3, 1, -1; of three members the two closest to falling count
    logits = torch.tensor([[[3.0, 0]], [[0, 1.0]], [[1.0, 0]]])
    assert float(half_margin(logits, torch.tensor([0]))) == pytest.approx((1 - 1) / 2)
    draws = torch.stack([logits, logits + torch.tensor([[[2.0, 0]], [[2.0, 0]], [[2.0, 0]]])])
    assert half_margin(draws, torch.tensor([0])).tolist() == [[0.0], [-2.0]]


def test_members_of_an_ensemble_are_seen_past_a_saturated_softmax() -> None:
    x, y, streams = images()
    sure = Ensemble([Linear(scale=3000.0, threshold=2 + 0.01 * member) for member in range(3)], Mean()).eval()
    blind = Apgd(norm="linf", eps=0.1, steps=20)(sure, x, y, streams)
    view = views(sure)["members"]
    assert view.model(x).shape == (3, len(x), 3) and set(view.losses) == {"ce", "margin", "half"}
    found = Guided(replace(APGD, loss=view.losses["half"]), view.model)(sure, x, y, streams)
    expected = x.flatten(1).sum(1) - 2.01 < 0.4  # two of three members
    assert torch.equal(found.broken, expected) and int(blind.broken.sum()) <= int(found.broken.sum())


def test_auto_pgd_goes_on_from_the_points_of_another_attack() -> None:
    x, y, streams = images()
    square = Square(norm="linf", eps=0.1, proposals=200)
    masked = Linear(steps=50)
    alone, after = square(masked, x, y, streams), ApgdAfter(norm="linf", eps=0.1, steps=5, first=square)(masked, x, y, streams)
    assert int(alone.broken.sum()) > 0 and int(APGD(masked, x, y, streams).broken.sum()) < int(alone.broken.sum())
    assert int(after.broken.sum()) >= int(alone.broken.sum()) - 1  # other random numbers
    with pytest.raises(ValueError, match="no room for 9 targets"):
        ApgdAfter(norm="linf", eps=0.1, targets=9, loss="dlr", first=square)


# The smooth copy


def test_soft_layers_come_close_to_the_hard_ones() -> None:
    x = torch.randn((2, 3, 8, 8), generator=generator(0, "soft"), dtype=torch.float64)
    for slope in (0.0, 0.1):
        hard = nn.LeakyReLU(slope)(x)
        assert float((SoftReLU(10.0, slope)(x) - hard).abs().max()) <= math.log(2) / 10 + 1e-9
        assert torch.allclose(SoftReLU(1e4, slope)(x), hard, atol=1e-4)
    pool = nn.MaxPool2d(2)
    assert float((SoftMaxPool2d(pool, 10.0)(x) - pool(x)).abs().max()) <= math.log(4) / 10 + 1e-9
    assert torch.allclose(SoftMaxPool2d(pool, 500.0)(x), pool(x), atol=1e-2)
    assert torch.autograd.gradcheck(SoftMaxPool2d(pool, 10.0), x[:1, :1, :4, :4].clone().requires_grad_())


def test_the_copy_is_smooth_and_the_model_stays() -> None:
    body = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    model = Wrapped(body).eval()
    soft = smooth(model, 20.0)
    assert [type(m) for m in body] == [nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Flatten, nn.Linear]
    assert not any(isinstance(module, nn.ReLU | nn.MaxPool2d) for module in soft.modules())
    x = torch.rand((5, 1, 4, 4), generator=generator(0, "smooth"))
    assert 0 < float((soft(x) - model(x)).detach().abs().max()) < 0.2


# The evaluation


EVALUATION = Adaptive(images=12, norm="linf", eps=(0.1,), steps=10, pgd_steps=10, proposals=20, eot=2)


def measured(
    model: Classifier, found: Mapping[str, View] | None, evaluation: Adaptive = EVALUATION, **others: Classifier
) -> tuple[pd.DataFrame, Any]:
    x, y, _ = images()
    stored = Images((x * 255).round().to(torch.uint8), y, torch.arange(len(y)), "made")
    subject = Subject(model.eval(), None, 0, views=lambda: found, other=others.__getitem__)
    (rows,) = evaluation.measure([subject], stored, evaluation.pieces(subject)[0])
    return rows, evaluation.summarise(rows, subject)


def test_a_mask_is_named_with_the_view_that_broke_it() -> None:
    masked = Linear(steps=40)
    rows, outcome = measured(masked, {"plain": View(Linear(), {"ce": "ce"})})
    assert "plain: ce" in set(rows.broken_by)  # beside what random starts find by chance
    (finding,) = outcome.findings
    assert finding.kind == "adaptive_helps" and finding.evidence["by"]["plain: ce"] > 0
    after = {metric.source: metric.value for metric in outcome.metrics if metric.metric == "robust_accuracy_after"}
    assert 1.0 >= after["apgd_t"] > after["plain: ce"] >= after["square"] >= after["after square"]
    headline = next(metric for metric in outcome.metrics if metric.denominator == "all")
    assert headline.value == after["after square"] == float((rows.broken_by == "").mean())
    for point, by in zip(rows.x_adv, rows.broken_by, strict=True):
        x = torch.frombuffer(bytearray(point), dtype=torch.float32).view(1, 1, 2, 2)
        assert (int(masked.predict(x)) != 0) == (by != "")


def test_an_open_model_gets_no_finding() -> None:
    rows, outcome = measured(Linear(), {})
    assert outcome.findings == [] and set(rows.broken_by) <= {"apgd_ce", "apgd_t", ""}
    assert rows.tried.iloc[0].split("\n") == ["apgd_ce", "apgd_t", "pgd", "pgd: margin", "square", "after square"]


class Other(Linear):
    """Another network of the same layers."""


def test_every_attack_is_what_its_name_says() -> None:
    plain, far = View(Linear(), {"ce": "ce", "half": half_margin}), Other()
    asked = EVALUATION.model_copy(update={"steps": 7, "pgd_steps": 30, "restarts": 3, "sources": ("far",)})
    subject = Subject(Linear(), None, 0, views=lambda: {"plain": plain}, other={"far": far}.__getitem__)
    found = dict(asked.attacks(subject, 0.2))
    apgd, pgd = {"norm": "linf", "eps": 0.2, "steps": 7, "restarts": 3}, {"step": "2.5eps/T", "restarts": 3}
    moving = {"norm": "linf", "eps": 0.2, "steps": 7}
    assert found["apgd_ce"] == Apgd(**apgd) and found["apgd_t"] == ApgdT(**apgd)
    assert found["pgd"] == Pgd(norm="linf", eps=0.2, steps=30, **pgd)
    assert found["pgd: margin"] == Pgd(norm="linf", eps=0.2, steps=30, loss="margin", **pgd)
    for name, inner, guide in (
        ("plain: ce", Apgd(**apgd, loss="ce"), plain.model),
        ("plain: half", Apgd(**apgd, loss=half_margin), plain.model),
        ("plain: pgd, half", Pgd(norm="linf", eps=0.2, steps=30, loss=half_margin, **pgd), plain.model),
        ("from far: ce", DiverseMim(**moving, loss="ce"), far),
        ("from far: margin", DiverseMim(**moving, loss="margin"), far),
    ):
        attack = found[name]
        assert isinstance(attack, Guided) and (attack.inner, attack.guide, attack.draws) == (inner, guide, 2), name


def test_images_of_other_models_count_where_they_fool_the_model() -> None:
    deaf = Linear(steps=20)  # rounds, so that its own gradients are zero
    evaluation = EVALUATION.model_copy(update={"sources": ("open",), "proposals": 1, "steps": 1, "pgd_steps": 1})
    rows, _ = measured(deaf, {}, evaluation, open=Other())
    x, y, _ = images()
    along = (x - 0.1).clamp(0, 1)  # what the other model's gradient says, whatever the loss
    falls = (deaf.predict(along) != y).numpy() & rows.clean_correct.to_numpy()
    assert falls.any() and (rows.broken_by.to_numpy()[falls] != "").all()
    assert set(rows.broken_by[falls]) & {"from open: ce", "from open: margin"}


def test_a_model_that_draws_noise_is_asked_with_several_draws_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("bench.evals.adaptive.Eot", lambda attack, draws: asked.append(draws) or Eot(attack, draws))
    noisy = Noisy()
    rows, _ = measured(noisy, views(noisy))
    tried = rows.tried.iloc[0].split("\n")
    assert {"logits/10: ce", "smooth: margin"} <= set(tried) and set(asked) == {2} and len(asked) <= len(tried)
    measured(Linear(), {})
    assert len(asked) <= len(tried)


def test_views_are_of_the_model_itself() -> None:
    x, _, _ = images()
    members = [Linear(threshold=2 + 0.1 * member) for member in range(3)]
    whole = Ensemble(members, Mean()).eval()
    found = views(whole, (4.0,))
    logits = torch.stack([member(x) for member in members])
    assert torch.equal(found["logits/4"].model(x), whole(x) / 4)
    assert torch.equal(found["members"].model(x), logits) and torch.allclose(found["mean logits"].model(x), logits.mean(0))
    assert not torch.allclose(found["mean logits"].model(x), whole(x))
    noisy = Noisy()
    assert views(noisy)["logits/10"].model.randomized and not found["logits/4"].model.randomized  # type: ignore[attr-defined]
    divided = views(noisy)["logits/10"].model
    with drawing(divided, Streams(0, "one", ids=range(12))):
        assert torch.equal(divided(x), divided(x)) and not torch.allclose(divided(x), Linear()(x) / 10)


def test_nobody_thought_of_it() -> None:
    _, outcome = measured(Linear(), None)
    assert [finding.kind for finding in outcome.findings] == ["unreviewed"]


WRONG = [({"norm": "l1"}, "known are linf, l2"), ({"eps": (2.0,)}, "out of range"), ({"eps": ("a",)}, "not a number")]


@pytest.mark.parametrize(("fields", "text"), WRONG)
def test_wrong_fields_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Adaptive(**{**EVALUATION.model_dump(), **fields}).check("evals.adaptive", (1, 28, 28))


@dataclass(frozen=True)
class Asked:
    """What a run said of a variant."""

    record: Record

    @property
    def names(self) -> list[str]:
        return [m.source or "" for m in self.record.metrics if m.metric == "robust_accuracy_after"]


def test_a_run(tmp_path: Path) -> None:
    suite = tmp_path / "adaptive.toml"
    suite.write_text(
        'name = "adaptive"\nversion = 1\ndataset = "digits"\narchitecture = "cnn2"\ntrain_images = 64\nvalidation_images = 20\n'
        '[recipe]\nepochs = 2\nbatch = 32\noptimizer = "adam"\nlr = 0.01\n'
        '[evals.adaptive]\nkind = "adaptive"\nnorm = "l2"\neps = ["0.5"]\nsteps = 3\npgd_steps = 3\n'
        'proposals = 5\neot = 2\nrestarts = 1\nimages = 4\nsources = ["naive"]\n'
    )
    loud = "kap@noise=0.1,inference_noise=both"
    spec = f"naive@members=2,kap@noise=0.1,randsmooth,pdd@members=2,cear_gm@members=3,{loud}"
    records = Run(Request(defense=spec, suite=str(suite), device="cpu", runs=tmp_path / "runs")).execute()
    assert [record.status for record in records] == ["success"] * 6, [record.error for record in records]
    naive, kap, single, pdd, median, noisy = (Asked(record).names for record in records)
    assert {"members: ce", "members: margin", "members: half", "mean logits: margin", "smooth: margin"} <= set(naive)
    assert {"folded: ce", "folded: dlr", "recalibrated: ce", "noise on: dlr"} <= set(kap) and "members: ce" not in single
    assert {"logits/5: ce", "logits/50: ce"} <= set(pdd) and {"logits/10: ce", "noise on: dlr"} <= set(noisy)
    assert {"unrolled median: margin", "mean: ce", "members: half"} <= set(median) and "mean: ce" not in naive
    assert {"from naive: ce", "from naive: margin"} <= set(naive) & set(median) & set(noisy)
    assert not any(finding.kind == "unreviewed" for record in records for finding in record.findings)
