"""Plug-ins: defenses, attacks and suites of installed packages, by entry points, and attacks of files that a suite names.

======================  ==============================================================================================
group                   what an entry point leads to
======================  ==============================================================================================
``bench.defenses``      a module, whose top-level instances of Defense count; or an instance, under the entry point's name
``bench.attacks``       a subclass of Attack, under the entry point's name
``bench.suites``        ``package:NAME.toml``, a file of the package; or ``package``, every .toml file of its folder
======================  ==============================================================================================

What is broken, or takes a name that is in use, is a warning that names the package, and is left out: nothing is shadowed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from attacks import ATTACKS, Attack
from defenses.api import Defense

RESERVED = ("all", "itself")
"""Names that stand for something else where a defense is asked for."""


@dataclass(frozen=True)
class Offer:
    """Something of an installed package.

    Attributes:
        name: what it is called here.
        thing: a defense, a class of attacks, or the path of a suite.
        package, version: the distribution that brings it.
    """

    name: str
    thing: Any
    package: str
    version: str

    @property
    def origin(self) -> str:
        """Where it comes from, in words."""
        return f"{self.package} {self.version}"


def offers(kind: str, taken: Mapping[str, Any], warnings: list[str] | None = None) -> dict[str, Offer]:
    """What installed packages offer, by name.

    Args:
        kind: "defenses", "attacks" or "suites".
        taken: the project's own, by name. A plug-in may hand on what it imported from there, under its name.
        warnings: told of whatever was left out, and why.
    """
    found: dict[str, Offer] = {}
    loaded, wrong = _loaded(kind, tuple(sys.path))
    problems = list(wrong)
    for offer in loaded:
        if offer.name in taken and taken[offer.name] is offer.thing:
            continue
        other = found.get(offer.name)
        if offer.name in taken or offer.name in RESERVED or other is not None:
            whose = other.origin if other else "the project"
            problems.append(f"plug-in {offer.origin} is left out: {kind[:-1]} {offer.name!r} is a name of {whose}; rename it")
        else:
            found[offer.name] = offer
    if warnings is not None:
        warnings += problems
    return found


@cache
def _loaded(kind: str, path: tuple[str, ...]) -> tuple[tuple[Offer, ...], tuple[str, ...]]:
    """Everything that the packages on an import path offer, and what is wrong with the rest."""
    found: list[Offer] = []
    problems: list[str] = []
    for point in sorted(entry_points(group=f"bench.{kind}"), key=lambda point: (_package(point), point.name, point.value)):
        try:
            things = _READERS[kind](point)
            wrong = [name for name in things if not re.fullmatch(r"[A-Za-z]\w*", name)]
            if wrong:
                raise ValueError(f"{wrong[0]!r} is no name; letters, digits and _, from a letter")
        except (Exception, SystemExit) as error:  # a plug-in may fail in any way and must not stop the rest
            text = " ".join(f"{type(error).__name__}: {error}".split())
            problems.append(
                f"plug-in {' '.join(_package(point))} is left out: bench.{kind} {point.name} = {point.value}: {text}"
            )
        else:
            found += [Offer(name, thing, *_package(point)) for name, thing in things.items()]
    return tuple(found), tuple(problems)


def _package(point: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution of an entry point."""
    own = point.dist
    return (own.name, own.version) if own else ("(unknown package)", "?")


def _defenses(point: EntryPoint) -> dict[str, Defense]:
    thing = point.load()
    if isinstance(thing, Defense):
        return {point.name: thing}
    if not isinstance(thing, ModuleType):
        raise TypeError(f"neither a module nor a Defense, but {type(thing).__name__}")
    found = instances(thing)
    if not found:
        raise ValueError("the module has no Defense at its top level")
    return found


def instances(module: ModuleType) -> dict[str, Defense]:
    """Defenses at the top level of a module, by variable name."""
    return {name: value for name, value in vars(module).items() if isinstance(value, Defense) and not name.startswith("_")}


def _attacks(point: EntryPoint) -> dict[str, type[Attack]]:
    return {point.name: _attack(point.load())}


def _attack(thing: Any) -> type[Attack]:
    """What can be used as an attack.

    Raises:
        TypeError: says why it cannot be.
    """
    if not (isinstance(thing, type) and issubclass(thing, Attack)):
        raise TypeError(f"{thing!r} is no subclass of attacks.Attack")
    if inspect.isabstract(thing):
        raise TypeError(f"{thing.__name__} does not implement {', '.join(sorted(thing.__abstractmethods__))}")
    if not is_dataclass(thing) or not {"norm", "eps"} <= thing.__dataclass_fields__.keys():
        raise TypeError(f"{thing.__name__} is no dataclass with the fields norm and eps")
    return thing


def _suites(point: EntryPoint) -> dict[str, Path]:
    folder = Path(str(files(point.module)))
    found = [folder / point.attr] if point.attr else sorted(folder.glob("*.toml"))
    if not found:
        raise FileNotFoundError(f"there is no .toml file in {folder}")
    for path in found:
        name = tomllib.loads(path.read_text(encoding="utf-8")).get("name")
        if path.suffix != ".toml" or name != path.stem:
            raise ValueError(f"{path.name} must be called as its suite is, NAME.toml, but its name is {name!r}")
    return {path.stem: path for path in found}


_READERS: dict[str, Callable[[EntryPoint], Mapping[str, Any]]] = {
    "defenses": _defenses,
    "attacks": _attacks,
    "suites": _suites,
}


# Attacks, from wherever


_OF_FILES: dict[str, tuple[type[Attack], Path]] = {}


def attack_classes() -> dict[str, type[Attack]]:
    """Attacks by the name that suites use: the project's, those of plug-ins, and those of files that loaded suites named."""
    plugged = {name: offer.thing for name, offer in attack_offers().items()}
    return {**ATTACKS, **plugged, **{name: thing for name, (thing, _) in _OF_FILES.items()}}


def attack_offers(warnings: list[str] | None = None) -> dict[str, Offer]:
    """The attacks of installed plug-ins by name; ``warnings`` are told of plug-ins that are left out."""
    return offers("attacks", ATTACKS, warnings)


def attack_origin(name: str) -> str:
    """Where an attack comes from, in words."""
    plugged = attack_offers()
    if name in plugged:
        return plugged[name].origin
    return str(_OF_FILES[name][1]) if name in _OF_FILES else ATTACKS[name].__module__


def add_attack(name: str, spec: str, folder: Path) -> None:
    """Make an attack of a user's file known, for this process.

    Args:
        name: what suites call it.
        spec: "FILE.py:CLASS".
        folder: from where a relative path of the file counts.

    Raises:
        ValueError: for a name in use, or a file or class that cannot be used.
    """
    file, colon, wanted = spec.rpartition(":")
    path = (folder / file).resolve()
    if not colon or path.suffix != ".py" or not re.fullmatch(r"[a-z]\w*", name):
        raise ValueError(f'attacks.{name}: write NAME = "FILE.py:CLASS", got {spec!r}')
    old = _OF_FILES.get(name)
    if name in {**ATTACKS, **attack_offers()} or (old and (old[1], old[0].__name__) != (path, wanted)):
        raise ValueError(f"attacks.{name}: the name is in use, by {attack_origin(name)}; choose another")
    if old is None:
        module = executed(path)
        try:
            _OF_FILES[name] = (_attack(getattr(module, wanted, None)), path)
        except TypeError as error:
            raise ValueError(f"attacks.{name}: {path.name} has no usable {wanted}: {error}") from error


def attacks_of_files() -> dict[str, tuple[type[Attack], Path]]:
    """The attacks that :func:`add_attack` made known, with their files."""
    return dict(_OF_FILES)


def adopt(attacks: Mapping[str, tuple[type[Attack], Path]]) -> None:
    """Know the attacks of another process's files, for work that it hands over."""
    _OF_FILES.update(attacks)


def installed() -> dict[str, str]:
    """Versions of the packages that offer something, by name; nothing is loaded."""
    points = [point for kind in _READERS for point in entry_points(group=f"bench.{kind}")]
    return dict(_package(point) for point in points)


def executed(path: Path) -> ModuleType:
    """The module of a user's file, executed now.

    Raises:
        ValueError: if there is no such file, or it does not import.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    name = f"bench_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    digest = _hash(path)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    for own in vars(module).values():
        if isinstance(own, type) and own.__module__ == name:
            setattr(own, "__file_hash__", digest)  # noqa: B010 (not declared) -- it travels to workers without the file
    return module


def fingerprint(origin: str) -> dict[str, str]:
    """The ``file_hash`` of what comes from a user's file; nothing for what has a version.

    Whoever edits the file asks another question, which no older record answers.
    """
    return {"file_hash": _hash(Path(origin))} if origin.endswith(".py") else {}


def _hash(path: Path) -> str:
    """Of a file's bytes, 16 hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
