"""Pooling over neighbouring channels, which lie on a sheet (kernel average pooling, methods 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def sheet(channels: int) -> tuple[int, int]:
    """Rows and columns of the sheet on which channels lie, row by row: the closest pair of factors, the smaller first."""
    rows = next(rows for rows in range(math.isqrt(channels), 0, -1) if channels % rows == 0)
    return rows, channels // rows


@dataclass(frozen=True)
class Pool:
    """Pooling over neighbouring channels, of everything that lies behind them.

    Attributes:
        kind: a name of :data:`POOLS`.
        kernel: side of the window, odd; cells outside the sheet do not count.
        stride: between windows. A sheet that a stride above 1 has made smaller is padded with zeros to its old size. The
            maximum has stride 1.
        dims: 2: the sheet of :func:`sheet`; 1: all channels in one row.
    """

    kind: str
    kernel: int = 3
    stride: int = 1
    dims: int = 2

    def __post_init__(self) -> None:
        if self.kind not in POOLS:
            raise ValueError(f"pool: unknown {self.kind!r}; known are {', '.join(POOLS)}")
        if self.kernel < 1 or self.kernel % 2 == 0 or self.stride < 1:
            raise ValueError(f"kernel: an odd number, and stride: at least 1; got {self.kernel} and {self.stride}")
        if self.kind == "max" and self.stride > 1:
            raise ValueError(f"stride: the maximum is pooled with stride 1, got {self.stride}")
        if self.dims not in (1, 2):
            raise ValueError(f"dims: 1 or 2, got {self.dims}")

    @property
    def linear(self) -> bool:
        """Whether pooling answers is the same as pooling weights."""
        return self.kind != "max"

    def lies(self, channels: int) -> tuple[int, int]:
        """Rows and columns of the channels."""
        return (1, channels) if self.dims == 1 else sheet(channels)

    def obstacle(self, channels: int) -> str:
        """Why so many channels cannot be pooled, in words; empty if they can."""
        if self.kind == "none":
            return ""
        sides = self.lies(channels)[2 - self.dims :]
        if min(sides) < self.kernel:
            return f"a sheet of {' x '.join(map(str, sides))} channels is smaller than a kernel of {self.kernel}"
        lost = [side - ((side - 1) // self.stride + 1) for side in sides]
        if any(less % 2 for less in lost):
            return f"a stride of {self.stride} leaves {' x '.join(map(str, sides))} channels an odd number short"
        return ""

    def __call__(self, z: Tensor) -> Tensor:
        """Pool (c ...) over its first axis."""
        if self.kind == "none":
            return z
        rows, columns = self.lies(len(z))
        last = z.ndim == 4 and z.is_contiguous(memory_format=torch.channels_last)  # so that no layout is copied into another
        flat = z.permute(0, 2, 3, 1) if last else z
        pooled = POOLS[self.kind](flat.reshape(rows, columns, -1), self)
        if self.stride > 1:
            down, across = ((side - left) // 2 for side, left in zip((rows, columns), pooled.shape, strict=False))
            pooled = F.pad(pooled, (0, 0, across, across, down, down))
        whole = pooled.reshape(flat.shape)
        return whole.permute(0, 3, 1, 2) if last else whole

    def _windows(self) -> dict[str, Any]:
        flat = self.dims == 1
        return {
            "kernel_size": (1 if flat else self.kernel, self.kernel),
            "stride": (1 if flat else self.stride, self.stride),
            "padding": (0 if flat else self.kernel // 2, self.kernel // 2),
        }


class BoxSum(torch.autograd.Function):
    """Sums over windows of a sheet (rows columns d), cut off at its edges; its own adjoint, so differentiable to any order.

    A few additions of whole rows: on the weights of a ResNet-18 many times as fast as pooling in two dimensions.
    """

    @staticmethod
    def forward(z: Tensor, reach: tuple[int, int]) -> Tensor:
        for axis, far in enumerate(reach):
            whole, side = z.clone(), z.shape[axis]
            for by in range(1, min(far, side - 1) + 1):
                whole.narrow(axis, 0, side - by).add_(z.narrow(axis, by, side - by))
                whole.narrow(axis, by, side - by).add_(z.narrow(axis, 0, side - by))
            z = whole
        return z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, tuple[int, int]], output: Tensor) -> None:
        ctx.reach = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return BoxSum.apply(grads[0], ctx.reach), None


def _average(z: Tensor, pool: Pool) -> Tensor:
    if pool.stride > 1:
        return _as_images(F.avg_pool2d, z, pool, count_include_pad=False)
    far = pool.kernel // 2
    reach = (0 if pool.dims == 1 else far, far)
    count = BoxSum.apply(z.new_ones(*z.shape[:2], 1), reach)
    return BoxSum.apply(z, reach) / count


def _as_images(function: Callable[..., Tensor], z: Tensor, pool: Pool, **settings: Any) -> Tensor:
    """Pooling by torch, whose images are (1 d rows columns)."""
    return function(z.permute(2, 0, 1).unsqueeze(0), **pool._windows(), **settings).squeeze(0).permute(1, 2, 0)


POOLS: dict[str, Callable[[Tensor, Pool], Tensor]] = {
    "average": _average,
    "max": lambda z, pool: _as_images(F.max_pool2d, z, pool),
    "none": lambda z, pool: z,
}
"""(sheet of channels (rows columns d), pool) -> the pooled sheet."""
