"""What the rows of a probe say: numbers with intervals, and signs of masked gradients with the images that show them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from attacks.checks import CHECKS
from bench import metrics
from bench.evals.api import mean_of, share
from bench.store import Finding, Metric
from bench.verdicts import MASKED, NAMED

BEATS = 0.5
"""A full step along the gradient must raise the margin more than every random direction does, in more than this share of the
images. Trained networks reach 1.0 (MNIST, Fashion-MNIST, CIFAR-10, eps up to 0.3), but MNIST networks trained adversarially at
0.3, whose logits hardly change within the ball, 0.66 (TRADES) and 0.78 (AT); a random gradient reaches 1 / (directions + 1)."""

KEPT = 0.5
"""Share of its promise that a short step along the gradient must keep in half of the images. Trained networks keep 0.7 to 1
in the median, also at budgets that break every image; gradients shattered until PGD fails less than 0.5, most less than 0.1."""

UNCONVERGED = 0.05
"""Share of images that the last enlargement of PGD, fourfold steps or restarts, may still break. Trained networks lose 0 to 4 %
(methods 12.2: AutoAttack itself is within 4 points of a converged PGD)."""

NOISY = 0.01
"""Share of single draws whose class is not the usual one, above which a verdict depends on the draw: a flip rate of 5 %
survives three tries with .86, and a hundred with .006 (methods 9.2)."""


def numbers(rows: pd.DataFrame, searches: Sequence[tuple[int, int]]) -> list[Metric]:
    """Numbers of all rows; those of gradients are of the images that the model gets right, accuracies of all."""
    first = rows[rows.eps == rows.eps.iloc[0]]
    found = [
        share("clean_accuracy_of_probe", first.clean_correct, denominator="all"),
        mean_of("single_draw_accuracy", first.single, denominator="all", draws=1),
        mean_of("flips", first.flips, denominator="all"),
        share("unbounded_accuracy", first.stands_unbounded, eps=float(first.edge.iloc[0]), denominator="all"),
    ]
    for eps, part in rows.groupby("eps"):
        facts: dict[str, Any] = {"eps": float(eps)}  # type: ignore[arg-type]
        found += _of_gradients(part[part.clean_correct], {**facts, "denominator": "clean_correct"})
        for search in searches:
            source = words(*search)
            found.append(share("robust_accuracy_after", part[column(*search)], source=source, denominator="all", **facts))
        found.append(mean_of("single_draw_accuracy", part.attacked_single, denominator="all", draws=1, **facts))
    return found


def column(steps: int, restarts: int) -> str:
    """The column of a PGD's verdicts."""
    return f"stands_{steps}_{restarts}"


def words(steps: int, restarts: int) -> str:
    """A PGD in words, the ``source`` of its accuracy."""
    return f"pgd, {steps} step{'s' * (steps > 1)}, {restarts} restart{'s' * (restarts > 1)}"


def _of_gradients(right: pd.DataFrame, facts: dict[str, Any]) -> list[Metric]:
    if right.empty:
        return []
    found = [mean_of(f"margin_{where}", right[f"margin_{where}"], unit="logits", **facts) for where in _WHERE]
    found.append(share("zero_margin_gradient", right.margin_slope == 0, **facts))
    found.append(share("zero_ce_gradient", right.ce_slope == 0, **facts))
    sloping = right[right.margin_slope > 0]
    if len(sloping):
        found.append(share("gradient_beats_random", _beats(sloping), **facts))
        found.append(share("gradient_keeps_promise", _keeps(sloping), **facts))
    for step, letters in enumerate(zip(*right.gradients, strict=True)):
        asked = np.array([letter for letter in letters if letter != "-"])
        if len(asked):
            found.append(share("zero_gradients_at_step", asked == "0", source=f"step {step}", **facts))
            found.append(share("vanishing_gradients_at_step", asked != "1", source=f"step {step}", **facts))
    return found


_WHERE = ("clean", "random", "gradient")


def _beats(rows: pd.DataFrame) -> pd.Series:
    return rows.margin_gradient > rows.margin_best


def _keeps(rows: pd.DataFrame) -> pd.Series:
    return rows.delivered >= KEPT * rows.promised


def findings(rows: pd.DataFrame, searches: Sequence[tuple[int, int]], directions: int) -> list[Finding]:
    """Every sign, each with the images that show it."""
    first = rows[rows.eps == rows.eps.iloc[0]]
    found = [*_declared(first), *_gradients_at_image(first), *_unbounded(first)]
    for eps, part in rows.groupby("eps"):
        right = part[part.clean_correct]
        signs = [*_zero_on_the_way(right), *_pointless(right, directions), *_unconverged(part, searches)]
        signs += [*_hidden_by_noise(part, searches), *_drawn(part, part.attacked_flips, part.attacked_single, "attacked")]
        found += [own.model_copy(update={"evidence": {"eps": eps, **own.evidence}}) for own in signs]
    return found


def _sign(kind: str, detail: str, rows: pd.DataFrame, **evidence: Any) -> Finding:
    """A finding that names the images of its rows."""
    ids = rows.id.unique()
    return Finding(kind=kind, detail=detail, evidence={"images": ids[:NAMED].tolist(), "count": len(ids), **evidence})


def _declared(first: pd.DataFrame) -> Iterator[Finding]:
    """What a look at the model shows; images that it gets wrong are shown too, as AutoAttack's own checks do."""
    for name, text in CHECKS.items():
        # A zero gradient is told with its reason below; noise is judged by what depends on it.
        if name != "zero_gradient" and first[name].any():
            yield _sign(name, f"{int(first[name].sum())} images: {text}", first[first[name]])
    if first.randomised.any() and not first.declared.any():
        detail = "forward passes differ, and the model does not say that it draws noise: every verdict is that of one draw"
        yield _sign("noise_dependent", detail, first[first.randomised])
    yield from _drawn(first, first.flips, first.single, "as they are")


def _gradients_at_image(first: pd.DataFrame) -> Iterator[Finding]:
    right = first[first.clean_correct]
    flat, saturated = right[right.margin_slope == 0], right[(right.margin_slope > 0) & (right.ce_slope == 0)]
    if len(flat) > MASKED * len(right):
        detail = f"{len(flat)} of {len(right)} images: not even the margin has a gradient, so that gradient attacks are blind"
        yield _sign("zero_gradients", detail, flat)
    if len(saturated) > MASKED * len(right):
        detail = (
            f"{len(saturated)} of {len(right)} images: the margin has a gradient ({saturated.margin_slope.median():.3g} long), "
            "cross-entropy has none: the softmax is saturated; attack a margin, DLR, or logits that are divided"
        )
        yield _sign("saturated_loss", detail, saturated)


def _unbounded(first: pd.DataFrame) -> Iterator[Finding]:
    stands, chance = first[first.stands_unbounded], 1 / int(first.classes.iloc[0])
    edge, tolerance = float(first.edge.iloc[0]), 2 * float(np.sqrt(chance * (1 - chance) / len(first)))
    if len(stands) > (chance + tolerance) * len(first):
        detail = (
            f"{len(stands)} of {len(first)} images stand under PGD within {edge:g}, which reaches every image there is; "
            f"chance level is {chance:.1%}"
        )
        yield _sign("unbounded_stands", detail, stands, eps=edge)


def _zero_on_the_way(right: pd.DataFrame) -> Iterator[Finding]:
    """Zero gradients of PGD beyond the image, where there was one at the image."""
    sloping = right[right.ce_slope > 0]
    zeros = sloping.gradients.str.count("0")
    asked = int(sloping.gradients.str.count("[0v1]").sum())
    if zeros.sum() > MASKED * asked:
        share_of = float(zeros.sum()) / asked
        detail = f"{share_of:.1%} of PGD's gradients are zero in every pixel, on images that have one themselves"
        yield _sign("zero_gradients", detail, sloping[zeros > 0], share=share_of)


def _pointless(right: pd.DataFrame, directions: int) -> Iterator[Finding]:
    """Gradients that lead nowhere: no better than chance, or far from what they promise."""
    sloping = right[right.margin_slope > 0]
    if sloping.empty:
        return
    beaten, broken = sloping[~_beats(sloping)], sloping[~_keeps(sloping)]
    if len(beaten) >= (1 - BEATS) * len(sloping):
        detail = (
            f"in {len(beaten)} of {len(sloping)} images the best of {directions} random directions raises the margin as much "
            f"as a step along its gradient; means: {sloping.margin_clean.mean():.3g} at the images, "
            f"{sloping.margin_random.mean():.3g} at random, {sloping.margin_gradient.mean():.3g} along the gradient"
        )
        yield _sign("gradient_no_better_than_random", detail, beaten, random=1 / (directions + 1))
    if len(broken) > 0.5 * len(sloping):
        kept = float((sloping.delivered / sloping.promised).median())
        detail = (
            f"in {len(broken)} of {len(sloping)} images a short step along the gradient raises the margin by less than half of "
            f"what the gradient promises (median {kept:.2f} of it): the gradient is not that of the function at this scale"
        )
        yield _sign("shattered_gradients", detail, broken, kept=kept)


def _unconverged(part: pd.DataFrame, searches: Sequence[tuple[int, int]]) -> Iterator[Finding]:
    """The last enlargement of steps, and that of restarts."""
    longer = [search for search in searches if search[1] == searches[0][1]]
    for chain in (longer, searches[len(longer) - 1 :]):
        if len(chain) < 2:
            continue
        before, after = chain[-2:]
        fell = part[part[column(*before)] & ~part[column(*after)]]
        if len(fell) > UNCONVERGED * len(part) and metrics.beyond_chance(len(fell), 0):
            detail = (
                f"{len(fell)} of {len(part)} images stood after {words(*before)} and fell to {words(*after)}: "
                "the accuracy has not reached its plateau"
            )
            yield _sign("not_converged", detail, fell)


def _hidden_by_noise(part: pd.DataFrame, searches: Sequence[tuple[int, int]]) -> Iterator[Finding]:
    """Points that an attack misses which differentiates one draw of a noise that the model declares."""
    averaged = part[column(*searches[0])]
    missed, other = part[part.stands_plain & ~averaged], part[~part.stands_plain & averaged]
    if metrics.beyond_chance(len(missed), len(other)):
        detail = (
            f"{len(missed)} of {len(part)} images stand under {words(*searches[0])} on one draw and fall with expectation over "
            f"the noise ({len(other)} the other way round)"
        )
        yield _sign("noise_dependent", detail, missed)


def _drawn(part: pd.DataFrame, flips: pd.Series, single: pd.Series, where: str) -> Iterator[Finding]:
    """Verdicts that depend on the draw."""
    if flips.mean() > NOISY:
        detail = (
            f"{flips.mean():.1%} of single draws on images {where} give another class than most draws do; "
            f"a single draw is right in {single.mean():.1%}"
        )
        yield _sign("noise_dependent", detail, part[flips > 0], flips=float(flips.mean()))
