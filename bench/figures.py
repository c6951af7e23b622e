"""A figure file: which stored numbers of which suites stand on which axes, read strictly from TOML; it contains no code.

A figure is a page of panels. A panel of kind "curves" has a line a defense; every other kind shows one defense, drawn as the
plots of a suite draw it. Panels ask for records by suite, variant and evaluation: see :mod:`bench.wanted`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from bench.registry import variant_of
from bench.store import Metric, Strict
from bench.suites import SUITES, Suite, in_words, load_suite, unknown
from bench.wanted import Need

FIGURES = SUITES.parent / "figures"

VIEWS = {
    "margin": "variance",
    "acr": "variance",
    "samples": "variance",
    "transfer": "transfer",
    "kernels": "kernels",
    "depth": "activations",
    "kernel_changes": "activations",
    "layer_changes": "activations",
}
"""Kinds of panels of one defense, and the kind of evaluation that each shows."""

METRICS = {
    "certified_accuracy": "certified accuracy (%)",
    "robust_accuracy": "accuracy under attack (%)",
    "black_box_accuracy": "accuracy under attack (%)",
}
"""What curves may show, and the name of its axis."""


class FigureError(ValueError):
    """A figure that does not exist or cannot be used; says which key, what was given and what is allowed."""


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class Line(Strict):
    """A line of curves.

    Attributes:
        label: in the legend; equal labels look equal on a whole page.
        defense: a variant as on the command line; for curves without an ``x``, of each place on the axis.
        eval: instead of the panel's.
        fields: "field=value" that every ``defense`` of the panel gets, instead of the panel's.
        baseline: grey and dashed.
        published: facts of the printed numbers, beside or instead of the panel's; see ``Curves.published``.
    """

    label: str
    defense: str | dict[float, str]
    eval: str = ""
    fields: str = ""
    baseline: bool = False
    published: dict[str, str | float] = Field(default_factory=dict)

    def specs(self, fields: str) -> dict[float | None, str]:
        """The variants, by their place on the axis where there is one."""
        added = self.fields or fields
        found: list[tuple[float | None, str]] = (
            [(None, self.defense)] if isinstance(self.defense, str) else [*self.defense.items()]
        )
        return {x: f"{spec}{',' if '@' in spec else '@'}{added}" if added else spec for x, spec in found}


class Panel(Strict):
    """What every panel says.

    Attributes:
        title: above it.
        suite: whose records; of several suites the first of those that have records of the most lines.
        eval: name of the evaluation in that suite.
    """

    title: str
    suite: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(min_length=1)
    eval: str


class Curves(Panel):
    """Numbers against a radius, a budget or whatever the lines say, a line a defense.

    Attributes:
        metric: a key of :data:`METRICS`.
        x: the field of a number that is on the axis, "radius" or "eps"; empty where lines have a variant for every place.
        xlabel: name of the axis; needed without ``x``.
        log: a logarithmic axis.
        select: other facts of the numbers, such as eps = 1.0.
        fields: see :class:`Line`.
        lines: from below to above; the figure's own unless given.
        published: facts of the printed numbers, by column of :data:`bench.published.COLUMNS`; "" asks that a paper states
            nothing. The defense is the line's own unless given. Empty: none are drawn.
    """

    kind: Literal["curves"]
    metric: Literal["certified_accuracy", "robust_accuracy", "black_box_accuracy"]
    x: Literal["radius", "eps", ""] = ""
    xlabel: str = ""
    log: bool = False
    select: dict[str, str | float] = Field(default_factory=dict)
    fields: str = ""
    lines: tuple[Line, ...] = Field(min_length=1)
    published: dict[str, str | float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Curves:
        for name in self.select:
            if name not in Metric.model_fields:
                raise ValueError(f"select: {unknown(name, Metric.model_fields)}")
        for one in self.lines:
            if isinstance(one.defense, str) != bool(self.x):
                wanted = "one variant" if self.x else "a variant for every place on the axis, since the panel gives no x"
                raise ValueError(f"line {one.label!r}: defense must be {wanted}")
        if not self.x and not self.xlabel:
            raise ValueError("xlabel: needed without x")
        return self

    def needs(self, suite: str) -> dict[str, dict[float | None, Need]]:
        """Of each line, by label, its records, by their place on the axis where there is one."""
        return {
            own.label: {x: Need(suite, spec, own.eval or self.eval) for x, spec in own.specs(self.fields).items()}
            for own in self.lines
        }

    def facts(self, line: Line) -> dict[str, Any] | None:
        """What to ask :func:`bench.published.known` for a line; None where nothing is to be drawn."""
        if not self.published and not line.published:
            return None
        name = variant_of(next(iter(line.specs(self.fields).values()))).name
        given = {"defense": name, "metric": METRIC_PRINTED.get(self.metric, self.metric), **self.published, **line.published}
        return {key: None if value == "" else value for key, value in given.items()}


METRIC_PRINTED = {"black_box_accuracy": "robust_accuracy"}
"""What papers' numbers are called where ours have another name."""


class View(Panel):
    """One defense, as the plots of a suite show it; of several seeds the first, but for transfer and depth, which are means.

    Attributes:
        defense: a variant as on the command line.
        layer: of the panels of changes of activations: first, middle or last of the network.
    """

    kind: Literal["margin", "acr", "samples", "transfer", "kernels", "depth", "kernel_changes", "layer_changes"]
    defense: str
    layer: Literal["", "first", "middle", "last"] = ""

    @model_validator(mode="after")
    def _check(self) -> View:
        if self.kind.endswith("_changes") != bool(self.layer):
            raise ValueError("layer: first, middle or last, for kernel_changes and layer_changes alone")
        return self

    def needs(self, suite: str) -> dict[str, dict[float | None, Need]]:
        """As :meth:`Curves.needs`."""
        return {self.title: {None: Need(suite, self.defense, self.eval)}}


class Figure(Strict):
    """A page of panels.

    Attributes:
        title, caption: what a stranger needs to understand it; the caption says what panels, axes and lines are.
        remarks: what is known of the protocol, and where it differs from the paper's.
        columns: panels side by side.
        lines: of all curves that have none of their own.
        panels: row by row.
    """

    title: str
    caption: str
    remarks: tuple[str, ...] = ()
    columns: int = Field(ge=1, le=6)
    lines: tuple[Line, ...] = ()
    panels: tuple[Annotated[Curves | View, Field(discriminator="kind")], ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _own_lines(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("panels"), list) or "lines" not in raw:
            return raw
        shared = {"lines": raw["lines"]}
        return {**raw, "panels": [{**shared, **own} if own.get("kind") == "curves" else own for own in raw["panels"]]}


def available_figures() -> list[str]:
    """Names of the figures that come with the project."""
    return sorted(path.stem for path in FIGURES.glob("*.toml"))


def load_figure(name: str) -> Figure:
    """Read a figure by name, or from a TOML file, and check that everything exists that it names.

    Raises:
        FigureError: for an unknown figure, key, suite, evaluation or defense, or an evaluation that a panel cannot show.
    """
    path = Path(name) if name.endswith(".toml") else FIGURES / f"{name}.toml"
    if not path.is_file():
        raise FigureError(f"figure: {unknown(name, available_figures())}, or give the path of a .toml file")
    with in_words(path.name, FigureError, ("curves", *VIEWS)):
        figure = Figure(**tomllib.loads(path.read_text()))
        suites: dict[str, Suite] = {}
        for number, panel in enumerate(figure.panels, start=1):
            _exists(f"panel {number} ({panel.title})", panel, suites)
        return figure


def _exists(place: str, panel: Curves | View, suites: dict[str, Suite]) -> None:
    """What the panel names is there; ``suites`` are those that were read before."""
    try:
        for name in panel.suite:
            suites[name] = suites.get(name) or load_suite(name)
            for need in _needs(panel, name):
                _fits(panel, suites[name], need)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _needs(panel: Curves | View, suite: str) -> Iterator[Need]:
    for needs in panel.needs(suite).values():
        yield from needs.values()


def _fits(panel: Curves | View, suite: Suite, need: Need) -> None:
    """The variant and the evaluation exist, and the panel can show the latter."""
    assert need.variant, "raises where there is none"
    if need.eval not in suite.evals:
        raise ValueError(f"eval in {suite.name}: {unknown(need.eval, suite.evals)}")
    kind = suite.evals[need.eval].kind
    if kind != VIEWS.get(panel.kind, kind):
        raise ValueError(f"a panel of kind {panel.kind} shows evaluations of kind {VIEWS[panel.kind]}; {need.eval} is {kind}")
