"""How far noise and an attack of the same length move the activations of every convolution (KAP, figures A2 to A4).

The noise is Gaussian, of a fixed l2 length: the largest that the attack's budget allows. It may leave the box [0,1]: clipped,
it would be shorter than the attack. Images that the network gets wrong as they are stay where they are under an attack, so that
numbers are of the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from attacks import Streams
from attacks.norms import per_row
from bench.arrays import packed
from bench.evals.api import Outcome, Piece, Subject, mean_of
from bench.evals.convolutions import check_uses_budget, quiet_network
from bench.evals.robust import Attacking
from bench.store import Metric
from defenses.api import Images
from defenses.kernels import answers
from defenses.nets import Network
from defenses.pooling import sheet

CHANGES = ("noise", "attack")
"""What moves an image."""

BATCH = 20
"""Images at a time, so that memory stays small; no number depends on it."""


class Activations(Attacking):
    """Relative change of every convolution's activations, behind its pool, under noise and under an attack.

    Attributes:
        shown: how many of the first images keep the changes of one kernel, in the first, middle and last layer.
    """

    divides: ClassVar[bool] = False
    """A piece has one layer after the other, with many images in each."""

    kind: Literal["activations"] = "activations"
    shown: int = Field(8, ge=0)

    def check(self, place: str, shape: tuple[int, int, int]) -> None:
        super().check(place, shape)
        check_uses_budget(place, self.attack)

    def pieces(self, subject: Subject) -> list[Piece]:
        quiet_network(subject)
        return [Piece(rows, {"eps": eps}) for eps in self.eps for rows in self._slices(100)]

    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        return [self._measure(subject, images, piece) for subject in subjects]

    def _measure(self, subject: Subject, images: Images, piece: Piece) -> pd.DataFrame:
        """A row an image and layer: id, label, eps, what the attack says (clean_correct, broken, distance), layer (from 1) and
        its name, then as :func:`changes` and :func:`of_one_kernel`."""
        net, x, eps = quiet_network(subject), images.floats(), piece.setting["eps"]
        # The same streams, and so the same images, as those of a `robust` evaluation with this attack.
        streams = Streams(subject.seed, self.attack, self.norm, ids=images.ids, device=x.device)
        result = self.attacker(eps, subject.scratch)(net, x, images.labels, streams)
        noise = Streams(subject.seed, "activations", ids=images.ids, device=x.device)
        facts: dict[str, Any] = {
            "id": images.ids.cpu(),
            "label": images.labels.cpu(),
            "eps": eps,
            # The contract of attacks: an image that was wrong before costs nothing, any other at least one forward.
            "clean_correct": (result.forwards > 0).cpu(),
            "broken": result.broken.cpu(),
            "distance": result.distance.double().cpu(),
        }
        kept, found = max(0, self.shown - piece.rows.start), []
        moved = {"noise": jittered(x, reach(self.norm, eps, x[0].numel()), noise), "attack": result.x_adv}
        for rows in range(0, len(x), BATCH):
            some = slice(rows, rows + BATCH)
            own = pd.DataFrame({name: column[some] if name != "eps" else column for name, column in facts.items()})
            for table in layers(net, x[some], {name: points[some] for name, points in moved.items()}, kept - rows):
                found.append(pd.concat([own, table], axis=1))
        return pd.concat(found, ignore_index=True)

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        """In its numbers ``source`` is what moved the images, ``target`` the layer, in the order of the network."""
        numbers: list[Metric] = []
        for eps in self.eps:
            counted = rows[(rows.eps == eps) & rows.clean_correct & (rows["size"] > 0)]
            for (_, name), part in counted.groupby(["layer", "name"]):
                for source in CHANGES:
                    facts: dict[str, Any] = {"eps": eps, "source": source, "target": name, "denominator": "clean_correct"}
                    numbers.append(mean_of("activation_change", part[source] / part["size"], unit="ratio", **facts))
        return Outcome(numbers, [])


def reach(norm: str, eps: float, pixels: int) -> float:
    """The largest l2 length of what a budget allows."""
    return eps * math.sqrt(pixels) if norm == "linf" else eps


def jittered(x: Tensor, length: float, streams: Streams) -> Tensor:
    """Images (n c h w) with Gaussian noise that is scaled to an l2 length."""
    noise = streams.normal_like(x)
    return x + noise * per_row(length / noise.flatten(1).norm(dim=1), x)


def layers(net: Network, x: Tensor, moved: Mapping[str, Tensor], kept: int) -> list[pd.DataFrame]:
    """Columns of images (n c h w) and their moved versions (n c h w), by name; a table of n rows a layer.

    size: l2 length of the layer's answer to the image.
    noise, attack: l2 length of its change.
    kernel: one of the layer's kernels, the one in the middle of its sheet; -1 for images and layers that do not show it.
    kernel_noise, kernel_attack: float16 (rows columns) in bytes, the changes of its answer, over the root mean square of all
        the layer's answers to the image.

    Args:
        net: in eval mode.
        x: images.
        moved: by the names of :data:`CHANGES`.
        kept: how many of the first images show a kernel.
    """
    before, after = answers(net, x), {name: answers(net, points) for name, points in moved.items()}
    shown, found = {0, len(before) // 2, len(before) - 1}, []
    for number, (name, answer) in enumerate(before.items()):
        size, changes = length(answer), {who: after[who][name] - answer for who in CHANGES}
        kernel, count = middle(answer.shape[1]), max(0, kept) if number in shown else 0
        columns: dict[str, Any] = {"layer": number + 1, "name": name, "size": size.cpu()}
        columns |= {who: length(change).cpu() for who, change in changes.items()}
        columns["kernel"] = np.where(np.arange(len(x)) < count, kernel, -1)
        scale = per_row(size / math.sqrt(answer[0].numel()), answer).clamp_min(torch.finfo(size.dtype).tiny)
        for who, change in changes.items():
            columns[f"kernel_{who}"] = _files((change / scale)[:, kernel], count)
        found.append(pd.DataFrame(columns))
    return found


def _files(changes: Tensor, count: int) -> list[bytes | None]:
    """The first of (n rows columns) as files, none of the rest."""
    files = [packed(own.half().cpu().numpy()) for own in changes[:count]]
    return [*files, *[None] * (len(changes) - len(files))]


def length(answer: Tensor) -> Tensor:
    """l2 length of each row of (n ...), (n)."""
    return answer.flatten(1).norm(dim=1)


def middle(channels: int) -> int:
    """The kernel in the middle of its sheet."""
    rows, columns = sheet(channels)
    return rows // 2 * columns + columns // 2
