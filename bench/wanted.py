"""Records that somebody asks for by suite, variant and evaluation; what is missing, with the commands that would make it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from bench.registry import variant_of
from bench.store import Record, Store
from bench.suites import Suite, available, load_suite


@cache
def suite(name: str, budget: str) -> Suite:
    """A suite, read once."""
    return load_suite(name, budget)


@dataclass(frozen=True)
class Need:
    """A record that is asked for, of any training seed.

    Attributes:
        suite: its name, or its TOML file.
        eval: name.
        spec: the variant as on the command line.
    """

    suite: str
    spec: str
    eval: str

    @property
    def variant(self) -> str:
        """Its label, under which records are stored."""
        return variant_of(self.spec).label

    @classmethod
    def of(cls, record: Record, evaluation: str = "") -> Need:
        """A stored record, or another evaluation of its variant, and of no other of the suite's sweep.

        Where a user's files are a record does not know.
        """
        name, label, fields = record.suite["name"], record.defense["variant"], record.defense.get("fields", {})
        spec = f"FILE.py:{label}" if "file_hash" in record.defense else label
        known = name in available()
        for field, values in (suite(name, record.suite["budget"]).sweep if known else {}).items():
            if field in fields and values != (fields[field],) and not re.search(f"[@,]{field}=", label):
                spec += f"{',' if '@' in spec else '@'}{field}={fields[field]}"
        return cls(name if known else "FILE.toml", spec, evaluation or record.eval["name"])


@dataclass(frozen=True)
class Hole:
    """Something that is missing.

    Attributes:
        where: what it was wanted for, in words.
        need: the record.
        reason: why there is none.
        taken: whether a finished record that does not answer has its place.
    """

    where: str
    need: Need
    reason: str
    taken: bool = False

    @property
    def fillable(self) -> bool:
        """Whether a run would help; what was skipped makes no sense."""
        return not self.reason.startswith("skipped")


FINISHED = ("success", "skipped")
"""Statuses of records that a run leaves as they are."""

AGAIN = "Ours is made again, networks and all, by:"
"""Before the commands of :func:`again`."""


class Shelf:
    """The records of a store at one budget, by what is asked. Those of another version of a suite do not count."""

    def __init__(self, store: Store, budget: str) -> None:
        self.store, self.budget = store, budget
        self._suites: dict[str, Suite] = {}
        self._records: dict[str, dict[tuple[str, str], list[Record]]] = {}

    def of(self, need: Need) -> list[Record]:
        """Finished records, a seed each, in the order of the seeds."""
        version = self._suite(need).version
        return [r for r in self._all(need) if r.status == "success" and r.suite["version"] == version]

    def reason(self, need: Need) -> str:
        """Why :meth:`of` has nothing."""
        found = self._all(need)
        if not found:
            return "no record"
        one = found[0]
        if one.status in FINISHED and one.suite["version"] != self._suite(need).version:
            return f"the record is of version {one.suite['version']} of the suite"
        last = (one.error or "").strip().splitlines()[-1:]
        return ": ".join([one.status, *last])

    def taken(self, need: Need) -> bool:
        """Whether a finished record has its place, be it that of an older question."""
        return any(record.status in FINISHED for record in self._all(need))

    def every(self, suite: str) -> list[Record]:
        """All records of a suite of which something was asked."""
        return [record for own in self._records.get(suite, {}).values() for record in own]

    def _suite(self, need: Need) -> Suite:
        if need.suite not in self._suites:
            self._suites[need.suite] = load_suite(need.suite)
        return self._suites[need.suite]

    def _all(self, need: Need) -> list[Record]:
        name = self._suite(need).name
        if name not in self._records:
            shelf = self._records[name] = {}
            for record in self.store.records(name):
                if record.suite["budget"] == self.budget:
                    shelf.setdefault((record.defense["variant"], record.eval["name"]), []).append(record)
        return sorted(self._records[name].get((need.variant, need.eval), []), key=lambda record: record.seed)


def commands(
    needs: Iterable[Need], budget: str, seeds: Sequence[int] = (), taken: Collection[Need] = (), more: str = ""
) -> list[str]:
    """What makes records: a command for each suite and set of evaluations, of some training seeds or of the usual one.

    Args:
        taken: those whose place has a finished record that does not answer. A run would leave it, or refuse, so that they have
            commands of their own that move it aside.
        more: further options.
    """
    evals: dict[tuple[str, str, str], list[str]] = {}
    for need in needs:
        evals.setdefault((need.suite, need.spec, " --fresh" if need in taken else ""), []).append(need.eval)
    together: dict[tuple[str, str, str], list[str]] = {}
    for (suite, spec, fresh), names in evals.items():
        together.setdefault((suite, ",".join(dict.fromkeys(names)), fresh), []).append(spec)
    told = f"--budget {budget}" + (f" --seeds {','.join(map(str, seeds))}" if seeds else "")
    return [
        f"bench run --defense {','.join(specs)} --suite {suite} {told} --only {names}{fresh}{more}"
        for (suite, names, fresh), specs in together.items()
    ]


def again(records: Iterable[Record]) -> list[str]:
    """What makes finished records anew in a folder without them, by :func:`commands` for each budget and set of training seeds.

    Nothing does where the suite has been changed since.
    """
    seeds: dict[tuple[str, Need], set[int]] = {}
    for record in records:
        name, budget = record.suite["name"], record.suite["budget"]
        same = name not in available() or suite(name, budget).version == record.suite["version"]
        if record.status == "success" and same:
            seeds.setdefault((budget, Need.of(record)), set()).add(record.seed)
    together: dict[tuple[str, tuple[int, ...]], list[Need]] = {}
    for (budget, need), own in seeds.items():
        together.setdefault((budget, tuple(sorted(own))), []).append(need)
    return [command for (budget, own), needs in together.items() for command in commands(needs, budget, own)]
