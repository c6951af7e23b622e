"""A cell of a paper's table: what is printed, what our records say, and how far that is apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from scipy import stats

from bench import published
from bench.metrics import CONFIDENCE
from bench.papers.layout import Answer, Beside, facts
from bench.store import Metric, Record
from bench.tables import numbers
from bench.wanted import Need, commands

TIMES = ("training_seconds_per_image", "seconds_per_image")
"""What may answer besides a record's own numbers, from what it cost: an image in an epoch of all networks, and a prediction.
A time of an image can be scaled to the size of the paper, which budgets of fewer images and epochs have not."""

HALF = 0.5 + CONFIDENCE / 2
"""Quantile at the upper end of an interval."""


@dataclass(frozen=True)
class Number:
    """One record's answer, in the unit of the published number.

    Attributes:
        value, lower, upper: with its interval, if it has one.
        n: images, or epochs of a time of training.
        too_few: a certified accuracy that is 0 because the draws cannot prove the radius for any image.
    """

    value: float
    lower: float | None
    upper: float | None
    n: int
    too_few: bool = False


def number(record: Record, wanted: Answer | Beside, row: Mapping[str, Any]) -> Number | None:
    """What a record answers to a published number, None if it has no such number.

    Raises:
        ValueError: if several of its numbers fit.
    """
    asked = facts(wanted.facts, row)
    fit = [one for one in _all(record) if one.metric == wanted.metric and _has(one, asked)]
    if not fit:
        return _beyond(record, wanted, asked)
    if len(fit) > 1:
        raise ValueError(f"{record.eval['name']}: {len(fit)} numbers {wanted.metric} with {asked}; give more facts")
    one, scale = fit[0], getattr(wanted, "scale", 1.0) * (100.0 if fit[0].unit == "fraction" else 1.0)
    ends = (one.lower, one.value, one.upper)
    if getattr(wanted, "complement", False):
        ends = tuple(None if end is None else 1 - end for end in reversed(ends))  # type: ignore[assignment]
    low, value, high = (None if end is None else end * scale for end in ends)
    assert value is not None
    if low == high:  # a bootstrap over equal images has no width, and says nothing
        low = high = None
    return Number(value, low, high, one.n)


def _all(record: Record) -> list[Metric]:
    """A record's numbers, and times that follow from what it cost."""
    found, images = list(numbers(record)), record.eval["fields"].get("images")
    epochs, trained = [one for one in found if one.metric == "training_seconds_per_epoch"], record.task.get("train_images")
    if epochs and trained:
        found.append(epochs[0].model_copy(update={"metric": "training_seconds_per_image", "value": epochs[0].value / trained}))
    seconds = record.cost.get("seconds")
    if seconds is not None and images and record.cost.get("measured_together", 1.0) == 1.0:
        found.append(Metric(metric="seconds_per_image", value=seconds / images, n=images, unit="seconds"))
    return found


def _has(one: Metric, asked: Mapping[str, Any]) -> bool:
    for name, wanted in asked.items():
        own = getattr(one, name)
        if isinstance(own, float) and isinstance(wanted, float | int):
            if abs(own - wanted) > 1e-9:
                return False
        elif own != wanted:
            return False
    return True


def _beyond(record: Record, wanted: Answer | Beside, asked: Mapping[str, Any]) -> Number | None:
    """Certified accuracy at a radius that no votes can prove: 0, without an interval."""
    fields, radius = record.eval["fields"], asked.get("radius")
    if wanted.metric != "certified_accuracy" or radius is None or "estimator" not in fields:
        return None
    from defenses.estimators import ESTIMATORS, Question

    top = ESTIMATORS[fields["estimator"]].ceiling(Question(fields["sigma"], fields["alpha"], fields["n"]))
    return Number(0.0, None, None, fields["images"], True) if float(radius) > top else None


def by_seed(stated: Iterable[tuple[str, int]]) -> str:
    """Statuses in words, of whose seeds where they differ."""
    seeds: dict[str, set[int]] = {}
    for status, seed in stated:
        seeds.setdefault(status, set()).add(seed)
    if len(seeds) < 2:
        return "".join(seeds)
    return "; ".join(f"{status} (seed {', '.join(map(str, sorted(own)))})" for status, own in seeds.items())


@dataclass(frozen=True)
class Cell:
    """A published number and what answers it.

    Attributes:
        row: of :func:`bench.published.frame`.
        answer: what is asked of our records.
        suite, budget: whose records.
        spec, label: the variant, as on the command line and as records call it.
        deviation: whether the published number is one, over training seeds.
        records, ours: finished records that answer, one a training seed, and their numbers.
        why: of a hole, what its records say instead of a number, if there are any.
        taken: whether a finished record that does not answer has a place that a run would need.
        statuses: what may be believed of each record, as in summaries.
        best: whether it is the best of its block and column, and differs from all others there significantly.
        first: of a time, the first of ours of its data set and column, if that is another.
    """

    row: Mapping[str, Any]
    answer: Answer
    suite: str
    budget: str
    spec: str
    label: str
    deviation: bool = False
    records: tuple[Record, ...] = ()
    ours: tuple[Number, ...] = ()
    why: str = ""
    taken: bool = False
    statuses: tuple[str, ...] = ()
    best: bool = False
    first: Cell | None = None

    @property
    def printed(self) -> float:
        """The published number: the mean, or, in a table of deviations, the deviation."""
        return float(self.row["std"] if self.deviation else self.row["value"])

    @property
    def filled(self) -> bool:
        """Whether there is a number of ours."""
        return len(self.ours) > (1 if self.deviation else 0)

    @property
    def too_few(self) -> bool:
        """Whether ours is 0 for want of draws, which is no finding."""
        return self.filled and self.ours[0].too_few

    @property
    def flagged(self) -> bool:
        """Whether the diagnosis of a seed flags ours."""
        return "flagged" in self.statuses

    @property
    def status(self) -> str:
        """What may be believed, of whose seeds where they differ; "" for a hole."""
        return by_seed(self.stated)

    @property
    def stated(self) -> list[tuple[str, int]]:
        """The status of each record, and its seed."""
        return [(status, record.seed) for status, record in zip(self.statuses, self.records, strict=True)]

    @property
    def value(self) -> float:
        """Ours: the mean over training seeds, or their deviation where the paper prints one."""
        values = [one.value for one in self.ours]
        return stdev(values) if self.deviation else mean(values)

    @property
    def spread(self) -> float | None:
        """Deviation over training seeds, of two at least."""
        return stdev([one.value for one in self.ours]) if len(self.ours) > 1 and not self.deviation else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of one seed over images; of several over images and seeds together (Student); of a deviation by chi-square.

        A deviation of 0 has none: seeds agree exactly because accuracies move by whole images.
        """
        if self.deviation:
            return _of_deviation(self.value, len(self.ours)) if self.filled and self.value else None
        ends = [(one.lower, one.upper) for one in self.ours if one.lower is not None and one.upper is not None]
        if not ends or len(ends) < len(self.ours):
            return None
        if self.spread is None:
            return ends[0]
        # All seeds are asked about the same images, whose choice their mean does not average out.
        # Each side has its own width: near 0 and 100 percent an interval over images reaches one way alone.
        below = mean(own.value - low for own, (low, _) in zip(self.ours, ends, strict=True))
        above = mean(high - own.value for own, (_, high) in zip(self.ours, ends, strict=True))
        seeds = float(stats.t.ppf(HALF, len(ends) - 1)) * self.spread / math.sqrt(len(ends))
        low, high = self.value - math.hypot(below, seeds), self.value + math.hypot(above, seeds)
        return (max(low, 0.0), min(high, 100.0)) if self.row["unit"] == "percent" else (low, high)

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, in points; None where it would tell nothing: of times, of impossible numbers, for want of
        draws."""
        told = self.filled and not self.too_few and not self.impossible and self.in_percent
        return self.value - self.printed if told else None

    @property
    def ratio(self) -> float | None:
        """Ours over the paper's, of times; None where our network is another than the paper's, which tells nothing."""
        same = all(record.architecture == self.row["architecture"] for record in self.records)
        return self.value / self.printed if self.filled and not self.in_percent and same else None

    @property
    def multiples(self) -> tuple[float, float] | None:
        """Of a time, how many times the first it is, ours and the paper's; None for the first."""
        return None if self.first is None else (self.value / self.first.value, self.printed / self.first.printed)

    @property
    def in_percent(self) -> bool:
        """Whether it is in percent, or in points of percent, and no time."""
        return str(self.row["unit"]).startswith("percent")

    @property
    def impossible(self) -> bool:
        """Whether the published number cannot be true."""
        return bool(self.row["flag"] == "impossible")

    @property
    def inside(self) -> bool | None:
        """Whether the paper's number lies in our interval; None without one, or where the number is impossible."""
        if not self.filled or self.interval is None or self.impossible:
            return None
        digits = 10.0 ** -_decimals(self.row["printed"]) / 2  # what rounding may have moved it by
        low, high = self.interval
        return low - digits <= self.printed <= high + digits

    @property
    def lower_is_better(self) -> bool:
        """Of this kind of number."""
        return self.row["metric"] in published.LOWER_IS_BETTER or self.deviation

    def command(self, seeds: Sequence[int], more: str = "") -> str:
        """What fills the cell, with further options."""
        return commands([self.need], self.budget, seeds, [self.need] if self.taken else (), more)[0]

    @property
    def need(self) -> Need:
        """The record behind it."""
        return Need(self.suite, self.spec, self.answer.eval)


def _of_deviation(deviation: float, count: int) -> tuple[float, float]:
    low, high = (float(stats.chi2.ppf(share, count - 1)) for share in (HALF, 1 - HALF))
    return deviation * math.sqrt((count - 1) / low), deviation * math.sqrt((count - 1) / high)


def _decimals(printed: str) -> int:
    return len(str(printed).partition(".")[2])
