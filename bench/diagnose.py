"""What may be believed of a variant: its findings, which of them are signs of masked gradients, and a status in one word.

Findings are those that the records carry and those of :mod:`bench.invariants`; :mod:`bench.findings` says what each kind means
and :data:`STATUSES` what each status does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.findings import OTHER, SIGNS
from bench.invariants import inconsistencies
from bench.metrics import wilson
from bench.partial import StoreError
from bench.store import Finding, Record, Store
from bench.unseen import Unseen, looking, unseen

STATUSES = {
    "flagged": "a sign of masked gradients, or numbers that cannot all be true: read the findings before quoting any",
    "certified": "no flag, and a certificate by a sound estimator; it says nothing beyond its norm and radius",
    "adaptive": "no flag, and attacked through views that its defense names; that accuracy is the one to quote",
    "autoattack-ok": "no flag, and attacked by all of AutoAttack (or its version for models that draw noise)",
    "unreviewed": "no flag, but neither a certificate nor AutoAttack, or a defense that names no view to attack it through",
}
"""What each status means, in the order in which the first that fits is taken; but an adaptive evaluation without views makes a
row unreviewed, whatever AutoAttack says. Only finished evaluations count whose rows are there."""


CERTIFYING = ("certified", "votes", "variance")
"""Kinds of evaluations with certificates; "challenge" attacks them."""

WHOLE = ("standard", "plus", "rand")
"""Versions of AutoAttack with everything that they need; CEAR's subset lacks Square, which exposes masking."""


@dataclass(frozen=True)
class Diagnosis:
    """What is known of one variant, seed and budget of a suite.

    Attributes:
        records: all of them.
        findings: everything found; evidence names the evaluations that a finding is about.
    """

    records: tuple[Record, ...]
    findings: tuple[Finding, ...]

    @property
    def place(self) -> Place:
        """Whose it is."""
        return place(self.records[0])

    def flags(self, finding: Finding) -> bool:
        """Whether a finding makes the status "flagged"."""
        sign = SIGNS.get(finding.kind, OTHER)
        if not sign.flags or sign.least < 0:
            return sign.flags
        names = finding.evidence["evaluations"]
        images = min(record.eval["fields"].get("images", 1) for record in self.records if record.eval["name"] in names)
        count = finding.evidence.get("count", len(finding.evidence.get("images", ())))
        return wilson(min(count, images), images)[0] > sign.least

    def about(self, evaluations: Iterable[str]) -> Diagnosis:
        """The same of some of the evaluations: their records, and the findings that name one of them."""
        names = set(evaluations)
        records = tuple(record for record in self.records if record.eval["name"] in names)
        return Diagnosis(records or self.records[:0], tuple(f for f in self.findings if names & set(f.evidence["evaluations"])))

    @property
    def attacks(self) -> Diagnosis:
        """The same without what certifies."""
        return self.about(record.eval["name"] for record in self.records if not certifies(record))

    @property
    def certificates(self) -> Diagnosis:
        """The same of what certifies alone: masked gradients take nothing from a certificate."""
        return self.about(record.eval["name"] for record in self.records if certifies(record))

    @property
    def done(self) -> list[Record]:
        """Those that are finished and whose rows are there."""
        unread = {name for own in self.findings if own.kind == "unreadable_rows" for name in own.evidence["evaluations"]}
        return [record for record in self.records if record.status == "success" and record.eval["name"] not in unread]

    @cached_property
    def unseen(self) -> list[Unseen]:
        """What no evaluation looked at; nothing where there are certificates alone, whatever the gradients."""
        return unseen(self.records, self.done) if self.attacks.records else []

    @property
    def status(self) -> str:
        """A word of :data:`STATUSES`."""
        kinds = {record.eval["fields"].get("kind") for record in self.done}
        broken = any(record.eval["fields"].get("kind") == "challenge" and record.status == "error" for record in self.records)
        if any(self.flags(finding) for finding in self.findings):
            return "flagged"
        if kinds & set(CERTIFYING) and not broken:
            return "certified"
        if "adaptive" in kinds:
            return "unreviewed" if any(finding.kind == "unreviewed" for finding in self.findings) else "adaptive"
        robust = [record.eval["fields"] for record in self.done if record.eval["fields"].get("kind") == "robust"]
        whole = any(fields.get("attack") == "autoattack" and fields.get("version") in WHOLE for fields in robust)
        return "autoattack-ok" if whole else "unreviewed"


def certifies(record: Record) -> bool:
    """Whether a record is about certificates."""
    return record.eval["fields"].get("kind") in (*CERTIFYING, "challenge")


Place = tuple[str, str, str, int]
"""Suite, budget, variant and seed."""


def place(record: Record) -> Place:
    """Whose record it is."""
    return record.suite["name"], record.suite["budget"], record.defense["variant"], record.seed


def diagnose(store: Store, records: Iterable[Record]) -> list[Diagnosis]:
    """A diagnosis of every variant, seed and budget that has records, in the order of their places."""
    found = []
    for _, group in groupby(sorted(records, key=place), key=place):
        own = tuple(group)
        carried = [_carried(record, finding) for record in own for finding in record.findings]
        found.append(Diagnosis(own, (*carried, *inconsistencies(store, own))))
    return found


def statuses(store: Store, records: Sequence[Record], every: Iterable[Record]) -> list[str]:
    """What may be believed of each record's numbers: the status of the certificates or of the attacks of its variant and seed,
    whose other records are among ``every``."""
    places = {place(record) for record in records}
    known = {own.place: own for own in diagnose(store, [record for record in every if place(record) in places])}
    sides = [(known[place(record)], certifies(record)) for record in records]
    return [(own.certificates if certified else own.attacks).status for own, certified in sides]


def _carried(record: Record, finding: Finding) -> Finding:
    """A record's finding, with the evaluation that it is about."""
    return finding.model_copy(update={"evidence": {"evaluations": [record.eval["name"]], **finding.evidence}})


FORMATS = ("text", "json")

Told = tuple[Diagnosis, tuple[Finding, ...]]
"""A diagnosis, and those of its findings that were asked for."""


def read(path: Path) -> tuple[list[Told], list[str]]:
    """The diagnoses of a place in a run folder, and files that could not be read, in words.

    Args:
        path: RUNS/SUITE, RUNS/SUITE/VARIANT, .../BUDGET, .../seedK, or one record's .json. Of a record the findings are told
            that are about it; the other evaluations of its network are what it is compared with.

    Raises:
        ValueError: if there is no such place, or no record in it.
    """
    if not path.exists():
        raise ValueError(f"there is no {path}; {_ALLOWED}")
    place = path.resolve()
    folder = place.parent if place.is_file() else place
    levels = range(0 if folder.name.startswith("seed") else 1, len(_PATTERNS))
    level = next((up for up in levels if any(folder.glob(_PATTERNS[up]))), None)
    if level is None or (place.is_file() and (level or place.suffix != ".json")):
        raise ValueError(f"{path} holds no records; {_ALLOWED}")
    root = folder.parents[3 - level] if level < 4 else folder
    store, records, problems = Store(root), [], []
    for file in sorted(folder.glob(_PATTERNS[level])):
        try:
            record = store.read(file)
        except StoreError as error:
            problems.append(str(error))
            continue
        if store.path(record) == file:
            records.append(record)
        else:
            problems.append(f"{file} belongs to {store.path(record)}; it was left out")
    names = {place.stem} if place.is_file() else {record.eval["name"] for record in records}
    if not any(record.eval["name"] in names for record in records):
        raise ValueError("; ".join(problems))
    return [(found, found.about(names).findings) for found in diagnose(store, records)], problems


_PATTERNS = ("*.json", "seed*/*.json", "*/seed*/*.json", "*/*/seed*/*.json", "*/*/*/seed*/*.json")
"""Where records lie below a seed, a budget, a variant, a suite and a run folder."""

_ALLOWED = "give RUNS/SUITE, RUNS/SUITE/VARIANT, .../BUDGET, .../seedK, or one record's .json"


def render(told: Sequence[Told], fmt: str = "text") -> str:
    """Diagnoses as text or JSON.

    Raises:
        ValueError: for another format.
    """
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt!r}; known are {', '.join(FORMATS)}")
    if fmt == "json":
        return json.dumps([_raw(*one) for one in told], indent=1, allow_nan=False)
    commands = looking((diagnosis.records[0], diagnosis.unseen) for diagnosis, _ in told)
    lines = [line for one in told for line in _lines(*one)]
    return "\n".join([*lines, *(["What would look:"] if commands else []), *commands])


def _raw(diagnosis: Diagnosis, findings: Iterable[Finding]) -> dict[str, Any]:
    place = dict(zip(("suite", "budget", "defense", "seed"), diagnosis.place, strict=True))
    kept = [{**own.model_dump(), "flags": diagnosis.flags(own), "means": SIGNS.get(own.kind, OTHER).text} for own in findings]
    words = {"status": diagnosis.status, "of": {side: own.status for side, own in _sides(diagnosis).items()}}
    gaps, commands = [asdict(own) for own in diagnosis.unseen], looking([(diagnosis.records[0], diagnosis.unseen)])
    return {**place, **words, "findings": kept, "not_looked_at": gaps, "commands": commands}


def _sides(diagnosis: Diagnosis) -> dict[str, Diagnosis]:
    """Attacks and certificates, if there are both."""
    both = {"attacks": diagnosis.attacks, "certificates": diagnosis.certificates}
    return both if all(own.records for own in both.values()) else {}


def _lines(diagnosis: Diagnosis, findings: Sequence[Finding]) -> Iterable[str]:
    suite, budget, variant, seed = diagnosis.place
    words = "; ".join(f"{side}: {own.status}" for side, own in _sides(diagnosis).items())
    yield f"{suite}, {budget}, {variant}, seed {seed}: {diagnosis.status}" + (f" ({words})" if words else "")
    for finding in sorted(findings, key=lambda own: not diagnosis.flags(own)):
        mark = "!" if diagnosis.flags(finding) else "-"
        evaluations = ", ".join(finding.evidence["evaluations"])
        yield f"  {mark} {finding.kind} ({SIGNS.get(finding.kind, OTHER).text}; {evaluations}): {finding.detail}"
        shown = {name: value for name, value in finding.evidence.items() if name not in ("evaluations", "images", "count")}
        images = finding.evidence.get("images", [])
        if images:
            more = finding.evidence.get("count", len(images)) - len(images)
            shown["images"] = ", ".join(map(str, images)) + (f" and {more} more" if more > 0 else "")
        if shown:
            yield "      " + "; ".join(f"{name}: {value}" for name, value in shown.items())
    if not findings:
        yield "    no findings"
    if diagnosis.unseen:
        yield f"  ? not looked at: {'; '.join(gap.words for gap in diagnosis.unseen)}"
