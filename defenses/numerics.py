"""Named numerics for voting: the float32 network as it is, compiled, or a bfloat16 copy of it.

A vote under bfloat16 is a vote of another network: certify, predict and attack the same one, and let the record name it.
Noise is added in float32 by the caller in every case; the cast afterwards is then part of the classifier, and the
certificate is sound.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from defenses.api import Classifier

NUMERICS = ("float32", "float32 compiled", "bfloat16", "bfloat16 compiled")


def voter(model: Classifier, numerics: str = "float32", batch: int = 100) -> Callable[[Tensor], Tensor]:
    """A function from images (b c h w), float32, to labels (b): the model's ``predict`` under some numerics.

    Args:
        model: left as it is; bfloat16 works on a copy.
        numerics: a name of :data:`NUMERICS`.
        batch: shape that compiled code is made for; smaller inputs are padded to it, larger ones split, so that nothing is
            compiled twice.

    Raises:
        ValueError: for unknown numerics.
    """
    if numerics not in NUMERICS:
        raise ValueError(f"unknown numerics {numerics!r}; known are {', '.join(NUMERICS)}")
    dtype = torch.bfloat16 if numerics.startswith("bfloat16") else torch.float32
    net = copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last) if dtype != torch.float32 else model

    def vote(x: Tensor) -> Tensor:
        return net.predict(x.to(dtype))

    if not numerics.endswith("compiled"):
        return vote
    fast = torch.compile(vote, dynamic=False, options={"freezing": True})

    def compiled(x: Tensor) -> Tensor:
        with torch.no_grad():  # frozen weights must not be inference tensors, and need no gradient
            return torch.cat([fast(_padded(piece, batch))[: len(piece)] for piece in x.split(batch)])

    return compiled


def _padded(x: Tensor, batch: int) -> Tensor:
    spare = batch - len(x)
    return torch.cat([x, x[:1].expand(spare, *x.shape[1:])]) if spare else x.clone()
