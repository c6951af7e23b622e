"""What in a certification log cannot be true (methods 1.3 I7, 7.1, 7.5): every kind of problem, and how it is found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from itertools import chain, islice, pairwise

import numpy as np
from numpy.typing import NDArray

from bench.logs import Log
from defenses.bounds import Bools, Floats
from defenses.estimators import ESTIMATORS, Estimator, Question, Tally

Ints = NDArray[np.int64]

PROBLEMS = {
    "empty": "there is no row",
    "unreadable": "lines, by their number, that are no row under this header",
    "truncated": "the end is cut off: of a log the last line, by its number, of a record the last ids",
    "missing": "indices that are left out, although the log's stride or its record has them",
    "stray": "indices that fit neither the log's stride nor its record",
    "duplicate": "indices that occur more than once",
    "correct": "the column `correct` contradicts label and prediction; an abstention (-1) is never correct",
    "abstention": "an abstention (-1) with a radius above 0",
    "radius": "radii that are no finite numbers of at least 0; NaN certifies nothing",
    "ceiling": "radii above the largest that can be certified even if all draws agree",
    "rounding": "radii that printing rounded up past the largest that can be certified: as printed they are not proven",
    "unproven": "radii above what the row's own count of votes proves",
    "unsound": "no radius is proven: the record says that its estimator is unsound",
}
"""Every kind of problem, in a sentence."""

_SLACK = 1 + 1e-7
"""float32 radii and other libraries' quantiles differ by less; what printing rounds is far more."""

_LISTED = 100_000
"""Missing indices that are named at most: one corrupted index can open a gap of any size."""


@dataclass(frozen=True)
class Problem:
    """Something in a log that cannot be true, or is not there.

    Attributes:
        kind: a key of :data:`PROBLEMS`.
        detail: in words.
        rows: indices of the rows concerned, increasing; numbers of lines where there is no index.
    """

    kind: str
    detail: str
    rows: list[int]


def problems(log: Log, limits: Limits | None) -> list[Problem]:
    """Everything that is wrong with a log; without limits, radii are not compared with anything."""
    found = [*_reading(log), *_indices(log), *_rows(log, limits)]
    return [Problem(kind, PROBLEMS[kind] + note, sorted({int(row) for row in where})) for kind, where, note in found]


Found = Iterator[tuple[str, Iterable[int], str]]
"""Kind, rows, and words that the kind's sentence lacks."""


def _reading(log: Log) -> Found:
    yield from log.damage
    if _unsound(log):
        yield "unsound", log.rows.idx[log.rows.predict != -1], ""
    if log.rows.empty and not log.damage:
        yield "empty", [], ""


def _indices(log: Log) -> Found:
    """What is missing, too much, or twice."""
    known, often = np.unique(log.rows.idx.to_numpy(), return_counts=True)
    if (often > 1).any():
        yield "duplicate", known[often > 1], ""
    if log.record and len(known):
        yield from _against_record(known, int(log.fields["images"]))
    elif len(known):
        yield from _against_stride(known)


def _against_record(known: Ints, images: int) -> Found:
    """Ids are positions in the stored data. Of a shuffled data set few are below ``images``, and what is lost has no name."""
    counted = f" ({len(known)} different ids, the record is of {images} images)"
    inside = known[(known >= 0) & (known < images)]
    if len(inside) < 0.9 * len(known):
        if len(known) != images:
            yield ("truncated" if len(known) < images else "stray"), [], counted
        return
    lost, stray = np.setdiff1d(np.arange(images), inside), np.setdiff1d(known, inside)
    found = {"missing": lost[lost < inside[-1]], "truncated": lost[lost > inside[-1]], "stray": stray}
    yield from ((kind, where, counted) for kind, where in found.items() if len(where))


def _against_stride(known: Ints) -> Found:
    """The stride is the most frequent step between neighbours, its start the most frequent remainder; of two, the smaller.

    A log where fewer than half of the steps are equal has none (images in shuffled order): nobody knows what it lacks.
    """
    steps, often = np.unique(np.diff(known), return_counts=True)
    if 2 * often.max(initial=0) < max(1, often.sum()):
        return
    stride = int(steps[often.argmax()])
    starts, often = np.unique(known % stride, return_counts=True)
    fits = known % stride == starts[often.argmax()]
    gaps = [range(a + stride, b, stride) for a, b in pairwise(known[fits].tolist()) if b - a > stride]
    if gaps:
        yield "missing", islice(chain.from_iterable(gaps), _LISTED), f" ({sum(map(len, gaps))} at a stride of {stride})"
    if not fits.all():
        yield "stray", known[~fits], f" (a stride of {stride})"


def _rows(log: Log, limits: Limits | None) -> Found:
    """What single rows claim."""
    rows, radius = log.rows, log.rows.radius.to_numpy()
    abstained = (rows.predict == -1).to_numpy()
    hits: dict[str, Bools] = {
        "correct": (rows.correct != ((rows.label == rows.predict) & ~abstained)).to_numpy(),
        "abstention": abstained & (radius > 0),
        "radius": ~(np.isfinite(radius) & (radius >= 0)),
    }
    if limits:
        top = limits.ceiling * _SLACK
        above, printed = radius > top, radius - _half_unit(log) <= top
        hits |= {"ceiling": above & ~printed, "rounding": above & printed}
        if limits.proven is not None:
            hits["unproven"] = ~above & ~abstained & ~np.isnan(radius) & ~(radius <= limits.proven * _SLACK)
    for kind, hit in hits.items():
        if hit.any():
            limit = limits and kind in ("ceiling", "rounding") and f" ({down(limits.ceiling[hit].min(), 6)}{limits.words})"
            yield kind, rows.idx.to_numpy()[hit], limit or ""


@dataclass(frozen=True)
class Limits:
    """What can be proven, a radius a row.

    Attributes:
        ceiling: by draws that all agree; 0 if even they prove nothing.
        proven: by the row's own count; NaN if it proves nothing. None if the log has no counts.
        words: sigma, n and alpha.
    """

    ceiling: Floats
    proven: Floats | None
    words: str


def limits(log: Log, question: Question | None) -> Limits | None:
    """What can be proven at each row; None without a question, rows, or an estimator that is known here.

    An unsound estimator gets the ceiling of the sound one that it imitates, and its counts prove nothing.
    """
    rule = ESTIMATORS.get("fixed" if _unsound(log) else log.fields.get("estimator", "fixed"))
    if question is None or rule is None or log.rows.empty:
        return None
    rows = log.rows
    tossed = rows.chance.to_numpy(float) if "chance" in rows else np.ones(len(rows))
    coins, own = np.unique(tossed, return_inverse=True)
    endless = np.full(len(coins), np.inf)
    highest = _provable(rule, question, endless, endless, coins)[own]
    counted = {"count", "draws"} <= set(rows) and not _unsound(log)
    proven = _provable(rule, question, rows["count"].to_numpy(float), rows.draws.to_numpy(float), tossed) if counted else None
    return Limits(
        np.where(np.isnan(highest), 0.0, highest),
        proven,
        f" at sigma {question.sigma:g}, n {question.n}, alpha {question.alpha:g}",
    )


def _unsound(log: Log) -> bool:
    return log.record is not None and any(finding.kind == "unsound" for finding in log.record.findings)


def _provable(rule: Estimator, question: Question, count: Floats, draws: Floats, chance: Floats) -> Floats:
    """The largest radius that an estimator can give for a final count of votes; NaN where it must abstain.

    Every look up to ``draws`` is made with as many votes as it can have had: no more than its draws, nor than the final count.
    A look's bound rises with its votes, so none was higher. Exact where there was one look, or a fresh count at the last.
    """
    bound, before = np.zeros(len(count)), 0
    for trial, looks in enumerate(rule.trials(question)):
        for index, now in enumerate(looks):
            made = draws >= before + now
            if made.any():
                tally = Tally(np.minimum(count, now)[made], bound[made], chance[made])
                bound[made], _ = rule.look(question, trial, index, tally)
        before += looks[-1]
    return rule.radius(question, bound)


def _half_unit(log: Log) -> Floats:
    """Half a unit of the last significant digit that a log prints, per row: what printing can have added to a radius.

    A log is printed with one precision, and formats drop trailing zeros ("0.9" is 0.900 with three digits), so the radius with
    the most digits tells it; fewer than the three of Cohen's logs are not believed. A record's radii are not printed.
    """
    half = np.zeros(len(log.rows))
    finite = np.isfinite(log.rows.radius.to_numpy())
    if log.record is None and finite.any():
        printed = [Decimal(repr(radius)) for radius in log.rows.radius[finite].tolist()]
        digits = max(3, *(len(number.as_tuple().digits) for number in printed))
        half[finite] = [0.5 * 10.0 ** (number.adjusted() - digits + 1) for number in printed]
    return half


def down(value: float, digits: int) -> str:
    """A number with fewer digits, never larger than it is; one that is too large to have any as it is."""
    exact = repr(float(value))
    return str(Decimal(exact).quantize(Decimal(1).scaleb(-digits), ROUND_FLOOR)) if abs(value) < 1e9 else exact
