"""A suite file: data set, network, recipe, evaluations and budgets, read strictly from TOML."""

from __future__ import annotations

import copy
import difflib
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from bench.data import DATASETS, Dataset
from bench.evals import KINDS, Evaluation
from bench.store import Strict
from defenses.api import Recipe
from defenses.nets import ARCHITECTURES

BUDGETS = ("smoke", "quick", "paper")

SUITES = Path(__file__).parent.parent / "leaderboards" / "suites"

# What a budget may change: how much is computed, never what is asked.
_BUDGET_KEYS = (
    r"architecture|train_images|validation_images|recipe\.epochs|sweep\.\w+|evals\.\w+\.(images|n|steps|restarts|eot)"
)


class SuiteError(ValueError):
    """A suite that does not exist or cannot be used; says which key, what was given and what is allowed."""


class Suite(Strict):
    """A suite at one budget.

    Attributes:
        name, version: identity; a change that moves numbers raises the version.
        dataset, architecture: names of :data:`bench.data.DATASETS` and :data:`defenses.nets.ARCHITECTURES`.
        train_images, validation_images: how many images train, and how many of the stored training images are held out first.
        recipe: training of every network, unless a defense's method says otherwise.
        sweep: defense fields to run through, e.g. sigma, for defenses that have them.
        evals: evaluations by name, in the order in which they run.
    """

    name: str
    version: int
    budget: str
    description: str = ""
    dataset: str
    architecture: str
    train_images: int | None = None
    validation_images: int = 5000
    recipe: dict[str, Any]
    sweep: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    evals: dict[str, Evaluation]

    @model_validator(mode="after")
    def _check(self) -> Suite:
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset: {unknown(self.dataset, DATASETS)}")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture: {unknown(self.architecture, ARCHITECTURES)}")
        for key in self.recipe:
            if key not in {field.name for field in fields(Recipe)}:
                raise ValueError(f"recipe: {unknown(key, [field.name for field in fields(Recipe)])}")
        self.training()
        shape = DATASETS[self.dataset].shape
        for name, evaluation in self.evals.items():
            evaluation.check(f"evals.{name}", shape)
        return self

    def training(self) -> Recipe:
        """The recipe as the training loop takes it."""
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in self.recipe.items()}
        return Recipe(**values)

    @property
    def facts(self) -> Dataset:
        """Classes, shape and normalisation of the data set."""
        return DATASETS[self.dataset]


def unknown(given: str, known: Any) -> str:
    """'unknown "x"; did you mean "y"? Known are ...'."""
    near = difflib.get_close_matches(str(given), [str(k) for k in known], 1, 0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {given!r}; {hint}Known are {', '.join(sorted(map(str, known)))}"


def available() -> list[str]:
    """Names of the suites that come with the project."""
    return sorted(path.stem for path in SUITES.glob("*.toml"))


def load_suite(name: str | Path, budget: str = "quick") -> Suite:
    """Read a suite by name, or from a TOML file, at a budget.

    Raises:
        SuiteError: for an unknown suite, budget or key, or a value out of range.
    """
    if budget not in BUDGETS:
        raise SuiteError(f"budget: {unknown(budget, BUDGETS)}")
    path = Path(name) if str(name).endswith(".toml") else SUITES / f"{name}.toml"
    if not path.is_file():
        raise SuiteError(f"suite: {unknown(str(name), available())}, or give the path of a .toml file")
    try:
        raw = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise SuiteError(f"{path}: not valid TOML: {error}") from error
    try:
        return Suite(budget=budget, **_at_budget(raw, budget))
    except ValidationError as error:
        raise SuiteError(f"{path.name}: {_explain(error)}") from error
    except (TypeError, ValueError) as error:
        raise SuiteError(f"{path.name}: {error}") from error


def _at_budget(raw: dict[str, Any], budget: str) -> dict[str, Any]:
    """Apply the dotted overrides of a budget."""
    raw = copy.deepcopy(raw)
    overrides = raw.pop("budget", {})
    for name in overrides:
        if name not in BUDGETS:
            raise SuiteError(f"budget: {unknown(name, BUDGETS)}")
    for key, value in overrides.get(budget, {}).items():
        if not re.fullmatch(_BUDGET_KEYS, key):
            raise SuiteError(
                f"budget.{budget}: {key!r} may not change with the budget; allowed are architecture, train_images, "
                "validation_images, recipe.epochs, sweep.*, evals.*.(images|n|steps|restarts|eot)"
            )
        *path, last = key.split(".")
        place = raw
        for step in path:
            if step not in place:
                raise SuiteError(f"budget.{budget}.{key}: there is no {step!r} in the suite")
            place = place[step]
        if key.startswith("sweep.") and not set(value) <= set(place.get(last, [])):
            raise SuiteError(f"budget.{budget}.{key}: a budget may only choose among {place.get(last, [])}, got {value}")
        place[last] = value
    return raw


def _explain(error: ValidationError) -> str:
    """The first few problems of a suite file, in words."""
    problems = []
    for item in error.errors()[:3]:
        # Pydantic puts the kind between an evaluation's name and its key; the file has no such level.
        place = ".".join(str(part) for i, part in enumerate(item["loc"]) if not (i == 2 and part in KINDS))
        if item["type"] == "extra_forbidden":
            problems.append(f"{place}: unknown key")
        else:
            problems.append(f"{place}: {item['msg'].removeprefix('Value error, ')}, got {item['input']!r}"[:300])
    return "; ".join(problems)
