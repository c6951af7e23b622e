"""Images of other models: random resizing against torch's own, and the worst of all sources image by image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import HEAD
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adaptive import Linear, images
from test_training import task
from torch import Tensor

from attacks import DiverseMim, Mim
from attacks.input_diversity import diverse
from attacks.streams import generator
from bench.evals import BlackBox, Subject
from bench.jobs import APART
from bench.request import Request
from bench.runner import Run
from bench.suites import SuiteError
from defenses.api import Classifier, Images, Wrapped
from defenses.combine import Mean
from defenses.ensemble import Ensemble
from defenses.nets import Network, network


@settings(max_examples=50)
@given(side=st.integers(8, 32), place=st.tuples(*[st.floats(0, 0.999)] * 3))
def test_resizing_is_torchs_and_a_zero_border(side: int, place: tuple[float, float, float]) -> None:
    x = torch.rand((1, 3, side, side), generator=generator(side, "resize"), dtype=torch.float64)
    seen = diverse(x, torch.tensor([[0.2, *place]], dtype=torch.float64), 0.5)
    least = math.ceil(0.9 * side)
    small = least + int(place[0] * (side - least + 1))
    top, left = int(place[1] * (side - small + 1)), int(place[2] * (side - small + 1))
    resized = F.interpolate(x, (small, small), mode="bilinear", align_corners=False)
    expected = F.pad(resized, (left, side - small - left, top, side - small - top))
    assert torch.allclose(seen, expected, atol=1e-9)


def test_some_images_stay() -> None:
    x = torch.rand((4, 1, 10, 10), generator=generator(0, "some"))
    numbers = torch.tensor([[0.4, 0, 0, 0], [0.6, 0, 0, 0], [0.4, 0.99, 0, 0], [0.9, 0, 0, 0]])
    seen = diverse(x, numbers, 0.5)
    kept = [torch.allclose(a, b, atol=1e-6) for a, b in zip(seen, x, strict=True)]
    assert kept == [False, True, True, True]  # the third keeps its side
    assert torch.equal(diverse(x, numbers, 0.0), x)


def test_gradients_flow_through_the_resizing() -> None:
    x = torch.rand((2, 1, 10, 10), generator=generator(0, "grad"), dtype=torch.float64, requires_grad=True)
    numbers = torch.tensor([[0.1, 0.3, 0.9, 0.0], [0.1, 0.0, 0.5, 0.5]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda points: diverse(points, numbers, 1.0), x)


def test_without_resizing_it_is_mim_to_the_last_step() -> None:
    x, y, streams = images()
    found = DiverseMim(norm="linf", eps=0.05, steps=10, step="eps/10", chance=0.0)(Linear(threshold=0.5), x, y, streams)
    assert torch.allclose(found.x_adv, Mim(norm="linf", eps=0.05)(Linear(threshold=0.5), x, y, streams).x_adv)  # nothing falls


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_image_depends_on_the_others(norm: str) -> None:
    x, y, streams = images()
    attack = DiverseMim(norm=norm, eps=0.1, steps=5)
    whole = attack(Linear(), x, y, streams)
    rows = torch.tensor([7, 2])
    assert torch.equal(attack(Linear(), x[rows], y[rows], streams.take(rows)).x_adv, whole.x_adv[rows])


def test_images_that_are_wrong_are_left_alone_unless_everything_is_asked_for() -> None:
    x, y, streams = images()
    wrong = Linear(threshold=3.0)
    assert torch.equal(Mim(norm="linf", eps=0.05)(wrong, x, y, streams).x_adv, x)
    moved = Mim(norm="linf", eps=0.05)(wrong, x, y, streams, everything=True)
    assert moved.broken.all() and (moved.forwards > 0).all()
    attack = DiverseMim(norm="linf", eps=0.05, steps=10, chance=0.0)
    assert float((attack(wrong, x, y, streams, everything=True).x_adv - x).abs().mean()) == pytest.approx(0.05, abs=1e-4)


# The evaluation


def asked(others: dict[str, Classifier], victim: Classifier, **fields: Any) -> tuple[Any, Any]:
    x, y, _ = images()
    stored = Images((x * 255).round().to(torch.uint8), y, torch.arange(len(y)), "made")
    given = {"images": 12, "attack": "diverse_mim", "norm": "linf", "eps": (0.1,), "steps": 10, "sources": tuple(others)}
    evaluation = BlackBox(**{**given, **fields})
    evaluation.check("evals.black_box", (1, 2, 2))
    subject = Subject(victim.eval(), None, 0, other=partial(dict.__getitem__, others))
    (rows,) = evaluation.measure([subject], stored, evaluation.pieces(subject)[0])
    return rows, evaluation.summarise(rows, subject).metrics


class Blind(Linear):
    """Looks at some pixels only."""

    def __init__(self, weights: list[float], threshold: float) -> None:
        super().__init__(threshold=threshold)
        self.weights = torch.tensor(weights)

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weights.to(x) - self.threshold
        return torch.stack([score, -score, -2 * score.abs() - 1], 1)


def test_the_worst_of_all_sources_counts() -> None:
    """Sources move only the pixels that they look at, by 0.1 each; the victim adds up all four."""
    sources: dict[str, Classifier] = {"left": Blind([1.0, 0, 1.0, 0], 0.2), "far": Blind([0, 1.0, 0, 0], 0.1)}
    x, _, _ = images()
    beyond = x.flatten(1).sum(1) - 2
    rows, metrics = asked(sources, Linear())
    left, far = rows["wrong left"].to_numpy(), rows["wrong far"].to_numpy()
    assert (left == (beyond < 0.2 - 0.01).numpy()).mean() >= 11 / 12 and far.sum() < left.sum()
    values = {(m.metric, m.source): m.value for m in metrics if m.denominator == "all"}
    assert values["robust_accuracy", None] == 1 - (left | far).mean()
    assert values["black_box_accuracy", "left"] == 1 - left.mean() and values["black_box_accuracy", "far"] == 1 - far.mean()


class Torn(Linear):
    """Always wrong. Cross-entropy falls along two pixels, the margin to the best class along the second alone."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.flatten(1)[:, 0], x.flatten(1)[:, 1]
        return torch.stack([0 * first, 4 + 9 * first, 14 + second], 1)


class First(Linear):
    """Wrong once the first pixel has risen by 0.05; the images' last one is that much darker, and no source looks at it."""

    def forward(self, x: Tensor) -> Tensor:
        rise = x.flatten(1)[:, 0] - x.flatten(1)[:, 3] - 0.05
        return torch.stack([0.05 - rise, rise - 0.05, -9 + 0 * rise], 1)


def test_each_loss_is_climbed_to_the_last_step_whether_the_source_is_wrong_or_not() -> None:
    rows, metrics = asked({"one": Torn()}, First(), losses=("ce", "margin"), attack="mim")
    assert rows["wrong one, ce"].all() and not rows["wrong one, margin"].any() and rows.clean_correct.all()
    assert {m.source for m in metrics if m.source} == {"one, ce", "one, margin"}


class Own(Classifier):
    """Somebody's own ensemble, which torch sees as one module."""

    def __init__(self, *nets: Classifier) -> None:
        super().__init__()
        self.nets = torch.nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets]).sum(0)


class Listed(Classifier):
    """Somebody's own ensemble, whose networks torch does not see."""

    def __init__(self, *nets: Classifier) -> None:
        super().__init__()
        self.nets = nets

    @property
    def members(self) -> Sequence[Classifier]:
        return self.nets

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets]).sum(0)


def net(seed: int) -> Network:
    """A network like others of its seed, but another object, as every fit makes one."""
    return network(task(), generator(seed))


def new_head(seed: int) -> Classifier:
    """The layers of a network, and a new last one."""
    made = net(seed)
    layers = list(made.body.children())
    made.body = torch.nn.Sequential(*layers[:-1], torch.nn.Linear(84, 10))
    return made


def judged(source: Classifier, victim: Classifier) -> int:
    x = torch.zeros((1, 1, 28, 28), dtype=torch.uint8)
    stored = Images(x, torch.zeros(1, dtype=torch.int64), torch.arange(1), "made")
    evaluation = BlackBox(images=1, attack="mim", norm="linf", eps=(0.1,), steps=1, sources=("twin",))
    subject = Subject(victim.eval(), None, 0, other=lambda name: source.eval())
    return len(evaluation.measure([subject], stored, evaluation.pieces(subject)[0]))


def ensemble(*seeds: int) -> Classifier:
    return Ensemble([net(seed) for seed in seeds], Mean())


SHARED: dict[str, Callable[[], tuple[Classifier, Classifier]]] = {
    "ensembles with a member in common": lambda: (ensemble(0, 1), ensemble(1, 2)),
    "wrapped": lambda: (Wrapped(net(0)), net(0)),
    "wrapped, and an ensemble": lambda: (Wrapped(net(0)), ensemble(0, 1)),
    "own class, and its member": lambda: (Own(net(0), net(1)), net(1)),
    "own classes": lambda: (Own(net(0), net(1)), Own(net(1), net(2))),
    "own class that torch does not see into": lambda: (Wrapped(Own(net(0))), Listed(Wrapped(net(0)), net(1))),
    "members of members": lambda: (net(0), Listed(Listed(net(1), net(0)))),
    "new head": lambda: (new_head(0), net(0)),
    "other precision and layout": lambda: (Wrapped(net(0).to(memory_format=torch.contiguous_format)), net(0).double()),
}


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("turned", [False, True])
def test_a_source_that_shares_weights_is_refused(case: str, turned: bool) -> None:
    source, victim = SHARED[case]()[:: -1 if turned else 1]
    with pytest.raises(ValueError, match=r"shares weights with the model that is attacked \(.*weight, \d+ in all"):
        judged(source, victim)


def trained(seed: int) -> Classifier:
    """Weights that begin with the same seed and take steps of their own."""
    made = net(0)
    optimiser = torch.optim.SGD(made.parameters(), 0.1)
    for _ in range(2):
        x = torch.rand((8, 1, 28, 28), generator=generator(seed, "images"))
        optimiser.zero_grad()
        F.cross_entropy(made(x), torch.arange(8)).backward()
        optimiser.step()
    return made


class Preset(Own):
    """Networks between parameters that are the same in every copy: they stand for what is written down, or never changes."""

    def __init__(self, *nets: Classifier) -> None:
        super().__init__(*nets)
        fixed = {"deviations": torch.linspace(0.2, 0.3, 6), "colours": torch.eye(64), "gains": torch.ones(512)}
        self.fixed = torch.nn.ParameterDict(fixed)
        self.signs = torch.nn.Parameter(torch.arange(300.0).view(100, 3) % 3 - 1, requires_grad=False)


@pytest.mark.parametrize(
    ("source", "victim"),
    [
        (lambda: net(2), lambda: ensemble(0, 1)),
        (lambda: trained(1), lambda: trained(2)),
        (lambda: trained(1), lambda: net(0)),
        (lambda: Preset(net(0)), lambda: Preset(net(1))),
    ],
    ids=["other seed", "trained apart", "trained on", "constants"],
)
def test_networks_that_were_trained_apart_may_be_sources(
    source: Callable[[], Classifier], victim: Callable[[], Classifier]
) -> None:
    assert judged(source(), victim()) == 1


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"attack": "fmn"}, "no test of another network"),
        ({"losses": ("cw",)}, "unknown 'cw'; known are ce, margin, dlr"),
        ({"loss": "ce"}, "give evals.black_box.losses, a list"),
        ({"sources": ()}, "at least 1 item"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        asked({"one": Linear()}, Linear(), **fields)


SUITE = (
    f'name = "outside"\n{HEAD}\n'
    '[evals.outside]\nkind = "black_box"\nattack = "diverse_mim"\nnorm = "linf"\neps = ["0.1"]\nsteps = 3\nimages = 8\n'
    'losses = ["ce", "margin"]\n'
)


def run(tmp_path: Path, sources: str, **fields: Any) -> list[Any]:
    suite = tmp_path / "outside.toml"
    suite.write_text(SUITE + f"sources = {sources}\n")
    request = Request(defense="naive@members=2", suite=str(suite), device="cpu", runs=tmp_path / "runs")
    return Run(replace(request, **fields)).execute()


def test_a_run_trains_surrogates_with_other_seeds_once(tmp_path: Path) -> None:
    records = run(tmp_path, '["itself", "nt", "naive@members=2"]', seeds=(0, 1))
    assert [record.status for record in records] == ["success"] * 2, [record.error for record in records]
    first, second = records
    assert first.hashes["source itself"] == first.hashes["source naive@members=2"] != first.hashes["weights"]
    assert first.hashes["source itself"] != second.hashes["source itself"] and "source nt" in first.hashes
    assert {m.source for m in first.metrics if m.source} >= {"itself, ce", "nt, margin"}
    assert run(tmp_path, '["itself", "nt", "naive@members=2"]', seeds=(0, 1)) == records
    (again,) = run(tmp_path, '["itself", "nt", "naive@members=2"]', seeds=(APART,), runs=tmp_path / "other")
    assert again.hashes["weights"] == first.hashes["source itself"]


def test_wrong_sources_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="naiv"):
        run(tmp_path, '["naiv"]')
    with pytest.raises(SuiteError, match=r"evals\.outside\.sources: one variant each, got 'naive,adp'"):
        run(tmp_path, '["naive,adp"]')
    assert not (tmp_path / "runs").exists()


def test_a_source_that_cannot_be_fitted_is_a_stored_error(tmp_path: Path) -> None:
    (record,) = run(tmp_path, '["kap"]')
    assert record.status == "error" and "kap, whose images were asked for, cannot be fitted: lenet5: a sheet of" in str(
        record.error
    )
