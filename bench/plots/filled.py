"""The records behind a declared figure: of each panel, what of it is missing, and the words about it all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from bench.columns import certificate, crafted
from bench.diagnose import statuses
from bench.figures import VIEWS, Curves, Figure, View
from bench.plots.panels import values
from bench.plots.style import INTERVALS, OVER_IMAGES, sources, suites
from bench.store import Record, Store
from bench.verdicts import UNREADABLE
from bench.wanted import Hole, Shelf, commands

ROWS = ("kernels", "kernel_changes", "layer_changes")
"""Panels that are drawn from rows, which a store may lack."""


@dataclass(frozen=True)
class Filled:
    """A panel with its records.

    Attributes:
        panel: what was asked.
        suite: the one that the records answer.
        found: of each line, by label, its records, a seed each, by their place on the axis where there is one.
        holes: what is missing.
        empty: labels of the lines with nothing to draw.
    """

    panel: Curves | View
    suite: str
    found: dict[str, dict[float | None, list[Record]]]
    holes: list[Hole]
    empty: list[str]

    @property
    def records(self) -> list[Record]:
        return [record for places in self.found.values() for records in places.values() for record in records]

    @property
    def asked(self) -> int:
        """How many results the panel is made of."""
        return sum(len(places) for places in self.found.values())

    @property
    def partly(self) -> list[str]:
        """Labels of the lines that lack some of their places."""
        return [label for label, places in self.found.items() if label not in self.empty and not all(places.values())]


def fill(panel: Curves | View, shelf: Shelf) -> Filled:
    """A panel with the records of that of its suites which has them for the most lines, the first of equals."""
    return max((_of_suite(panel, suite, shelf) for suite in panel.suite), key=lambda one: len(one.found) - len(one.empty))


def _of_suite(panel: Curves | View, suite: str, shelf: Shelf) -> Filled:
    needs, holes, empty = panel.needs(suite), [], []
    found = {label: {x: shelf.of(need) for x, need in places.items()} for label, places in needs.items()}
    for label, places in found.items():
        where = panel.title if isinstance(panel, View) else f"{panel.title}: {label}"
        lost = "" if _drawable(panel, places, shelf) else _LOST[panel.kind in ROWS]
        for x, need in needs[label].items():
            reason = lost if places[x] else shelf.reason(need)
            holes += [Hole(where, need, reason, shelf.taken(need))] if reason else []
        empty += [label] if lost else []
    return Filled(panel, suite, found, holes, empty)


_LOST = {False: "the record has no such number", True: "the record's rows are missing or damaged"}


def _drawable(panel: Curves | View, places: dict[float | None, list[Record]], shelf: Shelf) -> bool:
    """Whether there is anything to draw."""
    if isinstance(panel, Curves):
        return bool(values(panel, places))
    records = [record for records in places.values() for record in records]
    return bool(records) and (panel.kind not in ROWS or _readable(shelf.store, records[0]))


def _readable(store: Store, record: Record) -> bool:
    try:
        return len(store.rows(record)) > 0
    except UNREADABLE:
        return False


def doubts(filled: Sequence[Filled], shelf: Shelf) -> list[str]:
    """Whose numbers are flagged, a sentence at most."""
    records = list({id(record): record for one in filled for record in one.records}.values())
    names = dict.fromkeys(_suite(record) for record in records)
    words = statuses(shelf.store, records, [record for name in names for record in shelf.every(name)])
    flagged = [record for record, status in zip(records, words, strict=True) if status == "flagged"]
    whose = {name: [r.defense["variant"] for r in flagged if _suite(r) == name] for name in names}
    told = [f"{', '.join(dict.fromkeys(variants))} in {name}" for name, variants in whose.items() if variants]
    return [f"flagged, to be read in bench diagnose before their numbers are quoted: {'; '.join(told)}"] if told else []


def facts(filled: Sequence[Filled]) -> list[str]:
    """What was measured on what, a sentence a suite, of everything that is shown; of several suites with their panels."""
    records = sorted((record for one in filled for record in one.records), key=_suite)
    told = {name: _fact(list(group)) for name, group in groupby(records, key=_suite)}
    if len(told) > 1:
        places = {name: [one.panel.title for one in filled if name in map(_suite, one.records)] for name in told}
        told = {name: f"{fact}; shown in: {' | '.join(dict.fromkeys(places[name]))}" for name, fact in told.items()}
    shown = {one.panel.kind for one in filled if one.records}
    if "curves" in shown:
        return [*told.values(), INTERVALS]
    return [*told.values(), *([OVER_IMAGES] if any(VIEWS[kind] == "variance" for kind in shown) else [])]


def _suite(record: Record) -> str:
    return str(record.suite["name"])


def _fact(records: list[Record]) -> str:
    """What was measured on what, of the records of one suite."""
    networks = ", ".join(sorted({record.architecture for record in records}))
    counts = sorted({r.eval["fields"].get("images", 0) for r in records if r.eval["fields"].get("kind") != "kernels"})
    images = f"{'/'.join(map(str, counts))} images of " if counts else ""
    ways = sorted({way for record in records if (way := _way(record))})
    seeds = len({record.seed for record in records})
    trained = f", {seeds} training seeds" if seeds > 1 else ""
    return "; ".join([f"{suites(records)}: {networks}{trained}, {images}{sources(records)}", *ways])


def _way(record: Record) -> str:
    """How a record's numbers were made, in words."""
    fields = record.eval["fields"]
    if fields.get("kind") == "variance":
        return "n0 = {n0} draws to select (not in k n), alpha = {alpha:g}".format(**fields)
    if "estimator" in fields:
        return f"{record.eval['name']}: {certificate(record)}"
    return f"{record.eval['name']}: {crafted(record)}" if "attack" in fields else ""


def explained(figure: Figure) -> list[str]:
    """Caption and remarks, a line each."""
    return [" ".join(text.split()) for text in (figure.caption, *figure.remarks)]


def holes(filled: Sequence[Filled]) -> list[Hole]:
    """Everything that is missing."""
    return [hole for one in filled for hole in one.holes]


def missing(gaps: Sequence[Hole], budget: str, options: str) -> Iterator[str]:
    """The holes, and the commands that would fill them, with further options."""
    if gaps:
        yield "\n".join([f"Missing at budget {budget}:", *(f"- {hole.where}: {hole.reason}" for hole in gaps)])
    fills = commands(
        (hole.need for hole in gaps if hole.fillable), budget, taken=[hole.need for hole in gaps if hole.taken], more=options
    )
    if fills:
        yield "\n".join(["What would make it:", *fills])
