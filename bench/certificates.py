"""What stored certificates must not say: methods 1.3, I6 to I8, and whatever an audit of their log finds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from bench import audit
from bench.store import Finding, Record, Store
from bench.verdicts import Judged, excess, finding


def impossible(store: Store, record: Record) -> Iterator[Finding]:
    """I7, and what else cannot be true in a certification log."""
    for report in audit.audit(store.path(record)):
        for problem in report.problems:
            if problem.kind != "unsound":  # the record says so itself
                kind = _AUDIT.get(problem.kind, "wrong_log")
                detail = f"{record.eval['name']}: {len(problem.rows)} rows: {problem.detail}"
                yield finding(kind, detail, [record.eval["name"]], problem.rows)


_AUDIT = {
    "ceiling": "radius_above_ceiling",
    "rounding": "radius_above_ceiling",
    "unproven": "radius_above_votes",
    "radius": "not_a_number",
}


def rising(record: Record, rows: pd.DataFrame) -> Iterator[Finding]:
    """I6: of runs for one radius each image by image, else of the numbers, which are of the same rows."""
    name = record.eval["name"]
    if "asked" in rows:
        at = {asked: radii(rows[rows.asked == asked]) >= asked for asked in rows.asked.unique().tolist()}
        wrong = excess(((high, low), at[high], at[low]) for low, high in combinations(sorted(at), 2))
        if wrong:
            high, low = wrong.at
            detail = (
                f"{name}: of {wrong.n} images {len(wrong.more)} are certified at {high:g} and not at {low:g}, "
                f"{len(wrong.fewer)} the other way round"
            )
            yield finding("certified_rises_with_radius", detail, [name], wrong.more, radius=[low, high], n=wrong.n)
        return
    told = sorted((m.radius, m.value) for m in record.metrics if m.metric == "certified_accuracy" and m.radius is not None)
    for (low, before), (high, after) in combinations(told, 2):
        if after > before + 1e-9:
            detail = f"{name}: certified accuracy is {before:.4g} at {low:g} and {after:.4g} at {high:g}"
            yield finding("certified_rises_with_radius", detail, [name], radius=[low, high])
            return


def radii(rows: pd.DataFrame) -> pd.Series:
    """The largest radius certified with the right class of every image, by its id; -1 for none."""
    right = (rows.prediction == rows.label).to_numpy()
    return pd.Series(np.where(right, rows.radius, -1.0), index=rows.id.to_numpy()).groupby(level=0).max()


def attacked(certified: Sequence[tuple[Record, pd.Series]], attacks: Sequence[Judged]) -> Iterator[Finding]:
    """I8: the same smoothed classifier under l2 attacks."""
    for record, radius in certified:
        sigma, name = record.eval["fields"].get("sigma"), record.eval["name"]
        for one in attacks:
            if one.norm != "l2" or not sigma or one.noise != sigma:
                continue
            wrong = excess(((eps, eps), radius >= eps, stands) for eps, stands in one.at.items())
            if wrong:
                detail = (
                    f"of {wrong.n} images {len(wrong.more)} are certified at radius {wrong.at[0]:g} by {name} and fall to "
                    f"{one.name} within it, {len(wrong.fewer)} stand without a certificate"
                )
                facts = {"eps": wrong.at[0], "other": len(wrong.fewer), "n": wrong.n}
                yield finding("certified_above_attacked", detail, [name, one.name], wrong.more, **facts)
