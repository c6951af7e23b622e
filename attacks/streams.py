"""All randomness of the project: one generator per (seed, purpose, image, block), so that nothing depends on batching."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Purpose = str | int | float


def _digest(seed: int, purpose: tuple[Purpose, ...], size: int) -> bytes:
    return hashlib.blake2b(repr((int(seed), *purpose)).encode(), digest_size=size).digest()


def generator(seed: int, *purpose: Purpose, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator that is a pure function of ``seed`` and ``purpose`` (blake2b of both).

    For training, splits and initialisation, which need few: on the CPU torch uses 32 bits of a seed.
    """
    return torch.Generator(device=device).manual_seed(int.from_bytes(_digest(seed, purpose, 8), "big") >> 1)


def wide_generator(seed: int, *purpose: Purpose, device: str | torch.device = "cpu") -> torch.Generator:
    """As :func:`generator`, for the millions of streams of an evaluation, which 32 bits could not keep apart.

    On the CPU the whole state of the Mersenne twister is filled from the hash; CUDA's generator takes 64 bits by itself.
    """
    made = torch.Generator(device=device)
    if made.device.type != "cpu":
        return made.manual_seed(int.from_bytes(_digest(seed, purpose, 8), "big") >> 1)
    state = _FRESH.copy()
    words = np.frombuffer(hashlib.shake_256(_digest(seed, purpose, 32)).digest(4 * _WORDS), "<u4").astype("<u8")
    state[_OFFSET : _OFFSET + 8 * _WORDS] = words.view(np.uint8)
    return made.set_state(torch.from_numpy(state))


_WORDS, _OFFSET = 624, 24
"""The twister's words, and where they lie in torch's serialised CPU generator: 64 bits each, after seed, left and next."""

_FRESH = torch.Generator().manual_seed(0).get_state().numpy()
"""State just after seeding: the next number asked for twists all words first."""


class Streams:
    """Random numbers for a batch of images, a row an image.

    Row i is drawn from a generator keyed by (seed, purpose, ids[i], block). Batch size, order, sharding and the other
    images therefore change nothing. CPU and CUDA generators differ: :attr:`rng` names the kind for the record.

    Args:
        seed: master seed.
        purpose: what the numbers are for, e.g. ``"pgd", "restart", 3``; :meth:`child` appends to it.
        ids: image ids, one per row.
        device: where the numbers are drawn.
    """

    def __init__(
        self,
        seed: int,
        *purpose: Purpose,
        ids: Sequence[int] | Tensor,
        device: str | torch.device = "cpu",
    ) -> None:
        self.seed = int(seed)
        self.purpose = purpose
        self.ids = [int(i) for i in ids]
        self.device = torch.device(device)

    @property
    def rng(self) -> str:
        """Name of the generator family, as records show it."""
        return f"torch-{self.device.type}"

    def __len__(self) -> int:
        return len(self.ids)

    def child(self, *purpose: Purpose) -> Streams:
        """Independent streams of the same images for a finer purpose."""
        return Streams(self.seed, *self.purpose, *purpose, ids=self.ids, device=self.device)

    def take(self, rows: Tensor) -> Streams:
        """The streams of some rows: a boolean mask (n) or integer indices."""
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        ids = [self.ids[i] for i in rows.tolist()]
        return Streams(self.seed, *self.purpose, ids=ids, device=self.device)

    def one(self, row: int, block: int = 0) -> torch.Generator:
        """The generator of one row's block."""
        return wide_generator(self.seed, *self.purpose, "image", self.ids[row], block, device=self.device)

    def generators(self, block: int = 0) -> Iterator[torch.Generator]:
        """One generator per row for this block."""
        for row in range(len(self)):
            yield self.one(row, block)

    def normal(self, shape: Sequence[int], block: int = 0) -> Tensor:
        """Standard normal numbers, float32 of shape (n, *shape)."""
        out = torch.empty(len(self), *shape, device=self.device)
        for row, gen in zip(out, self.generators(block), strict=True):
            row.normal_(generator=gen)
        return out

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal numbers for activations (n ...) of the images."""
        return self.normal(x.shape[1:]).to(x)

    def uniform(self, shape: Sequence[int], block: int = 0) -> Tensor:
        """Uniform numbers in [0, 1), float32 of shape (n, *shape)."""
        out = torch.empty(len(self), *shape, device=self.device)
        for row, gen in zip(out, self.generators(block), strict=True):
            row.uniform_(generator=gen)
        return out

    def signs(self, shape: Sequence[int], block: int = 0) -> Tensor:
        """Fair signs -1 or +1, float32 of shape (n, *shape)."""
        return (self.uniform(shape, block) < 0.5).float().mul_(2).sub_(1)


class Shared:
    """One generator for all images of a batch and all layers: quick; for training, whose numbers may depend on the batch."""

    def __init__(self, gen: torch.Generator) -> None:
        self.gen = gen

    def child(self, *purpose: Purpose) -> Shared:
        """The same: whoever asks next gets the next numbers."""
        return self

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal numbers of the shape of x."""
        return torch.randn(x.shape, generator=self.gen, device=x.device, dtype=x.dtype)


class Draws(nn.Module):
    """Base of modules whose forward pass draws random numbers; they take them from :func:`drawing`, never globally."""

    streams: Streams | Shared | None = None

    def drawn(self) -> Any:
        """The streams in force, or an error that says how to set them."""
        if self.streams is None:
            raise RuntimeError(
                f"{type(self).__name__} draws random numbers, but no streams are in force; "
                "call it inside `with drawing(model, streams):`"
            )
        return self.streams

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal numbers for activations (n ...), from the streams in force."""
        found: Tensor = self.drawn().normal_like(x)
        return found


@contextmanager
def drawing(model: object, streams: Streams | Shared) -> Iterator[None]:
    """Let every :class:`Draws` module inside ``model`` take its numbers from ``streams``, each from a child of its own."""
    modules = list(model.named_modules()) if isinstance(model, nn.Module) else []
    layers = [(name, module) for name, module in modules if isinstance(module, Draws)]
    before = [module.streams for _, module in layers]
    for name, module in layers:
        module.streams = streams.child("layer", name)
    try:
        yield
    finally:
        for (_, module), old in zip(layers, before, strict=True):
            module.streams = old
