"""Batch normalisation whose double backward pass is written out.

Losses that hold gradients by the image (GAL, SMD, DEG) differentiate the backward pass of every BatchNorm. torch composes that
of some twenty passes over the activations; here it is one more backward pass, one product summed, and one linear combination.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

ALL = [True, True, True]
"""Gradients by image, weight and bias."""


class BatchNorm2d(nn.BatchNorm2d):
    """As torch's, with the same numbers, buffers and first derivatives; second ones differ by rounding."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.running_mean is None or self.momentum is None or not self.affine:
            return super().forward(x)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        running = self.running_mean, self.running_var, self.momentum
        normalised: Tensor = _Forward.apply(x, self.weight, self.bias, *running, self.eps)
        return normalised


def written_out(model: nn.Module) -> None:
    """Make every BatchNorm of a model one of these; weights, buffers and their names stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm2d


class _Forward(Function):
    """Normalisation by the batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        mean, variance, momentum, ctx.eps = rest
        out, average, scale = torch.native_batch_norm(x, weight, bias, mean, variance, True, momentum, ctx.eps)
        ctx.save_for_backward(x, weight, average, scale)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return (*_Backward.apply(g, *ctx.saved_tensors, ctx.eps), None, None, None, None)


class _Backward(Function):
    """Its gradients by image, weight and bias, for the gradient g of what comes out."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, *seen: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, ctx.eps = seen
        found = _gradients(g, tensors, ctx.eps)
        ctx.save_for_backward(g, *tensors, *found[1:])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of v . dx + a . dweight + c . dbias by g, x and the weight.

        With z = (x - average) scale: dx = weight scale (g - mean g - z mean(g z)), dweight = sum g z, dbias = sum g. The
        gradient by g is the same backward pass, of v; that by x comes through z, whose own is p v + q g, and through the scale.
        """
        g, x, weight, average, scale, gz, g_sum = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        for_g, vz, v_sum = _gradients(v, (x, weight, average, scale), ctx.eps)
        shared = (v * g).sum((0, 2, 3)) - (v_sum * g_sum + vz * gz) / n
        p, q = -weight * scale * gz / n, a - weight * scale * vz / n
        of_x = -(scale**2) * (p * vz + q * gz + weight * scale * shared) / n
        constant = -scale * (p * v_sum + q * g_sum) / n - of_x * average
        for_x = torch.addcmul(_wide(constant), x, _wide(of_x))
        for_x.addcmul_(v, _wide(scale * p)).addcmul_(g, _wide(scale * q))
        for_g = for_g.addcmul_(x, _wide(a * scale)).add_(_wide(c - a * scale * average))
        return for_g, for_x, scale * shared, None, None, None


def _gradients(g: Tensor, seen: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by x, weight and bias, where x, weight, average and scale were seen."""
    x, weight, *moments = seen
    backward = torch.ops.aten.native_batch_norm_backward
    found: tuple[Tensor, Tensor, Tensor] = backward(g, x, weight, None, None, *moments, True, eps, ALL)
    return found


def _wide(channels: Tensor) -> Tensor:
    """A number a channel (c), beside activations (n c h w)."""
    return channels.view(1, -1, 1, 1)
