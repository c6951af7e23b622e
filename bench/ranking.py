"""Ranks of defenses: what stands of every image under all that is known of a threat, and ties where images tell no difference.

An attack's verdict counts at its own radius and at every larger one. The images are those that the strongest kind of attack
was asked about within the radius; whatever else was asked about one of them can only lower its verdict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bench import metrics
from bench.diagnose import WHOLE
from bench.store import Record, Store
from bench.verdicts import UNREADABLE, Judged, judged, standing

STRENGTH = ("adaptive", "cascade", "iterated", "single step", "black box", "")
"""Roles of attacks, the strongest first; "" are searches for the nearest point."""

SMOOTHED = "smoothed"


@dataclass(frozen=True)
class Threat:
    """What an attacker may do, and to what.

    Attributes:
        norm, eps: the ball, pixels in [0,1].
        of: "" for the network as it is, :data:`SMOOTHED` for the smoothed classifier at the defense's own noise level, or in
            words the noise that an evaluation adds.
    """

    norm: str
    eps: float
    of: str = ""

    @property
    def order(self) -> tuple[Any, ...]:
        """The network as it is before noisy ones, l_inf before other norms, small radii before large ones."""
        return self.of, self.norm != "linf", self.norm, self.eps


@dataclass(frozen=True)
class WorstCase:
    """What stands of one network at a threat.

    Attributes:
        stands: whether each image stands under everything, by image id.
        attacks: all attacks that were asked about one of the images, in words.
        strong: whether the adaptive attacks or all of AutoAttack were among them, at this very radius.
    """

    stands: pd.Series
    attacks: tuple[str, ...]
    strong: bool


def worst_cases(store: Store, records: Iterable[Record]) -> dict[Threat, WorstCase]:
    """The worst case at every threat that the records of one variant and seed tell of; unreadable rows count for nothing."""
    found: dict[tuple[str, str], list[Judged]] = {}
    for record in records:
        if record.status != "success":
            continue
        try:
            for one in judged(record, store.rows(record)):
                found.setdefault((one.norm, _of(record, one.noise)), []).append(one)
        except UNREADABLE:
            continue
    return {
        Threat(norm, eps, of): _worst_case(attacks, eps)
        for (norm, of), attacks in found.items()
        for eps in sorted({eps for one in attacks for eps in one.at})
    }


def threatened(record: Record, eps: float | None) -> Threat | None:
    """The threat of an attack's number; None if the record does not tell it."""
    fields = record.eval["fields"]
    norm, noise = fields.get("norm"), fields.get("noise") or 0.0
    if eps is None or not isinstance(norm, str) or not isinstance(noise, int | float):
        return None
    return Threat(norm, eps, _of(record, float(noise)))


def _of(record: Record, noise: float) -> str:
    """What is attacked under a noise: see :class:`Threat`."""
    if not noise:
        return ""
    return SMOOTHED if noise == record.defense.get("fields", {}).get("sigma") else f"noise {noise:g}"


def _worst_case(attacks: Sequence[Judged], eps: float) -> WorstCase:
    within = [(one, [one.at[radius] for radius in one.at if radius <= eps]) for one in attacks]
    within = [(one, verdicts) for one, verdicts in within if verdicts]
    strongest = min(STRENGTH.index(one.role) for one, _ in within)
    ids = pd.concat([own for one, each in within if STRENGTH.index(one.role) == strongest for own in each]).index.unique()
    stands = standing([own for _, each in within for own in each]).reindex(ids).astype(bool)
    words = dict.fromkeys(one.name if one.name == one.words else f"{one.name} ({one.words})" for one, _ in within)
    return WorstCase(stands, tuple(words), any(_is_strong(one) for one in attacks if eps in one.at))


def _is_strong(one: Judged) -> bool:
    return one.role == "adaptive" or (one.role == "cascade" and one.settings.get("version") in WHOLE)


def fewest(cases: Sequence[WorstCase]) -> Sequence[WorstCase]:
    """Of the worst cases of several seeds at a threat those whose mean is told: all of them, or those that faced the same,
    whichever stand least.

    Seeds that faced different attacks have no honest mean. With this no attack that a seed is spared, and no seed that is
    added, raises the number of those that faced the most.
    """
    alike: dict[frozenset[str], list[WorstCase]] = {}
    for case in cases:
        alike.setdefault(frozenset(case.attacks), []).append(case)
    return min([cases, *alike.values()], key=lambda some: float(np.mean([case.stands.mean() for case in some])))


def over_seeds(each: Sequence[pd.Series]) -> pd.Series:
    """A value of every image, the mean over the training seeds that have one."""
    return each[0].astype(float) if len(each) == 1 else pd.concat([one.astype(float) for one in each]).groupby(level=0).mean()


def apart(a: pd.Series, b: pd.Series) -> bool:
    """Whether the images of both tell two defenses apart, at 95 % and without a correction for many comparisons.

    The test of :func:`bench.compare.compare` for the networks as they are. Trainings are not asked about: a rank is that of the
    networks which were submitted, whose seeds seldom agree in number, and one seed alone tells nothing of trainings.
    """
    ids = a.index if a.index.equals(b.index) else a.index.intersection(b.index)
    x, y = a[ids].to_numpy(float), b[ids].to_numpy(float)
    if not len(ids) or np.array_equal(x, y):
        return False
    return metrics.over_images(x, y) <= 1 - metrics.CONFIDENCE


def ranks(values: Mapping[str, pd.Series]) -> dict[str, tuple[int, bool]]:
    """(rank, tied) by name, the highest mean first.

    A rank is shared with the best of those that have it, as long as :func:`apart` cannot tell the two apart; the next rank is
    the place in the order, so that after three in rank 1 comes rank 4.
    """
    order = sorted(values, key=lambda name: (-values[name].mean(), name))
    found: dict[str, int] = {}
    best = ""
    for place, name in enumerate(order, 1):
        if not best or apart(values[best], values[name]):
            best, found[name] = name, place
        else:
            found[name] = found[best]
    shared = list(found.values())
    return {name: (rank, shared.count(rank) > 1) for name, rank in found.items()}
