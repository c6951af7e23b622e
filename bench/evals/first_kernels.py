"""The kernels of the first convolution as they lie on their sheet (KAP, figures 7 and A1), and how alike neighbours are.

Neighbours that are means over overlapping windows are alike by construction: with 3x3 windows two of them share six of nine
kernels, which alone gives a cosine of 2/3. So the kernels before pooling are compared, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from torch import Tensor, nn

from bench.arrays import packed, unpacked
from bench.evals.api import Base, Outcome, Piece, Subject
from bench.evals.convolutions import one_network
from bench.store import Metric
from defenses.api import Images
from defenses.kernels import KernelConv2d
from defenses.nets import Network
from defenses.pooling import sheet

STAGES = ("applied", "learned")
"""Which kernels: those that the network convolves images with, and those before any pooling."""

PAIRS = ("neighbours", "all")


class FirstKernels(Base):
    """Kernels of the first convolution: as applied, which is after the mean where a defense pools by mean, and as learned.

    A maximum over answers has no kernels of its own: of such a pool both are the learned ones. No image is used.
    """

    kind: Literal["kernels"] = "kernels"

    def pieces(self, subject: Subject) -> list[Piece]:
        one_network(subject)
        return [Piece(slice(0, 1), {})]

    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        return [kernels(one_network(subject)) for subject in subjects]

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        """In its numbers ``source`` is which kernels, ``target`` which pairs of them. There is no chance in them."""
        numbers = []
        cells = rows[["row", "column"]].to_numpy()
        for source in STAGES:
            cosines, adjacent = pairs(np.stack([unpacked(own).flatten() for own in rows[source]]), cells)
            for target, chosen in zip(PAIRS, (cosines[adjacent], cosines), strict=True):
                if len(chosen):
                    facts: dict[str, Any] = {"source": source, "target": target, "unit": "cosine"}
                    numbers.append(Metric(metric="kernel_cosine", value=float(chosen.mean()), n=len(chosen), **facts))
        return Outcome(numbers, [])


def kernels(net: Network) -> pd.DataFrame:
    """A row a kernel of the first convolution: its number, row and column on its sheet, and float32 (c h w) in bytes."""
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    applied = first.plain().weight if isinstance(first, KernelConv2d) and first.pool.linear else first.weight
    rows, columns = first.pool.lies(first.out_channels) if isinstance(first, KernelConv2d) else sheet(first.out_channels)
    places = np.arange(rows * columns)
    files = {"applied": _files(applied), "learned": _files(first.weight)}
    return pd.DataFrame({"kernel": places, "row": places // columns, "column": places % columns, **files})


def _files(weight: Tensor) -> list[bytes]:
    return [packed(own) for own in weight.detach().float().cpu().contiguous().numpy()]


def pairs(weights: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of all pairs of kernels (k d) that are not 0, and which pairs lie side by side in cells (k 2), each (p)."""
    lengths = np.linalg.norm(weights.astype(float), axis=1)
    some = lengths > 0  # a stride leaves cells of the sheet empty
    unit, cells = weights[some] / lengths[some, None], cells[some]
    a, b = np.triu_indices(len(unit), 1)
    return (unit @ unit.T)[a, b], np.abs(cells[a] - cells[b]).sum(1) == 1
