"""A defense on the leaderboard: the records of all its training seeds in one suite, version, budget and source of data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from bench import cells, columns
from bench.cells import Column, Number
from bench.diagnose import STATUSES, Diagnosis
from bench.findings import FALSE, SIGNS
from bench.metrics import wilson
from bench.ranking import Threat, WorstCase, fewest, over_seeds, worst_cases
from bench.store import Metric, Record, Store
from bench.verdicts import UNREADABLE

ATTACKS = ("robust", "adaptive", "black_box", "transfer", "probe", "noise", "activations")
"""Kinds of evaluations that make an entry one of the ranking under attack."""


@dataclass(frozen=True)
class Setting:
    """How certificates were made; entries of different settings are never ranked together.

    Attributes:
        evaluation: its name in the suite.
        how: estimator, draws, alpha and numerics, in words.
        sigma: noise of the smoothed classifier.
    """

    evaluation: str
    how: str
    sigma: float


@dataclass(frozen=True)
class Entry:
    """One variant of a defense.

    Attributes:
        store: where its records lie.
        seeds: what is known of each training seed.
    """

    store: Store
    seeds: Sequence[Diagnosis]

    @property
    def variant(self) -> str:
        """Its label, e.g. "cear_rw@sigma=0.5"."""
        return str(self.records[0].defense["variant"])

    @property
    def members(self) -> int:
        """Networks of the ensemble, 1 for a single one."""
        return self.records[0].members

    @cached_property
    def records(self) -> list[Record]:
        """Of all seeds."""
        return [record for own in self.seeds for record in own.records]

    @property
    def is_attacked(self) -> bool:
        """Whether something asked how it stands under attack."""
        return any(record.eval["fields"].get("kind") in ATTACKS for record in self.records if record.status != "skipped")

    @cached_property
    def settings(self) -> list[Setting]:
        """How its certificates were made."""
        found = {setting: None for record in self.records if (setting := _setting(record))}
        return list(found)

    @cached_property
    def faced(self) -> dict[Threat, list[WorstCase]]:
        """The worst cases of all seeds at every threat."""
        found: dict[Threat, list[WorstCase]] = {}
        for own in self.seeds:
            for threat, case in worst_cases(self.store, own.records).items():
                found.setdefault(threat, []).append(case)
        return found

    @cached_property
    def worst(self) -> dict[Threat, Sequence[WorstCase]]:
        """Those of them whose mean is told."""
        return {threat: fewest(cases) for threat, cases in self.faced.items()}

    def stands(self, threat: Threat) -> pd.Series | None:
        """What stands of every image at a threat, mean over the seeds; None if nobody asked."""
        return over_seeds([case.stands for case in self.worst[threat]]) if threat in self.worst else None

    def strongly(self, threat: Threat) -> bool:
        """Whether a seed was attacked adaptively or by all of AutoAttack at this very threat; what is told is no more than what
        such seeds withstood."""
        return any(case.strong for case in self.faced.get(threat, ()))

    def radii(self, setting: Setting) -> dict[Column, pd.Series]:
        """What ranks certificates, image by image, mean over the seeds: whether it is certified at a radius, and its radius
        where radii are whole."""
        each: dict[Column, list[pd.Series]] = {}
        for record in self.records:
            if _setting(record) != setting or record.status != "success":
                continue
            try:
                rows = self.store.rows(record)
                for radius in record.eval["fields"]["radii"]:
                    part = rows[rows.asked == radius] if "asked" in rows else rows
                    right = (part.prediction == part.label) & (part.radius >= radius)
                    column = Column("certified", evaluation=setting.evaluation, at=radius)
                    each.setdefault(column, []).append(pd.Series(right.to_numpy(), index=part.id.to_numpy()))
                if any(metric.metric == "acr" for metric in record.metrics):
                    radii = np.where(rows.prediction == rows.label, rows.radius, 0.0)
                    each.setdefault(Column("acr", evaluation=setting.evaluation), []).append(pd.Series(radii, index=rows.id))
            except UNREADABLE:
                continue
        return {column: over_seeds(own) for column, own in each.items()}

    @cached_property
    def numbers(self) -> dict[Column, Number]:
        """Its cells."""
        found: dict[Column, list[Metric]] = {}
        for record in self.records:
            for column, metric in cells.numbers(record):
                found.setdefault(column, []).append(metric)
        for threat, cases in self.worst.items():
            for case in cases:
                n, left = len(case.stands), int(case.stands.sum())
                low, high = wilson(left, n)
                metric = Metric(metric="worst_case", value=left / n, n=n, lower=low, upper=high)
                found.setdefault(Column("worst", threat), []).append(metric)
        return {column: cells.over_seeds(own) for column, own in found.items()}

    def side(self, evaluation: str) -> list[Diagnosis]:
        """What is known of its attacks, or, with the name of an evaluation, of those certificates, by seed."""
        if not evaluation:
            return [own.attacks for own in self.seeds]
        challenges = [own.eval["name"] for own in self.records if own.eval["fields"].get("kind") == "challenge"]
        return [own.about([evaluation, *challenges]) for own in self.seeds]

    def impossible(self, evaluation: str = "") -> bool:
        """Whether numbers under attack, or of an evaluation with certificates, cannot be true."""
        found = [finding for own in self.side(evaluation) for finding in own.findings if own.flags(finding)]
        return any(SIGNS[finding.kind].text == FALSE for finding in found)

    def unfinished(self) -> list[str]:
        """Evaluations without numbers that could have some, with what became of them."""
        return sorted({f"{own.eval['name']} {own.status}" for own in self.records if own.status in ("running", "error")})


def _setting(record: Record) -> Setting | None:
    fields = record.eval["fields"]
    if fields.get("kind") != "certified" or record.status == "skipped":
        return None
    return Setting(str(record.eval["name"]), columns.certificate(record), float(fields.get("sigma") or 0.0))


def least(sides: Sequence[Diagnosis]) -> str:
    """The status of several seeds in a word: "flagged" if one of them is, else the least assured."""
    words = {own.status for own in sides}
    return "flagged" if "flagged" in words else max(words, key=list(STATUSES).index, default="unreviewed")


def told(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """The findings of a seed in words, those that flag first."""
    found = [
        {
            "seed": diagnosis.place[3],
            "kind": own.kind,
            "flags": diagnosis.flags(own),
            "means": SIGNS[own.kind].text if own.kind in SIGNS else "",
            "detail": own.detail,
            "evidence": own.evidence,
        }
        for own in diagnosis.findings
    ]
    return sorted(found, key=lambda own: not own["flags"])
