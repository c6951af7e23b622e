"""Finished ImageNet classifiers of torchvision, as members of ensembles."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

from defenses.api import Part, Task, Weights, Workshop
from defenses.nets import TORCHVISION, network


class WeightsAbsent(RuntimeError):
    """Weights can neither be read nor downloaded; says which file belongs where."""


@dataclass(frozen=True, kw_only=True)
class TorchvisionWeights(Part):
    """Weights of a torchvision model, from torch's hub cache or a download after its checksum.

    Attributes:
        architecture: "torchvision/NAME".
        weights: member of the model's weights enum, e.g. "IMAGENET1K_V2".
    """

    architecture: str
    weights: str = "DEFAULT"

    def make(self, task: Task, needs: Sequence[Weights], workshop: Workshop) -> Weights:
        import torch
        from torchvision.models import get_model_weights, list_models

        name = self.architecture.removeprefix(TORCHVISION)
        if name not in list_models():
            near = difflib.get_close_matches(name, list_models(), 3)
            raise ValueError(f"torchvision has no model {name!r}; near are {', '.join(near) or 'none'}")
        found = get_model_weights(name)[self.weights]
        classes = len(found.meta["categories"])
        if classes != task.classes:
            raise ValueError(f"the weights of {self.architecture} know {classes} classes, {task.dataset} has {task.classes}")
        try:
            state = found.get_state_dict(progress=False, check_hash=True)
        except (URLError, OSError) as error:
            place = Path(torch.hub.get_dir()) / "checkpoints"
            raise WeightsAbsent(
                f"{found.url} cannot be downloaded ({error}); put the file {Path(found.url).name} into {place}"
            ) from error
        net = network(task, architecture=self.architecture)
        net.body.load_state_dict(state)
        return net.state_dict()
