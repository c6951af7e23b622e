"""The pieces of evaluations that are measured together: which are finished, and how one is measured, also in little memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch

from bench.evals import Clean, Evaluation, Piece, Subject
from bench.jobs import Ready, forward_milliseconds
from bench.partial import as_parquet
from bench.store import Store
from defenses.api import Images


class Pieces:
    """The work of jobs whose models are fitted and that ask the same question.

    Attributes:
        ready: the jobs.
        evaluation: what they ask.
        whole: all pieces, in order.

    Raises:
        StoreError: if there are pieces of another request.
        Skipped: if the question makes no sense for a subject.
    """

    def __init__(self, ready: Sequence[Ready], store: Store) -> None:
        self.ready = ready
        self.evaluation: Evaluation = ready[0].job.evaluation
        self.whole = self.evaluation.pieces(ready[0].subject)
        self._partials = [store.partial(one.blank) for one in ready]
        for one, partial in zip(ready, self._partials, strict=True):
            networks = {f"hashes.{name}": value for name, value in one.blank.made_of().items()}
            partial.open({**one.blank.request(), **networks, "numerics": one.blank.numerics})

    @property
    def title(self) -> str:
        """Who is asked what, for the display of progress."""
        blank = self.ready[0].blank
        who = self.ready[0].job.variant.label if len(self.ready) == 1 else f"{len(self.ready)} defenses"
        return f"{who} {blank.eval['name']} (seed {blank.seed})"

    def absent(self, number: int) -> list[int]:
        """Places, among the jobs, of those that lack a piece."""
        return [place for place, partial in enumerate(self._partials) if partial.piece(number) is None]

    def measure(self, number: int, places: Sequence[int], test: Images) -> list[bytes]:
        """Measure a piece here, for the jobs at some places: a Parquet file each."""
        subjects = [replace(self.ready[place].subject, scratch=self._partials[place].scratch(number)) for place in places]
        piece = self.whole[number]
        return [as_parquet(rows) for rows in measured(self.evaluation, subjects, test.take(piece.rows), piece)]

    def keep(self, number: int, places: Sequence[int], tables: Sequence[bytes]) -> None:
        """Store what was measured of a piece."""
        for place, rows in zip(places, tables, strict=True):
            self._partials[place].keep(number, rows)

    def tables(self) -> list[tuple[pd.DataFrame, dict[str, float]]] | None:
        """All rows of every job, and what they cost; None if a piece is missing."""
        found = []
        for partial in self._partials:
            rows = [partial.piece(number) for number in range(len(self.whole))]
            own = [table for table in rows if table is not None]
            if len(own) < len(rows):
                return None
            table = pd.concat(own, ignore_index=True)
            table.attrs = {}
            found.append((table, _cost(own)))
        return found


def _cost(pieces: Sequence[pd.DataFrame]) -> dict[str, float]:
    """Seconds of all pieces, how many jobs shared them on average, and, of clean images, those of a decision.

    Pieces from before it was noted cost nothing.
    """
    seconds = [(table.attrs.get("seconds", 0.0), table.attrs.get("together", 1)) for table in pieces]
    total, own = sum(spent for spent, _ in seconds), sum(spent / together for spent, together in seconds)
    cost = {"seconds": total, "measured_together": round(total / own, 3) if own else 1.0}
    decisions = [table.attrs["forward_milliseconds"] for table in pieces if "forward_milliseconds" in table.attrs]
    return {**cost, "forward_milliseconds": min(decisions)} if decisions else cost


def measured(
    evaluation: Evaluation, subjects: Sequence[Subject], images: Images, piece: Piece, most: int | None = None
) -> list[pd.DataFrame]:
    """Rows of a piece for each subject, with what they cost in ``attrs``.

    Where memory runs out, half as many images are measured at a time. Every row depends on its own image alone, so that halves
    one after the other are the whole.

    Args:
        evaluation: the question.
        subjects: who is asked.
        images: the piece's.
        piece: what of the whole it is.
        most: images at a time; all at first.

    Raises:
        MemoryError: if a single image is too much, or the evaluation's pieces are more than their images.
    """
    began = time.perf_counter()
    most = most or max(1, len(images))
    while True:
        try:
            tables = _in_runs(evaluation, subjects, images, piece, most)
            break
        except Exception as error:
            if not out_of_memory(error):
                raise
            trouble = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Outside of the handler: the exception's frames hold the tensors that did not fit.
        if most == 1 or not evaluation.divides:
            least = "one image" if most == 1 else f"a piece of {len(images)} images, which cannot be divided,"
            raise MemoryError(f"{least} needs more memory than there is: {trouble}")
        most = (min(most, len(images)) + 1) // 2
        _release()
    seconds = time.perf_counter() - began
    for subject, table in zip(subjects, tables, strict=True):
        table.attrs = {"seconds": seconds, "together": len(subjects)}
        if isinstance(evaluation, Clean):  # timed where the work is done
            table.attrs["forward_milliseconds"] = forward_milliseconds(subject, images)
    return tables


def _in_runs(
    evaluation: Evaluation, subjects: Sequence[Subject], images: Images, piece: Piece, most: int
) -> list[pd.DataFrame]:
    """Measure so many images at a time."""
    if len(images) <= most:
        return evaluation.measure(subjects, images, piece)
    found: list[list[pd.DataFrame]] = []
    for start in range(0, len(images), most):
        stop = min(start + most, len(images))
        rows = slice(piece.rows.start + start, piece.rows.start + stop)
        # Unfinished work belongs to the images that it is of.
        own = [replace(one, scratch=one.scratch and one.scratch / f"{rows.start}-{rows.stop}") for one in subjects]
        found.append(evaluation.measure(own, images.take(slice(start, stop)), replace(piece, rows=rows)))
    return [_joined(tables) for tables in zip(*found, strict=True)]


def _joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One after the other. What an attack tells only of images that it touched is -1 of all others (attacks.api.Search)."""
    types = {name: own.dtype for table in tables for name, own in table.items()}
    order = max(tables, key=lambda table: len(table.columns)).columns
    joined = pd.concat(tables, ignore_index=True)[list(order)]
    lacking = {name: kind for name, kind in types.items() if any(name not in table for table in tables)}
    return joined.fillna(dict.fromkeys(lacking, -1)).astype(lacking)


def out_of_memory(error: Exception) -> bool:
    """Whether a device or the host had no memory left."""
    told = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)  # how torch says it of the host
    return told or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _release() -> None:
    """Give memory of finished work back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
