"""A suite file: data set, network, recipes, evaluations and budgets, read strictly from TOML, on top of what it extends."""

from __future__ import annotations

import copy
import difflib
import re
import tomllib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from bench.data import DATASETS, Dataset
from bench.evals import KINDS, Evaluation
from bench.plugins import Offer, add_attack, offers
from bench.store import Strict
from defenses.api import Recipe
from defenses.nets import check_architectures

BUDGETS = ("smoke", "quick", "paper")

SUITES = Path(__file__).parent.parent / "leaderboards" / "suites"

ROLES = ("teacher", "student", "gaussian", "plain", "kernels", "at", "trades", "fast_at")
"""What networks are trained for, as :meth:`defenses.api.Task.recipe_for` is asked; a suite may give each its own recipe."""

# What a budget may change: how much is computed, never what is asked. Batch and schedule go with the number of training
# images, since the same epochs on a tenth of the images are a tenth of the steps.
_BUDGET_KEYS = (
    r"architecture|train_images|validation_images|recipe\.(epochs|batch|decay_at)|roles\.\w+\.epochs"
    r"|sweep\.\w+|evals\.\w+\.(images|n|steps|pgd_steps|restarts|eot|proposals|repeats|distilled|maps)"
)
_BUDGET_TEXT = (
    "architecture, train_images, validation_images, recipe.(epochs|batch|decay_at), roles.*.epochs, sweep.*, "
    "evals.*.(images|n|steps|pgd_steps|restarts|eot|proposals|repeats|distilled|maps)"
)


class SuiteError(ValueError):
    """A suite that does not exist or cannot be used; says which key, what was given and what is allowed."""


class Suite(Strict):
    """A suite at one budget.

    Attributes:
        name, version: identity; a change that moves numbers raises the version.
        dataset, architecture: names of :data:`bench.data.DATASETS` and :data:`defenses.nets.ARCHITECTURES`, or
            "torchvision/NAME".
        unsound: hand the test images to defenses that tune on them, for comparison with protocols that do.
        train_images, validation_images: how many images train, and how many of the stored training images are held out first.
        recipe: training of every network, unless a defense's method says otherwise.
        roles: what the networks of a role of :data:`ROLES` are trained by instead, key by key.
        sweep: defense fields to run through, e.g. sigma, for defenses that have them.
        evals: evaluations by name, in the order in which they run.
    """

    name: str
    version: int
    budget: str
    description: str = ""
    dataset: str
    architecture: str
    unsound: bool = False
    train_images: int | None = None
    validation_images: int = 5000
    recipe: dict[str, Any]
    roles: dict[str, dict[str, Any]] = Field(default_factory=dict)
    sweep: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    evals: dict[str, Evaluation]

    @model_validator(mode="after")
    def _check(self) -> Suite:
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset: {unknown(self.dataset, DATASETS)}")
        try:
            check_architectures([self.architecture])
        except ValueError as error:
            raise ValueError(f"architecture: {error}") from error
        for role in self.roles:
            if role not in ROLES:
                raise ValueError(f"roles: {unknown(role, ROLES)}")
        for place, given in {"recipe": self.recipe, **{f"roles.{role}": own for role, own in self.roles.items()}}.items():
            _check_recipe(place, {**self.recipe, **given}, given)
        shape = DATASETS[self.dataset].shape
        for name, evaluation in self.evals.items():
            evaluation.check(f"evals.{name}", shape)
        return self

    def training(self, role: str = "") -> Recipe:
        """The recipe of a role's networks as the training loop takes it; without a role that of all others."""
        return _RECIPE.validate_python({**self.recipe, **self.roles.get(role, {})})

    @property
    def facts(self) -> Dataset:
        """Classes, shape and normalisation of the data set."""
        return DATASETS[self.dataset]


# Checks types and turns TOML's lists into tuples.
_RECIPE = TypeAdapter(Recipe)


def _check_recipe(place: str, values: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse a recipe with keys or values that do not exist; ``given`` are the keys that ``place`` of the file sets."""
    known = [field.name for field in fields(Recipe)]
    for key in given:
        if key not in known:
            raise ValueError(f"{place}: {unknown(key, known)}")
    try:
        recipe = _RECIPE.validate_python(values)
    except ValidationError as error:
        raise ValueError(explain(error, place)) from error
    if recipe.epochs < 1 or recipe.batch < 1:
        raise ValueError(f"{place}: epochs and batch must be at least 1, got {recipe.epochs} and {recipe.batch}")
    if not all(0 <= share <= 1 for share in recipe.decay_at):
        raise ValueError(f"{place}.decay_at: shares of the epochs, from 0 to 1, got {list(recipe.decay_at)}")


def unknown(given: str, known: Any, what: str = "") -> str:
    """'unknown "x"; did you mean "y"? Known are ...'; with what it was to be, if that is not clear."""
    names = {str(name).lower(): str(name) for name in known}
    near = difflib.get_close_matches(str(given).lower(), names, 1, 0.5)
    hint = f"did you mean {names[near[0]]!r}? Known" if near else "known"
    return f"unknown {f'{what} ' if what else ''}{given!r}; {hint} are {', '.join(sorted(map(str, known)))}"


def available() -> list[str]:
    """Names of the suites that come with the project, and of those of installed plug-ins."""
    return sorted({*_own(), *plugged()})


def plugged(warnings: list[str] | None = None) -> dict[str, Offer]:
    """The suites of installed plug-ins by name; ``warnings`` are told of plug-ins that are left out."""
    return offers("suites", _own(), warnings)


def _own() -> dict[str, Path]:
    return {path.stem: path for path in SUITES.glob("*.toml")}


def _located(name: str) -> Path | None:
    """The file of a suite that is known by name."""
    own = SUITES / f"{name}.toml"
    return own if own.is_file() else plugged()[name].thing if name in plugged() else None


def load_suite(name: str | Path, budget: str = "quick") -> Suite:
    """Read a suite by name, or from a TOML file, at a budget.

    Raises:
        SuiteError: for an unknown suite, budget or key, or a value out of range.
    """
    if budget not in BUDGETS:
        raise SuiteError(f"budget: {unknown(budget, BUDGETS)}")
    path = Path(name) if str(name).endswith(".toml") else _located(str(name))
    if path is None or not path.is_file():
        raise SuiteError(f"suite: {unknown(str(name), available())}, or give the path of a .toml file")
    raw = _read(path, [])
    with in_words(path.name, SuiteError):
        return Suite(budget=budget, **_at_budget(raw, budget))


def _read(path: Path, children: list[Path]) -> dict[str, Any]:
    """The content of a suite file, on top of what it extends; ``children`` are the files that led here."""
    with in_words(str(path), SuiteError):
        raw = tomllib.loads(path.read_text())
    _check_tables(path.name, raw)
    _add_attacks(path, raw.pop("attacks", {}))
    given = raw.pop("extends", None)
    if given is None:
        return raw
    files = [*children, path]
    chain = " extends ".join([*(file.name for file in files), str(given)])
    parent = path.parent / given if str(given).endswith(".toml") else _located(str(given))
    if parent is None or not parent.is_file():
        near = unknown(str(given), available())
        raise SuiteError(f"{chain}: {near}, or give the path of a .toml file, from the folder of {path.name}")
    if parent.resolve() in [file.resolve() for file in files]:
        raise SuiteError(f"{chain}: that is a circle; one of them must stand on its own")
    for key in ("name", "version"):
        if key not in raw:
            raise SuiteError(f"{path.name}: {key} is missing; a suite that extends {given} must give its own")
    return _on_top(path.name, _read(parent, files), raw)


def _check_tables(file: str, raw: dict[str, Any]) -> None:
    """Refuse a plain value where merging and budgets expect a table."""
    found = {key: raw.get(key, {}) for key in ("attacks", "recipe", "roles", "sweep", "evals", "budget")}
    if isinstance(found["budget"], dict):
        found |= {f"budget.{name}": own for name, own in found["budget"].items()}
    for place, value in found.items():
        if not isinstance(value, dict):
            raise SuiteError(f"{file}: {place} must be a table, got {value!r}")


def _add_attacks(path: Path, attacks: dict[str, Any]) -> None:
    """Make known the attacks that a suite file brings along: names, and "FILE.py:CLASS" from its folder."""
    for name, spec in attacks.items():
        try:
            add_attack(name, str(spec), path.parent)
        except ValueError as error:
            raise SuiteError(f"{path.name}: {error}") from error


def _on_top(file: str, parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """The child's content merged into the parent's; an evaluation that the child calls false goes, with its budgets, and with
    ``others = false`` every one that the child does not name."""
    evals = child.get("evals", {})
    if evals.get("others") is False:
        del evals["others"]
        evals |= {name: False for name in parent.get("evals", {}) if name not in evals}
    for name in [name for name, value in evals.items() if value is False]:
        if name not in parent.get("evals", {}):
            raise SuiteError(f"{file}: evals.{name} = false: {unknown(name, parent.get('evals', {}))}")
        del evals[name], parent["evals"][name]
        for budget in parent.get("budget", {}).values():
            for key in [key for key in budget if key.startswith(f"evals.{name}.")]:
                del budget[key]
    return _merged(parent, child)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Tables merge, other values replace."""
    both = {key: _merged(under[key], value) for key, value in over.items() if _tables(under.get(key), value)}
    return {**under, **over, **both}


def _tables(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _at_budget(raw: dict[str, Any], budget: str) -> dict[str, Any]:
    """Apply the dotted overrides of a budget."""
    raw = copy.deepcopy(raw)
    overrides = raw.pop("budget", {})
    for name in overrides:
        if name not in BUDGETS:
            raise SuiteError(f"budget: {unknown(name, BUDGETS)}")
    for key, value in overrides.get(budget, {}).items():
        if not re.fullmatch(_BUDGET_KEYS, key):
            raise SuiteError(f"budget.{budget}: {key!r} may not change with the budget; allowed are {_BUDGET_TEXT}")
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


@contextmanager
def in_words(file: str, kind: type[ValueError] = ValueError, kinds: Collection[str] = KINDS) -> Iterator[None]:
    """Whatever is wrong with the content of a TOML file, as one line that begins with the file.

    Args:
        file: its name.
        kind: of the errors that are raised.
        kinds: see :func:`explain`.
    """
    try:
        yield
    except tomllib.TOMLDecodeError as error:
        raise kind(f"{file}: not valid TOML: {error}") from error
    except ValidationError as error:
        raise kind(f"{file}: {explain(error, kinds=kinds)}") from error
    except (TypeError, ValueError) as error:
        raise kind(f"{file}: {error}") from error


def explain(error: ValidationError, *above: str, kinds: Collection[str] = KINDS) -> str:
    """The first few problems of a file, in words; ``above`` is where in the file they are."""
    problems = []
    for item in error.errors()[:3]:
        # Pydantic puts the kind between an evaluation's (or a panel's) name and its key; the file has no such level.
        place = ".".join(str(part) for i, part in enumerate((*above, *item["loc"])) if not (i == 2 and part in kinds))
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            problems.append(f"{place}: unknown key")
        elif not item["loc"] and not above:  # found by the suite's own check, whose text names the key
            problems.append(text)
        else:
            problems.append(f"{place}: {text}, got {item['input']!r}"[:300])
    return "; ".join(problems)
