"""Vote rules against values worked out by hand (methods G2, 3.4, 4.1)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import optimize
from torch import Tensor

from attacks.streams import generator
from defenses.combine import GeometricMedian, LogMean, Mean, MeanLogits, Rule, Weighted
from defenses.median import median_weights, unrolled_median


def points(*rows: tuple[float, ...]) -> Tensor:
    """Members' probabilities as (m 1 k)."""
    return torch.tensor(rows, dtype=torch.float64).unsqueeze(1)


def answer(rule: Rule, p: Tensor) -> Tensor:
    return rule(p.clamp_min(1e-300).log())[0].exp()


def objective(p: Tensor, q: Tensor) -> float:
    return float((p[:, 0] - q).norm(dim=-1).sum())


def close(found: Tensor, expected: tuple[float, ...], tolerance: float = 1e-6) -> bool:
    return torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64), atol=tolerance)


FIVE = points((0.7, 0.2, 0.1), (0.6, 0.3, 0.1), (0.5, 0.4, 0.1), (0.2, 0.7, 0.1), (0.1, 0.1, 0.8))
SPLIT = points((0.60, 0.30, 0.10), (0.58, 0.32, 0.10), (0.62, 0.28, 0.10), (0.001, 0.989, 0.01), (0.002, 0.988, 0.01))


def test_mean_is_stable_where_a_clamped_logarithm_is_not() -> None:
    logits = torch.tensor([[[200.0, 0.0]], [[200.0, 0.0]]])
    assert torch.allclose(Mean()(logits), torch.tensor([[0.0, -200.0]]))
    logits = torch.tensor([[[10.0, 0, 0]], [[0.0, 0, 0]]])
    assert close(Mean()(logits)[0], (-0.4055, -1.7916, -1.7916), 1e-4)


def test_mean_of_the_naive_check() -> None:
    assert answer(Mean(), points((0.5, 0.5), (0.25, 0.75)))[0].log().item() == pytest.approx(-0.980829, abs=1e-6)


def test_median_of_the_simplex_vertices_is_its_centre() -> None:
    assert close(answer(GeometricMedian(), points((1, 0, 0), (0, 1, 0), (0, 0, 1))), (1 / 3, 1 / 3, 1 / 3))


def test_median_of_a_majority_at_one_point_is_that_point() -> None:
    p = points((0.2, 0.3, 0.5), (0.2, 0.3, 0.5), (0.2, 0.3, 0.5), (0.9, 0.05, 0.05), (0.1, 0.8, 0.1))
    assert close(answer(GeometricMedian(), p), (0.2, 0.3, 0.5))


def test_median_mean_and_log_mean_of_five_members() -> None:
    q = answer(GeometricMedian(), FIVE)
    assert close(q, (0.517382, 0.360345, 0.122273), 2e-6)
    assert objective(FIVE, q) == pytest.approx(1.700270, abs=1e-6)
    assert close(answer(Mean(), FIVE), (0.42, 0.34, 0.24))
    assert close(answer(LogMean(), FIVE), (0.437557, 0.364289, 0.198154))


def test_aggregations_disagree_on_a_planted_minority() -> None:
    """The median stays with three members; two confident ones carry the mean and the log-mean away."""
    assert close(answer(GeometricMedian(), SPLIT), (0.58, 0.32, 0.10), 1e-5)
    assert close(answer(Mean(), SPLIT), (0.3606, 0.5754, 0.0640))
    assert close(answer(LogMean(), SPLIT), (0.0926, 0.8383, 0.0691), 1e-4)
    logits = SPLIT.log()
    uniform = Weighted(5).double()
    decisions = [int(rule.decide(logits)) for rule in (GeometricMedian(), uniform, Mean(), LogMean())]
    assert decisions == [0, 1, 1, 1]


def test_the_iteration_does_not_stick_at_a_data_point() -> None:
    """The mean is the fifth member; an unguarded Weiszfeld iteration stays there."""
    p = points(*[(0.55 - 0.4 * t, 0.45 + 0.4 * t) for t in (0, 0, 0, 1, 0.25)])
    q = answer(GeometricMedian(), p)
    assert close(q, (0.55, 0.45))
    assert objective(p, q) == pytest.approx(0.707107, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 7), st.integers(2, 6))
def test_median_weights_are_convex_and_optimal(seed: int, members: int, classes: int) -> None:
    p = torch.rand(members, 3, classes, generator=generator(seed), dtype=torch.float64).mul(4).softmax(-1)
    weights = median_weights(p)
    assert (weights >= 0).all() and torch.allclose(weights.sum(0), torch.ones(3, dtype=torch.float64))
    for sample in range(3):
        own = p[:, sample]
        q = weights[:, sample] @ own
        cost = (own - q).norm(dim=1).sum()

        def total(z, own=own):  # type: ignore[no-untyped-def]
            return float((own - torch.from_numpy(z)).norm(dim=1).sum())

        best = min(optimize.minimize(total, start.numpy(), method="Nelder-Mead").fun for start in [own.mean(0), *own])
        # Two close pairs of members make the sum of distances almost flat between them; 200 steps end within 2e-4 of it.
        assert cost <= best + 2e-4


def test_an_answer_does_not_depend_on_the_other_samples() -> None:
    logits = torch.randn(5, 200, 10, generator=generator(3)) * 3
    logits[:, 0] = SPLIT.repeat(1, 1, 4)[:, 0, :10].log().float()
    rule = GeometricMedian()
    together = rule(logits)
    assert torch.allclose(together[17:18], rule(logits[:, 17:18]), atol=1e-6)
    assert torch.equal(rule.decide(logits), together.argmax(-1))


def test_robust_weights_average_as_worked_out() -> None:
    rule = Weighted(3).double()
    rule.set(torch.tensor([0.4, 1 / 3, 0.8 / 3], dtype=torch.float64))
    p = points((0.5, 0.3, 0.2), (0.2, 0.6, 0.2), (0.1, 0.2, 0.7))
    assert close(answer(rule, p), (0.293333, 0.373333, 0.333333))
    uniform = Weighted(3).double()
    assert torch.allclose(uniform(p.log()), Mean()(p.log()))


@pytest.mark.parametrize("weights", [(0.5, 0.6), (1.5, -0.5), (1.0,)])
def test_weights_off_the_simplex_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="sum 1"):
        Weighted(2).set(torch.tensor(weights))


def test_soft_voting_on_logits_is_their_mean() -> None:
    logits = torch.randn(4, 5, 3, generator=generator(1))
    assert torch.equal(MeanLogits()(logits), logits.mean(0))


def test_the_median_can_be_differentiated() -> None:
    logits = torch.randn(5, 4, 3, generator=generator(2)).requires_grad_()
    GeometricMedian()(logits)[:, 0].sum().backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0 and torch.isfinite(logits.grad).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_the_unrolled_median_and_its_gradient_are_the_medians(seed: int) -> None:
    """Against the solved median, and its differences; members far from each other, so that the median is at none of them."""
    p = (torch.randn(5, 1, 4, generator=generator(seed), dtype=torch.float64) * 0.7).softmax(-1)
    assume(float((p - solved(p)).norm(dim=-1).min()) > 0.05)
    assert torch.allclose(unrolled_median(p, 200), solved(p), atol=1e-5)
    assert torch.allclose(unrolled_median(p), solved(p), atol=5e-3)
    direction = torch.randn(p.shape, generator=generator(seed, "direction"), dtype=torch.float64)
    step = 1e-5 * direction
    expected = (solved(p + step) - solved(p - step)) / 2e-5
    _, got = torch.func.jvp(lambda q: unrolled_median(q, 200), (p,), (direction,))
    assert torch.allclose(got, expected, atol=2e-2 * float(direction.abs().max()))


def solved(p: Tensor) -> Tensor:
    """The median (n k) by its weights."""
    return torch.einsum("mn,mnk->nk", median_weights(p, 1e-13, 5000), p)
