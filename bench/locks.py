"""One run at a time in a folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.partial import StoreError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a suite's folder for this process; the lock dies with it, however it ends.

    Raises:
        StoreError: if another run holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 (held open on purpose: closing releases the lock)
    except OSError as error:
        raise StoreError(f"cannot write to {folder} ({error.strerror}); choose another folder with --runs DIR") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise StoreError(f"another run is working in {folder}; wait for it, or choose another --runs DIR") from error
    try:
        yield
    finally:
        lock.close()
