"""Two defenses on the same images: every number they share, the paired difference, its interval, and a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import pandas as pd

from bench import metrics
from bench.diagnose import diagnose
from bench.differences import Difference, difference
from bench.per_image import stored
from bench.registry import RegistryError, variant_of
from bench.store import Record, Store
from bench.suites import unknown

Found = dict[tuple[str, int], Record]
"""Evaluation and seed -> record."""


@dataclass(frozen=True)
class Between:
    """What to compare.

    Attributes:
        first, second: two variants as records call them (:func:`label`).
        suite, budget: whose records.
        only: evaluations; all of them if there are none.
    """

    first: str
    second: str
    suite: str
    budget: str = "quick"
    only: Sequence[str] = ()

    def found(self, store: Store) -> dict[str, Found]:
        """Finished records of both.

        Raises:
            ValueError: if one has none; says what there is.
        """
        return {name: _finished(store, self.suite, self.budget, name) for name in (self.first, self.second)}


def compare(store: Store, between: Between) -> list[Difference]:
    """Every number that two variants share at a budget of a suite, as the first less the second.

    Raises:
        ValueError: if one has no finished records there, or not of an evaluation, or they share no number; says what there is.
    """
    found, only = between.found(store), between.only
    first, second = found[between.first], found[between.second]
    evaluations = {evaluation for own in found.values() for evaluation, _ in own}
    for name in only:
        if name not in evaluations:
            raise ValueError(f"--only: {unknown(name, evaluations, 'evaluation')}")
    rows: list[Difference] = []
    for evaluation in dict.fromkeys(name for name, _ in first):
        pairs = _pairs(first, second, evaluation)
        if pairs and (not only or evaluation in only):
            rows += _of_evaluation(store, evaluation, pairs)
    if not rows:
        where = f"{between.suite} at budget {between.budget}"
        why = _left_out(store, between, found, rows)
        raise ValueError(f"{between.first} and {between.second} share no number of images in {where}: {why}")
    corrected = metrics.holm([row.p for row in rows])
    # Over the same number of rows, so that nothing holds for other trainings that does not hold for these.
    again = metrics.holm([1.0 if row.trainings is None else row.trainings for row in rows])
    return [
        replace(row, holm=p, trainings_holm=None if row.trainings is None else q)
        for row, p, q in zip(rows, corrected, again, strict=True)
    ]


def label(spec: str) -> str:
    """What records call a variant that is given as on the command line; the text itself where it names none here, since records
    may be of somebody else's defense."""
    try:
        return variant_of(spec).label
    except RegistryError:
        return spec


def _finished(store: Store, suite: str, budget: str, variant: str) -> Found:
    records = [r for r in store.records(suite) if r.suite["budget"] == budget and r.status == "success"]
    names = {record.defense["variant"] for record in records}
    if not names:
        raise ValueError(f"no finished records of budget {budget} under {store.root / suite}")
    if variant not in names:
        raise ValueError(f"no finished records of budget {budget} under {store.root / suite}: {unknown(variant, names)}")
    return {(r.eval["name"], r.seed): r for r in records if r.defense["variant"] == variant}


def notes(store: Store, between: Between, rows: Sequence[Difference]) -> list[str]:
    """What a reader of a comparison must know besides: which of the two is flagged, and what was not compared, and why."""
    found = between.found(store)
    told = []
    for name, own in found.items():
        seeds = [one.place[3] for one in diagnose(store, own.values()) if one.status == "flagged"]
        if seeds:
            whose = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
            told.append(
                f"{name} is flagged ({whose}): read what `bench diagnose {store.root / between.suite / name}` says first."
            )
    left_out = _left_out(store, between, found, rows)
    return [*told, *([f"Not compared: {left_out}."] if left_out else [])]


def _left_out(store: Store, between: Between, found: Mapping[str, Found], rows: Sequence[Difference]) -> str:
    """The evaluations of two variants that no row is of, by the reason."""
    first, second, only = found[between.first], found[between.second], between.only
    why: dict[str, list[str]] = {}
    for evaluation in dict.fromkeys(name for name, _ in (*first, *second)):
        if evaluation in {row.evaluation for row in rows} or (only and evaluation not in only):
            continue
        pairs = _pairs(first, second, evaluation)
        lacking = [name for name, own in found.items() if not any(evaluation == one for one, _ in own)]
        if lacking:
            reason = f"{lacking[0]} has none"
        elif not pairs:
            reason = "no seed in common"
        elif not all(same_question(*pair) for pair in pairs):
            reason = "asked otherwise, or of other images"
        elif any(stored(store, record) is None for pair in pairs for record in pair):
            reason = "rows that cannot be read: see bench verify"
        else:
            reason = "no number that is a mean over images"
        why.setdefault(reason, []).append(evaluation)
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in why.items())


def _pairs(first: Found, second: Found, evaluation: str) -> list[tuple[Record, Record]]:
    """The records of an evaluation that two variants have of the same seeds."""
    seeds = sorted(seed for name, seed in first.keys() & second.keys() if name == evaluation)
    return [(first[evaluation, seed], second[evaluation, seed]) for seed in seeds]


def _of_evaluation(store: Store, evaluation: str, pairs: Sequence[tuple[Record, Record]]) -> list[Difference]:
    """The numbers of one evaluation, of records that answer the same question on the same images."""
    if not all(same_question(*pair) for pair in pairs):
        return []
    tables = []
    for pair in pairs:
        first, second = (stored(store, record) for record in pair)
        if first is None or second is None:
            return []
        tables.append((first, second))
    shared = [number for number in tables[0][0] if all(number in values for pair in tables for values in pair)]
    return [difference(evaluation, number, [(a[number], b[number]) for a, b in tables]) for number in shared]


def same_question(first: Record, second: Record) -> bool:
    """Whether two records were asked the same about the same images, by the same version of their suite."""
    asked = [(record.suite, record.eval["fields"], record.hashes.get("images")) for record in (first, second)]
    return asked[0] == asked[1]


def table(rows: Sequence[Difference], first: str, second: str, fmt: str = "text", notes: Sequence[str] = ()) -> str:
    """The comparison as text, Markdown, CSV or JSON; the first two with notes (:func:`notes`).

    Raises:
        ValueError: for another format.
    """
    if fmt in ("csv", "json"):
        told = [
            {"each": " ".join(map(repr, row.each)), "p_is_bound": row.p_is_bound, "verdict": row.verdict, "again": row.again}
            for row in rows
        ]
        frame = pd.DataFrame([asdict(row) | words for row, words in zip(rows, told, strict=True)])
        return frame.to_csv(index=False).strip() if fmt == "csv" else frame.to_json(orient="records", indent=1)
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt!r}; known are {', '.join(FORMATS)}")
    from tabulate import tabulate

    lines = []
    for row in rows:
        percent = "accuracy" in row.number
        shown = [_short(value, percent) for value in (row.a, row.b, row.difference)]
        each = " ".join(_short(value, percent) for value in row.each) if row.seeds > 1 else ""
        again = row.again if row.trainings_holm is None else f"{row.again} (p {row.trainings_holm:.3g})"
        interval = f"[{_short(row.lower, percent)}, {_short(row.upper, percent)}]" if row.lower is not None else "–"
        lines.append([row.evaluation, row.number, row.n, *shown, interval, each, row.p_in_words, row.verdict, again])
    headings = [
        "eval",
        "number",
        "images",
        first,
        second,
        "difference",
        "95 % interval",
        "of each seed",
        "p (Holm)",
        f"{first} is",
        "if trained again",
    ]
    grid = str(tabulate(lines, headings, tablefmt={"text": "simple", "md": "github"}[fmt], disable_numparse=True))
    return "\n\n".join([grid, summary(rows, first, second), *notes, CAPTION])


def summary(rows: Sequence[Difference], first: str, second: str) -> str:
    """The comparison in a sentence."""
    shown = {verdict: [row for row in rows if row.verdict == verdict] for verdict in ("higher", "lower")}
    parts = [f"{verdict} than {second} in {_largest(found)}" for verdict, found in shown.items() if found]
    rest = len(rows) - sum(map(len, shown.values()))
    if not parts:
        return f"Of {len(rows)} numbers none shows a difference between {first} and {second} beyond chance."
    left = f"; {rest} of {len(rows)} numbers show no difference." if rest else "."
    return f"Beyond chance {first} is {', and '.join(parts)}{left} {_of_trainings([*shown['higher'], *shown['lower']])}"


def _of_trainings(found: Sequence[Difference]) -> str:
    """What of the differences, which are those of the networks at hand, goes for the methods."""
    several = [row for row in found if row.trainings_holm is not None]
    if not several:
        return "That is for these networks: one training seed does not tell whether networks trained again would differ, too."
    hold = [f"{row.evaluation}: {row.number}" for row in several if row.again != "not shown"]
    named = f" ({'; '.join(hold)})" if 0 < len(hold) <= 3 else ""
    shown = f"{len(hold)} of these {len(several)}" if hold else "none"
    return f"That is for these networks; that networks trained again would differ, too, is shown in {shown}{named}."


def _largest(found: Sequence[Difference]) -> str:
    """How many numbers differ, and the one of them that differs most for its interval."""
    most = max(found, key=lambda row: abs(row.difference) / max(_width(row), 1e-12))
    percent = "accuracy" in most.number
    clearest = f"{most.evaluation}: {most.number}, by {_short(abs(most.difference), percent)}" + " points" * percent
    if most.lower is not None and most.upper is not None:
        ends = sorted([most.lower, most.upper] if most.difference > 0 else [-most.lower, -most.upper])
        clearest += f", 95 % interval {_short(ends[0], percent)} to {_short(ends[1], percent)}"
    return f"{len(found)} number{'s' if len(found) > 1 else ''} ({'most clearly in ' if len(found) > 1 else ''}{clearest})"


def _width(row: Difference) -> float:
    return 0.0 if row.lower is None or row.upper is None else row.upper - row.lower


FORMATS = ("text", "md", "csv", "json")

CAPTION = (
    "Accuracies in percent. Higher is the larger number, which is the better one of accuracies and radii, not of every "
    "number. Paired on the same images, means over the training seeds that both have. Intervals and tests are over "
    "images, for the networks as they were trained: Newcombe's interval and McNemar's exact test for one seed's verdicts, "
    "or those of seeds that all agree, else bootstrap (– where it has no width) and sign flips. Training again gives "
    "other networks: whether they would differ, too, is read off the seeds (the larger of that p and a paired t over "
    "seeds), whose differences must be much alike where seeds are few. All p are corrected by Holm over all rows; "
    "intervals are not, so that one may leave out 0 where no difference is shown."
)


def _short(value: float | None, percent: bool) -> str:
    if value is None:
        return "–"
    # Rounding leaves no sign before nothing.
    return f"{round(100 * value, 1) + 0.0:.1f}" if percent else f"{value + 0.0:.4g}"
