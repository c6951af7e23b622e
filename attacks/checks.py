"""Signs that the usual attacks cannot judge a model: noise, probabilities, no gradient, inner optimisation (methods 8.10)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attacks.losses import CLASSES_NEEDED, dlr, margin
from attacks.oracle import Model, Oracle
from attacks.streams import Streams

PASSES = 5
"""Forward passes that have to agree."""

TOLERANCE = 1e-4
"""Largest relative difference of logits between passes, and by which rows of probabilities may miss a sum of one."""

CHECKS = {
    "randomised": "forward passes differ: the model draws noise, and needs expectation over it",
    "probabilities": "the model returns probabilities: their gradients vanish where it is sure; return logits",
    "zero_gradient": "the DLR loss has no gradient at the image: gradient attacks start blind",
    "dynamic": "the forward pass differentiates: attacks have to adapt to its inner optimisation",
}
"""What :func:`inspect` looks for, in words."""


def inspect(model: Model, x: Tensor, y: Tensor, streams: Streams | None = None) -> dict[str, Tensor]:
    """Which images show which sign.

    Args:
        model: images (n *shape) -> logits (n k), in eval mode.
        x: images (n *shape).
        y: labels (n).
        streams: noise of a model that declares itself randomised.

    Returns:
        A mask (n) for each name of :data:`CHECKS`.
    """
    oracle = Oracle(model, streams.child("inspect") if streams and getattr(model, "randomized", False) else None)
    rows = torch.arange(len(x), device=x.device)
    with torch.no_grad(), torch.random.fork_rng():
        passes = torch.stack([_plain(oracle, x, rows, number) for number in range(PASSES)])
    first = passes[0]
    scale = first.abs().amax(1).clamp_min(1e-12)
    moved = (passes - first).abs().amax((0, 2)) / scale > TOLERANCE
    chances = (first >= 0).all(1) & (first <= 1).all(1) & ((first.sum(1) - 1).abs() < TOLERANCE)
    here = x.detach().requires_grad_()
    with torch.enable_grad(), torch.random.fork_rng(), _Watch() as watch:
        scores = oracle.scores(here, rows)
        dynamic = bool(watch.seen)
        loss = (dlr if scores.shape[1] >= CLASSES_NEEDED["dlr"] else margin)(scores, y)
        connected = loss.requires_grad
        slope = torch.autograd.grad(loss.sum(), here, allow_unused=True)[0] if connected else None
    flat = torch.zeros_like(x) if slope is None else slope
    return {
        "randomised": moved | (passes.argmax(2) != first.argmax(1)).any(0),
        "probabilities": chances,
        # Of images that are wrong as they are, DLR is constant where the label comes third, whatever the network.
        "zero_gradient": (flat.flatten(1) == 0).all(1) & (scores.argmax(1) == y),
        "dynamic": torch.full_like(y, dynamic, dtype=torch.bool),
    }


def _plain(oracle: Oracle, x: Tensor, rows: Tensor, number: int) -> Tensor:
    """One pass, under noise of its own where the model declares any."""
    if oracle.streams is None:
        return oracle(x, rows)
    return Oracle(oracle.model, oracle.streams.child("pass", number)).scores(x, rows)


class _Watch(TorchFunctionMode):
    """Notes calls of autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in ("grad", "backward"):
            self.seen.add(name)
        return function(*args, **(kwargs or {}))
