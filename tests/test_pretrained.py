"""Finished torchvision classifiers as members, without a network connection: weights lie in torch's hub cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn

from attacks.streams import generator
from defenses.api import Images, Recipe, Task
from defenses.nets import body
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


def part(architecture: str = "torchvision/resnet18", weights: str = "DEFAULT") -> TorchvisionWeights:
    return TorchvisionWeights(role="pretrained", seed=0, architecture=architecture, weights=weights)


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], nn.Module]:
    """Random weights where torch's hub looks for a model's published ones; returns the model as torchvision loads it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **options: pytest.fail("a download"))

    def put(name: str, **options: object) -> nn.Module:
        with torch.random.fork_rng():
            model = torchvision.models.get_model(name, weights=None, **options)
        url = torchvision.models.get_model_weights(name)["DEFAULT"].url
        place = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1]
        place.parent.mkdir(parents=True)
        torch.save(model.state_dict(), place)
        return torchvision.models.get_model(name, weights="DEFAULT").eval()

    return put


@pytest.mark.parametrize(("name", "options"), [("resnet18", {}), ("googlenet", {"init_weights": False})])
def test_a_member_answers_as_the_torchvision_model_on_normalised_images(
    name: str, options: dict[str, object], publish: Callable[..., nn.Module]
) -> None:
    """GoogLeNet's published weights know another normalisation, which torchvision's model makes itself."""
    cached = publish(name, **options)
    own = task()
    defense = SmoothedEnsemble(architectures=(f"torchvision/{name}",) * 2)
    model = defense.build(own)
    defense.fit(model, own, Plain(own), 0)
    x = own.train.floats()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (own.mean, own.std))
    with torch.inference_mode():
        answer, expected = model(x), cached((x - mean) / std)
    assert torch.allclose(answer, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_weights_of_another_number_of_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="know 1000 classes, imagenet has 200"):
        part().make(task(200), [], None)
    with pytest.raises(ValueError, match="know 0 classes, imagenet has 1000"):
        part("torchvision/vgg16", "IMAGENET1K_FEATURES").make(task(), [], None)


def test_transformers_are_built_for_the_task_s_image_size_and_other_weights_are_refused(
    publish: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        assert body("torchvision/vit_b_32", (3, 64, 64), 10).encoder.pos_embedding.shape == (1, 1 + 4, 768)
        assert body("torchvision/vit_b_32", (3, 224, 224), 10).encoder.pos_embedding.shape == (1, 1 + 49, 768)
    state = publish("resnet18").state_dict() | {"conv1.weight": torch.zeros(64, 3, 3, 3)}
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda *args, **options: state)
    with pytest.raises(ValueError, match=r"(?s)do not fit torchvision/resnet18 for images of 64x64.*conv1"):
        part().make(task(), [], None)


def test_an_unknown_model_gets_the_nearest_names() -> None:
    with pytest.raises(ValueError, match=r"no model 'resnet19'.*resnet18"):
        part("torchvision/resnet19").make(task(), [], None)
    with pytest.raises(ValueError, match="did you mean 'torchvision/resnet18'"):
        part("resnet18").make(task(), [], None)


def test_unknown_weights_get_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"no weights 'IMAGENET1K_V7'; did you mean 'IMAGENET1K_V[12]'\? Known are .*DEFAULT"):
        part("torchvision/resnet50", "IMAGENET1K_V7").make(task(), [], None)


def test_offline_the_error_says_which_file_belongs_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(WeightsAbsent, match=r"put the file resnet18-.*\.pth into .*checkpoints"):
        part().make(task(), [], None)


def test_the_key_follows_the_file_that_the_default_stands_for() -> None:
    def part(weights: str) -> TorchvisionWeights:
        return TorchvisionWeights(role="pretrained", seed=0, architecture="torchvision/resnet50", weights=weights)

    files = {weights: part(weights).identity(task())["file"] for weights in ("DEFAULT", "IMAGENET1K_V2", "IMAGENET1K_V1")}
    assert files["DEFAULT"] == files["IMAGENET1K_V2"] != files["IMAGENET1K_V1"]
    assert part("IMAGENET1K_V1").key(task()) != part("IMAGENET1K_V2").key(task())
