"""Which images stand, read from stored rows: every evaluation that attacks, in one form, so that they can be compared.

Reading needs no torch, so that a table of stored records can be made at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from bench.metrics import beyond_chance
from bench.store import Finding, Record

UNREADABLE = (OSError, ValueError, KeyError, AttributeError, TypeError)
"""What reading rows of a damaged or hostile record raises; the diagnosis tells of it."""

SINGLE = ("fgsm", "r_fgsm")
"""Attacks of one gradient step."""

ITERATED = ("bim", "pgd", "mim", "diverse_mim", "apgd", "apgd_t")
"""Attacks of many gradient steps on the model itself."""

BLACK_BOX = ("square",)
"""Attacks that see answers alone."""

ENSEMBLE = "ensemble"
"""The whole, as a source and as a target of transfer; members go by their number, from 0."""

KNOWN = ("apgd_ce", "apgd_t", "pgd", "pgd: margin")
"""The attacks of the adaptive evaluation that climb the model as it is; what falls only later fell to knowledge of the defense,
or to a search without its gradients."""

MASKED = 0.01
"""Share of zero gradients above which gradients are called masked (methods 12.1)."""

HELPS = 0.002
"""Share of images that must fall to Square, or to attacks that know the defense, after gradient attacks on the model, before
they are said to help (methods 8.10 has it for Square)."""

NAMED = 20
"""Images that a finding names at most; it counts all."""

ROLES = {
    **dict.fromkeys(SINGLE, "single step"),
    **dict.fromkeys(ITERATED, "iterated"),
    **dict.fromkeys(BLACK_BOX, "black box"),
    "autoattack": "cascade",
}
"""What an attack is to others; minimum-norm attacks are nothing to them."""


@dataclass(frozen=True)
class Judged:
    """Verdicts of one evaluation on one classifier.

    Attributes:
        record: where they are from.
        words: the attack.
        role: a value of :data:`ROLES`, "adaptive", or "" for others.
        norm: of its budgets.
        noise: standard deviation of the noise that is part of the classifier; 0 for the network as it is.
        at: budget -> whether each image stands, by image id.
        settings: of the attack.
        own: whether it was on this classifier; images of a member or of another model it only has to judge.
    """

    record: Record
    words: str
    role: str
    norm: str
    noise: float
    at: Mapping[float, pd.Series]
    settings: Mapping[str, Any]
    own: bool = True

    @property
    def name(self) -> str:
        """Of the evaluation."""
        return str(self.record.eval["name"])


def within(rows: pd.DataFrame, eps: float, nearest: bool) -> tuple[pd.DataFrame, pd.Series]:
    """The rows that tell of a budget, and whether each row's point lies in it: an image stands unless it is broken there.

    Where every budget had a search of its own its points do, whose distances rounding may put a hair beyond eps.
    """
    part = rows if nearest else rows[rows.eps == eps]
    return part, part.distance <= eps if nearest else pd.Series(True, index=part.index)


def judged(record: Record, rows: pd.DataFrame) -> list[Judged]:
    """The verdicts of a finished record; none for evaluations that do not attack.

    Raises:
        KeyError, AttributeError: for rows without a column that they should have.
    """
    read = _KINDS.get(record.eval["fields"].get("kind", ""))
    return list(read(record, rows)) if read else []


def _series(part: pd.DataFrame, stands: Any) -> pd.Series:
    return pd.Series(pd.Series(stands).to_numpy(bool), index=part.id.to_numpy())


def _by_eps(rows: pd.DataFrame) -> Iterator[tuple[float, pd.DataFrame]]:
    return ((float(eps), rows[rows.eps == eps]) for eps in rows.eps.unique())


def _robust(record: Record, rows: pd.DataFrame) -> Iterator[Judged]:
    fields, at = record.eval["fields"], {}
    for eps in fields["eps"]:
        # Records from before searches for the nearest point do not have the field.
        part, near = within(rows, eps, fields.get("nearest", False))
        at[eps] = _series(part, ~(part.broken & near))
    attack = fields["attack"]
    one = Judged(record, attack, ROLES.get(attack, ""), fields["norm"], float(fields.get("noise") or 0), at, fields)
    yield one
    if one.role == "cascade" and "broken_by" in rows:
        names = list(dict.fromkeys(m.source for m in record.metrics if m.metric == "robust_accuracy_after"))
        gradients = range(names.index("square") if "square" in names else len(names))
        wrong = ~rows.clean_correct | rows.broken_by.isin(gradients)
        before = {eps: _series(part, ~wrong[part.index]) for eps, part in _by_eps(rows)}
        yield replace(one, words="its attacks with gradients", role="iterated", at=before, settings={})


def _adaptive(record: Record, rows: pd.DataFrame) -> Iterator[Judged]:
    norm = record.eval["fields"]["norm"]
    for words, role, by in (
        ("the adaptive attacks", "adaptive", rows.broken_by != ""),
        ("APGD and PGD on the model", "iterated", rows.broken_by.isin(KNOWN)),
    ):
        at = {eps: _series(part, part.clean_correct & ~by[part.index]) for eps, part in _by_eps(rows)}
        yield Judged(record, words, role, norm, 0.0, at, {})


def _black_box(record: Record, rows: pd.DataFrame) -> Iterator[Judged]:
    fields, searches = record.eval["fields"], [name for name in rows if str(name).startswith("wrong ")]
    at = {eps: _series(part, part.clean_correct & ~part[searches].any(axis=1)) for eps, part in _by_eps(rows)}
    words = f"{fields['attack']} on {', '.join(fields['sources'])}"
    yield Judged(record, words, "black box", fields["norm"], 0.0, at, {"attack": fields["attack"]}, own=False)


def _transfer(record: Record, rows: pd.DataFrame) -> Iterator[Judged]:
    """What is crafted on the ensemble, and what on its members, judged by the ensemble."""
    fields, right = record.eval["fields"], f"correct_{ENSEMBLE}"
    own = f"wrong_{ENSEMBLE}_{ENSEMBLE}"
    others = [name for name in rows if str(name).startswith("wrong_") and str(name).endswith(f"_{ENSEMBLE}") and name != own]
    attack = fields["attack"]
    for role, columns, where in (
        (ROLES.get(attack, ""), [own], "the ensemble"),
        ("black box", others, "its members"),
    ):
        at = {eps: _series(part, part[right] & ~part[columns].any(axis=1)) for eps, part in _by_eps(rows)}
        yield Judged(record, f"{attack} on {where}", role, fields["norm"], 0.0, at, fields, own=columns == [own])


def _probe(record: Record, rows: pd.DataFrame) -> Iterator[Judged]:
    """The longest of its searches."""
    fields = record.eval["fields"]
    steps, restarts = fields["steps"][-1], fields["restarts"][-1]
    at = {eps: _series(part, part[f"stands_{steps}_{restarts}"]) for eps, part in _by_eps(rows)}
    settings = {"attack": "pgd", "loss": "ce", "steps": steps, "restarts": restarts}
    yield Judged(record, f"pgd ({steps} steps, {restarts} restarts)", "iterated", fields["norm"], 0.0, at, settings)


_KINDS: dict[str, Callable[[Record, pd.DataFrame], Iterator[Judged]]] = {
    "robust": _robust,
    "adaptive": _adaptive,
    "black_box": _black_box,
    "transfer": _transfer,
    "probe": _probe,
}


@dataclass(frozen=True)
class Excess:
    """How an attack that should be the stronger is the weaker one.

    Attributes:
        at: where, of the stronger and of the weaker.
        more, fewer: images that stand under the stronger alone, and under the weaker alone.
        n: images that both were asked about.
    """

    at: tuple[float, float]
    more: list[int]
    fewer: list[int]
    n: int

    @property
    def share(self) -> float:
        """By how much accuracy under the stronger is higher."""
        return (len(self.more) - len(self.fewer)) / self.n


def excess(pairs: Iterable[tuple[tuple[float, float], pd.Series, pd.Series]]) -> Excess | None:
    """The largest of pairs (where, verdicts under the stronger, verdicts under the weaker), on the images of both; None if none
    is beyond two standard errors."""
    found = []
    for at, strong, weak in pairs:
        same = strong.index.equals(weak.index)  # pandas takes long to look up the images of every pair
        ids = strong.index if same else strong.index.intersection(weak.index)
        s, w = (own.to_numpy(bool) if same else own[ids].to_numpy(bool) for own in (strong, weak))
        own = Excess(at, ids[s & ~w].tolist(), ids[w & ~s].tolist(), len(ids))
        if beyond_chance(len(own.more), len(own.fewer)):
            found.append(own)
    return max(found, key=lambda own: own.share, default=None)


def together(attacks: Iterable[Judged], eps: float) -> pd.Series:
    """Whether each image stands under all attacks that were asked about it at a budget."""
    return standing([one.at[eps] for one in attacks if eps in one.at])


def standing(verdicts: Sequence[pd.Series]) -> pd.Series:
    """Whether each image stands by all verdicts about it."""
    ids = verdicts[0].index
    if ids.is_unique and all(own.index.equals(ids) for own in verdicts):  # pandas takes long to group them
        return pd.Series(np.logical_and.reduce([own.to_numpy(bool) for own in verdicts]), index=ids)
    return pd.concat(verdicts).groupby(level=0).min()


def finding(kind: str, detail: str, evaluations: Iterable[str], images: Iterable[int] = (), **evidence: Any) -> Finding:
    """A finding that names its evaluations and images."""
    ids = sorted({int(image) for image in images})
    facts = {"evaluations": list(dict.fromkeys(evaluations)), **evidence, "images": ids[:NAMED], "count": len(ids)}
    return Finding(kind=kind, detail=detail, evidence=facts)
