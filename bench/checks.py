"""What must hold of a finished record by itself, its data and its weights; each check yields what does not.

What a check cannot tell of a part of it, it yields as unknown. One that cannot be made, or not to its end, raises
:class:`bench.stock.Impossible`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binom

from bench.datasets import STORED
from bench.evals import Certified, Skipped
from bench.jobs import numerics, price, weights_hash
from bench.mismatch import Mismatch, Unknown, brief, differing, equal, few, named, same_rows, settings_of
from bench.restore import Case
from bench.stock import Impossible
from bench.store import Finding, Metric, Store, as_json
from bench.suites import SuiteError, available, load_suite
from defenses.recipe import settings

PRICED = ("parameters", "training_seconds_per_epoch")
"""What of a record's cost follows from its parts; the rest are times of the machine at that moment, and what divides them."""

ROUNDING = 1e-7
"""Relative difference of radii that another library's quantiles may make."""

RARE, SELDOM = 1e-8, 0.01
"""Probability of an honest radius that is refused for its row alone, and of one that is counted together with others."""


def request(case: Case) -> Iterator[Mismatch]:
    """The record lies where it belongs, and asks what its suite asks, at its version and budget, of its label's defense, in the
    arithmetic that it says."""
    record = case.record
    place = Store(Path()).path(record)
    there = Path(*case.path.absolute().parts[-len(place.parts) :])
    if there != place:
        yield Mismatch("place of the record", there, place)
    unknown = []
    for part in (_of_arithmetic, _of_defense, _of_suite):
        try:
            yield from part(case)
        except Impossible as reason:
            unknown.append(str(reason))
    if unknown:
        raise Impossible("; ".join(unknown))


def _of_arithmetic(case: Case) -> Iterator[Mismatch]:
    """What the question says of the numerics; the rest, where random numbers came from, no measurement elsewhere repeats."""
    wanted = numerics(case.evaluation)
    yield from differing({key: case.record.numerics.get(key) for key in wanted}, wanted, "numerics")


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


def radii(case: Case) -> Iterator[Mismatch]:
    """Radii and abstentions are those that the estimator gives for the votes of the row, and it would have stopped with them.

    Where a radius may stem from a look that is not stored, it is one that can be, and few rows have what only some have.
    """
    assert isinstance(case.evaluation, Certified)
    rows = case.rows
    widest, usual = (case.evaluation.recounted(rows, case.outline, error) for error in (RARE, SELDOM))
    abstained = (rows.prediction == -1).to_numpy()
    stored = np.where(abstained, -1.0, rows.radius)
    slack = ROUNDING * np.abs(stored)
    possible = (stored >= widest.low - slack) & (stored <= widest.high + slack)
    words = [_between(*ends) for ends in zip(widest.low, widest.high, strict=True)]
    told = rows.assign(said=[_between(own, own) for own in stored], votes=words, lucky=possible & (stored > usual.high + slack))
    for where, part in settings_of(told[~possible]):
        yield Mismatch(f"radius of {named(part.id)}{where}", few(part.said), f"{few(part.votes)}, by the votes")
    for where, part in settings_of(rows[abstained & (rows.radius != 0)]):
        yield Mismatch(f"radius of {named(part.id)}{where}", few(part.radius), "0 of abstentions")
    for where, part in settings_of(rows[~widest.ended]):
        yield Mismatch(f"draws of {named(part.id)}{where}", few(part.draws), "not where the estimator stops with these votes")
    for where, part in settings_of(told):
        lucky = part[part.lucky]
        if binom.sf(len(lucky) - 1, len(part), SELDOM) < RARE:
            usually = f"at most {SELDOM:.0%} of the images are above what their last votes prove by so much"
            yield Mismatch(f"radius of {named(lucky.id)}{where}", f"{few(lucky.said)}, of {len(lucky)} of {len(part)}", usually)


def _between(low: float, high: float) -> str:
    """A radius, or the two that it must lie between, in words; -1 is an abstention."""
    ends = ["abstains" if radius < 0 else brief(radius) for radius in (low, high)]
    return " to ".join(dict.fromkeys(ends))


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


def data(case: Case) -> Iterator[Mismatch | Unknown]:
    """The images that trained, validated and tested are those of the record, which says where they came from, and the rows are
    of the last and have their labels."""
    hashes = case.record.hashes
    known: dict[str, set[str | None]] = {name: {hashes.get(name)} for name in ("train", "images")}
    known["validation"] = {*case.held_out}
    here = {"train": case.task.train, "validation": case.task.validation, "images": case.images}
    for name, some in here.items():
        if not known[name]:
            yield Unknown("validation images", "the record is older than their hash, and no note of a part has it")
        elif some.hash not in known[name]:
            stored = " or ".join(map(str, sorted(known[name], key=str)))
            yield Mismatch(f"hashes.{name}", f"{stored} ({hashes.get('data')})", f"{some.hash} ({some.source})")
    if hashes.get("images") == case.images.hash:  # else the source is named with them
        yield from _source(str(hashes.get("data")), case.images.source)
    table = case.rows
    if "id" not in table:
        return
    tested = pd.DataFrame({"id": case.images.ids.cpu(), "label": case.images.labels.cpu()})
    first = f"the first {len(tested)} test images"
    missing, foreign = sorted(set(tested.id) - set(table.id)), sorted(set(table.id) - set(tested.id))
    if missing:
        yield Mismatch("ids of the rows", f"not {named(missing)}", first)
    if foreign:
        yield Mismatch("ids of the rows", f"also {named(foreign)}", first)
    yield from same_rows(table, tested)


def _source(stored: str, here: str) -> Iterator[Mismatch | Unknown]:
    """What the record says of where its images are from, which are the same here: only their layout may be another."""
    if stored == here:
        return
    if any(stored == here.replace(f" {a}", f" {b}", 1) for a in STORED for b in STORED):
        yield Unknown("hashes.data", f"the same images are here as {here!r}, not as {stored!r}")
    else:
        yield Mismatch("hashes.data", stored, here)


def cost(case: Case) -> Iterator[Mismatch]:
    """What is told of size and training follows from the stored parts and their logs, of those of :data:`PRICED` it tells."""
    stored, found = case.record.cost, price(case.own)
    told = [name for name in PRICED if name in stored]
    yield from differing({name: stored[name] for name in told}, {name: found.get(name) for name in told}, "cost")


def networks(case: Case) -> Iterator[Mismatch]:
    """A training seed has one model: this record's is that of the finished records beside it, which are read together, or at
    least of more of them than any other."""
    own = case.record.hashes.get("weights", "")
    beside = [*map(_weights, sorted(case.path.parent.glob("*.json")))]
    told = Counter(name for name in beside if name is not None)
    count = told.pop(own, 0)
    other, most = next(iter(told.most_common(1)), ("", 0))
    if most >= max(count, 1):
        yield Mismatch("hashes.weights", own, f"{other}, of {most} other record{'s' if most > 1 else ''} of this seed")


def _weights(path: Path) -> str | None:
    """The weights that a finished record names; None if there is no such record."""
    try:
        content = json.loads(path.read_bytes())
        return str(content["hashes"]["weights"]) if content["status"] == "success" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
