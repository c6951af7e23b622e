"""Arrays in the cells of a table: NumPy files (``.npy``) in bytes, with type and shape, and never a pickle."""

from __future__ import annotations

import io

import numpy as np


def packed(array: np.ndarray) -> bytes:
    """An array as a file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def unpacked(file: bytes) -> np.ndarray:
    """The array that :func:`packed` stored."""
    found: np.ndarray = np.load(io.BytesIO(file), allow_pickle=False)
    return found
