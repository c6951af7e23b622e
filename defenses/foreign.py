"""torchvision's classifiers by name, built as their published weights expect them; torchvision is imported only when asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

TORCHVISION = "torchvision/"
"""Prefix of the names of torchvision's models, e.g. "torchvision/resnet50"."""


def classifiers() -> list[str]:
    """Names of torchvision's image classifiers, without the prefix."""
    from torchvision import models

    # Without the module, detectors and quantised networks are listed too; some download when they are built.
    return models.list_models(module=models)


def untrained(name: str, shape: Sequence[int], classes: int) -> nn.Module:
    """One of them for images of a shape (c h w), with weights of torch's choice."""
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=classes, **_options(name, shape))


def _options(name: str, shape: Sequence[int]) -> dict[str, Any]:
    """What torchvision's constructors otherwise take from the weights they load."""
    if name in ("googlenet", "inception_v3"):  # trained on [-1, 1], which they make from ImageNet's mean and std
        return {"transform_input": True, "init_weights": False}
    if name.startswith("vit_"):
        return {"image_size": shape[-1]}
    return {"input_size": tuple(shape[1:])} if name.startswith("maxvit") else {}
