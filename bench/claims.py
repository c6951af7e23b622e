"""What papers print of a defense, beside what was measured of its entry on the leaderboard."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

from bench import published
from bench.cells import Column
from bench.entries import Entry

UNITS = ("percent", "percent_summed", "seconds", "milliseconds_per_batch")
"""Units of results; other rows are settings and figures of the text."""

NAMES = {"clean": "clean_accuracy", "certified": "certified_accuracy", "tsr": "tsr"} | dict.fromkeys(
    ("attack", "autoattack"), "robust_accuracy"
)
"""Metric of the papers by kind of column."""


def claims(entry: Entry) -> list[dict[str, Any]]:
    """Every number that a paper prints of this defense, with as many members and as much noise, on this data set.

    Each has ``column``, the key of the measured number of the same thing, or None where nothing of the kind was measured, which
    is so where the paper does not state a strength; ``value`` in the column's unit; and what the paper says in words.
    """
    return [
        {
            "column": next((column.key for column in entry.numbers if _same(column, row, entry)), None),
            "value": row["value"] / 100 if row["unit"] == "percent" else row["value"],
            "printed": row["printed"],
            "unit": row["unit"].replace("percent", "%").replace("_", " "),
            "what": _what(row),
            "where": f"{row['paper'].upper()}, {'text' if row['table'] == 'text' else 'table ' + row['table']}",
            "title": published.PAPERS[row["paper"]],
            "flag": row["flag"],
            "remark": "; ".join(filter(None, (row["remark"], row["note"]))),
        }
        for row in _about(entry)
    ]


@cache
def _rows() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The published results by data set and defense."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in published.frame().to_dict("records"):
        if row["unit"] in UNITS and row["metric"] and not math.isnan(row["value"]):
            found.setdefault((row["dataset"], row["defense"]), []).append({str(name): value for name, value in row.items()})
    return found


def _about(entry: Entry) -> Iterator[dict[str, Any]]:
    first = entry.records[0]
    fields = first.defense.get("fields", {})
    has = {"members": entry.members, "eat": int(bool(fields.get("eat"))), "sigma": fields.get("sigma")}
    for row in _rows().get((str(first.task.get("dataset")), first.defense["name"]), []):
        # Noise in training is a field of KAP's networks alone; a paper that leaves it empty trained without.
        noise = row["paper"] != "kap" or _equal(row["noise"], fields.get("noise") or math.nan)
        if noise and all(math.isnan(row[name]) or _equal(row[name], own) for name, own in has.items()):
            yield row


def _equal(printed: float, own: Any) -> bool:
    if not isinstance(own, int | float):
        return False
    return math.isclose(printed, own, rel_tol=1e-6) or (math.isnan(printed) and math.isnan(own))


def _same(column: Column, row: dict[str, Any], entry: Entry) -> bool:
    """Whether a column is of what a row is about."""
    if NAMES.get(column.kind) != row["metric"] or row["place"]:
        return False
    if column.kind == "clean":
        return True
    if column.kind == "tsr":
        return column.at is not None and _equal(row["eps"], column.at)
    if column.kind == "certified":
        sigmas = [own.sigma for own in entry.settings if own.evaluation == column.evaluation]
        return column.at is not None and _equal(row["radius"], column.at) and any(_equal(row["sigma"], own) for own in sigmas)
    threat = column.threat
    if threat is None or threat.of or row["threat"] != "whitebox" or row["norm"] != threat.norm:
        return False
    names = [own.eval["fields"].get("attack") for own in entry.records if own.eval["name"] == column.evaluation]
    attacks = names if column.kind == "attack" else ["autoattack"]
    return row["attack"] in attacks and _equal(row["eps"], threat.eps)


def _what(row: dict[str, Any]) -> str:
    """What was measured, in words."""
    words = [row["metric"].replace("_", " "), row["threat"].replace("certified", ""), row["attack"], row["norm"]]
    words += [f"{name} {row[name]:g}" for name in ("eps", "radius", "sigma") if not math.isnan(row[name])]
    words += [f"from {row['source']}" if row["source"] else "", f"noise: {row['place']}" if row["place"] else ""]
    return " ".join(filter(None, [*words, row["architecture"]]))
