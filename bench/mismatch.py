"""What does not hold, in words, and the comparison of stored numbers and rows with recomputed ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

KEYS = ("id", "eps", "asked", "members", "n", "made", "place", "layer")
"""Columns that tell a row of an image from its others; an evaluation has some of them."""

SHOWN = 5
"""Images that are named, at most."""

EXACT = 1e-9
"""Relative difference that printing and reading a number may make."""


@dataclass(frozen=True)
class Mismatch:
    """Something that does not hold.

    Attributes:
        what: in words.
        stored, recomputed: what the record says, and what came out.
    """

    what: str
    stored: Any
    recomputed: Any


@dataclass(frozen=True)
class Unknown:
    """Something, of a check that can be made, that cannot be told.

    Attributes:
        what, reason: in words.
    """

    what: str
    reason: str


def equal(a: Any, b: Any) -> bool:
    """Whether two values are the same, numbers up to their representation."""
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=EXACT, abs_tol=EXACT)
    return bool(a == b)


def differing(stored: dict[str, Any], now: dict[str, Any], place: str) -> Iterator[Mismatch]:
    """Fields of a record that are other ones now."""
    for key in sorted(stored.keys() | now.keys()):
        if not equal(stored.get(key), now.get(key)):
            yield Mismatch(f"{place}.{key}", stored.get(key), now.get(key))


def same_rows(stored: pd.DataFrame, fresh: pd.DataFrame) -> Iterator[Mismatch]:
    """Rows that both have agree in every column that both have; a mismatch a column and setting."""
    keys = [key for key in KEYS if key in fresh and key in stored]
    both = stored.merge(fresh, on=keys, suffixes=("", " now"))
    for column in fresh.columns.intersection(stored.columns).difference(keys, sort=False):
        wrong = both[~_agree(both[column], both[f"{column} now"])]
        for values, part in settings_of(wrong):
            what = f"{column} of {named(part.id)}{values}"
            yield Mismatch(what, few(part[column]), few(part[f"{column} now"]))


def settings_of(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Rows by what tells those of an image apart, in words that can follow a comma's place."""
    keys = [key for key in KEYS[1:] if key in rows]
    for values, part in rows.groupby(keys, sort=False) if keys else [((), rows)] if len(rows) else []:
        yield "".join(f", {key} {brief(value)}" for key, value in zip(keys, values, strict=True)), part


def _agree(stored: pd.Series, fresh: pd.Series) -> np.ndarray:
    if pd.api.types.is_float_dtype(fresh):
        return np.isclose(stored.astype(float), fresh, rtol=EXACT, atol=EXACT, equal_nan=True)
    if fresh.dtype == object:
        return np.array([np.array_equal(a, b) for a, b in zip(stored, fresh, strict=True)], bool)
    return (stored == fresh).to_numpy()


def named(ids: Iterable[int]) -> str:
    """Images by their ids: a few, and how many more."""
    given = list(dict.fromkeys(int(own) for own in ids))
    more = f" and {len(given) - SHOWN} more" if len(given) > SHOWN else ""
    return f"image{'s' if len(given) > 1 else ''} {', '.join(map(str, given[:SHOWN]))}{more}"


def brief(value: Any) -> str:
    """A number or a word."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def few(values: Sequence[Any] | pd.Series | np.ndarray) -> str:
    """The first of some values."""
    shown = [f"{value:.9g}" if isinstance(value, float) else str(value) for value in list(values)[:SHOWN]]
    return ", ".join(shown) + (", ..." if len(values) > SHOWN else "")
