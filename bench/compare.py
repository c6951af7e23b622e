"""Two defenses on the same images: every number they share, the paired difference, its interval, and a test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from bench import metrics
from bench.per_image import per_image
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
        p: McNemar's exact test for the verdicts of one seed, else a sign-flip test over images; ``holm`` is it, corrected.
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

    @property
    def verdict(self) -> str:
        """In words."""
        if self.holm > LEVEL:
            return "no difference shown"
        return "higher" if self.difference > 0 else "lower"


def compare(
    store: Store, first: str, second: str, suite: str, budget: str = "quick", only: Sequence[str] = ()
) -> list[Difference]:
    """Every number that two variants share at a budget of a suite, as ``first`` less ``second``.

    Raises:
        ValueError: if one has no finished records there, or they share no number; says what there is.
    """
    found = {name: _finished(store, suite, budget, name) for name in (first, second)}
    rows: list[Difference] = []
    for evaluation in dict.fromkeys(name for name, _ in found[first]):
        seeds = sorted({seed for name, seed in found[first].keys() & found[second].keys() if name == evaluation})
        if seeds and (not only or evaluation in only):
            pairs = [(found[first][evaluation, seed], found[second][evaluation, seed]) for seed in seeds]
            rows += _of_evaluation(store, evaluation, pairs)
    if not rows:
        raise ValueError(f"{first} and {second} share no number of images in {suite} at budget {budget}")
    corrected = metrics.holm([row.p for row in rows])
    return [replace(row, holm=p) for row, p in zip(rows, corrected, strict=True)]


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
    return Difference(evaluation, number, len(means), len(frames), a, b, mean, low, high, each, _p(means, len(frames)))


def chance(pairs: Sequence[tuple[pd.Series, pd.Series]]) -> float:
    """The p of :func:`difference` alone."""
    frames = _shared(pairs)
    return _p(_means(frames), len(frames))


def _gap(frame: pd.DataFrame) -> float:
    """Mean difference of a and b; 0 where rows in float32 cannot tell it from nothing."""
    gap = float((frame.a - frame.b).mean())
    return gap if abs(gap) > 2**-24 * float(frame.abs().to_numpy().mean()) else 0.0


def _shared(pairs: Sequence[tuple[pd.Series, pd.Series]]) -> list[pd.DataFrame]:
    """Values a and b of the images of both, a frame a seed."""
    return [pd.DataFrame({"a": a, "b": b}).dropna().astype(float) for a, b in pairs]


def _means(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames).groupby(level=0).mean()


def _p(means: pd.DataFrame, seeds: int) -> float:
    apart = (means.a - means.b).to_numpy()
    verdicts = seeds == 1 and set(np.unique(means.to_numpy())) <= {0.0, 1.0}
    return metrics.mcnemar(int((apart > 0).sum()), int((apart < 0).sum())) if verdicts else metrics.sign_flip(apart)


def table(rows: Sequence[Difference], first: str, second: str, fmt: str = "text") -> str:
    """The comparison as text, Markdown, CSV or JSON.

    Raises:
        ValueError: for another format.
    """
    if fmt in ("csv", "json"):
        frame = pd.DataFrame([{**asdict(row), "each": " ".join(map(repr, row.each)), "verdict": row.verdict} for row in rows])
        return frame.to_csv(index=False).strip() if fmt == "csv" else frame.to_json(orient="records", indent=1)
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt!r}; known are {', '.join(FORMATS)}")
    from tabulate import tabulate

    lines = []
    for row in rows:
        percent = "accuracy" in row.number
        shown = [_short(value, percent) for value in (row.a, row.b, row.difference, row.lower, row.upper)]
        each = " ".join(_short(value, percent) for value in row.each) if row.seeds > 1 else ""
        lines.append(
            [row.evaluation, row.number, row.n, *shown[:3], f"[{shown[3]}, {shown[4]}]", each, f"{row.holm:.3g}", row.verdict]
        )
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
    return f"Beyond chance {first} is {', and '.join(parts)}" + (
        f"; {rest} of {len(rows)} numbers show no difference." if rest else "."
    )


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
    "sign flips; p is corrected by Holm over all rows."
)


def _short(value: float, percent: bool) -> str:
    return f"{100 * value:.1f}" if percent else f"{value:.4g}"
