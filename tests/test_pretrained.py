"""Finished torchvision classifiers as members, without a network connection: weights lie in torch's hub cache."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision

from attacks.streams import generator
from defenses.api import Images, Recipe, Task
from defenses.nets import network
from defenses.pretrained import TorchvisionWeights, WeightsAbsent
from defenses.smoothed_ensemble import SmoothedEnsemble


def task(classes: int = 1000) -> Task:
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=generator(0, "pixels"), dtype=torch.uint8)
    images = Images(pixels, torch.arange(2), torch.arange(2), "random")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Task("imagenet", images, images, classes, mean, std, "torchvision/resnet18", Recipe(epochs=1))


class Plain:
    """Parts made on the spot."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def get(self, part):  # type: ignore[no-untyped-def]
        return part.make(self.task, [self.get(need) for need in part.needs], None)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A ResNet-18 with random weights where torch's hub looks for the published ones."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    with torch.random.fork_rng():
        model = torchvision.models.resnet18(weights=None).eval()
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    place = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1]
    place.parent.mkdir(parents=True)
    torch.save(model.state_dict(), place)
    return model


def test_a_member_answers_as_the_torchvision_model_on_normalised_images(cached: torch.nn.Module) -> None:
    own = task()
    defense = SmoothedEnsemble(architectures=("torchvision/resnet18", "torchvision/resnet18"))
    model = defense.build(own)
    defense.fit(model, own, Plain(own), 0)
    x = own.train.floats()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (own.mean, own.std))
    with torch.inference_mode():
        assert torch.allclose(model(x), cached((x - mean) / std), atol=1e-4)


def test_weights_of_another_number_of_classes_are_refused(cached: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="know 1000 classes, imagenet has 200"):
        TorchvisionWeights(role="pretrained", seed=0, architecture="torchvision/resnet18").make(task(200), [], None)


def test_an_unknown_model_gets_the_nearest_names() -> None:
    with pytest.raises(ValueError, match=r"no model 'resnet19'.*resnet18"):
        TorchvisionWeights(role="pretrained", seed=0, architecture="torchvision/resnet19").make(task(), [], None)
    with pytest.raises(ValueError, match="unknown architecture"):
        network(task(), architecture="torchvision/resnet19")


def test_offline_the_error_says_which_file_belongs_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(WeightsAbsent, match=r"put the file resnet18-.*\.pth into .*checkpoints"):
        TorchvisionWeights(role="pretrained", seed=0, architecture="torchvision/resnet18").make(task(), [], None)
