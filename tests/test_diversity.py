"""Diversity of members: closed forms, a slow reference, and independence of who else is measured (methods 9.7)."""

from __future__ import annotations

import io
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
from bench import plots, tables
from bench.evals import Diversity, Skipped, Subject
from bench.evals.api import Piece
from bench.evals.diversity import BATCH, PIECE, UNITS, error_correlation, error_interval, look
from bench.evals.saliency import saliency
from bench.evals.vulnerability import BLOCK, VULNERABILITY, shown, vulnerability
from bench.request import Request
from bench.runner import Run
from bench.store import Store
from defenses.adp import log_diversity
from defenses.api import Classifier, Images, Wrapped
from defenses.combine import Mean
from defenses.dverge import distil
from defenses.ensemble import Ensemble
from defenses.features import features, layers
from defenses.nets import Network, Normalise


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


def layered(members: int = 3, hidden: nn.Module | None = None) -> Ensemble:
    """Small networks on 1x6x6 images whose layers are known: two, if the activation is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        made: list[Classifier] = []
        for _ in range(members):
            body = nn.Sequential(nn.Conv2d(1, 4, 3), hidden or nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
            made.append(Network(Normalise([0.5], [0.5]), body, "small"))
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
    for name in ("gradient_cosine", "gradient_coherence", "curvature_cosine"):
        assert np.allclose(found[name], 1, atol=1e-6), name
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


class Bowl(Classifier):
    """Two classes; cross-entropy of class 0 is (x'Ax) / 2 for points (n 1 1 2)."""

    def __init__(self, *diagonal: float) -> None:
        super().__init__()
        self.a = torch.tensor(diagonal)  # of A

    def forward(self, x: Tensor) -> Tensor:
        odds = (x.flatten(1).square() @ self.a / 2).expm1().log()
        return torch.stack([torch.zeros_like(odds), odds], 1)


def test_curvatures_are_those_of_quadratic_losses() -> None:
    """Methods 4.9: diag(2,1) and diag(1,2) at (1,1) bend by (.1414,.0707) and (.0707,.1414) over a step of .1."""
    found = look([Bowl(2.0, 1.0), Bowl(1.0, 2.0)], torch.ones(3, 1, 1, 2), torch.zeros(3, dtype=torch.long), 0.1)
    assert torch.allclose(found["curvature_cosine"], torch.full((3,), 0.8), atol=1e-4)
    assert torch.allclose(found["curvature"], torch.full((3,), 2.5), atol=1e-3)
    third = look([Bowl(2.0, 1.0), Bowl(1.0, 2.0), Bowl(2.0, 1.0)], torch.ones(1, 1, 1, 2), torch.tensor([0]), 0.1)
    assert float(third["curvature_cosine"].detach()) == pytest.approx((0.8 + 1 + 0.8) / 3, abs=1e-4)


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
    bends = [float(F.cosine_similarity(a, b, 0)) for a, b in combinations(change, 2)]
    return {
        "gradient_cosine": float(np.mean(cosines)),
        "gradient_coherence": max(cosines),
        "saliency_alignment": math.log(sum(map(math.exp, others))),
        "log_diversity": float(log_diversity(torch.stack(p), y[None])),
        "gradient_norm": float(np.mean([float(g.norm()) for g in gradients])),
        "curvature": float(np.mean([float(d.norm()) ** 2 / h**2 for d in change])),
        "curvature_cosine": float(np.mean(bends)),
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
    model, some = layered(), images(BATCH + 3)
    asked = Diversity(images=len(some), distilled=BATCH + 10, maps=0)
    whole = rows(model, some, asked).set_index("id")
    order = torch.randperm(len(some), generator=generator(5))
    mixed = rows(model, some.take(order), asked).set_index("id").loc[whole.index]
    alone = rows(model, some.take(torch.tensor([BATCH + 1])), asked)
    assert (whole.partner >= 0).sum() == BATCH
    pd.testing.assert_frame_equal(whole, mixed, rtol=1e-4, atol=1e-5)
    pd.testing.assert_frame_equal(whole.loc[alone.id], alone.set_index("id"), rtol=1e-4, atol=1e-5)


class Pixels(Network):
    """Two classes on images (n 1 1 2); the logit of the second is weight . x + offset. Its only layer is the logits."""

    def __init__(self, weight: list[float], offset: float) -> None:
        last = nn.Linear(2, 2)
        last.weight.data = torch.tensor([[0.0, 0.0], weight])
        last.bias.data = torch.tensor([0.0, offset])
        super().__init__(Normalise([0.0], [1.0]), nn.Sequential(nn.Flatten(), last), "pixels")


def test_vulnerability_of_linear_members_is_that_by_hand() -> None:
    """Distilled images move by 0.07 in those pixels that their member looks at, and no further than the others can see."""
    first, second = Pixels([4.0, 0.0], -2.0), Pixels([0.0, 4.0], -2.0)
    both = Pixels([20.0, 20.0], -9.0)
    pixels = torch.tensor([51, 204] * (BLOCK // 2), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 1, 2)  # .2 and .8
    some = Images(pixels, torch.tensor([0, 1] * (BLOCK // 2)), torch.arange(BLOCK), "pixels")
    found = vulnerability([first, second, both], some, 0.07, 0)
    # Logits of an image (.2, .2): (.27, .2) from the first, (.2, .27) from the second, (.27, .27) from the third member.
    seen_dark = [4 * 0.2 - 2, 20 * 0.47 - 9, 4 * 0.2 - 2, 20 * 0.47 - 9, 4 * 0.27 - 2, 4 * 0.27 - 2]
    seen_light = [4 * 0.8 - 2, 20 * 1.53 - 9, 4 * 0.8 - 2, 20 * 1.53 - 9, 4 * 0.73 - 2, 4 * 0.73 - 2]
    expected = [np.mean([math.log1p(math.exp(-z)) for z in seen_dark]), np.mean([math.log1p(math.exp(z)) for z in seen_light])]
    assert np.allclose(found["vulnerability_diversity"], expected * (BLOCK // 2), atol=1e-5)
    assert np.allclose(found["vulnerability_transfer"], [2 / 6, 0.0] * (BLOCK // 2))  # the third falls for both others
    assert found["partner"].tolist() == [*range(1, BLOCK), 0]


@pytest.mark.parametrize("layer", [1, 2])
def test_identical_members_fall_for_what_each_of_them_falls_for(layer: int) -> None:
    one, some = layered(1).members[0], images(BLOCK)
    assert isinstance(one, Network) and layers(one) == 2
    found = shown([one] * 3, some, [layer] * 3, 0.3)
    x, y = some.floats(), some.labels
    own = one(distil(lambda z: features(one, z, layer), x, x[[*range(1, BLOCK), 0]], 0.3)).detach()
    assert torch.allclose(found["vulnerability_diversity"], F.cross_entropy(own, y.roll(-1), reduction="none"), atol=1e-6)
    assert torch.equal(found["vulnerability_transfer"], (own.argmax(-1) != y).float())


def test_vulnerability_knows_neither_pieces_nor_how_many_are_distilled() -> None:
    model, some = layered(), images(4 * BLOCK)
    subject = Subject(model, None, 0)
    asked = Diversity(images=len(some), distilled=3 * BLOCK)
    whole = rows(model, some, asked)
    cut = slice(0, 2 * BLOCK), slice(2 * BLOCK, 4 * BLOCK)
    pieces = [asked.measure([subject], some.take(part), Piece(part, {}))[0] for part in cut]
    pd.testing.assert_frame_equal(whole, pd.concat(pieces, ignore_index=True), rtol=1e-4, atol=1e-5)
    names = ["partner", *VULNERABILITY]
    fewer = rows(model, some, Diversity(images=len(some), distilled=BLOCK))[names]
    pd.testing.assert_frame_equal(fewer[:BLOCK], whole[names][:BLOCK])
    assert (fewer.partner[BLOCK:] == -1).all() and fewer[BLOCK:][[*VULNERABILITY]].isna().all(axis=None)
    assert not whole[: 3 * BLOCK][names].isna().any(axis=None)
    assert PIECE % BLOCK == 0


def test_the_layer_is_drawn_for_every_ten_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def note(network: Network, x: Tensor, layer: int) -> Tensor:
        asked.append((len(x), layer))
        return features(network, x, layer)

    monkeypatch.setattr("bench.evals.vulnerability.features", note)
    members, some, chosen = layered(2).members, images(20 * BLOCK), []
    for seed in (0, 1):
        asked.clear()
        vulnerability(members, some, 0.07, seed)
        assert {size for size, _ in asked} == {BLOCK}
        tens = np.array([layer for _, layer in asked]).reshape(20, -1)
        assert (tens == tens[:, :1]).all()  # the same for all members and steps
        chosen.append(tens[:, 0].tolist())
    assert set(chosen[0]) == {1, 2} == set(chosen[1]) and chosen[0] != chosen[1]


def test_members_without_known_layers_have_no_vulnerability() -> None:
    for model in (nets(), layered(hidden=nn.Sigmoid())):
        found = rows(model, images())
        assert not {"partner", *VULNERABILITY} & set(found)
    found = rows(layered(), images(8))  # fewer than ten
    names = {metric.metric for metric in Diversity(images=8).summarise(found, Subject(layered(), None, 0)).metrics}
    assert set(UNITS) <= names and not names & set(VULNERABILITY)


def test_vulnerability_is_the_mean_over_distilled_images() -> None:
    model, asked = layered(), Diversity(images=25)
    found = rows(model, images(25), asked)
    numbers = {metric.metric: metric for metric in asked.summarise(found, Subject(model, None, 0)).metrics}
    for name, unit in VULNERABILITY.items():
        assert numbers[name].n == 20 and numbers[name].unit == unit
        assert numbers[name].value == pytest.approx(found[name][:20].mean())
    assert numbers["gradient_cosine"].n == 25
    with pytest.raises(ValueError, match="finite number"):
        asked.summarise(found.assign(vulnerability_transfer=np.nan), Subject(model, None, 0))


def opened(column: pd.Series) -> list[np.ndarray]:
    return [np.load(io.BytesIO(own), allow_pickle=False) for own in column if own is not None]


def test_saliency_maps_are_the_gradients_of_the_label() -> None:
    """Two channels: a map shows the larger size, a cosine counts the signs of both."""
    members = [Linear(torch.tensor([weight, [0.0] * 4])) for weight in ([1.0, -4, 2, 1], [-2.0, 1, 0, 0])]
    some = Images(torch.arange(8, dtype=torch.uint8).view(2, 2, 1, 2), torch.tensor([0, 1]), torch.arange(2), "two")
    found = saliency(members, some, 2)
    first, second = opened(pd.Series(found["saliency"]))
    assert first.dtype == np.float16 and first.tolist() == [[[0.5, 1.0]], [[1.0, 0.5]]]
    assert not second.any()  # class 1 looks at nothing
    cosines = opened(pd.Series(found["saliency_cosines"]))
    assert np.allclose(cosines[0], [-6 / 110**0.5]) and np.allclose(cosines[1], [0.0])
    assert [own.tolist() for own in opened(pd.Series(found["pixels"]))] == some.pixels.tolist()


def test_the_first_images_keep_maps_that_agree_with_their_rows() -> None:
    found = rows(layered(), images())
    assert found.saliency.notna().tolist() == [True] * 4 + [False] * 8
    maps, cosines = opened(found.saliency), opened(found.saliency_cosines)
    assert {own.shape for own in maps} == {(3, 6, 6)} and all((own.max((1, 2)) == 1).all() for own in maps)
    kept = [float(np.log(np.exp(own).sum())) for own in cosines]
    assert np.allclose(kept, found.saliency_alignment[:4], atol=1e-5)
    none = rows(layered(), images(), Diversity(images=12, maps=0))
    assert none.saliency.isna().all() and none.pixels.isna().all()


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
    with pytest.raises(ValueError, match="multiple of 10"):
        Diversity(images=50, distilled=15)


def test_a_run_stores_it_and_a_table_shows_it(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text(tiny.read_text() + '[evals.diversity]\nkind = "diversity"\nimages = 12\n')
    asked = Request(defense="naive@members=2,randsmooth", suite=str(tiny), runs=tmp_path / "runs", only=("diversity",))
    several, single = Run(asked).execute()
    assert (several.status, single.status) == ("success", "skipped"), several.error
    assert single.error == "diversity is of two members or more, this is one network"
    (table,) = tables.summaries(Store(asked.runs))
    assert table.title == "tiny, quick: diversity of members"
    names = ["cosine", "coherence", "SMD", "ln ED", "errors", "gradient", "curvature"]
    names += ["bend cosine", "vulnerability", "distilled errors"]
    assert [name for name in table.columns[2:-1] if name != "errors"] == [name for name in names if name != "errors"]
    (line,) = tables.body(table)
    assert line[0] == "naive@members=2" and line[-1] == "unreviewed" and tables.HOLE not in line
    assert all(f"{name}:" in table.caption for name in names) and "h = 0.3" in table.caption
    assert "10 images distilled within 0.07 in l_inf" in table.caption
    value = next(metric for metric in several.metrics if metric.metric == "gradient_cosine")
    assert line[2] == f"{value.value:.3f} [{value.lower:.3f}, {value.upper:.3f}]"
    for fmt in tables.FORMATS:
        assert tables.render(table, fmt)
    assert "saliency.png" in [path.name for path in plots.draw(Store(asked.runs), "tiny", tmp_path / "figures")]
