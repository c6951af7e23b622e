"""What the members look at in a few images, kept with the rows so that a figure can be drawn from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.arrays import packed
from defenses.api import Classifier, Images
from defenses.joint import input_gradients, pair_cosines


def saliency(members: Sequence[Classifier], images: Images, count: int) -> dict[str, list[bytes | None]]:
    """Columns of images (n), each of n NumPy files (``.npy``) in bytes, None after the first ``count``.

    pixels: uint8 (c h w).
    saliency: float16 (m h w), size of the gradient of the label's logit, largest over channels, over its own maximum; 0 where
        the gradient is.
    saliency_cosines: float32 (p), cosines of those gradients, signs and all channels counted, over pairs a < b of members in
        the order of itertools.combinations.
    """
    some = images.take(slice(0, count))
    kept: dict[str, list[bytes]] = {"pixels": [_file(own) for own in some.pixels], "saliency": [], "saliency_cosines": []}
    if len(some):
        y = some.labels.unsqueeze(1)
        with torch.enable_grad():
            _, found = input_gradients(members, some.floats(), lambda own: own.gather(1, y).squeeze(1))
        gradients = found.detach().view(len(members), len(some), *some.shape)
        sizes = gradients.abs().amax(2)
        maps = sizes / sizes.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)
        kept["saliency"] += [_file(own) for own in maps.half().unbind(1)]
        kept["saliency_cosines"] += [_file(own) for own in pair_cosines(gradients.flatten(2)).unbind(1)]
    rest = [None] * (len(images) - len(some))
    return {name: [*files, *rest] for name, files in kept.items()}


def _file(array: Tensor) -> bytes:
    return packed(array.cpu().numpy())
