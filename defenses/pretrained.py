"""Finished ImageNet classifiers of torchvision, as members of ensembles."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

from defenses.api import Part, Task, Weights, Workshop
from defenses.foreign import TORCHVISION, classifiers
from defenses.nets import network


class WeightsAbsent(RuntimeError):
    """Weights can neither be read nor downloaded; says which file belongs where."""


@dataclass(frozen=True, kw_only=True)
class TorchvisionWeights(Part):
    """Weights of a torchvision model, from torch's hub cache or a download after its checksum.

    Attributes:
        architecture: "torchvision/NAME".
        weights: member of the model's weights enum, e.g. "IMAGENET1K_V2".

    Raises (on making):
        ValueError: for an unknown model or weights, or where they do not fit the task's classes or image size.
        WeightsAbsent: if the file is neither in the cache nor to be had.
    """

    architecture: str
    weights: str = "DEFAULT"

    def make(self, task: Task, needs: Sequence[Weights], workshop: Workshop) -> Weights:
        import torch

        found = self._published()
        classes = len(found.meta["categories"] or ())  # None: features only, the last layer is not trained
        if classes != task.classes:
            raise ValueError(f"the weights of {self.architecture} know {classes} classes, {task.dataset} has {task.classes}")
        try:
            # The checksum is of downloads; a file that lies in the cache is read as tensors, never as code.
            state = found.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (URLError, OSError) as error:
            place = Path(torch.hub.get_dir()) / "checkpoints"
            raise WeightsAbsent(
                f"{found.url} cannot be downloaded ({error}); put the file {Path(found.url).name} into {place}"
            ) from error
        net = network(task, architecture=self.architecture)
        try:
            net.body.load_state_dict(state)
        except RuntimeError as error:  # transformers hold an embedding per place of their own image size
            side = "x".join(map(str, task.shape[1:]))
            raise ValueError(f"the weights {found} do not fit {self.architecture} for images of {side}: {error}") from error
        return net.state_dict()

    def identity(self, task: Task) -> dict[str, Any]:
        # What "DEFAULT" stands for changes with torchvision's version; the file's name holds its checksum.
        return {**super().identity(task), "file": Path(self._published().url).name}

    def _published(self) -> Any:
        """The entry of torchvision's weights enum."""
        from torchvision import models

        names = classifiers()
        name = self.architecture.removeprefix(TORCHVISION)
        if name not in names:
            near = difflib.get_close_matches(name, names, 3)
            raise ValueError(f"torchvision has no model {name!r}; near are {', '.join(near) or 'none'}")
        if name == self.architecture:
            raise ValueError(f"{name!r} is not an architecture of torchvision's; did you mean {TORCHVISION + name!r}?")
        known = models.get_model_weights(name).__members__
        if self.weights not in known:
            near = difflib.get_close_matches(self.weights, known, 1)
            hint = f"did you mean {near[0]!r}? Known" if near else "known"
            raise ValueError(f"{self.architecture} has no weights {self.weights!r}; {hint} are {', '.join(known)}")
        return known[self.weights]
