"""Cells of the leaderboard: which column a stored number belongs to, what heads it, and the number over training seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from bench import columns
from bench.diagnose import WHOLE
from bench.ranking import Threat, threatened
from bench.store import Metric, Record

Number = list[float | int | None]
"""A cell: value, lower and upper end of its interval, deviation over seeds, number of seeds, number of images."""

NORMS = {"linf": "ℓ∞", "l2": "ℓ₂", "l1": "ℓ₁"}

KINDS = {
    "clean": ("clean", "%"),
    "worst": ("worst case", "%"),
    "adaptive": ("adaptive", "%"),
    "autoattack": ("AutoAttack", "%"),
    "attack": ("", "%"),
    "acr": ("ACR", ""),
    "certified": ("CA", "%"),
    "tsr": ("TSR", ""),
    "parameters": ("parameters", "count"),
    "forward_milliseconds": ("forward", "ms"),
    "training_seconds_per_epoch": ("epoch", "s"),
}
"""Kinds of columns in their order, with label and unit."""

PRICES = ("parameters", "forward_milliseconds", "training_seconds_per_epoch")
"""Kinds that are what a defense costs, as the record of its clean accuracy tells it."""


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        kind: a name of :data:`KINDS`.
        threat: of an accuracy under attack.
        evaluation: of a single attack or of certificates.
        at: the radius of a certified accuracy, the eps of TSR.
    """

    kind: str
    threat: Threat | None = None
    evaluation: str = ""
    at: float | None = None

    @property
    def key(self) -> str:
        """What tells it from the others of a board."""
        threat = f"{self.threat.norm} {self.threat.eps:g} {self.threat.of}".strip() if self.threat else ""
        at = "" if self.at is None else f"{self.at:g}"
        return "|".join(filter(None, [self.kind, threat, self.evaluation, at]))

    @property
    def order(self) -> tuple[Any, ...]:
        """Where it stands: columns of one threat together, between clean accuracy and the others."""
        group = 0 if self.kind == "clean" else 1 if self.threat else 2
        threat = self.threat.order if self.threat else ()
        return group, threat, list(KINDS).index(self.kind), self.evaluation, -1.0 if self.at is None else self.at

    def heading(self) -> dict[str, Any]:
        """What the page needs of it."""
        label, unit = KINDS[self.kind]
        text = " ".join(filter(None, [label or self.evaluation, "" if self.at is None else columns.short(self.at)]))
        threat = in_words(self.threat) if self.threat else ""
        own = self.evaluation if self.kind in ("acr", "certified") else ""
        return {"key": self.key, "kind": self.kind, "label": text, "unit": unit, "threat": threat, "of": own}


def in_words(threat: Threat) -> str:
    """ "ℓ∞ 8/255", with what is attacked if it is not the network as it is."""
    text = f"{NORMS.get(threat.norm, threat.norm)} {columns.short(threat.eps)}"
    return f"{text}, {threat.of}" if threat.of else text


def numbers(record: Record) -> Iterator[tuple[Column, Metric]]:
    """The numbers of a record that have a column."""
    kind = record.eval["fields"].get("kind")
    for metric in record.metrics:
        found = _column(record, metric)
        if found:
            yield found, metric
    if kind == "clean":
        for name in PRICES:
            if name in record.cost:
                yield Column(name), Metric(metric=name, value=record.cost[name], n=1, unit=name)


def _column(record: Record, metric: Metric) -> Column | None:
    kind, name = record.eval["fields"].get("kind"), str(record.eval["name"])
    certificates = {
        "acr": Column("acr", evaluation=name),
        "certified_accuracy": Column("certified", evaluation=name, at=metric.radius),
    }
    others = {"clean_accuracy": Column("clean"), "tsr": Column("tsr", at=metric.eps)}
    if metric.metric == "robust_accuracy" and metric.denominator in ("all", None):
        return _under_attack(record, metric)
    return certificates.get(metric.metric) if kind == "certified" else others.get(metric.metric)


def _under_attack(record: Record, metric: Metric) -> Column | None:
    fields, threat = record.eval["fields"], threatened(record, metric.eps)
    if not threat or fields.get("kind") not in ("robust", "adaptive"):
        return None
    if fields["kind"] == "adaptive":
        return Column("adaptive", threat)
    whole = fields.get("attack") == "autoattack" and fields.get("version") in WHOLE
    return Column("autoattack", threat) if whole else Column("attack", threat, str(record.eval["name"]))


def over_seeds(each: Sequence[Metric]) -> Number:
    """One number of the seeds': the value and interval of one seed, or mean and deviation of several."""
    if len(each) == 1:
        one = each[0]
        return [_brief(one.value), _brief(one.lower), _brief(one.upper), None, 1, one.n]
    values = [one.value for one in each]
    return [_brief(mean(values)), None, None, _brief(stdev(values)), len(each), each[0].n]


def _brief(value: float | None) -> float | None:
    """Six digits are more than a table shows; the records on the page have all of them."""
    return None if value is None else float(f"{value:.6g}")
