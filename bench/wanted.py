"""Records that somebody asks for by suite, variant and evaluation; what is missing, with the commands that would make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from bench.registry import resolve
from bench.store import Record, Store
from bench.suites import Suite, load_suite


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
        return _label(self.spec)


@cache
def _label(spec: str) -> str:
    return resolve(spec, {})[0].label


@dataclass(frozen=True)
class Hole:
    """Something that is missing.

    Attributes:
        where: what it was wanted for, in words.
        need: the record.
        reason: why there is none.
    """

    where: str
    need: Need
    reason: str


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
        if one.status == "success":
            return f"the record is of version {one.suite['version']} of the suite"
        last = (one.error or "").strip().splitlines()[-1:]
        return ": ".join([one.status, *last])

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


def commands(holes: Sequence[Hole], budget: str) -> list[str]:
    """What would fill the holes: a command for each suite and set of evaluations, those that cannot be filled left out."""
    evals: dict[tuple[str, str], list[str]] = {}
    for hole in holes:
        if not hole.reason.startswith("skipped"):
            evals.setdefault((hole.need.suite, hole.need.spec), []).append(hole.need.eval)
    together: dict[tuple[str, str], list[str]] = {}
    for (suite, spec), names in evals.items():
        together.setdefault((suite, ",".join(dict.fromkeys(names))), []).append(spec)
    return [
        f"bench run --defense {','.join(specs)} --suite {suite} --only {names} --budget {budget}"
        for (suite, names), specs in together.items()
    ]
