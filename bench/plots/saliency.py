"""What the members of ensembles look at: their saliency maps of a few test images side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from bench.arrays import unpacked
from bench.plots.style import SMALL, small_print, sources, suites
from bench.store import Record, Store

BLOCKS = 6
"""Defenses of one figure."""

PAGE = 11.2
"""Inches: blocks stand side by side as long as they fit into this width."""

CELL, GAP, LINE, SIDE, HEAD, FOOT = 0.8, 0.05, 0.16, 0.32, 0.55, 0.8
"""Inches: a picture's side, space between pictures, a line of cosines, space left of a block and above it, and below all."""

PAIRS = 10
"""Up to so many cosines are printed one by one; of more their mean and their range."""

COLOURS = "magma"

MEANING = (
    "maps: size of the gradient of the true class's logit with respect to each pixel, the largest over channels, "
    "divided by the map's own maximum",
    "cos a,b: cosine of these gradients of members a and b over all pixels and channels, signs counted",
)


@dataclass(frozen=True)
class Block:
    """The images and maps of one defense.

    Attributes:
        title: which.
        labels: true class of each image.
        pictures: images, (h w) grey or (h w 3).
        maps: of each image the members' maps (m h w), in 0 to 1.
        cosines: of each image the cosines of all pairs (p), in the order of combinations.
    """

    title: str
    labels: list[int]
    pictures: list[np.ndarray]
    maps: list[np.ndarray]
    cosines: list[np.ndarray]

    @property
    def members(self) -> int:
        return len(self.maps[0])

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches."""
        return SIDE + (1 + self.members) * (CELL + GAP), HEAD + len(self.maps) * (CELL + LINE)


def saliency(records: Sequence[Record], store: Store) -> list[Figure]:
    """Figures of up to ``BLOCKS`` defenses each, of every defense its first seed; none where no record keeps maps.

    A block a defense, a row an image: the image, the map of each member, and the cosines of the members' gradients below.
    """
    found: dict[str, tuple[Record, Block]] = {}
    for record in sorted(records, key=lambda record: (record.defense["variant"], record.seed, record.eval["name"])):
        if record.eval["fields"].get("kind") == "diversity" and record.defense["variant"] not in found:
            block = _block(record, store.rows(record))
            if block:
                found[record.defense["variant"]] = record, block
    shown = list(found.values())
    return [_figure(shown[start : start + BLOCKS]) for start in range(0, len(shown), BLOCKS)]


def _block(record: Record, rows: pd.DataFrame) -> Block | None:
    kept = rows[rows.saliency.notna()] if "saliency" in rows else rows[:0]
    if kept.empty:
        return None
    pictures = [unpacked(own).transpose(1, 2, 0) for own in kept.pixels]
    return Block(
        f"{record.defense['variant']}, seed {record.seed}",
        kept.label.tolist(),
        [own[..., 0] if own.shape[-1] == 1 else own for own in pictures],
        [unpacked(own).astype(float) for own in kept.saliency],
        [unpacked(own).astype(float) for own in kept.saliency_cosines],
    )


def _figure(shown: Sequence[tuple[Record, Block]]) -> Figure:
    blocks = [block for _, block in shown]
    corners, width, height = _flow(blocks)
    figure = Figure(figsize=(width, height + FOOT))
    for block, (left, top) in zip(blocks, corners, strict=True):
        _draw(_Sheet(figure), block, left, top)
    _foot(figure, [record for record, _ in shown])
    return figure


def _flow(blocks: Sequence[Block]) -> tuple[list[tuple[float, float]], float, float]:
    """Left upper corners of the blocks, set like words into lines, and the width and height of it all, in inches."""
    corners, left, top, deepest, widest = [], 0.0, 0.0, 0.0, 5.0
    for block in blocks:
        width, height = block.size
        if left and left + width > PAGE:
            left, top, deepest = 0.0, top + deepest, 0.0
        corners.append((left, top))
        left, deepest = left + width, max(deepest, height)
        widest = max(widest, left)
    return corners, widest + GAP, top + deepest


class _Sheet:
    """A figure that is addressed in inches from its left upper corner."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.width, self.height = figure.get_size_inches()

    def picture(self, left: float, top: float, pixels: np.ndarray, cmap: str) -> None:
        place = (left / self.width, 1 - (top + CELL) / self.height, CELL / self.width, CELL / self.height)
        axes = self.figure.add_axes(place, xticks=[], yticks=[])
        axes.imshow(pixels, cmap=cmap, vmin=0, vmax=255 if pixels.dtype == np.uint8 else 1, interpolation="nearest")
        axes.spines[:].set_visible(False)

    def text(self, left: float, top: float, words: str, **look: Any) -> None:
        self.figure.text(left / self.width, 1 - top / self.height, words, **look)


def _draw(sheet: _Sheet, block: Block, left: float, top: float) -> None:
    """One defense."""
    first = left + SIDE
    room = 72 * (block.size[0] - SIDE) / 0.65  # letters are about 0.65 of their height wide
    sheet.text(first, top + HEAD - 0.3, block.title, fontsize=min(9, room / len(block.title)), va="bottom")
    heads = ["image", *(f"member {member + 1}" for member in range(block.members))]
    for column, head in enumerate(heads):
        middle = first + column * (CELL + GAP) + CELL / 2
        sheet.text(middle, top + HEAD - GAP, head, fontsize=7, ha="center", va="bottom")
    for row, (picture, maps) in enumerate(zip(block.pictures, block.maps, strict=True)):
        here = top + HEAD + row * (CELL + LINE)
        sheet.text(first - GAP, here + CELL / 2, f"class {block.labels[row]}", fontsize=7, ha="right", va="center", rotation=90)
        sheet.picture(first, here, picture, "gray")
        for column, own in enumerate(maps, start=1):
            sheet.picture(first + column * (CELL + GAP), here, own, COLOURS)
        words = _words(block.members, block.cosines[row])
        sheet.text(first, here + CELL + 0.02, words, fontsize=6, va="top", color="#444444")


def _words(members: int, cosines: np.ndarray) -> str:
    """The cosines of a row in small print."""
    if len(cosines) > PAIRS:
        mean, low, high = _short([cosines.mean(), cosines.min(), cosines.max()])
        return f"cos of {len(cosines)} pairs: mean {mean}, from {low} to {high}"
    pairs = combinations(range(1, members + 1), 2)
    return "cos  " + "  ".join(f"{a},{b}: {value}" for (a, b), value in zip(pairs, _short(cosines), strict=True))


def _short(cosines: Sequence[float] | np.ndarray) -> list[str]:
    """Two digits, and never -0.00."""
    return [f"{round(float(value), 2) + 0.0:.2f}" for value in cosines]


def _foot(figure: Figure, records: Sequence[Record]) -> None:
    """The scale of the maps, and in small print what was measured on what."""
    width, height = figure.get_size_inches()
    bar = figure.add_axes(((width - 1.3) / width, 0.5 / height, 1.0 / width, 0.08 / height))
    figure.colorbar(ScalarMappable(cmap=COLOURS), bar, orientation="horizontal", ticks=[0, 1])
    bar.tick_params(labelsize=6, length=2)
    bar.set_xlabel("share of the map's maximum", fontsize=6, color="#444444")
    one = records[0]
    lines = [f"{suites(records)}; the first test images of {sources(records)}, {one.task.get('architecture')}", *MEANING]
    figure.text(SIDE / width, 0.08 / height, small_print(lines, width - 1.8), va="bottom", **SMALL)  # beside the scale
