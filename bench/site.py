"""The leaderboard as one static page: stored records only, nothing fetched, everything escaped."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench import tables
from bench.store import Record, Store, write_atomic
from bench.suites import SUITES

PAGES = SUITES.parent / "pages"


def write(stores: list[Store], out: Path) -> Path:
    """Write ``index.html`` from the records of all stores; returns its path."""
    blocks = [_block(table) for store in stores if store.root.exists() for table in tables.summaries(store)]
    # autoescape is set outright: Jinja's select_autoescape would not escape a template that ends in .j2.
    pages = Environment(loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined)
    text = pages.get_template("board.html.j2").render(blocks=blocks, problems=[p for store in stores for p in store.problems])
    path = out / "index.html"
    write_atomic(path, text.encode())
    return path


def _block(table: tables.Table) -> dict[str, Any]:
    rows = []
    for cells, variant in zip(tables.body(table), sorted(table.rows), strict=True):
        records = _records(table, variant)
        rows.append({"cells": cells, "variant": variant, "records": [_details(record) for record in records]})
    return {"title": table.title, "caption": table.caption, "columns": table.columns, "rows": rows}


def _records(table: tables.Table, variant: str) -> list[Record]:
    """Each record behind a row once."""
    behind = [record for cell in table.rows[variant].values() for record, _ in cell] + table.unfinished.get(variant, [])
    unique = {(record.eval["name"], record.seed): record for record in behind}
    return [unique[key] for key in sorted(unique)]


def _details(record: Record) -> dict[str, Any]:
    made = record.made
    versions = ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items())
    code = f"commit {made['commit'][:12]}{' (changed)' if made.get('dirty') else ''}" if "commit" in made else "no commit"
    content = record.model_dump_json(indent=1)
    return {
        "name": f"{record.eval['name']}, seed {record.seed}",
        "status": record.status,
        "command": (
            f"bench run --defense {record.defense['variant']} --suite {record.suite['name']} "
            f"--budget {record.suite['budget']} --seeds {record.seed} --only {record.eval['name']}"
        ),
        "made": f"{code}; {versions}; {made.get('device', 'unknown device')}",
        "hashes": ", ".join(f"{name} {value}" for name, value in record.hashes.items()),
        "error": (record.error or "").strip()[-2000:],
        "file": f"{record.defense['variant']}_{record.eval['name']}_seed{record.seed}.json",
        "download": "data:application/json;base64," + base64.b64encode(content.encode()).decode(),
    }
