"""What must hold of a finished record by itself, its data and its weights; each check yields what does not.

A check that cannot be made, or not to its end, raises :class:`bench.restore.Impossible`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from bench.evals import Skipped
from bench.jobs import weights_hash
from bench.mismatch import Mismatch, brief, differing, equal, named, same_rows, settings_of
from bench.restore import Case, Impossible
from bench.store import Finding, Metric, Store, as_json
from bench.suites import SuiteError, available, load_suite
from defenses.recipe import settings


def request(case: Case) -> Iterator[Mismatch]:
    """The record lies where it belongs, and asks what its suite asks, at its version and budget, of its label's defense."""
    record = case.record
    place = Store(Path()).path(record)
    there = Path(*case.path.absolute().parts[-len(place.parts) :])
    if there != place:
        yield Mismatch("place of the record", there, place)
    unknown = []
    for part in (_of_defense, _of_suite):
        try:
            yield from part(case)
        except Impossible as reason:
            unknown.append(str(reason))
    if unknown:
        raise Impossible("; ".join(unknown))


def _of_defense(case: Case) -> Iterator[Mismatch]:
    """What the label says of the defense's fields."""
    yield from differing(case.record.defense["fields"], as_json(settings(case.variant.defense)), "defense.fields")


def _of_suite(case: Case) -> Iterator[Mismatch]:
    """What the suite asks, of any defense."""
    record = case.record
    name, own = record.suite["name"], record.eval["name"]
    if name not in available():
        raise Impossible(f"no suite {name!r} comes with this version")
    try:
        suite = load_suite(name, record.suite["budget"])
    except SuiteError as error:  # of a broken plug-in, or at a budget that there is not
        raise Impossible(f"the suite {name!r} cannot be used here: {error}") from error
    if suite.version != record.suite["version"]:
        raise Impossible(f"the suite {name} is at version {suite.version} here, not {record.suite['version']}")
    if own not in suite.evals:
        yield Mismatch("eval.name", own, f"{name} has {', '.join(suite.evals)}")
        return
    wanted = suite.evals[own].resolved(case.outline)
    wanted.pop("engine_version", None)
    # What a record of before some field does not say is today's default.
    known = case.evaluation.resolved(case.outline) if case.attack_known else {}
    given = {**known, **record.eval["fields"]}
    yield from differing({key: given.get(key) for key in wanted}, wanted, "eval.fields")
    yield from differing(record.task["recipe"], as_json(settings(suite.training())), "task.recipe")
    roles = {role: as_json(settings(suite.training(role))) for role in suite.roles}
    yield from differing(record.task.get("roles", {}), roles, "task.roles")
    asked = {key: getattr(suite, key) for key in ("dataset", "architecture", "validation_images")}
    yield from differing({key: record.task.get(key) for key in asked}, asked, "task")
    train = {"train_images": suite.train_images or case.trainable}  # all of them where the suite does not say how many
    yield from differing({"train_images": record.task["train_images"]}, train, "task")


def rows(case: Case) -> Iterator[Mismatch]:
    """There are rows of the right number of images, of each exactly one under every setting."""
    try:
        table = case.rows
    except Impossible as reason:
        yield Mismatch("rows", "a finished record has rows of every image", str(reason))
        return
    if "id" not in table:  # nothing was asked of images
        return
    everybody, wanted = set(table.id), case.evaluation.images
    if len(everybody) != wanted:
        yield Mismatch("rows", f"of {len(everybody)} images", f"{wanted} images were asked for")
    try:
        pieces = case.evaluation.pieces(case.outline)
    except Skipped as reason:
        raise Impossible(f"what was measured depends on networks that are not known here: {reason}") from reason
    for setting in dict.fromkeys(item for piece in pieces for item in piece.setting.items()):
        column = "asked" if setting[0] == "radius" else setting[0]
        if setting[1] not in set(table[column]):
            yield Mismatch(f"rows, {column} {brief(setting[1])}", "none", f"{wanted} images were asked for")
    for where, part in settings_of(table):
        missing, twice = sorted(everybody - set(part.id)), sorted(set(part.id[part.id.duplicated()]))
        if missing:
            yield Mismatch(f"rows{where}", f"{len(part)} rows", f"there is none of {named(missing)}")
        if twice:
            yield Mismatch(f"rows{where}", f"{len(part)} rows", f"there are several of {named(twice)}")


def numbers(case: Case) -> Iterator[Mismatch]:
    """Every metric and finding follows from the rows, and nothing else does."""
    found = case.evaluation.summarise(case.rows, case.outline)
    yield from _metrics(case.record.metrics, found.metrics)
    derived = list(found.findings)
    # That a training ended early follows from its parts: see `weights`.
    stored = [finding for finding in case.record.findings if finding.kind != "training_ended_early"]
    try:
        unsound = case.variant.defense.unsound
        derived += [Finding(kind="unsound", detail=unsound)] if unsound else []
    except Impossible:  # only the defense itself says whether it is
        stored = [finding for finding in stored if finding.kind != "unsound"]
    yield from _findings(stored, derived)


def _metrics(stored: Sequence[Metric], derived: Sequence[Metric]) -> Iterator[Mismatch]:
    before, now = _by_facts(stored), _by_facts(derived)
    for name in before | now:
        if name not in now:
            yield Mismatch(name, before[name].value, "does not follow from the rows")
        elif name not in before:
            yield Mismatch(name, "not in the record", now[name].value)
        else:
            for field in ("value", "n", "lower", "upper"):
                a, b = getattr(before[name], field), getattr(now[name], field)
                if not equal(a, b):
                    yield Mismatch(f"{name}: {field}", a, b)


def _by_facts(metrics: Sequence[Metric]) -> dict[str, Metric]:
    """Metrics by name and facts, in words, and by number where those are equal."""
    found: dict[str, Metric] = {}
    for metric in metrics:
        facts = metric.model_dump(exclude={"metric", "value", "n", "lower", "upper"}, exclude_defaults=True)
        name = ", ".join([metric.metric, *(f"{key} {brief(value)}" for key, value in facts.items())])
        number = sum(key == name or key.startswith(f"{name} (") for key in found)
        found[f"{name} ({number + 1})" if number else name] = metric
    return found


def _findings(stored: Sequence[Finding], derived: Sequence[Finding]) -> Iterator[Mismatch]:
    before, now = ([json.dumps(own.model_dump(mode="json"), sort_keys=True) for own in some] for some in (stored, derived))
    for text in dict.fromkeys([*before, *now]):
        kind, counts = json.loads(text)["kind"], (before.count(text), now.count(text))
        if counts[0] > counts[1]:
            yield Mismatch(f"finding {kind}", text, "does not follow")
        elif counts[0] < counts[1]:
            yield Mismatch(f"finding {kind}", "not in the record", text)


def data(case: Case) -> Iterator[Mismatch]:
    """The images that trained and tested are those of the record, and the rows are of the latter and have their labels."""
    hashes = case.record.hashes
    for name, some in {"train": case.task.train, "images": case.images}.items():
        if hashes.get(name) != some.hash:
            yield Mismatch(f"hashes.{name}", f"{hashes.get(name)} ({hashes.get('data')})", f"{some.hash} ({some.source})")
    table = case.rows
    if "id" not in table:
        return
    here = pd.DataFrame({"id": case.images.ids.cpu(), "label": case.images.labels.cpu()})
    first = f"the first {len(here)} test images"
    missing, foreign = sorted(set(here.id) - set(table.id)), sorted(set(table.id) - set(here.id))
    if missing:
        yield Mismatch("ids of the rows", f"not {named(missing)}", first)
    if foreign:
        yield Mismatch("ids of the rows", f"also {named(foreign)}", first)
    yield from same_rows(table, here)


def weights(case: Case) -> Iterator[Mismatch]:
    """The networks of the stored parts are those that were measured, with the same facts and the same end of training."""
    record, model = case.record, case.fitted.model
    if record.hashes.get("weights") != weights_hash(model):
        yield Mismatch("hashes.weights", record.hashes.get("weights"), weights_hash(model))
        return
    yield from differing(dict(record.facts), case.variant.defense.facts(model), "facts")
    ended = [Finding(kind="training_ended_early", detail=text) for text in case.fitted.ended]
    yield from _findings([finding for finding in record.findings if finding.kind == "training_ended_early"], ended)
    for name in case.evaluation.others:
        found = weights_hash(case.other(name))
        if record.hashes.get(f"source {name}") != found:
            yield Mismatch(f"hashes.source {name}", record.hashes.get(f"source {name}"), found)
