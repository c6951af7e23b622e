"""What there is, and where it comes from: `bench list`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from bench import suites, tables
from bench.datasets import DATASETS
from bench.figures import available_figures, load_figure
from bench.options import check_folder
from bench.papers import layout
from bench.papers.join import filled
from bench.plugins import attack_classes, attack_origin
from bench.registry import from_file, problems, registered
from bench.store import Store
from bench.suites import SuiteError, available, load_suite, unknown
from defenses.api import Defense
from defenses.estimators import ESTIMATORS


def listing(what: str, runs: Path) -> None:
    """Print what there is: everything, one kind of things, or the defenses of a user's file; of tables, too, what is filled.

    Raises:
        ValueError: for an unknown kind, or a folder that is not there.
    """
    check_folder(runs)
    kinds = {
        "defenses": lambda: _defenses(registered()),
        "attacks": lambda: {name: f"{_first_line(own)} [{attack_origin(name)}]" for name, own in attack_classes().items()},
        "estimators": lambda: {name: _first_line(own) for name, own in ESTIMATORS.items()},
        "suites": lambda: {name: _suite(name) for name in available()},
        "tables": lambda: {"summary": f"every number of a suite; formats {', '.join(tables.FORMATS)}", **_papers(runs)},
        "datasets": lambda: {name: f"{facts.classes} classes, {facts.shape}" for name, facts in DATASETS.items()},
        "figures": lambda: {name: load_figure(name).title for name in available_figures()},
    }
    if what.endswith(".py"):
        kinds = {what: lambda: _defenses(from_file(Path(what)))}
    elif what and what not in kinds:
        raise ValueError(f"list: {unknown(what, kinds)}, or a .py file")
    for kind in [what] if what else list(kinds):
        print(f"{kind}:")
        listed = kinds[kind]()
        wide = max(map(len, listed), default=0)
        for name, text in listed.items():
            print(f"  {name:{wide}}  {text}")
    for text in problems():
        print(text, file=sys.stderr)


def _defenses(found: Mapping[str, tuple[Defense, str]]) -> dict[str, str]:
    return {name: f"{_first_line(defense)} [{origin}]" for name, (defense, origin) in found.items()}


def _suite(name: str) -> str:
    """A suite's description; nothing where a plug-in's cannot be read, which is told as a problem."""
    own = suites.plugged().get(name)
    try:
        return f"{load_suite(name).description} [{own.origin if own else 'leaderboards/suites'}]"
    except SuiteError:
        if own is None:
            raise
        return f"[{own.origin}]"


def _papers(runs: Path) -> dict[str, str]:
    """The tables of papers, and how many of their cells a run folder fills."""
    found = {}
    for name in layout.available():
        own = layout.load(name)
        budget, count, cells = filled(own, Store(runs))
        found[name] = f"{own.title} ({count} of {cells} cells in {runs}{f', budget {budget}' if count else ''})"
    return found


def _first_line(thing: object) -> str:
    return next(iter((thing.__doc__ or "").strip().splitlines()), "")
