"""Records on disk: a JSON each (variant, seed, evaluation), rows per image in Parquet beside it; atomic and resumable."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bench.partial import Partial, StoreError, write_atomic, write_rows

FORMAT = 1

EXAMPLES = ".examples.parquet"
"""Ending of a record's adversarial examples, which lie beside it and stay out of what is committed."""

COLUMNS = [
    "suite", "budget", "defense", "seed", "members", "eval", "attack", "norm", "eps", "sigma", "radius", "estimator", "draws",
    "denominator", "source", "target", "metric", "value", "n", "lower", "upper", "unit", "status", "warnings", "record",
]  # fmt: skip
"""Columns of :meth:`Store.frame`, in order."""


class Strict(BaseModel):
    """Frozen, no unknown keys, no NaN: what may go into a record."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Metric(Strict):
    """One number with its interval and the facts that tell it from others of the same record."""

    metric: str
    value: float
    n: int
    lower: float | None = None
    upper: float | None = None
    unit: str = "fraction"
    eps: float | None = None
    radius: float | None = None
    members: int | None = None
    draws: int | None = None
    estimator: str | None = None
    denominator: str | None = None
    source: str | None = None
    target: str | None = None


class Finding(Strict):
    """Something a reader must know about a number, with its evidence."""

    kind: str
    detail: str
    evidence: dict[str, Any] = Field(default_factory=dict)


class Record(Strict):
    """What was asked, what came out, what it cost, and with which code; written whatever happens."""

    format: Literal[1] = 1
    status: Literal["running", "success", "error", "skipped"]
    suite: dict[str, Any]
    defense: dict[str, Any]
    eval: dict[str, Any]
    seed: int
    task: dict[str, Any]
    hashes: dict[str, str] = Field(default_factory=dict)
    numerics: dict[str, Any] = Field(default_factory=dict)
    facts: dict[str, float] = Field(default_factory=dict)
    metrics: list[Metric] = Field(default_factory=list)
    findings: list[Finding] = Field(default_factory=list)
    cost: dict[str, float] = Field(default_factory=dict)
    made: dict[str, Any] = Field(default_factory=dict)
    error: str | None = None

    @model_validator(mode="after")
    def _stays_in_its_folder(self) -> Record:
        """Names become parts of paths, and a record may come from a stranger."""
        variant = str(self.defense.get("variant", "none")).replace("/", "_")  # as in Store.path
        names = {"suite.name": self.suite.get("name", "none"), "suite.budget": self.suite.get("budget", "none")}
        names |= {"defense.variant": variant, "eval.name": self.eval.get("name", "none")}
        for place, name in names.items():
            if not name or name.startswith(".") or set(name) & {"/", "\\", "\0"}:
                raise ValueError(f"{place} is {name!r}, which names no file of a run folder")
        return self

    @property
    def architecture(self) -> str:
        """The network: the defense's own, or else the suite's."""
        return str(self.defense.get("fields", {}).get("architecture") or self.task.get("architecture"))

    @property
    def members(self) -> int:
        """Networks of the ensemble, 1 for a single one: as many as the defense names, or else so many of the suite's."""
        fields = self.defense.get("fields", {})
        named, count = fields.get("architectures"), fields.get("members", 1)
        if isinstance(named, list) and named:
            return len(named)
        return count if isinstance(count, int) else 1

    def request(self) -> dict[str, Any]:
        """What was asked, flat: the fields that must agree before work is continued or called done."""
        asked = {
            "suite": self.suite,
            "defense": self.defense,
            "eval": self.eval,
            "seed": self.seed,
            "task": self.task,
            "hashes": {name: value for name, value in self.hashes.items() if name not in self.made_of()},
        }
        return flatten(asked)

    def hashed(self, **hashes: str) -> Record:
        """The record with further hashes."""
        return self.model_copy(update={"hashes": {**self.hashes, **hashes}})

    def made_of(self) -> dict[str, str]:
        """Hashes of the networks that were asked, which nobody knows before they are fitted."""
        return {name: value for name, value in self.hashes.items() if name == "weights" or name.startswith("source ")}


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def as_json(value: Any) -> Any:
    """Tuples as lists, so that a record read back equals the one written; functions by name, which no restart changes."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [as_json(item) for item in value]
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return value if isinstance(value, int | float | str | bool | type(None)) else repr(value)


def brief(text: str, longest: int = 300) -> str:
    """A text, or its beginning and how long it is."""
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text):,} characters)"


_ANSWERS: dict[str, dict[str, type]] = {
    "suite": {"name": str, "version": int, "budget": str},
    "defense": {"name": str, "variant": str},
    "eval": {"name": str, "fields": dict},
}
"""What every reader of a record asks of it."""


def _unanswered(record: Record) -> str:
    """The first of :data:`_ANSWERS` that a record does not have, in words; empty if it has all."""
    for part, fields in _ANSWERS.items():
        for name, kind in fields.items():
            if not isinstance(getattr(record, part).get(name), kind):
                return f"{part}.{name} is missing, or no {kind.__name__}"
    return ""


def _text(content: dict[str, Any]) -> str:
    """JSON with a line for each field and for each number: short, and one number changed is one line changed."""
    return "{\n" + ",\n".join(f" {_compact(field)}: {_lines(value)}" for field, value in content.items()) + "\n}\n"


def _lines(value: Any) -> str:
    several = isinstance(value, list) and value and isinstance(value[0], dict)
    return "[\n" + ",\n".join(f"  {_compact(one)}" for one in value) + "\n ]" if several else _compact(value)


def _compact(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


class Store:
    """A folder of records: ``<suite>/<variant>/<budget>/seed<k>/<eval>.json``.

    Attributes:
        root: the folder.
        problems: files that could not be read, in words; filled by :meth:`records`.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.problems: list[str] = []

    def path(self, record: Record) -> Path:
        """Where a record lives."""
        suite, variant, budget = record.suite["name"], record.defense["variant"], record.suite["budget"]
        return self.root / suite / variant.replace("/", "_") / budget / f"seed{record.seed}" / f"{record.eval['name']}.json"

    def write(self, record: Record) -> Path:
        """Store a record; replaces an older one of the same place."""
        path = self.path(record)
        # What a number does not have is left out: records of many numbers would be nulls for the most part.
        content = {**record.model_dump(mode="json"), "metrics": [m.model_dump(exclude_none=True) for m in record.metrics]}
        write_atomic(path, _text(content).encode())
        return path

    def read(self, path: Path) -> Record:
        """Read one record.

        Raises:
            StoreError: if it is damaged, of an unknown format, or does not say whose it is.
        """
        try:
            record = Record.model_validate_json(path.read_bytes())
            missing = _unanswered(record)
            if missing:
                raise ValueError(missing)
            return record
        except (ValidationError, ValueError) as error:
            first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise StoreError(f"{path} is no record of format {FORMAT} ({first}); move it away and run again") from error

    def find(self, like: Record) -> Record | None:
        """The stored record of the same place, or None. A damaged one is moved aside and counts as missing."""
        path = self.path(like)
        if not path.exists():
            return None
        try:
            return self.read(path)
        except StoreError as error:
            aside = path.with_suffix(".json.corrupt")
            os.replace(path, aside)
            self.problems.append(f"{error}; it was moved to {aside.name} and will be computed again")
            return None

    def records(self, suite: str = "*") -> list[Record]:
        """All readable records, in a fixed order; one that lies in the place of another is left out."""
        found, self.problems = [], []
        for path in sorted(self.root.glob(f"{suite}/*/*/seed*/*.json")):
            try:
                record = self.read(path)
            except StoreError as error:
                self.problems.append(str(error))
                continue
            if self.path(record) == path:
                found.append(record)
            else:
                self.problems.append(f"{path} belongs to {brief(str(self.path(record)))}; it was left out")
        return found

    def write_rows(self, record: Record, rows: pd.DataFrame) -> None:
        """Store rows per image, and, in a file of their own, the adversarial examples in column ``x_adv``."""
        path = self.path(record)
        if "x_adv" in rows:
            write_rows(path.with_suffix(EXAMPLES), rows[["id", "eps", "x_adv"]])
            rows = rows.drop(columns="x_adv")
        write_rows(path.with_suffix(".parquet"), rows)

    def rows(self, record: Record) -> pd.DataFrame:
        """Rows per image of a finished record."""
        return pd.read_parquet(self.path(record).with_suffix(".parquet"))

    def frame(self, suite: str = "*") -> pd.DataFrame:
        """One row per number, columns :data:`COLUMNS`; a record without numbers gives one row with its status."""
        rows: list[dict[str, Any]] = []
        for record in self.records(suite):
            common = self._common(record)
            numbers = [metric.model_dump() for metric in record.metrics] or [{"metric": None}]
            rows += [{**common, **{k: v for k, v in number.items() if v is not None or k == "metric"}} for number in numbers]
        return pd.DataFrame(rows, columns=COLUMNS)

    def _common(self, record: Record) -> dict[str, Any]:
        fields = {**record.defense.get("fields", {}), **record.eval.get("fields", {})}
        return {
            "suite": record.suite["name"],
            "budget": record.suite["budget"],
            "defense": record.defense["variant"],
            "seed": record.seed,
            "members": record.members,
            "eval": record.eval["name"],
            **{name: fields.get(name) for name in ("attack", "norm", "sigma", "estimator")},
            "status": record.status,
            "warnings": "; ".join(finding.kind for finding in record.findings),
            "record": str(self.path(record).relative_to(self.root)),
        }

    def move_aside(self, record: Record) -> None:
        """Rename everything of a record to a free name; nothing is deleted."""
        path = self.path(record)
        olds = [path, path.with_suffix(".parquet"), path.with_suffix(EXAMPLES), self.partial(record).folder]
        if not any(old.exists() for old in olds):
            return
        number = next(i for i in range(1, 10_000) if not path.with_suffix(f".json.old{i}").exists())
        for old in olds:
            if old.exists():
                os.replace(old, old.with_name(f"{old.name}.old{number}"))

    def partial(self, record: Record) -> Partial:
        """The unfinished pieces of an evaluation."""
        path = self.path(record)
        return Partial(path.with_name(f"{path.stem}.partial"), self.problems)
