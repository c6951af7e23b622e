"""Finds defenses: module-level instances in the package, in installed plug-ins, and in a file that a user hands in."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import defenses
from bench import suites
from bench.plugins import RESERVED, Offer, attack_offers, executed, instances, offers
from bench.suites import unknown
from defenses.api import Defense, Task


class RegistryError(ValueError):
    """A name that stands for nothing, or for two things."""


@dataclass(frozen=True)
class Variant:
    """A defense with its fields as they are run.

    Attributes:
        name: registered name.
        label: name, modifiers, and the fields that differ from the registered instance, e.g. "cear_rw@sigma=0.5", "smd+eat".
        defense: the instance.
        module: where it is defined: a module, a plug-in, or a file.
    """

    name: str
    label: str
    defense: Defense
    module: str


@cache
def own() -> dict[str, tuple[Defense, str]]:
    """The project's defenses by name, with the module each is defined in.

    Raises:
        RegistryError: if two modules define the same name.
    """
    found: dict[str, tuple[Defense, str]] = {}
    for info in pkgutil.iter_modules(defenses.__path__):
        module = importlib.import_module(f"defenses.{info.name}")
        for name, defense in instances(module).items():
            if name in found and found[name][0] is not defense:
                raise RegistryError(f"defense {name!r} is defined in {found[name][1]} and in {module.__name__}; rename one")
            found.setdefault(name, (defense, module.__name__))
    return found


def plugged(warnings: list[str] | None = None) -> dict[str, Offer]:
    """The defenses of installed plug-ins by name; ``warnings`` are told of plug-ins that are left out."""
    return offers("defenses", {name: defense for name, (defense, _) in own().items()}, warnings)


def registered(warnings: list[str] | None = None) -> dict[str, tuple[Defense, str]]:
    """All defenses by name, with the module or plug-in each is from. A broken plug-in becomes a warning that names it."""
    return dict(sorted({**own(), **{name: (offer.thing, offer.origin) for name, offer in plugged(warnings).items()}}.items()))


def problems() -> list[str]:
    """What is wrong with installed plug-ins, a line each."""
    found: list[str] = []
    for look in (plugged, attack_offers, suites.plugged):
        look(found)
    for name, offer in suites.plugged().items():
        try:
            suites.load_suite(name)
        except Exception as error:
            found.append(f"plug-in {offer.origin}: suite {name} cannot be used: {error}")
    return found


def packages(variant: Variant, others: Sequence[str], attack: str, suite: str) -> dict[str, str]:
    """Versions of the plug-ins that bring what a record is made with, by package: defenses, attack and suite."""
    names = [variant.name, *(variant_of(spec).name for spec in others if spec not in RESERVED)]
    needed = [plugged().get(name) for name in names] + [attack_offers().get(attack), suites.plugged().get(suite)]
    return {offer.package: offer.version for offer in needed if offer is not None}


def suited(task: Task) -> tuple[list[str], list[str]]:
    """Names of the registered defenses that make sense on a task; and :func:`problems`, with plug-ins that cannot say so."""
    warnings = problems()
    names = [name for name, (defense, _) in own().items() if not defense.unsuited(task)]
    for name, offer in plugged().items():
        try:
            names += [] if offer.thing.unsuited(task) else [name]
        except Exception as error:  # see plugins: it must not stop the rest
            warnings.append(f"plug-in {offer.origin}: {name} is left out: {type(error).__name__}: {error}")
    return sorted(names), warnings


def from_file(path: Path) -> dict[str, tuple[Defense, str]]:
    """The defenses of a user's file.

    Raises:
        RegistryError: if there is no such file, it does not import, it defines none, or one whose name is in use.
    """
    try:
        module = executed(path)
    except ValueError as error:
        raise RegistryError(str(error)) from error
    found = {key: (defense, str(path)) for key, defense in instances(module).items()}
    if not found:
        raise RegistryError(f"{path} defines no defense; a module-level instance of a Defense subclass is what counts")
    known = registered()
    for name, (defense, _) in found.items():
        if name in RESERVED or (name in known and known[name][0] is not defense):
            whose = known[name][1] if name in known else "the command line"
            raise RegistryError(f"{path}: {name} is a name of {whose} already; rename yours")
    return found


def resolve(spec: str, sweep: dict[str, tuple[float, ...]], every: Sequence[str] | None = None) -> list[Variant]:
    """Variants for what a user typed: "a,b", "all", "name+modifier@field=value,...", "./mine.py" or "./mine.py:name".

    Args:
        spec: names separated by commas; a comma followed by field=value continues a variant; "+" joins several values. A
            modifier is a field of the defense that is set to true; "all+modifier" is all that have it.
        sweep: fields to run through for defenses that have them, unless the variant fixes them.
        every: what "all" stands for; every registered name by default.

    Raises:
        RegistryError: for unknown names or fields, or values of the wrong type.
    """
    variants: dict[str, Variant] = {}
    for item in re.split(r",(?![^,@]*=)", spec):
        for name, fixed, (defense, module) in _named(item.strip(), every):
            changes = [_changes(name, defense, fixed)]
            for field, values in sweep.items():
                if field not in fixed and any(f.name == field for f in fields(defense)):
                    changes = [{**change, field: value} for change in changes for value in values]
            for change in changes:
                variant = _variant(name, defense, change, module)
                other = variants.get(variant.label, variant)
                if other.module != module:
                    raise RegistryError(f"{variant.label!r} is asked for from {other.module} and from {module}; rename one")
                variants[variant.label] = variant
    return list(variants.values())


def variant_of(spec: str) -> Variant:
    """The one variant that a specification stands for.

    Raises:
        RegistryError: as :func:`resolve`, and where there are several.
    """
    found = resolve(spec, {})
    if len(found) != 1:
        raise RegistryError(f"one defense is meant, {spec!r} are {len(found)}: {', '.join(variant.label for variant in found)}")
    return found[0]


def _named(item: str, every: Sequence[str] | None) -> list[tuple[str, dict[str, str], tuple[Defense, str]]]:
    """(name, fixed fields, (instance, module)) for one item."""
    head, _, tail = item.partition("@")
    parsed = re.fullmatch(r"(.*?\.py(?::\w*)?|[^+]*)((?:\+[^+]*)*)", head)
    assert parsed, "the first group takes whatever the second does not"
    head, added = parsed[1], parsed[2].split("+")[1:]
    fixed = dict.fromkeys(added, "true")
    for pair in filter(None, tail.split(",")):
        field, equals, value = pair.partition("=")
        if not equals:
            raise RegistryError(f"{item!r}: write a variant as name@field=value,field=value")
        fixed[field] = value
    path, _, wanted = head.partition(":")
    if path.endswith(".py"):
        found = from_file(Path(path))
        names = [wanted] if wanted else list(found)
    else:
        found = registered()
        names = list(every or found) if head == "all" else [head]
    for name in names:
        if name not in found:
            raise RegistryError(f"defense: {unknown(name, found)}")
    if head == "all":
        names = [name for name in names if set(added) <= set(modifiers(found[name][0]))]
    for name, modifier in ((name, modifier) for name in names for modifier in added):
        if modifier not in (known := modifiers(found[name][0])):
            raise RegistryError(f"{name} has no modifier {modifier!r}; it has {', '.join(known) or 'none'}")
    return [(name, fixed, found[name]) for name in names]


def modifiers(defense: Defense) -> list[str]:
    """What may follow the name of a defense after a "+"."""
    return [field.name for field in fields(defense) if field.metadata.get("modifier")]


def _changes(name: str, defense: Defense, fixed: dict[str, str]) -> dict[str, Any]:
    known = {field.name: getattr(defense, field.name) for field in fields(defense)}
    changes: dict[str, Any] = {}
    for field, text in fixed.items():
        if field not in known:
            raise RegistryError(f"{name} has no field: {unknown(field, known)}")
        changes[field] = _typed(f"{name}@{field}", text, known[field])
    return changes


def _typed(place: str, text: str, like: Any) -> Any:
    """The value that a text means for a field whose value now is ``like``."""
    kind = type(like)
    if kind is tuple:
        return tuple(_typed(place, item, like[0] if like else "") for item in text.split("+"))
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float, str):
        try:
            return kind(text)
        except ValueError:
            pass
    raise RegistryError(f"{place}: {text!r} is no {kind.__name__}")


def _variant(name: str, defense: Defense, changes: dict[str, Any], module: str) -> Variant:
    real = {field: value for field, value in changes.items() if value != getattr(defense, field)}
    try:
        changed = replace(defense, **real)
    except ValueError as error:
        raise RegistryError(f"{name}: {error}") from error
    texts = {field: "+".join(map(str, value)) if isinstance(value, tuple) else value for field, value in real.items()}
    added = [modifier for modifier in modifiers(changed) if texts.pop(modifier, False)]
    told = ",".join(f"{field}={text}" for field, text in sorted(texts.items()))
    label = "+".join([name, *added]) + (f"@{told}" if told else "")
    return Variant(name, label, changed, module)
