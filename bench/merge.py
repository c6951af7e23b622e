"""Shards that ran apart become one run folder, as if everything had run there."""

from __future__ import annotations

import json
from pathlib import Path

from bench.partial import Partial, write_atomic


def merge(source: Path, target: Path) -> dict[str, int]:
    """Copy what ``target`` lacks of a shard's run folder: trained parts, finished pieces and finished records.

    ``bench run`` without a shard then finishes the records from the pieces. Nothing in the target is replaced.

    Returns:
        how many parts, pieces and records were copied.

    Raises:
        ValueError: if the source holds no results.
        StoreError: if pieces belong to different requests; names every field that differs. Nothing is copied then.
    """
    notes = sorted(source.glob("*/*/*/seed*/*.partial/request.json"))
    parts = sorted(path for path in source.glob("*/parts/*") if path.suffix in (".safetensors", ".json"))
    records = [path for path in sorted(source.glob("*/*/*/seed*/*.json")) if _finished(path)]
    if not (notes or parts or records):
        raise ValueError(f"{source} holds no results; give the run folder (--runs) of a shard")
    if source.resolve() == target.resolve():
        raise ValueError(f"{source} cannot be merged into itself")
    for note in notes:  # all mismatches come up before anything is copied
        Partial(target / note.parent.relative_to(source)).check(json.loads(note.read_text()))
    found = {"parts": 0, "pieces": 0, "records": 0}
    for path in parts:
        found["parts"] += _bring(path, source, target)
    for note in notes:
        if _finished(target / note.parent.relative_to(source).with_suffix(".json")):
            continue
        _bring(note, source, target)
        for piece in sorted(note.parent.glob("*.parquet")):
            found["pieces"] += _bring(piece, source, target)
    for path in records:
        for beside in sorted(path.parent.glob(f"{path.stem}.*parquet")):
            _bring(beside, source, target)
        found["records"] += _bring(path, source, target)
    return found


def _finished(record: Path) -> bool:
    return record.exists() and json.loads(record.read_bytes())["status"] == "success"


def _bring(path: Path, source: Path, target: Path) -> bool:
    """Copy a file to its place in the target unless there is one; whether it was copied."""
    place = target / path.relative_to(source)
    if place.exists():
        return False
    write_atomic(place, path.read_bytes())
    return True
