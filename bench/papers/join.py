"""Joins a layout, the published numbers and stored records: one budget, one suite a block of cells, holes where nothing is."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.diagnose import statuses
from bench.papers.best import marked
from bench.papers.cells import Cell, number
from bench.papers.layout import Layout, facts
from bench.registry import variant_of
from bench.store import Record, Store
from bench.suites import BUDGETS, unknown
from bench.wanted import FINISHED, suite

Label = tuple[Hashable, ...]
"""Values of the columns of published numbers that make a row, or a column."""

Where = tuple[Label, Label]
"""Row and column of a cell."""

Key = tuple[str, str, str, str]
"""Suite, budget, variant and evaluation."""


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper beside our records.

    Attributes:
        layout: what it is.
        budget: whose records it shows.
        cells: (row, column) -> cell; a place without one is empty in print, too.
        left_out: records that were not used, in words.
        options: of commands that would fill its holes where it was made, e.g. " --runs elsewhere".
    """

    layout: Layout
    budget: str
    cells: Mapping[Where, Cell]
    left_out: tuple[str, ...]
    options: str = ""

    @property
    def rows(self) -> list[Label]:
        """In the order of the print, label by label."""
        return _ordered(row for row, _ in self.cells)

    @property
    def columns(self) -> list[Label]:
        """In the order of the print, label by label."""
        return _ordered(column for _, column in self.cells)

    @property
    def filled(self) -> int:
        """Cells with a number of ours."""
        return sum(cell.filled for cell in self.cells.values())

    @property
    def seeds(self) -> tuple[int, ...]:
        """Training seeds of missing cells: the protocol's at the published size, else one, or three for a deviation."""
        if self.budget == "paper":
            return self.layout.seeds
        return self.layout.seeds[: 3 if any(cell.deviation for cell in self.cells.values()) else 1]


def _ordered(labels: Iterable[Label]) -> list[Label]:
    """Each label once, sorted by where the values of its columns came first."""
    once = list(dict.fromkeys(labels))
    ranks = [list(dict.fromkeys(values)) for values in zip(*once, strict=True)]
    return sorted(once, key=lambda label: [rank.index(value) for rank, value in zip(ranks, label, strict=True)])


class Shelf:
    """The records of a store that tables may show, by what they answer."""

    def __init__(self, store: Store, suites: Iterable[str]) -> None:
        self.store = store
        self.found: dict[Key, dict[int, Record]] = {}
        for name in dict.fromkeys(suites):
            for record in store.records(name):
                key = (name, record.suite["budget"], record.defense["variant"], record.eval["name"])
                self.found.setdefault(key, {})[record.seed] = record

    def answering(self, key: Key) -> tuple[list[Record], list[str]]:
        """Finished records of the suite as it is now, by seed, that were asked the same; and why others are left out."""
        every = [record for _, record in sorted(self.found.get(key, {}).items()) if record.status == "success"]
        now = [record for record in every if _is_current(key, record)]
        same = [record for record in now if _asked(record) == _asked(now[0])]
        notes = (
            [f"{'/'.join(key)}: {len(every) - len(now)} records of another version of the suite"]
            if len(now) < len(every)
            else []
        )
        notes += (
            [f"{'/'.join(key)}: {len(now) - len(same)} seeds that were asked otherwise than the first"]
            if len(same) < len(now)
            else []
        )
        return same, notes

    def instead(self, key: Key) -> str:
        """What there is in place of a finished record, in words; "" if there is nothing."""
        found = sorted(self.found.get(key, {}).items(), reverse=True)
        states = {record.status: record for _, record in found if record.status != "skipped" or _is_current(key, record)}
        for status, words in (("skipped", "makes no sense here"), ("error", "failed"), ("running", "not finished")):
            if status in states:
                text = (states[status].error or "").strip().splitlines()
                return f"{words}: {text[-1]}" if text else words
        return ""


def _is_current(key: Key, record: Record) -> bool:
    """Whether a record is of the suite as it is now."""
    return key[1] in BUDGETS and record.suite["version"] == suite(key[0], key[1]).version


def _asked(record: Record) -> tuple[Any, ...]:
    """What seeds of a mean must share."""
    return record.eval["fields"], record.task, record.hashes.get("images"), record.hashes.get("data")


def join(layout: Layout, store: Store, budget: str | None = None) -> PaperTable:
    """A table at a budget; by default the largest for which there is a record.

    Raises:
        ValueError: for an unknown budget.
    """
    shelf = _shelf(layout, store)
    return _reviewed(_chosen(layout, shelf, budget), store, shelf)


def filled(layout: Layout, store: Store) -> tuple[str, int, int]:
    """Of a table at the largest budget with records: the budget, its cells with a number, all cells."""
    table = _chosen(layout, _shelf(layout, store), None)
    return table.budget, table.filled, len(table.cells)


def _shelf(layout: Layout, store: Store) -> Shelf:
    return Shelf(store, (name for names in layout.suites.values() for name in names))


def _chosen(layout: Layout, shelf: Shelf, budget: str | None) -> PaperTable:
    if budget is not None and budget not in BUDGETS:
        raise ValueError(f"budget: {unknown(budget, BUDGETS)}")
    for one in [budget] if budget else reversed(BUDGETS):
        table = _at(layout, shelf, one)
        if table.filled or budget:
            return table
    return _at(layout, shelf, "quick")


def _at(layout: Layout, shelf: Shelf, budget: str) -> PaperTable:
    left_out: list[str] = []
    blocks: dict[Label, list[dict[str, Any]]] = {}
    for row in layout.cells:
        blocks.setdefault(_block(layout, row), []).append(row)
    chosen: dict[Label, str] = {}
    for block, rows in blocks.items():
        chosen[block], notes = _suite(layout, shelf, budget, rows)
        left_out += notes
    cells: dict[Where, Cell] = {}
    for row in layout.cells:
        cell = _cell(layout, chosen[_block(layout, row)], budget, row)
        key = _key(cell)
        records, notes = shelf.answering(key)
        left_out += notes
        pairs = [(record, found) for record in records if (found := number(record, cell.answer, row)) is not None]
        why = "" if pairs else "its record has no such number" if records else shelf.instead(key)
        taken = sum(record.status in FINISHED for record in shelf.found.get(key, {}).values()) > len(pairs)
        where = (tuple(row[name] for name in layout.rows), tuple(row[name] for name in layout.columns))
        kept, ours = tuple(own for own, _ in pairs), tuple(own for _, own in pairs)
        cells[where] = replace(cell, records=kept, ours=ours, why=why, taken=taken)
    return PaperTable(layout, budget, _beside_the_first(cells), tuple(dict.fromkeys(left_out)))


def _beside_the_first(cells: Mapping[Where, Cell]) -> dict[Where, Cell]:
    """Times, with the first of ours of their data set and column."""
    first: dict[tuple[str, Label], Cell] = {}
    found = {}
    for where, cell in cells.items():
        place = cell.row["dataset"], where[1]
        if cell.filled and not cell.in_percent and first.setdefault(place, cell) is not cell:
            found[where] = replace(cell, first=first[place])
        else:
            found[where] = cell
    return found


def _block(layout: Layout, row: Mapping[str, Any]) -> Label:
    """The cells that are compared: of a data set, and alike in the columns of the layout's ``block``."""
    return row["dataset"], *(row[name] for name in layout.block)


def _suite(layout: Layout, shelf: Shelf, budget: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """The suite with records for the most cells of a block, of equals the first, which is the paper's protocol; and which
    others have some."""
    answered = {
        name: sum(bool(shelf.answering(_key(_cell(layout, name, budget, row)))[0]) for row in rows)
        for name in layout.suites[rows[0]["dataset"]]
    }
    most = max(answered, key=lambda name: answered[name])
    alike = ", ".join(f"{name} {rows[0][name]}" for name in ("dataset", *layout.block))
    notes = [
        f"not shown: {count} of {len(rows)} cells by suite {name} ({alike}); {most} has {answered[most]}, "
        "and what is compared is of one suite"
        for name, count in answered.items()
        if count and name != most
    ]
    return most, notes


def _cell(layout: Layout, suite_name: str, budget: str, row: Mapping[str, Any]) -> Cell:
    spec, _ = layout.variant(row)
    return Cell(row, layout.answer(row), suite_name, budget, spec, variant_of(spec).label, layout.deviation)


def _key(cell: Cell) -> Key:
    return cell.suite, cell.budget, cell.label, cell.answer.eval


def _reviewed(table: PaperTable, store: Store, shelf: Shelf) -> PaperTable:
    """With the status of every cell's records, and the best ones marked."""
    shown = {(cell.suite, cell.budget, cell.label) for cell in table.cells.values() if cell.ours}
    about = [record for key, seeds in shelf.found.items() if key[:3] in shown for record in seeds.values()]
    used = [record for cell in table.cells.values() for record in cell.records]
    words = {id(record): status for record, status in zip(used, statuses(store, used, about), strict=True)}
    cells = {
        where: replace(cell, statuses=tuple(words[id(record)] for record in cell.records))
        for where, cell in table.cells.items()
    }
    groups: dict[Label, dict[Where, Cell]] = {}
    for where, cell in cells.items():
        asked = (cell.suite, cell.answer.eval, cell.answer.metric, *sorted(facts(cell.answer.facts, cell.row).items()))
        groups.setdefault((*_block(table.layout, cell.row), *asked), {})[where] = cell
    best = marked(store, list(groups.values()))
    return replace(table, cells={where: best[where] for where in cells})
