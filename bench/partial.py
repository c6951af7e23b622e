"""Files that appear whole or not at all, and the finished pieces of an unfinished evaluation."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd


class StoreError(RuntimeError):
    """A run folder cannot be used as it is; says which file, why, and what to do.

    Attributes:
        broken: the folder failed in the middle of a right request (a full disk), rather than being a wrong one to ask for.
    """

    def __init__(self, message: str, broken: bool = False) -> None:
        super().__init__(message)
        self.broken = broken


LATER = ("hashes.validation",)
"""Fields that requests have not always had: one that lacks them, because it is older, may have asked the same."""


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Fields in which two requests differ, in words; empty if they agree."""
    lacking = {name for name in LATER if name not in old or name not in new}
    names = sorted(name for name in (old.keys() | new.keys()) - lacking if old.get(name) != new.get(name))
    return "; ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in names)


def write_atomic(path: Path, content: bytes) -> None:
    """Write to a temporary name, sync, rename: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def as_parquet(rows: pd.DataFrame) -> bytes:
    """Rows per image as a Parquet file, small, because records are committed: ids rise by ones, statistics serve nobody, and
    what pandas and Arrow say of the columns, longer than most of them, only ``attrs`` need."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer, table = io.BytesIO(), pa.Table.from_pandas(rows, preserve_index=False)
    rising = [field.name for field in table.schema if field.name == "id" and pa.types.is_integer(field.type)]
    others = [name for name in table.column_names if name not in rising]
    how: dict[str, Any] = {"use_dictionary": others, "column_encoding": dict.fromkeys(rising, "DELTA_BINARY_PACKED")}
    pq.write_table(table, buffer, compression="zstd", write_statistics=False, store_schema=bool(rows.attrs), **how)
    return buffer.getvalue()


def write_rows(path: Path, rows: pd.DataFrame) -> None:
    """Rows per image as Parquet, atomically."""
    write_atomic(path, as_parquet(rows))


class Partial:
    """Finished pieces of an evaluation, a Parquet file each, and the request they belong to.

    Attributes:
        problems: pieces that could not be read, in words.
    """

    def __init__(self, folder: Path, problems: list[str] | None = None) -> None:
        self.folder = folder
        self.problems = [] if problems is None else problems

    def open(self, request: dict[str, Any]) -> None:
        """Begin, or continue what an earlier run left.

        Raises:
            StoreError: if the pieces belong to another request; names every field that differs.
        """
        if not self.check(request):
            write_atomic(self._note, json.dumps(request, sort_keys=True, indent=1).encode())

    def check(self, request: dict[str, Any]) -> bool:
        """Whether there are pieces of this request.

        Raises:
            StoreError: if there are pieces of another one; names every field that differs.
        """
        if not self._note.exists():
            return False
        wrong = differences(json.loads(self._note.read_text()), json.loads(json.dumps(request)))
        if wrong:
            raise StoreError(f"{self.folder} holds pieces of another request: {wrong}; use --fresh to move them aside")
        return True

    def differs(self, request: dict[str, Any]) -> bool:
        """Whether there are pieces of another request, as far as can be told before networks are fitted: of hashes those alone
        count that the request has."""
        if not self._note.exists():
            return False
        old = {k: v for k, v in json.loads(self._note.read_text()).items() if k in request or not k.startswith("hashes.")}
        return bool(differences(old, json.loads(json.dumps(request))))

    def piece(self, number: int) -> pd.DataFrame | None:
        """A finished piece, or None. A damaged one is moved aside and counts as missing."""
        path = self._path(number)
        try:
            return pd.read_parquet(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            aside = path.with_name(f"{path.name}.corrupt")
            os.replace(path, aside)
            self.problems.append(f"{path} is damaged; it was moved to {aside.name} and is computed again")
            return None

    def keep(self, number: int, rows: bytes) -> None:
        """Store a finished piece, a Parquet file."""
        write_atomic(self._path(number), rows)
        shutil.rmtree(self.scratch(number), ignore_errors=True)

    def scratch(self, number: int) -> Path:
        """Where an unfinished piece may keep what it has; gone when the piece is stored."""
        return self.folder / f"{number:05d}"

    def discard(self) -> None:
        """Remove the pieces, after the whole was stored."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _note(self) -> Path:
        return self.folder / "request.json"

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.parquet"
