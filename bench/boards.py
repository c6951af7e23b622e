"""The leaderboard as plain data: a board for each suite, version, budget and source of data, and its rankings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import pandas as pd

from bench.cells import Column, in_words
from bench.diagnose import Diagnosis, diagnose
from bench.entries import Entry, Setting
from bench.ranking import Threat, ranks
from bench.store import Record, Store

Key = tuple[str, int, str, str]
"""Suite, version, budget and source of data: entries of different keys never compete."""

NOT_ATTACKED = "no AutoAttack and no adaptive attack at this radius, which others here withstood"
NOT_ASKED = "nothing was asked at this radius, or its rows per image are not there"
NOT_TRUE = "numbers that cannot all be true: see the findings"
"""Why an entry has no rank."""


@dataclass(frozen=True)
class Ranking:
    """What entries are ranked by: a value of every image.

    Attributes:
        column: of its mean.
        label: in words.
        values: by the number of the entry.
        without: number of the entry -> why it has no rank.
    """

    column: Column
    label: str
    values: Mapping[int, pd.Series]
    without: Mapping[int, str]

    @cached_property
    def places(self) -> dict[int, tuple[int, bool]]:
        """(rank, tied) by the number of the entry."""
        found = ranks({f"{number:06d}": own for number, own in self.values.items() if number not in self.without})
        return {int(name): place for name, place in found.items()}

    def telling(self) -> int:
        """How many ranks it tells apart."""
        return len({rank for rank, _ in self.places.values()})


@dataclass(frozen=True)
class Table:
    """What is shown as one table.

    Attributes:
        name, title, note: on the page.
        rows: numbers of the entries.
        rankings: what they may be ranked by, the default first.
        evaluation: of certificates, whose columns belong here.
    """

    name: str
    title: str
    note: str
    rows: list[int]
    rankings: list[Ranking]
    evaluation: str = ""

    def known(self, entry: Entry) -> list[Diagnosis]:
        """What is known of an entry's part in it, by seed."""
        return entry.side(self.evaluation) if self.rankings else list(entry.seeds)


def boards(stores: Sequence[Store]) -> tuple[list[Board], list[str]]:
    """All boards of some stores, those with rankings first, and what could not be read, in words.

    An entry is of one store; records of two stores never make one entry.
    """
    found: dict[Key, list[Entry]] = {}
    problems: list[str] = []
    for store in stores:
        records = store.records()
        problems += store.problems
        for key, own in groupby(sorted(records, key=_key), key=_key):
            for variant, some in groupby(sorted(own, key=_variant), key=_variant):
                try:
                    entry = Entry(store, diagnose(store, list(some)))
                    _ = entry.numbers, entry.settings  # whatever is wrong with a record shows here
                except Exception as error:  # a record may lie in any way, and must not take the page with it
                    problems.append(f"{key[0]}, {variant}: its records were left out ({type(error).__name__}: {error})")
                    continue
                found.setdefault(key, []).append(entry)
    made = [Board(key, tuple(entries)) for key, entries in sorted(found.items())]
    return sorted(made, key=lambda board: not (board.threats or board.settings)), problems


def _key(record: Record) -> Key:
    suite = record.suite
    return suite["name"], suite["version"], suite["budget"], record.hashes.get("data", "unknown source")


def _variant(record: Record) -> str:
    return str(record.defense["variant"])


@dataclass(frozen=True)
class Board:
    """Entries that answer the same questions about the same images."""

    key: Key
    entries: tuple[Entry, ...]

    @cached_property
    def strong(self) -> set[Threat]:
        """Where some entry was attacked adaptively or by all of AutoAttack."""
        return {threat for entry in self.entries for threat in entry.worst if entry.strongly(threat)}

    @cached_property
    def threats(self) -> list[Threat]:
        """Where attacks are compared: of each norm and classifier the strong ones, or all where there are none."""
        asked = {threat for entry in self.entries for threat in entry.worst}
        served = {(threat.norm, threat.of) for threat in self.strong}
        kept = [threat for threat in asked if threat in self.strong or (threat.norm, threat.of) not in served]
        return sorted(kept, key=lambda threat: threat.order)

    @cached_property
    def settings(self) -> list[Setting]:
        """How certificates were made, a ranking each."""
        return sorted(
            {own for entry in self.entries for own in entry.settings}, key=lambda own: (own.sigma, own.how, own.evaluation)
        )

    def members(self, setting: Setting | None = None) -> list[int]:
        """Numbers of the entries with certificates of a setting; without one, of those that were attacked."""
        known = [entry.is_attacked if setting is None else setting in entry.settings for entry in self.entries]
        return [number for number, member in enumerate(known) if member]

    def _under(self, threat: Threat) -> Ranking:
        each = {number: own for number, entry in enumerate(self.entries) if (own := entry.stands(threat)) is not None}
        strong = {number for number in each if self.entries[number].strongly(threat)}
        without = {number: NOT_ASKED for number in self.members() if number not in each}
        without |= {number: NOT_ATTACKED for number in each if strong and number not in strong}
        without |= {number: NOT_TRUE for number in each if self.entries[number].impossible()}
        return Ranking(Column("worst", threat), in_words(threat), each, without)

    def _certified(self, setting: Setting) -> list[Ranking]:
        """By average radius, where there is one, and by certified accuracy at every radius."""
        each = {number: self.entries[number].radii(setting) for number in self.members(setting)}
        found = dict.fromkeys(column for own in each.values() for column in own)
        impossible = {number: NOT_TRUE for number in each if self.entries[number].impossible(setting.evaluation)}
        made = []
        for column in sorted(found, key=lambda column: column.order):
            label = "average certified radius" if column.at is None else f"certified accuracy at radius {column.at:g}"
            values = {number: own[column] for number, own in each.items() if column in own}
            without = {number: NOT_ASKED for number in each if number not in values} | impossible
            made.append(Ranking(column, label, values, without))
        return made if made and made[0].column.kind == "acr" else _most_telling(made)

    def columns(self) -> list[Column]:
        """Every column with a number in it, without threats at which nothing is compared."""
        found = {column for entry in self.entries for column in entry.numbers}
        kept = [column for column in found if column.threat is None or column.threat in self.threats]
        return sorted(kept, key=lambda column: column.order)

    def tables(self) -> list[Table]:
        """The rankings, and a table of entries that are in none."""
        made = []
        attacked = self.members()
        if attacked:
            rankings = _most_telling([self._under(threat) for threat in self.threats], self.strong)
            made.append(Table("attack", "Accuracy under attack", "", attacked, rankings))
        for number, own in enumerate(self.settings):
            title = "Certified accuracy" + (f", σ = {own.sigma:g}" if own.sigma else "")
            note = f"ℓ₂ certificates: {own.how}"
            made.append(Table(f"certified-{number}", title, note, self.members(own), self._certified(own), own.evaluation))
        rest = set(range(len(self.entries))) - {number for table in made for number in table.rows}
        return [*made, Table("other", "Other evaluations", _OTHER, sorted(rest), [])] if rest else made

    def facts(self) -> dict[str, Any]:
        """What the heading and the filters need."""
        tasks = [record.task for entry in self.entries for record in entry.records]
        name, version, budget, data = self.key
        return {
            "suite": name,
            "version": version,
            "budget": budget,
            "data": data,
            "dataset": _told(task.get("dataset") for task in tasks),
            "architecture": _told(task.get("architecture") for task in tasks),
            "train_images": _told(task.get("train_images") for task in tasks),
            "epochs": _told(_epochs(task) for task in tasks),
        }


_OTHER = "Neither attacked nor certified by an evaluation that ranks; what was measured is in the details of each row."


def _epochs(task: Mapping[str, Any]) -> Any:
    recipe = task.get("recipe")
    return recipe.get("epochs") if isinstance(recipe, dict) else None


def _told(values: Iterable[Any]) -> str:
    """Different values in words."""
    return ", ".join(
        dict.fromkeys(f"{value:,}" if isinstance(value, int) else f"{value}" for value in values if value is not None)
    )


def _most_telling(rankings: list[Ranking], strong: Collection[Threat] = ()) -> list[Ranking]:
    """The one first that tells most entries apart, the last of several; a strong threat before others, and the network as it is
    before noisy ones. The others in their order."""
    if not rankings:
        return []

    def weight(one: Ranking) -> tuple[bool, bool, int]:
        threat = one.column.threat
        return threat in strong, threat is None or not threat.of, one.telling()

    first = max(reversed(rankings), key=weight)
    return [first, *(one for one in rankings if one is not first)]
