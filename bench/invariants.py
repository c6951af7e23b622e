"""What the stored attacks on one network must not say together: methods 1.3, I1 to I5, I9 and I10, from rows per image.

Two attacks are compared on the images that both were asked about: one that should be the stronger leaves more of them standing
if more images stand under it alone than under the other alone, by over two standard errors of their difference. Certificates
are looked at in :mod:`bench.certificates`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, permutations
from typing import Any

import pandas as pd

from bench import certificates
from bench.metrics import beyond_chance
from bench.partial import StoreError
from bench.store import Finding, Record, Store
from bench.verdicts import KNOWN, Judged, excess, finding, judged, together

GAP = 0.05
"""Share of images that may stand after APGD on the model and fall to attacks that know it (methods 12.2: AutoAttack is within 4
points of a converged PGD on networks whose gradients tell the truth)."""

WEAK = 0.1
"""Share of images that a gradient attack may leave standing and the worst case breaks, before it is called weak."""

ROUNDING = {"linf": 1e-7, "l2": 5e-5}
"""By how much rounding to float32 may lengthen a step to the edge of a ball, of images with up to 500,000 pixels."""

EFFORTS, FIXED = ("steps", "restarts", "proposals", "eot"), ("attack", "loss", "step", "start", "targets", "version")
"""Settings of which more must not hurt an attack, and those that make it another one."""

_READ = ("robust", "adaptive", "black_box", "transfer", "probe", "certified")


def inconsistencies(store: Store, records: Sequence[Record]) -> list[Finding]:
    """Everything that is wrong with the finished records of one variant, seed and budget; evidence names the evaluations."""
    found: list[Finding] = []
    attacks: list[Judged] = []
    certified: list[tuple[Record, pd.Series]] = []
    for record in records:
        name, kind = record.eval["name"], record.eval["fields"].get("kind")
        if record.status != "success" or kind not in _READ:
            continue
        try:
            rows = store.rows(record)
            own = judged(record, rows)
            found += [*(wrong for one in own for wrong in _alone(one)), *_of_rows(record, rows)]
            attacks += own
            if kind == "certified":
                found += [*certificates.impossible(store, record), *certificates.rising(record, rows)]
                certified.append((record, certificates.radii(rows)))
        except (OSError, ValueError, KeyError, AttributeError, StoreError) as error:
            detail = f"the rows of {name} cannot be read ({type(error).__name__}: {error}): they were not checked"
            found.append(finding("unreadable_rows", detail, [name]))
    for threat in dict.fromkeys((one.norm, one.noise) for one in attacks):
        found += _compared([one for one in attacks if (one.norm, one.noise) == threat])
    return [*found, *certificates.attacked(certified, attacks), *_without_expectation(records, attacks)]


# One evaluation alone


def _alone(one: Judged) -> Iterator[Finding]:
    """I1, I5."""
    wrong = excess(((high, low), one.at[high], one.at[low]) for low, high in combinations(sorted(one.at), 2))
    if wrong:
        (high, low), other = wrong.at, len(wrong.fewer)
        detail = (
            f"{one.name} ({one.words}): of {wrong.n} images {len(wrong.more)} stand at eps {high:g} and fall at {low:g}, "
            f"{other} the other way round: accuracy rises with eps"
        )
        yield finding("accuracy_rises_with_eps", detail, [one.name], wrong.more, eps=[low, high], other=other, n=wrong.n)
    for eps, stands in one.at.items():
        if one.role in ("iterated", "cascade", "adaptive") and eps >= 1:
            yield from _unbounded(one, eps, stands)


def _unbounded(one: Judged, eps: float, stands: pd.Series) -> Iterator[Finding]:
    from bench.datasets import DATASETS

    facts = DATASETS.get(one.record.task.get("dataset", ""))
    if facts is None or eps < (1 if one.norm == "linf" else math.sqrt(math.prod(facts.shape)) * (1 - 1e-6)):
        return
    chance, n = 1 / facts.classes, len(stands)
    if stands.mean() > chance + 2 * math.sqrt(chance * (1 - chance) / n):
        detail = (
            f"{one.name} ({one.words}): {int(stands.sum())} of {n} images stand within {eps:g}, which reaches every image "
            f"there is; chance level is {chance:.1%}"
        )
        yield finding("unbounded_stands", detail, [one.name], stands.index[stands], eps=eps, n=n)


def _of_rows(record: Record, rows: pd.DataFrame) -> Iterator[Finding]:
    """I10, and what only attacks that know the defense found."""
    name, fields = record.eval["name"], record.eval["fields"]
    if fields["kind"] == "robust":
        nan = rows[rows.select_dtypes("number").isna().any(axis=1)]
        if len(nan):
            yield finding("not_a_number", f"{name}: {len(nan)} rows hold NaN", [name], nan.id)
        far = rows[rows.distance > rows.eps * (1 + 1e-6) + ROUNDING.get(fields["norm"], 5e-5)]
        if len(far) and not fields.get("nearest"):
            detail = f"{name}: {len(far)} points lie outside their ball, the furthest at {far.distance.max():.9g}"
            yield finding("outside_budget", detail, [name], far.id, distance=float(far.distance.max()))
    if fields["kind"] == "adaptive":
        yield from _hidden(name, rows)


def _hidden(name: str, rows: pd.DataFrame) -> Iterator[Finding]:
    """What the gradients of the model itself did not find."""
    for eps in rows.eps.unique().tolist():
        part = rows[rows.eps == eps]
        later = part[part.clean_correct & ~part.broken_by.isin(["", *KNOWN])]
        if len(later) > GAP * len(part) and beyond_chance(len(later), 0):
            detail = (
                f"{name}: {len(later)} of {len(part)} images at eps {eps:g} stood after APGD and PGD on the model and fell to "
                "attacks that know the defense or need no gradient of it"
            )
            yield finding("adaptive_much_stronger", detail, [name], later.id, eps=eps, n=len(part))


# Several attacks on the same classifier


def _between(kind: str, strong: Sequence[Judged], weak: Judged, what: str) -> Iterator[Finding]:
    """A finding if attacks that should together be stronger than another one are not; ``what`` that would mean."""
    shared = sorted(weak.at.keys() & {eps for one in strong for eps in one.at})
    wrong = excess(((eps, eps), together(strong, eps), weak.at[eps]) for eps in shared)
    if wrong:
        eps, other = wrong.at[0], len(wrong.fewer)
        told = ", ".join(f"{one.name} ({one.words})" for one in strong if eps in one.at)
        detail = (
            f"of {wrong.n} images at eps {eps:g} {len(wrong.more)} stand under {told} and fall to {weak.name} ({weak.words}), "
            f"{other} the other way round: {what}"
        )
        names = [*(one.name for one in strong if eps in one.at), weak.name]
        yield finding(kind, detail, names, wrong.more, eps=eps, other=other, n=wrong.n)


def _compared(attacks: Sequence[Judged]) -> Iterator[Finding]:
    """I2, I3, I4 and I9, of attacks on one classifier in one norm."""
    for a, b in permutations(attacks, 2):
        if a.own and b.own and _stronger(a.settings, b.settings):  # effort spent on another model may be lost on this one
            yield from _between("more_effort_does_less", [a], b, "an attack does less with more effort")
        if (a.role == "cascade" and b.role not in ("cascade", "adaptive")) or (a.role == "adaptive" and b.role != "adaptive"):
            # Attacks that know the defense may find more than AutoAttack, see _hidden.
            yield from _between("worst_case_beaten", [a], b, "the worst case over attacks is not the worst")
    climbing = [one for one in attacks if one.role == "iterated"]
    better = [one for one in attacks if one.role in ("cascade", "adaptive")]
    for one in attacks:
        if one.role == "single step":
            yield from _between("fgsm_stronger_than_pgd", climbing, one, "one step leads further than many")
        if one.role == "black box":
            found = list(_without_gradients(attacks, climbing, one))
            yield from found
            better += [] if found else [one]
    for one in climbing:
        if "attack" in one.settings:
            yield from _weak(one, better)


def _without_gradients(attacks: Sequence[Judged], climbing: Sequence[Judged], box: Judged) -> Iterator[Finding]:
    """I3, for all attacks with gradients together: one that a black box beats may just be weak. Single steps are compared with
    the same step on another network, if there is nothing better."""
    own = box.settings.get("attack")
    strong = climbing or [one for one in attacks if one.role == "single step" and one.settings.get("attack") == own]
    return _between("black_box_stronger", strong, box, "gradients of the model lead less far than none")


def _weak(one: Judged, better: Sequence[Judged]) -> Iterator[Finding]:
    """Whether a gradient attack does less than a black box, or far less than the worst case; by whichever it is beaten most.
    PGD that does far less than a black box is a sign of masking even where other losses find what it misses (KAP's paper)."""
    beaten = []
    for other in better:
        wrong = excess(((eps, eps), one.at[eps], other.at[eps]) for eps in sorted(one.at.keys() & other.at.keys()))
        if wrong and (other.role == "black box" or wrong.share >= WEAK):
            beaten.append((wrong.share, other))
    boxes = [pair for pair in beaten if pair[1].role == "black box" and pair[1].own and pair[0] >= WEAK]
    kind, words = "weak_attack", "it is too weak here to be quoted alone"
    if boxes and one.settings["attack"] == "pgd":
        beaten, kind, words = boxes, "pgd_misled", "its gradients lead away from what can be found without any"
    if beaten:
        _, most = max(beaten, key=lambda pair: pair[0])
        yield from _between(kind, [one], most, words)


def _stronger(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether an attack is another one with more effort: the same with more steps or the like, Auto-PGD for as many
    gradients as PGD with the same loss, FGSM from the image itself for R-FGSM."""
    kinds = (a.get("attack"), b.get("attack"))
    if kinds == ("fgsm", "r_fgsm"):
        return True
    if kinds == ("apgd", "pgd"):
        return a.get("loss") == b.get("loss") and _gradients(a) >= _gradients(b)
    efforts = [(a.get(name) or 0, b.get(name) or 0) for name in EFFORTS]
    fixed = all(a.get(name) == b.get(name) for name in FIXED)
    return kinds[0] is not None and fixed and all(x >= y for x, y in efforts) and any(x > y for x, y in efforts)


def _gradients(settings: Mapping[str, Any]) -> int:
    return int(settings.get("steps") or 0) * int(settings.get("restarts") or 0)


def _without_expectation(records: Sequence[Record], attacks: Sequence[Judged]) -> Iterator[Finding]:
    """Gradient attacks that took one draw of a noise for the model."""
    drawn = [record.eval["name"] for record in records if any(own.kind == "randomised" for own in record.findings)]
    for one in attacks:
        plain = one.record.eval["fields"]["kind"] == "robust" and "attack" in one.settings
        once = plain and (one.settings.get("eot") or 1) == 1
        if once and one.role in ("iterated", "single step") and (drawn or one.noise):
            detail = f"{one.name} ({one.words}) differentiates one draw, and the model draws noise: its accuracy is too high"
            yield finding("no_expectation", detail, [one.name, *drawn])
