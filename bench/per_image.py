"""What a record's numbers are means of, image by image, so that two records can be compared on the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from bench.evals.diversity import UNITS
from bench.evals.vulnerability import VULNERABILITY
from bench.store import Record, Store
from bench.verdicts import UNREADABLE, within
from defenses.estimators import WHOLE
from defenses.smoothing import POOLED

Values = dict[str, pd.Series]
"""A number of an evaluation -> its value of every image, by image id; the number is their mean."""


ACR = "average certified radius"


def named(metric: str, facts: Mapping[str, Any]) -> str:
    """What :func:`per_image` calls a record's number, by its metric and facts; "" for one that is no mean over all images."""
    eps, source = facts.get("eps"), facts.get("source")
    if facts.get("denominator", "all") != "all":
        return ""
    if metric == "noisy_accuracy":
        words = {None: "clean", "none": f"attacked at eps {eps or 0:g}"}.get(source, f"eot at eps {eps or 0:g}")
        return f"accuracy {words}, noise: {facts.get('target')}"
    return {
        "clean_accuracy": "clean accuracy",
        "robust_accuracy": f"accuracy at eps {eps or 0:g}",
        "black_box_accuracy": f"accuracy at eps {eps or 0:g}, images of {source}",
        "certified_accuracy": f"certified accuracy at {facts.get('radius') or 0:g}",
        "acr": ACR,
    }.get(metric, "")


def per_image(record: Record, rows: pd.DataFrame) -> Values:
    """What of a record is a mean over all images, image by image; nothing for kinds of evaluations without such numbers."""
    values = _KINDS.get(record.eval["fields"].get("kind", ""), lambda fields, rows: {})(record.eval["fields"], rows)
    return {number: pd.Series(np.asarray(own), index=ids.to_numpy()) for number, (ids, own) in values.items()}


def stored(store: Store, record: Record) -> Values | None:
    """:func:`per_image` of its stored rows; None where they are missing or damaged."""
    try:
        return per_image(record, store.rows(record))
    except UNREADABLE:
        return None


Found = dict[str, tuple[pd.Series, Any]]


def _clean(fields: Mapping[str, Any], rows: pd.DataFrame) -> Found:
    return {"clean accuracy": (rows.id, rows.prediction == rows.label)}


def _robust(fields: Mapping[str, Any], rows: pd.DataFrame) -> Found:
    found: Found = {}
    for eps in fields["eps"]:
        # Records from before searches for the nearest point do not have the field.
        part, near = within(rows, eps, fields.get("nearest", False))
        found[f"accuracy at eps {eps:g}"] = part.id, ~(part.broken & near)
    return found


def _adaptive(fields: Mapping[str, Any], rows: pd.DataFrame) -> Found:
    found: Found = {}
    for eps in fields["eps"]:
        part = rows[rows.eps == eps]
        found[f"accuracy at eps {eps:g}"] = part.id, part.clean_correct & (part.broken_by == "")
    return found


def _certified(fields: Mapping[str, Any], rows: pd.DataFrame) -> Found:
    found: Found = {}
    for radius in fields["radii"]:
        part = rows[rows.asked == radius] if "asked" in rows else rows
        found[f"certified accuracy at {radius:g}"] = part.id, (part.prediction == part.label) & (part.radius >= radius)
    if fields["estimator"] in (*WHOLE, POOLED):
        found[ACR] = rows.id, rows.radius.where(rows.prediction == rows.label, 0.0)
    return found


def _black_box(fields: Mapping[str, Any], rows: pd.DataFrame) -> Found:
    """Under each search alone, and under all of them."""
    found: Found = {}
    searches = [str(name) for name in rows if str(name).startswith("wrong ")]
    for eps in fields["eps"]:
        part = rows[rows.eps == eps]
        found[f"accuracy at eps {eps:g}"] = part.id, part.clean_correct & ~part[searches].any(axis=1)
        for name in searches:
            words = f"accuracy at eps {eps:g}, images of {name.removeprefix('wrong ')}"
            found[words] = part.id, part.clean_correct & ~part[name]
    return found


def _diversity(fields: Mapping[str, Any], rows: pd.DataFrame) -> Found:
    names = [name for name in (*UNITS, *VULNERABILITY) if name in rows]
    return {name.replace("_", " "): (rows.id, rows[name]) for name in names}


def _noise(fields: Mapping[str, Any], rows: pd.DataFrame) -> Found:
    found: Found = {}
    for (eps, made, place), part in rows.groupby(["eps", "made", "place"], sort=False):
        words = f"{made} at eps {eps:g}" if eps else made
        found[f"accuracy {words}, noise: {place}"] = part.id, part.correct
    return found


_KINDS: dict[str, Callable[[Mapping[str, Any], pd.DataFrame], Found]] = {
    "clean": _clean,
    "robust": _robust,
    "adaptive": _adaptive,
    "black_box": _black_box,
    "certified": _certified,
    "diversity": _diversity,
    "noise": _noise,
}
