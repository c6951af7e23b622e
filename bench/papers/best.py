"""Which value of a block and column is the best beyond chance: paired on the same images and, of several training seeds, over
trainings, too, since bold speaks of a method; corrected for many comparisons."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import pandas as pd

from bench import metrics
from bench.compare import same_question
from bench.differences import LEVEL, chance
from bench.papers.cells import Cell
from bench.papers.layout import facts
from bench.per_image import named, stored
from bench.store import Record, Store

Place = TypeVar("Place", bound=Hashable)


def marked(store: Store, groups: Sequence[Mapping[Place, Cell]]) -> dict[Place, Cell]:
    """All cells of groups that answer one question, the significantly best of each marked."""
    found: dict[Place, Cell] = {}
    for group in groups:
        winner = _best(store, group)
        found |= {place: replace(cell, best=place == winner) for place, cell in group.items()}
    return found


def _best(store: Store, group: Mapping[Place, Cell]) -> Place | None:
    """The place of the cell that differs from every other of its group; None if none does, or it is flagged or untestable."""
    filled = {place: cell for place, cell in group.items() if cell.filled and not cell.deviation}
    if len(filled) < 2:
        return None
    ordered = sorted(filled, key=lambda place: filled[place].value, reverse=not next(iter(filled.values())).lower_is_better)
    first = filled[ordered[0]]
    if first.flagged:
        return None
    tests = [_p(store, first, filled[place]) for place in ordered[1:]]
    ps = [p for p in tests if p is not None]
    if len(ps) < len(tests) or max(metrics.holm(ps)) > LEVEL:
        return None
    return ordered[0]


def _p(store: Store, first: Cell, second: Cell) -> float | None:
    """That two cells are equally good, on the images and seeds of both; None without rows per image of the same question."""
    pairs = []
    others = {record.seed: record for record in second.records}
    for record in first.records:
        other = others.get(record.seed)
        if other is None or not same_question(record, other):
            return None
        sides = (_values(store, record, first), _values(store, other, second))
        if sides[0] is None or sides[1] is None:
            return None
        pairs.append((sides[0], sides[1]))
    if len(pairs) < len(others):
        return None
    return chance(pairs)


def _values(store: Store, record: Record, cell: Cell) -> pd.Series | None:
    """What the number of a cell is the mean of, image by image."""
    values = stored(store, record)
    return None if values is None else values.get(named(cell.answer.metric, facts(cell.answer.facts, cell.row)))
