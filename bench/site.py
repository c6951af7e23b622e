"""The leaderboard as one static page: stored records only, nothing fetched, everything that a record says shown as text."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bench.boards import Board, Table, boards
from bench.cells import in_words
from bench.claims import claims
from bench.diagnose import STATUSES
from bench.entries import Entry, least, told
from bench.store import Record, Store, brief, write_atomic
from bench.submissions import Submission, submissions
from bench.suites import SUITES

PAGES = SUITES.parent / "pages"

SCRIPTS = ("elements.js", "plots.js", "details.js", "table.js", "board.js")
"""In the order in which they use one another."""

LONGEST = 4000
"""Characters of a text in a record that the page shows; the stored file has all of it."""

LARGEST = 1_000_000
"""Characters of a record above which the page only names its file."""


def write(stores: list[Store], out: Path) -> Path:
    """Write ``index.html`` from the records of all stores; returns its path."""
    stores = [store for store in stores if store.root.exists()]
    found, problems = boards(stores)
    answers = [submissions(store, problems) for store in stores]
    details: list[str] = []
    shown = [_board(board, stores, answers, details) for board in found]
    # autoescape is set outright: Jinja's select_autoescape would not escape a template that ends in .j2.
    pages = Environment(loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined)
    style = Markup((PAGES / "board.css").read_text())
    script = Markup('"use strict";\n' + "\n".join((PAGES / name).read_text() for name in SCRIPTS))
    text = pages.get_template("board.html.j2").render(
        boards=[_plain(board) for board in shown],
        statuses=STATUSES,
        problems=[brief(problem) for problem in problems],
        reencoded=any("JPEG re-encoding" in board.key[3] for board in found),
        data=_for_script({"boards": shown, "statuses": STATUSES}),
        details=details,
        style=style,
        script=script,
        hashes={"style": _hash(style), "script": _hash(script)},
    )
    path = out / "index.html"
    write_atomic(path, text.encode())
    return path


def _hash(text: str) -> str:
    """As a content security policy names what it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _for_script(data: Any) -> Markup:
    """JSON that ends no script element, and that no parser takes for markup."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


Answers = dict[tuple[str, str], Submission]
"""What submitters say of the entries of a store, by suite and variant."""


def _board(board: Board, stores: list[Store], answers: list[Answers], details: list[str]) -> dict[str, Any]:
    columns, rows = board.columns(), []
    keys = [column.key for column in columns]
    for entry in board.entries:
        printed, number = claims(entry), stores.index(entry.store)
        submitted = answers[number].get((board.key[0], entry.variant))
        rows.append(
            {
                "variant": brief(entry.variant, 120),
                "family": brief(entry.records[0].defense["name"], 120),
                "members": entry.members,
                "seeds": [own.place[3] for own in entry.seeds],
                "store": number,
                "submitted": submitted and {"date": str(submitted.date), **submitted.answers.model_dump()},
                "cells": [entry.numbers.get(column) for column in columns],
                "claims": _beside(printed, keys),
                "unfinished": [brief(text, 120) for text in entry.unfinished()],
                "details": len(details),
            }
        )
        details.append(_packed({**_details(entry), "published": printed}))
    facts = {name: brief(value, 120) if isinstance(value, str) else value for name, value in board.facts().items()}
    tables = [_table(board, table) for table in board.tables()]
    return {**facts, "columns": [column.heading() for column in columns], "rows": rows, "tables": tables}


def _beside(printed: list[dict[str, Any]], keys: list[str]) -> list[list[Any]]:
    """What stands of published numbers in cells, by column: value, where it is from, and what is wrong with it. What several
    tables of a paper print alike stands once."""
    found: dict[tuple[int, float, str], list[str]] = {}
    for one in printed:
        if one["column"] in keys:
            place = (keys.index(one["column"]), one["value"], one["flag"])
            found.setdefault(place, []).append(f"{one['where']}: {one['title']}")
    return [[at, [value, "; ".join(sources), flag]] for (at, value, flag), sources in found.items()]


def _table(board: Board, table: Table) -> dict[str, Any]:
    sides = {number: table.known(board.entries[number]) for number in table.rows}
    return {
        "name": table.name,
        "title": table.title,
        "note": brief(table.note),
        "of": table.evaluation,
        "rows": table.rows,
        "status": {number: least(own) for number, own in sides.items()},
        "findings": {number: len({f.kind for one in own for f in one.findings}) for number, own in sides.items()},
        "rankings": [
            {
                "key": one.column.key,
                "label": one.label,
                "places": {number: [rank, int(tied)] for number, (rank, tied) in one.places.items()},
                "without": dict(one.without),
            }
            for one in table.rankings
        ],
    }


def _plain(board: dict[str, Any]) -> dict[str, Any]:
    """What of a board is readable without JavaScript: every ranking as it is by default."""
    tables, columns = [], board["columns"]
    for table in board["tables"]:
        best: dict[str, Any] = table["rankings"][0] if table["rankings"] else {"key": "", "label": "", "places": {}}
        ranked = next((at for at, column in enumerate(columns) if column["key"] == best["key"]), None)
        clean = next((at for at, column in enumerate(columns) if column["kind"] == "clean"), None)
        rows = [
            {
                "rank": best["places"].get(number, ["–"])[0],
                "variant": board["rows"][number]["variant"],
                "status": table["status"][number],
                "numbers": [_shown(board["rows"][number]["cells"], at, columns) for at in (clean, ranked)],
            }
            for number in table["rows"]
        ]
        rows.sort(key=lambda row: (row["rank"] == "–", row["rank"], row["variant"]))
        tables.append({**table, "label": best["label"], "rows": rows})
    return {**board, "tables": tables}


def _shown(cells: list[Any], at: int | None, columns: list[dict[str, Any]]) -> str:
    """A cell as text; a dash where there is no number."""
    if at is None or cells[at] is None:
        return "–"
    value, lower, upper, deviation, seeds, _ = cells[at]
    scale, digits = (100, 1) if columns[at]["unit"] == "%" else (1, 3)
    if seeds > 1:
        return f"{value * scale:.{digits}f} ± {deviation * scale:.{digits}f} ({seeds} seeds)"
    interval = f" [{lower * scale:.{digits}f}, {upper * scale:.{digits}f}]" if lower is not None and upper is not None else ""
    return f"{value * scale:.{digits}f}{interval}"


def _details(entry: Entry) -> dict[str, Any]:
    """Everything about an entry that its panel shows."""
    return {
        "records": [{"file": str(entry.store.path(own).relative_to(entry.store.root)), **_text(own)} for own in entry.records],
        "findings": [_presentable(finding) for own in entry.seeds for finding in told(own)],
        "status": [[own.place[3], own.status] for own in entry.seeds],
        "worst": [
            {
                "threat": in_words(column.threat),
                "eps": column.threat.eps,
                "group": [column.threat.norm, column.threat.of],
                "number": number,
                "attacks": list(dict.fromkeys(words for case in entry.worst[column.threat] for words in case.attacks)),
            }
            for column, number in sorted(entry.numbers.items(), key=lambda item: item[0].order)
            if column.kind == "worst" and column.threat
        ],
    }


def _text(record: Record) -> dict[str, Any]:
    """A record as its file holds it, or, where a text in it is too long or a number is none, with that replaced."""
    raw = record.model_dump(mode="json")
    shown = _presentable(raw)
    whole = shown == raw
    text = record.model_dump_json(indent=1) if whole else json.dumps(shown, indent=1, ensure_ascii=False, allow_nan=False)
    if len(text) > LARGEST:
        return {"text": "", "whole": False}
    return {"text": text + "\n", "whole": whole}


def _presentable(value: Any) -> Any:
    """The same with long texts cut, and a word for every number that JSON does not have."""
    if isinstance(value, dict):
        return {brief(key, LONGEST): _presentable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_presentable(item) for item in value]
    if isinstance(value, str):
        return brief(value, LONGEST)
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _packed(data: dict[str, Any]) -> str:
    """JSON, compressed without a date, as base64."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
