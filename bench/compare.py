"""Two defenses on the same images: every number they share, the paired difference, its interval, and a test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from bench import metrics
from bench.per_image import per_image
from bench.registry import RegistryError, variant_of
from bench.store import Record, Store
from bench.suites import unknown

LEVEL = 1 - metrics.CONFIDENCE
"""Of the verdicts, for all rows of a comparison together (Holm 1979)."""


@dataclass(frozen=True)
class Difference:
    """One number of two defenses.

    Attributes:
        evaluation, number: which.
        n, seeds: images that both were asked about, and training seeds that both have.
        a, b: the means over images and seeds.
        difference, lower, upper: a - b, with its interval over images, for the networks as they are.
        each: the difference of every seed.
        p: over images, for the networks as they are (:func:`bench.metrics.over_images`); ``holm`` is it, corrected.
        trainings: p for networks trained again, the larger of ``p`` and :func:`bench.metrics.over_trainings`; None for one
            seed, which does not tell. ``trainings_holm`` is it, corrected.
    """

    evaluation: str
    number: str
    n: int
    seeds: int
    a: float
    b: float
    difference: float
    lower: float
    upper: float
    each: tuple[float, ...]
    p: float
    holm: float = 1.0
    trainings: float | None = None
    trainings_holm: float | None = None

    @property
    def verdict(self) -> str:
        """For the networks as they are, in words."""
        return self._direction if self.holm <= LEVEL else "no difference shown"

    @property
    def again(self) -> str:
        """For networks trained again, in words."""
        if self.trainings_holm is None:
            return "one seed"
        return self._direction if self.trainings_holm <= LEVEL else "not shown"

    @property
    def _direction(self) -> str:
        return "higher" if self.difference > 0 else "lower"


def compare(
    store: Store, first: str, second: str, suite: str, budget: str = "quick", only: Sequence[str] = ()
) -> list[Difference]:
    """Every number that two variants share at a budget of a suite, as ``first`` less ``second``.

    Args:
        first, second: as records call them (:func:`label`).

    Raises:
        ValueError: if one has no finished records there, or not of an evaluation, or they share no number; says what there is.
    """
    found = {name: _finished(store, suite, budget, name) for name in (first, second)}
    evaluations = {evaluation for own in found.values() for evaluation, _ in own}
    for name in only:
        if name not in evaluations:
            raise ValueError(f"--only: {unknown(name, evaluations, 'evaluation')}")
    rows: list[Difference] = []
    for evaluation in dict.fromkeys(name for name, _ in found[first]):
        seeds = sorted({seed for name, seed in found[first].keys() & found[second].keys() if name == evaluation})
        if seeds and (not only or evaluation in only):
            pairs = [(found[first][evaluation, seed], found[second][evaluation, seed]) for seed in seeds]
            rows += _of_evaluation(store, evaluation, pairs)
    if not rows:
        raise ValueError(f"{first} and {second} share no number of images in {suite} at budget {budget}")
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


def _finished(store: Store, suite: str, budget: str, variant: str) -> dict[tuple[str, int], Record]:
    records = [r for r in store.records(suite) if r.suite["budget"] == budget and r.status == "success"]
    names = {record.defense["variant"] for record in records}
    if variant not in names:
        raise ValueError(f"no finished records of budget {budget} under {store.root / suite}: {unknown(variant, names)}")
    return {(r.eval["name"], r.seed): r for r in records if r.defense["variant"] == variant}


def _of_evaluation(store: Store, evaluation: str, pairs: Sequence[tuple[Record, Record]]) -> list[Difference]:
    """The numbers of one evaluation, of records that answer the same question on the same images."""
    if not all(same_question(*pair) for pair in pairs):
        return []
    tables = [tuple(per_image(record, store.rows(record)) for record in pair) for pair in pairs]
    shared = [number for number in tables[0][0] if all(number in values for pair in tables for values in pair)]
    return [difference(evaluation, number, [(a[number], b[number]) for a, b in tables]) for number in shared]


def same_question(first: Record, second: Record) -> bool:
    """Whether two records were asked the same about the same images, by the same version of their suite."""
    asked = [(record.suite, record.eval["fields"], record.hashes.get("images")) for record in (first, second)]
    return asked[0] == asked[1]


def difference(evaluation: str, number: str, pairs: Sequence[tuple[pd.Series, pd.Series]]) -> Difference:
    """The difference of one number, from what it is the mean of image by image, a pair a training seed."""
    frames = _shared(pairs)
    means = _means(frames)
    low, high = metrics.bootstrap_mean((means.a - means.b).to_numpy())
    each = tuple(_gap(frame) for frame in frames)
    a, b, mean = float(means.a.mean()), float(means.b.mean()), _gap(means)
    p, trainings = _chances(means, frames)
    return Difference(evaluation, number, len(means), len(frames), a, b, mean, low, high, each, p, trainings=trainings)


def chance(pairs: Sequence[tuple[pd.Series, pd.Series]]) -> float:
    """The p of :func:`difference` alone: for networks trained again where there are several seeds, else for these."""
    frames = _shared(pairs)
    p, trainings = _chances(_means(frames), frames)
    return p if trainings is None else trainings


def _gap(frame: pd.DataFrame) -> float:
    """Mean difference of a and b; 0 where rows in float32 cannot tell it from nothing."""
    gap = float((frame.a - frame.b).mean())
    return gap if abs(gap) > 2**-24 * float(frame.abs().to_numpy().mean()) else 0.0


def _shared(pairs: Sequence[tuple[pd.Series, pd.Series]]) -> list[pd.DataFrame]:
    """Values a and b of the images of both, a frame a seed."""
    return [pd.DataFrame({"a": a, "b": b}).dropna().astype(float) for a, b in pairs]


def _means(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames).groupby(level=0).mean()


def _chances(means: pd.DataFrame, frames: Sequence[pd.DataFrame]) -> tuple[float, float | None]:
    """``p`` and ``trainings`` of a :class:`Difference`."""
    p = metrics.over_images(means.a.to_numpy(), means.b.to_numpy())
    if len(frames) == 1:
        return p, None
    apart = [np.abs((frame.a - frame.b).to_numpy()) for frame in frames]
    steps = [values[values > 0].min() / len(values) for values in apart if (values > 0).any()]
    return p, max(p, metrics.over_trainings(np.array([_gap(frame) for frame in frames]), min(steps, default=0.0)))


def table(rows: Sequence[Difference], first: str, second: str, fmt: str = "text") -> str:
    """The comparison as text, Markdown, CSV or JSON.

    Raises:
        ValueError: for another format.
    """
    if fmt in ("csv", "json"):
        told = [{"each": " ".join(map(repr, row.each)), "verdict": row.verdict, "again": row.again} for row in rows]
        frame = pd.DataFrame([asdict(row) | words for row, words in zip(rows, told, strict=True)])
        return frame.to_csv(index=False).strip() if fmt == "csv" else frame.to_json(orient="records", indent=1)
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt!r}; known are {', '.join(FORMATS)}")
    from tabulate import tabulate

    lines = []
    for row in rows:
        percent = "accuracy" in row.number
        shown = [_short(value, percent) for value in (row.a, row.b, row.difference, row.lower, row.upper)]
        each = " ".join(_short(value, percent) for value in row.each) if row.seeds > 1 else ""
        again = row.again if row.trainings_holm is None else f"{row.again} (p {row.trainings_holm:.3g})"
        interval = f"[{shown[3]}, {shown[4]}]"
        lines.append([row.evaluation, row.number, row.n, *shown[:3], interval, each, f"{row.holm:.3g}", row.verdict, again])
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
    return f"{grid}\n\n{summary(rows, first, second)}\n\n{CAPTION}"


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
    most = max(found, key=lambda row: abs(row.difference) / max(row.upper - row.lower, 1e-12))
    percent = "accuracy" in most.number
    ends = [_short(value, percent) for value in (most.difference, most.lower, most.upper)]
    points = " points" if percent else ""
    clearest = f"{most.evaluation}: {most.number}, by {ends[0]}{points}, 95 % interval {ends[1]} to {ends[2]}"
    return f"{len(found)} number{'s' if len(found) > 1 else ''} ({'most clearly in ' if len(found) > 1 else ''}{clearest})"


FORMATS = ("text", "md", "csv", "json")

CAPTION = (
    "Accuracies in percent. Paired on the same images, means over the training seeds that both have. Intervals (bootstrap) and "
    "tests are over images, for the networks as they were trained: McNemar's exact test for one seed's verdicts, else "
    "sign flips. Training again gives other networks: whether they would differ, too, is read off the seeds (the larger of "
    "that p and a paired t over seeds), whose differences must be much alike where seeds are few. All p are corrected by Holm "
    "over all rows."
)


def _short(value: float, percent: bool) -> str:
    return f"{100 * value:.1f}" if percent else f"{value:.4g}"
