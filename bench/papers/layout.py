"""How a table of a paper is laid out, and which of our numbers answer which of its cells; read strictly from TOML."""

from __future__ import annotations

import re
import string
import tomllib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field, model_validator

from bench import published
from bench.registry import variant_of
from bench.store import Strict
from bench.suites import in_words, load_suite, unknown

TABLES = Path(__file__).parent.parent.parent / "leaderboards" / "tables"

Value = float | str

CELL = (
    "dataset", "architecture", "defense", "members", "eat", "noise", "sigma", "metric", "threat", "norm", "attack", "source",
    "place", "eps", "radius",
)  # fmt: skip
"""Columns of published numbers that say what a cell is about."""


class Choice(Strict):
    """What cells an entry is for: every column has the value, or one of the values. None: all cells."""

    of: dict[str, Value | tuple[Value, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Choice:
        for name in self.of:
            if name not in CELL:
                raise ValueError(f"of: {unknown(name, CELL)}")
        return self

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a published number is one of them."""
        return all(_same(row[name], wanted) for name, wanted in self.of.items())


def _same(value: Value, wanted: Value | tuple[Value, ...]) -> bool:
    return any(_same(value, one) for one in wanted) if isinstance(wanted, tuple) else value == wanted


class Run(Choice):
    """Which variant a published defense is.

    Attributes:
        run: as on the command line, with columns of the published number in braces: "randsmooth@sigma={sigma}".
        remark: what differs from the paper's.
    """

    run: str
    remark: str = ""


class Beside(Strict):
    """Another number of the same record, told beside the one that answers.

    Attributes:
        words: what it is.
        metric, facts: which, as in :class:`Answer`.
    """

    words: str
    metric: str
    facts: dict[str, Value] = Field(default_factory=dict)


class Answer(Choice):
    """Which number of our records answers a kind of cells.

    Attributes:
        eval: the evaluation.
        metric: of its record, or a time of :data:`bench.papers.cells.TIMES`.
        facts: what the number must say of itself (eps, radius, denominator, source, target); "{eps}" is what the paper's does.
        complement: the share that is left to 1, as a success rate is of an accuracy among the images that were right.
        scale: what ours is multiplied with, after fractions have become percent.
        remark: how the protocols differ, and what of ours was chosen where several could answer.
        beside: further numbers of the record.
    """

    eval: str
    metric: str
    facts: dict[str, Value] = Field(default_factory=dict)
    complement: bool = False
    scale: float = 1.0
    remark: str = ""
    beside: tuple[Beside, ...] = ()


class Layout(Strict):
    """A table.

    Attributes:
        name: of the file.
        published: stem of the file of published numbers.
        title, caption: what it is; a stranger understands them.
        rows, columns: columns of the published numbers that lay out the table.
        block: columns that cells of a data set must share, besides the question to our records, for the best of them to be
            looked for; those that share them are answered by the same suite.
        deviation: whether the published numbers are deviations over training seeds.
        where: which of the published numbers it shows; all unless given.
        suites: data set -> the suite of the paper's protocol, and others that answer blocks of which they have more.
        seeds: training seeds of the paper's protocol.
        runs: which variants published defenses are; the first that fits.
        answers: what answers the cells; the first that fits.
        words: column of published numbers -> value -> how it is shown; on top of :data:`WORDS`.
        remarks: what is known about the table as a whole.
    """

    name: str
    published: str
    title: str
    caption: str
    rows: tuple[str, ...] = Field(min_length=1)
    columns: tuple[str, ...] = Field(min_length=1)
    block: tuple[str, ...] = ()
    deviation: bool = False
    where: Choice = Choice()
    suites: dict[str, tuple[str, ...]]
    seeds: tuple[int, ...] = (0, 1, 2)
    runs: tuple[Run, ...] = Field(min_length=1)
    answers: tuple[Answer, ...] = Field(min_length=1)
    words: dict[str, dict[str, str]] = Field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Layout:
        known = sorted(set(published.frame().file))
        if self.published not in known:
            raise ValueError(f"published: {unknown(self.published, known)}")
        for place in ("rows", "columns", "block", "words"):
            for name in getattr(self, place):
                if name not in CELL:
                    raise ValueError(f"{place}: {unknown(name, CELL)}")
        for row in self.cells:
            self._check_cell(row)
        return self

    def _check_cell(self, row: Mapping[str, Any]) -> None:
        """Refuse a table that leaves a published number without its variant, suite or answer, or has two in one place."""
        told = ", ".join(f"{name} {row[name]}" for name in CELL if row[name] != "")
        for place in ("runs", "answers"):
            if not any(one.fits(row) for one in getattr(self, place)):
                raise ValueError(f"{place}: nothing fits the published number with {told}")
        if row["dataset"] not in self.suites:
            raise ValueError(f"suites: {row['dataset']} is missing, which the published numbers have")

    @cached_property
    def cells(self) -> list[dict[str, Any]]:
        """The published numbers, in the order of the print; numbers that they do not have are "".

        Raises:
            ValueError: if two of them would share a place.
        """
        frame = published.frame()
        frame = frame[frame.file == self.published].astype(object)
        rows: list[dict[str, Any]] = [
            {str(name): "" if pd.isna(value) else value for name, value in row.items()} for row in frame.to_dict("records")
        ]
        rows = [row for row in rows if self.where.fits(row)]
        places = [tuple(row[name] for name in (*self.rows, *self.columns)) for row in rows]
        for place in places:
            if places.count(place) > 1:
                raise ValueError(f"rows and columns: two published numbers at {place}; lay out by a further column")
        return rows

    @property
    def protocol(self) -> Layout:
        """The same, answered by the suites of the paper's protocol alone."""
        return self.model_copy(update={"suites": {data: names[:1] for data, names in self.suites.items()}})

    def variant(self, row: Mapping[str, Any]) -> tuple[str, Run]:
        """What is run for a published number, as on the command line, and why."""
        run = next(one for one in self.runs if one.fits(row))
        return _filled(run.run, row), run

    def answer(self, row: Mapping[str, Any]) -> Answer:
        """What answers a published number."""
        return next(one for one in self.answers if one.fits(row))


def facts(given: Mapping[str, Value], row: Mapping[str, Any]) -> dict[str, Value]:
    """Facts with the published number's own in place of braces."""
    return {name: _taken(value, row) for name, value in given.items()}


def _taken(value: Value, row: Mapping[str, Any]) -> Value:
    """A value, or the published number's own where it is a column in braces."""
    if isinstance(value, str) and value.startswith("{") and value.endswith("}"):
        own: Value = row[value[1:-1]]
        return own
    return value


def _filled(template: str, row: Mapping[str, Any]) -> str:
    """A variant with the published number's columns in place of braces; whole numbers without a point."""
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    values = {name: f"{row[name]:g}" if isinstance(row[name], float) else row[name] for name in names}
    return template.format(**values)


def available() -> list[str]:
    """Names of the tables that come with the project, by paper and number."""
    names = [path.stem for path in TABLES.glob("*.toml")]
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def load(name: str, others: Sequence[str] = ()) -> Layout:
    """A table by name.

    Args:
        others: what the caller knows besides, to be suggested to who mistypes it.

    Raises:
        ValueError: for an unknown table, a key that does not exist, or a name that nothing goes by; says where.
    """
    path = TABLES / f"{name}.toml"
    if not path.is_file():
        raise ValueError(f"table: {unknown(name, [*others, *available()])}")
    with in_words(path.name):
        layout = Layout(name=name, **_read(path))
        check(layout)
        return layout


def _read(path: Path) -> dict[str, Any]:
    """The content of a file, key by key on top of the table that it extends."""
    raw = tomllib.loads(path.read_text())
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    if parent not in available():
        raise ValueError(f"extends: {unknown(str(parent), available())}")
    return {**_read(TABLES / f"{parent}.toml"), **raw}


def check(layout: Layout, budget: str = "quick") -> None:
    """Refuse variants, suites and evaluations that do not exist, and facts that no number of an evaluation can have.

    Raises:
        ValueError: names which, and what there is.
    """
    suites = {name: load_suite(name, budget) for names in layout.suites.values() for name in names}
    for row in layout.cells:
        variant_of(layout.variant(row)[0])
        answer = layout.answer(row)
        for name in layout.suites[row["dataset"]]:
            evals = suites[name].evals
            if suites[name].dataset != row["dataset"]:
                raise ValueError(f"suites: {name} is about {suites[name].dataset}, the published number about {row['dataset']}")
            if answer.eval not in evals:
                raise ValueError(f"answers: {name} has no evaluation: {unknown(answer.eval, evals)}")
            asked = evals[answer.eval]
            norm = getattr(asked, "norm", None)
            if row["norm"] and norm is not None and norm != row["norm"]:
                raise ValueError(f"answers: {name}: {answer.eval} is in {norm}, the published number in {row['norm']}")
            eps = facts(answer.facts, row).get("eps")
            if eps is not None and not any(abs(float(eps) - own) < 1e-9 for own in getattr(asked, "eps", ())):
                raise ValueError(f"answers: {name}: {answer.eval} is not asked at eps {eps}")
