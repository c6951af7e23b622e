"""What nobody looked at: signs of masked gradients that only some kinds of evaluations show, and the commands that would look.

Without it "no findings" reads the same for a network that was probed and for one that was not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from bench.store import Record

LOOKS = {
    "where gradients lead, unbounded eps, single noise draws": ("probe",),
    "images of other models": ("transfer", "black_box"),
}
"""What is looked at, and the kinds of evaluations of which one is enough. Adaptive attacks that have sources are as good as a
black box."""


@dataclass(frozen=True)
class Unseen:
    """Something that no finished evaluation of a variant tells of.

    Attributes:
        what: a key of :data:`LOOKS`.
        kinds: of evaluations that would.
        evaluations: those of the suite that make sense for the variant.
        reason: why there are none; empty if there are.
    """

    what: str
    kinds: tuple[str, ...]
    evaluations: tuple[str, ...]
    reason: str

    @property
    def words(self) -> str:
        """With what is missing in brackets."""
        return f"{self.what} (no {' or '.join(self.kinds)}{self.reason and f'; {self.reason}'})"


def unseen(records: Sequence[Record], done: Iterable[Record]) -> list[Unseen]:
    """What the evaluations of one variant, seed and budget did not look at.

    Args:
        records: all of them.
        done: the finished ones whose rows can be read.
    """
    finished = [record.eval["fields"] for record in done]
    had = {fields.get("kind") for fields in finished} | {"black_box" for fields in finished if fields.get("sources")}
    return [Unseen(what, kinds, *_would(records, kinds)) for what, kinds in LOOKS.items() if not had & set(kinds)]


def _would(records: Sequence[Record], kinds: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Evaluations of these kinds that a run can still finish, and why there are none."""
    from bench.suites import SuiteError, load_suite

    name, budget = records[0].suite["name"], records[0].suite["budget"]
    try:
        evals = load_suite(name, budget).evals
        asked = [own for own, one in evals.items() if one.kind in kinds or ("black_box" in kinds and one.others)]
    except SuiteError:  # a file of somebody's own: its records know no path
        return (), f"suite {name} is not known here"
    skipped = {record.eval["name"] for record in records if record.status == "skipped"}
    left = tuple(own for own in asked if own not in skipped)
    return left, "" if left else "skipped" if asked else f"suite {name} has none"


def looking(blind: Iterable[tuple[Record, Sequence[Unseen]]]) -> list[str]:
    """The commands that would look, by one evaluation where several would, each for all variants that it can be given for.

    Args:
        blind: any record of a variant, seed and budget, with what was not looked at there.
    """
    from bench.wanted import Need, commands

    found: list[str] = []
    for (budget, seed), group in groupby(sorted(blind, key=lambda one: _when(one[0])), key=lambda one: _when(one[0])):
        needs = [Need.of(own, name) for own, gaps in group for gap in gaps for name in gap.evaluations[:1]]
        found += commands(needs, budget, (seed,))
    return found


def _when(record: Record) -> tuple[str, int]:
    return record.suite["budget"], record.seed
