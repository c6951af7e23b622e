"""Certification logs: anybody's in the format of Cohen et al. (2019), our own records, and our records written in that format.

The format has a line an image under the header ``idx label predict radius correct time``, tab separated. A record that decided
one radius a run is one log for each radius, because together its rows hold with a smaller probability than each run alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd

from bench.partial import write_atomic
from bench.store import Record, Store

COLUMNS = {"idx": "int64", "label": "int64", "predict": "int64", "radius": "float64", "correct": "bool"}
"""What every log has; ``time`` is not read."""

_OURS = {"id": "idx", "prediction": "predict"}


@dataclass(frozen=True, eq=False)
class Log:
    """One log as it was read; nothing is repaired, and no row is left out that could be read.

    Attributes:
        file: its path; with the radius if the record has a log for each.
        rows: :data:`COLUMNS`, radius NaN where it is no number; of a record also ``count`` and ``draws``, and ``chance`` where
            its estimator tossed a coin.
        damage: what could not be read: kind, line numbers, words.
        record: of our own logs.
        asked: the radius that this run of the record decided, if it decided one.
        seconds: of a record, the mean a row.
    """

    file: str
    rows: pd.DataFrame
    damage: tuple[tuple[str, list[int], str], ...] = ()
    record: Record | None = None
    asked: float | None = None
    seconds: float = 0.0

    @property
    def fields(self) -> dict[str, Any]:
        """The record's fields of the evaluation (sigma, alpha, n, estimator, images, ...); empty for a printed log."""
        return dict(self.record.eval["fields"]) if self.record else {}


def read(paths: Iterable[str | Path]) -> list[Log]:
    """All logs: files, records by their .json or .parquet, and folders of either, searched to the bottom. Each file once.

    Raises:
        ValueError: for a path that is not there or is no certification log, and for a folder that holds none.
        StoreError: for a damaged record.
    """
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        files |= dict.fromkeys(_inside(path) if path.is_dir() else [_file(path)])
    return [log for file in files for log in (_read_record(file) if file.suffix == ".json" else [_read_printed(file)])]


def _file(path: Path) -> Path:
    """The file to read for a path that somebody named."""
    file = path.with_suffix(".json") if path.suffix == ".parquet" else path
    if not file.is_file():
        what = f"{path} has no record {file.name} beside it" if file != path and path.is_file() else f"there is no {path}"
        raise ValueError(f"{what}; give a tab-separated log, a record's .json or .parquet, or a folder of them")
    return file


def _inside(folder: Path) -> list[Path]:
    """The logs of a folder, in a fixed order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    found = [path for path in files if (_certified(path) if path.suffix == ".json" else COLUMNS.keys() <= set(_header(path)))]
    if not found:
        raise ValueError(f"{folder} holds no certification log: neither a file headed {_heading()} nor a certified record")
    return found


def _heading() -> str:
    return "'" + " ".join([*COLUMNS, "time"]) + "' (tab separated)"


def _certified(path: Path) -> bool:
    """Whether a JSON file is a finished certified record; so is a damaged one with rows beside it, until somebody looks."""
    try:
        raw = json.loads(path.read_bytes())
        return bool(raw["status"] == "success" and raw["eval"]["fields"]["kind"] == "certified")
    except ValueError:
        return path.with_suffix(".parquet").exists()
    except (KeyError, TypeError):
        return False


def _header(path: Path) -> list[str]:
    with open(path, "rb") as file:
        return _cells(file.readline(1000).decode("utf-8-sig", errors="replace"))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.rstrip("\r\n").split("\t")]


def _read_printed(path: Path) -> Log:
    """A log of tab-separated lines. A line is a row if it has as many cells as the header and numbers where they belong; a
    last line that is not, and is short or lacks its line break, was cut off."""
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    lines = {number: _cells(line) for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    header = lines.pop(next(iter(lines), 0), [*COLUMNS, "time"])
    if not COLUMNS.keys() <= set(header):
        raise ValueError(f"{path} is no certification log: its first line is {' '.join(header)[:80]!r}, not {_heading()}")
    rows, unread = [], []
    for number, cells in lines.items():
        try:
            rows.append(_row(dict(zip(header, cells, strict=True))))
        except (ValueError, KeyError):
            unread.append(number)
    cut = []
    if lines:
        last, cells = lines.popitem()
        open_end = not text.endswith("\n") and (last in unread or not all(cells))
        cut = [last] if open_end or len(cells) < len(header) else []
    found = {"unreadable": [number for number in unread if number not in cut], "truncated": cut}
    damage = tuple((kind, numbers, "") for kind, numbers in found.items() if numbers)
    return Log(str(path), pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS), damage)


def _row(cells: dict[str, str]) -> tuple[int, int, int, float, bool]:
    """A line's numbers; a radius that is none becomes NaN, anything else that is none raises ValueError or KeyError."""
    idx, label, predict = (_integer(cells[name]) for name in ("idx", "label", "predict"))
    correct = {"0": False, "1": True, "false": False, "true": True}[cells["correct"].lower()]
    try:
        radius = float(cells["radius"])
    except ValueError:
        radius = float("nan")
    return idx, label, predict, radius, correct


def _integer(cell: str) -> int:
    """20 or 20.0; beyond 2^53 a float would be another number."""
    number = float(cell)
    if not number.is_integer() or abs(number) > 2**53:
        raise ValueError(f"{cell!r} is no whole number")
    return int(number)


def _read_record(path: Path) -> list[Log]:
    """The logs of a record; rows that are absent or damaged are damage, not an error."""
    record = Store(path.parent).read(path)
    if record.status != "success" or record.eval.get("fields", {}).get("kind") != "certified":
        what = f"status {record.status}, evaluation {record.eval.get('name')!r}"
        raise ValueError(f"{path} is no finished certified record ({what}); name one, or a folder to use those in it")
    try:
        table = pd.read_parquet(path.with_suffix(".parquet")).rename(columns=_OURS)
        table = table.assign(correct=table.predict == table.label).astype(COLUMNS)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        note = f": {path.with_suffix('.parquet').name}: {(str(error).splitlines() or ['damaged'])[0]}"
        return [Log(str(path), pd.DataFrame(columns=list(COLUMNS)).astype(COLUMNS), (("unreadable", [], note),), record)]
    if "asked" not in table:
        return [Log(str(path), table, record=record, seconds=_mean_seconds(record, table))]
    runs = [(float(asked), rows) for asked, rows in table.groupby("asked")]  # type: ignore[arg-type]
    seconds = _mean_seconds(record, table)
    return [Log(f"{path}#radius={asked!r}", rows, (), record, asked, seconds) for asked, rows in runs]


def _mean_seconds(record: Record, table: pd.DataFrame) -> float:
    """Of a row: the evaluation's seconds, shared equally by its rows and by the defenses that were measured together."""
    return record.cost.get("seconds", 0.0) / record.cost.get("measured_together", 1.0) / max(1, len(table))


def export(paths: Iterable[str | Path], out: str | Path) -> list[Path]:
    """Write our certified records as logs of Cohen's format: radii in full precision, ``time`` the mean of the record.

    Returns:
        the files, ``out/<suite>_<variant>_<budget>_seed<k>_<eval>.tsv``, one a log.

    Raises:
        ValueError: if a path holds no record of ours, a record's rows are lost, or two records have one name.
    """
    paths = [Path(path) for path in paths]
    logs = read(paths)
    printed = [log.file for log in logs if not log.record]
    if len(printed) == len(logs) or set(printed) & set(map(str, paths)):
        raise ValueError(f"{printed[0]} is a log already; name a record's .json or .parquet, or a folder of records")
    written: dict[Path, str] = {}
    for log in logs:
        if log.record:
            if log.damage:
                raise ValueError(f"the rows of {log.file} cannot be read{log.damage[0][2]}; evaluate it again")
            target = Path(out) / f"{_name(log.record, log.asked)}.tsv"
            if target in written:
                raise ValueError(f"{written[target]} and {log.file} would both be {target}; export them to two folders")
            written[target] = log.file
            write_atomic(target, _printed(log).encode())
    return list(written)


def _name(record: Record, asked: float | None) -> str:
    place = (record.suite["name"], record.defense["variant"], record.suite["budget"], f"seed{record.seed}", record.eval["name"])
    return "_".join([*place, *([] if asked is None else [f"radius{asked!r}"])]).replace("/", "_")


def _printed(log: Log) -> str:
    rows, time = log.rows[[*COLUMNS]].itertuples(index=False), timedelta(seconds=log.seconds)
    lines = [f"{row.idx}\t{row.label}\t{row.predict}\t{row.radius!r}\t{row.correct:d}\t{time}" for row in rows]
    return "\n".join(["\t".join([*COLUMNS, "time"]), *lines, ""])
