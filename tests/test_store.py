"""Records: strict, atomic, readable for ever."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError

from bench.partial import differences, write_atomic
from bench.store import COLUMNS, Metric, Record, Store


def record(**changes: Any) -> Record:
    fields: dict[str, Any] = {
        "status": "success",
        "suite": {"name": "tiny", "version": 1, "budget": "quick"},
        "defense": {"name": "cear_rw", "variant": "cear_rw@sigma=0.5", "fields": {"members": 5, "sigma": 0.5}},
        "eval": {"name": "pgd", "fields": {"attack": "pgd", "norm": "linf"}},
        "seed": 3,
        "task": {"architecture": "lenet5"},
        "metrics": [Metric(metric="robust_accuracy", value=0.5, n=10, lower=0.2, upper=0.8, eps=0.1, denominator="all")],
    }
    return Record(**{**fields, **changes})


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.write(record())
    assert path == tmp_path / "tiny/cear_rw@sigma=0.5/quick/seed3/pgd.json"
    assert store.read(path) == record() == store.find(record())


def test_records_and_rows_take_little_room_and_come_back(tmp_path: Path) -> None:
    store, rows = (
        Store(tmp_path),
        pd.DataFrame({"id": range(7, 10_007), "label": 3, "right": True, "score": 0.5, "word": "one"}),
    )
    text = store.write(record()).read_text()
    assert "null" not in text.split('"findings"')[0]
    fields, numbers = len(Record.model_fields), len(record().metrics)
    assert len(text.splitlines()) == 2 + fields + numbers + 1, "a field and a number have a line each"
    store.write_rows(record(), rows)
    pd.testing.assert_frame_equal(store.rows(record()), rows)
    assert store.path(record()).with_suffix(".parquet").stat().st_size < 1500, "ids that rise by ones, or schemas, took bytes"
    store.write_rows(record(), rows.assign(word=["one", None] * 5000))
    assert store.rows(record()).word[:2].isna().tolist() == [False, True]
    rows.attrs["milliseconds"] = 2.5
    store.write_rows(record(), rows)
    assert store.rows(record()).attrs == {"milliseconds": 2.5}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5x"])
def test_no_nan_and_no_text_for_a_number(value: Any) -> None:
    with pytest.raises(ValidationError):
        Metric(metric="acr", value=value, n=1)


def test_unknown_keys_and_statuses_are_refused() -> None:
    with pytest.raises(ValidationError):
        record(extra=1)
    with pytest.raises(ValidationError):
        record(status="fine")


def test_the_frame_has_a_row_a_number_and_one_for_a_failure(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(record())
    store.write(record(seed=4, status="error", metrics=[], error="boom"))
    frame = store.frame()
    assert list(frame.columns) == COLUMNS
    row = frame[frame.seed == 3].iloc[0]
    assert (row.value, row.eps, row.sigma, row.members, row.attack, row.denominator) == (0.5, 0.1, 0.5, 5, "pgd", "all")
    assert frame[frame.seed == 4].iloc[0].status == "error"
    assert frame[frame.seed == 4].value.isna().all()


def test_a_damaged_record_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(record())
    bad = store.write(record(seed=4))
    bad.write_text(bad.read_text()[:50])
    assert len(store.records()) == 1
    assert str(bad) in store.problems[0]


@pytest.mark.parametrize(
    ("part", "says"),
    [({"suite": {}}, "suite.name"), ({"eval": {"name": "pgd"}}, "eval.fields"), ({"suite": {"name": "x"}}, "suite.version")],
)
def test_a_record_that_does_not_say_whose_it_is_is_named(tmp_path: Path, part: dict[str, Any], says: str) -> None:
    store = Store(tmp_path)
    path = store.write(record())
    path.write_text(json.dumps({**json.loads(path.read_text()), **part}))
    assert store.records() == [] and str(path) in store.problems[0] and f"{says} is missing" in store.problems[0]


def test_a_record_in_the_place_of_another_is_left_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.write(record())
    path.write_text(record(suite={"name": "other", "version": 1, "budget": "quick"}).model_dump_json())
    assert store.records() == [] and "belongs to" in store.problems[0]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


def test_differences_name_every_field() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}) == "b was 2, now 3"


def test_requests_of_before_a_field_was_known_do_not_differ_in_it() -> None:
    old, new = {"a": 1}, {"a": 1, "hashes.validation": "x"}
    assert not differences(old, new) and not differences(new, old)
    assert differences({**new, "hashes.validation": "y"}, new) == "hashes.validation was 'y', now 'x'"


HISTORIC = Path(__file__).parent / "historic"


@pytest.mark.parametrize("path", sorted(HISTORIC.glob("*.json")), ids=lambda path: path.name)
def test_records_of_every_format_stay_readable(path: Path) -> None:
    found = Store(HISTORIC).read(path)
    assert found.metrics
    assert json.loads(path.read_text())["format"] == 1
