"""Diversity of members: closed forms, a slow reference, and independence of who else is measured (methods 9.7)."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.streams import Draws, generator
from bench import tables
from bench.evals import Diversity, Skipped, Subject
from bench.evals.diversity import BATCH, UNITS, error_correlation, error_interval, look
from bench.runner import Request, Run
from bench.store import Store
from defenses.adp import log_diversity
from defenses.api import Classifier, Images, Wrapped
from defenses.combine import Mean
from defenses.ensemble import Ensemble


class Linear(Classifier):
    """Logits W x of images (n 1 1 d)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def nets(members: int = 3, classes: int = 5, scale: float = 1.0) -> Ensemble:
    """Small ReLU networks on 1x6x6 images; ``scale`` makes their logits sure."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made: list[Classifier] = []
        for _ in range(members):
            last = nn.Linear(64, classes)
            last.weight.data *= scale
            made.append(Wrapped(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), last)))
    return Ensemble(made, Mean()).eval()


def images(n: int = 12, classes: int = 5) -> Images:
    gen = generator(0, "diversity")
    pixels = torch.randint(0, 256, (n, 1, 6, 6), generator=gen, dtype=torch.uint8)
    return Images(pixels, torch.randint(0, classes, (n,), generator=gen), 7 * torch.arange(n), "random")


def rows(model: Classifier, some: Images, evaluation: Diversity | None = None) -> pd.DataFrame:
    evaluation = evaluation or Diversity(images=len(some))
    subject = Subject(model, None, 0)
    (piece,) = evaluation.pieces(subject)
    return evaluation.measure([subject], some, piece)[0]


@pytest.mark.parametrize("members", [2, 3, 5])
def test_identical_members_agree_in_everything(members: int) -> None:
    one = nets(1).members[0]
    found = rows(Ensemble([one] * members, Mean()), images(classes=5))
    assert np.allclose(found.gradient_cosine, 1, atol=1e-6) and np.allclose(found.gradient_coherence, 1, atol=1e-6)
    pairs = members * (members - 1) / 2
    assert np.allclose(found.saliency_alignment, 1 + math.log(pairs), atol=1e-6)
    assert ("log_diversity" in found) == (members < 5)  # five members need six classes
    if members == 3:
        assert np.allclose(found.log_diversity, math.log((3 + 1e-6) * 1e-12), atol=1e-4)
    outcome = Diversity(images=12).summarise(found, Subject(Ensemble([one] * members, Mean()), None, 0))
    numbers = {metric.metric: metric for metric in outcome.metrics}
    assert numbers["error_correlation"].value == pytest.approx(1)
    assert numbers["error_correlation"].lower == pytest.approx(1)


def test_orthogonal_linear_members_have_cosine_0() -> None:
    """Each looks at pixels of its own; softmax of two classes bends the loss by a known amount."""
    weight = torch.tensor([[1.0, 0, 0], [0.0, 0, 0]])
    members = [Linear(weight.roll(place, 1)) for place in range(3)]
    x, y = torch.zeros(2, 1, 1, 3), torch.tensor([0, 1])
    found = look(members, x, y, 0.3)
    assert torch.equal(found["gradient_cosine"], torch.zeros(2)) and torch.equal(found["gradient_coherence"], torch.zeros(2))
    assert torch.allclose(found["saliency_alignment"], torch.full((2,), math.log(3)))
    assert "log_diversity" not in found
    # p_y = 1/2 everywhere: a gradient of 1/2 in one pixel, which a step of 0.3 makes sigmoid(0.3).
    assert torch.allclose(found["gradient_norm"], torch.full((2,), 0.5))
    bent = (1 / (1 + math.exp(-0.3)) - 0.5) ** 2 / 0.09
    assert torch.allclose(found["curvature"], torch.full((2,), bent))


def slowly(model: Ensemble, x: Tensor, y: Tensor, h: float) -> dict[str, float]:
    """The numbers of one image in float64, as methods 9.7 writes them."""
    gradients, saliency, change, p = [], [], [], []
    for member in model.members:
        own: list[Tensor] = []
        point = x
        for _ in range(2):
            leaf = point.clone().requires_grad_()
            logits = member(leaf[None])
            own += torch.autograd.grad(F.cross_entropy(logits, y[None]), leaf, retain_graph=True)
            if len(own) == 1:
                saliency.append(torch.autograd.grad(logits[0, y], leaf)[0].flatten())
                p.append(logits.detach().softmax(-1))
            point = x + h * own[0].sign() / own[0].sign().norm()
        gradients.append(own[0].flatten())
        change.append((own[1] - own[0]).flatten())
    cosines = [float(F.cosine_similarity(a, b, 0)) for a, b in combinations(gradients, 2)]
    others = [float(F.cosine_similarity(a, b, 0)) for a, b in combinations(saliency, 2)]
    return {
        "gradient_cosine": float(np.mean(cosines)),
        "gradient_coherence": max(cosines),
        "saliency_alignment": math.log(sum(map(math.exp, others))),
        "log_diversity": float(log_diversity(torch.stack(p), y[None])),
        "gradient_norm": float(np.mean([float(g.norm()) for g in gradients])),
        "curvature": float(np.mean([float(d.norm()) ** 2 / h**2 for d in change])),
    }


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_numbers_are_those_of_a_slow_reference(scale: float) -> None:
    """Also of sure members, for whom the usual cross-entropy has no gradient left in float32."""
    some = images()
    found = rows(nets(scale=scale), some, Diversity(images=12, h=0.2))
    slow = nets(scale=scale).double()
    expected = pd.DataFrame([slowly(slow, x.double(), y, 0.2) for x, y in zip(some.floats(), some.labels)])
    for name in expected:
        assert np.allclose(found[name], expected[name], rtol=2e-3, atol=1e-5), name
    wrong = torch.stack([member(some.floats().double()).argmax(-1) != some.labels for member in slow.members])
    assert (found[["wrong_0", "wrong_1", "wrong_2"]].to_numpy() == wrong.T.numpy()).all()
    assert list(found.id) == some.ids.tolist() and list(found.label) == some.labels.tolist()


def test_sure_members_keep_their_direction() -> None:
    """Margins of 90: p_y is 1 in any precision, the gradient's length vanishes, its direction does not."""
    members = [Linear(200 * torch.tensor([[1.0, 0], [0.0, 0]])), Linear(200 * torch.tensor([[1.0, 1], [0.0, 0]]) / 2)]
    found = look(members, torch.tensor([[0.45, 0.45]]).view(1, 1, 1, 2), torch.tensor([0]), 0.3)
    assert float(found["gradient_cosine"].detach()) == pytest.approx(0.5**0.5, rel=1e-5)
    assert float(found["gradient_norm"].detach()) < 1e-30


def test_sure_members_keep_their_wrong_classes() -> None:
    """Margins of 1000: every wrong class has probability 0 in any precision; the members hold different ones for likelier."""
    members = [Linear(torch.tensor([[1000.0], [place], [1.0 - place]])) for place in (0.0, 1.0)]
    found = look(members, torch.ones(1, 1, 1, 1), torch.tensor([0]), 0.3)
    cosine = 2 * math.e / (1 + math.e**2)
    assert float(found["log_diversity"].detach()) == pytest.approx(math.log((1 + 1e-6) ** 2 - cosine**2), rel=1e-5)


def test_rows_know_neither_batch_nor_order() -> None:
    model, some = nets(), images(BATCH + 3)
    whole = rows(model, some).set_index("id")
    order = torch.randperm(len(some), generator=generator(5))
    mixed = rows(model, some.take(order)).set_index("id").loc[whole.index]
    alone = rows(model, some.take(torch.tensor([BATCH + 1])))
    pd.testing.assert_frame_equal(whole, mixed, rtol=1e-4, atol=1e-6)
    pd.testing.assert_frame_equal(whole.loc[alone.id], alone.set_index("id"), rtol=1e-4, atol=1e-6)


def test_errors_correlate_as_pearson_says() -> None:
    gen = np.random.default_rng(0)
    wrong = gen.random((400, 3)) < 0.3
    wrong[:, 1] |= wrong[:, 0] & (gen.random(400) < 0.5)
    expected = np.corrcoef(wrong.T.astype(float))[np.triu_indices(3, 1)].mean()
    assert error_correlation(wrong) == pytest.approx(expected)
    low, high = error_interval(wrong)
    assert low < expected < high and 0.02 < high - low < 0.4
    assert error_interval(wrong) == (low, high)


def test_a_member_that_never_errs_correlates_with_nobody() -> None:
    wrong = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0]], bool)
    assert error_correlation(wrong) == pytest.approx(np.corrcoef(wrong[:, 0], wrong[:, 1])[0, 1])
    assert error_correlation(np.zeros((4, 3), bool)) is None
    low, high = error_interval(wrong)
    assert -1 <= low <= high <= 1


def test_numbers_are_means_of_rows_with_intervals() -> None:
    model, evaluation = nets(), Diversity(images=12)
    found = rows(model, images())
    numbers = {metric.metric: metric for metric in evaluation.summarise(found, Subject(model, None, 0)).metrics}
    assert list(numbers) == [*UNITS, "error_correlation"]
    for name, unit in UNITS.items():
        one = numbers[name]
        assert one.value == pytest.approx(found[name].mean()) and one.unit == unit and one.n == 12
        assert one.lower is not None and one.upper is not None and one.lower <= one.value <= one.upper
    perfect = found.assign(wrong_0=False, wrong_1=False, wrong_2=False)
    assert "error_correlation" not in {m.metric for m in evaluation.summarise(perfect, Subject(model, None, 0)).metrics}


class Noisy(Draws, Classifier):
    randomized = True


def test_what_has_no_diversity_is_skipped() -> None:
    evaluation = Diversity(images=5)
    with pytest.raises(Skipped, match="two members or more, this is one network"):
        evaluation.pieces(Subject(nets(1).members[0], None, 0))
    with pytest.raises(Skipped, match="two members or more"):
        evaluation.pieces(Subject(nets(1), None, 0))
    with pytest.raises(Skipped, match="draw noise"):
        evaluation.pieces(Subject(Ensemble([Noisy(), Noisy()], Mean()), None, 0))
    with pytest.raises(ValueError, match="greater than 0"):
        Diversity(images=5, h=0)


def test_a_run_stores_it_and_a_table_shows_it(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text(tiny.read_text() + '[evals.diversity]\nkind = "diversity"\nimages = 12\n')
    asked = Request(defense="naive@members=2,randsmooth", suite=str(tiny), runs=tmp_path / "runs", only=("diversity",))
    several, single = Run(asked).execute()
    assert (several.status, single.status) == ("success", "skipped"), several.error
    assert single.error == "diversity is of two members or more, this is one network"
    (table,) = tables.summaries(Store(asked.runs))
    assert table.title == "tiny, quick: diversity of members"
    names = ["cosine", "coherence", "SMD", "ln ED", "errors", "gradient", "curvature"]
    assert [name for name in table.columns[2:-1] if name != "errors"] == [name for name in names if name != "errors"]
    (line,) = tables.body(table)
    assert line[0] == "naive@members=2" and line[-1] == "ok" and tables.HOLE not in line
    assert all(f"{name}:" in table.caption for name in names) and "h = 0.3" in table.caption
    value = next(metric for metric in several.metrics if metric.metric == "gradient_cosine")
    assert line[2] == f"{value.value:.3f} [{value.lower:.3f}, {value.upper:.3f}]"
    for fmt in tables.FORMATS:
        assert tables.render(table, fmt)
