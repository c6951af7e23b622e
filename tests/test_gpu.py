"""On a GPU: deterministic attacks and votes on given noise agree with the CPU within float noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attacks import Bim, Fgsm, Mim
from attacks.streams import generator
from bench.request import Request
from bench.runner import Run
from defenses.api import Images, Recipe, Task
from defenses.nets import Network, network

pytestmark = pytest.mark.gpu


def task(architecture: str = "lenet5") -> Task:
    gen = generator(0, "gpu test")
    pixels = torch.randint(0, 256, (64, 1, 28, 28), generator=gen, dtype=torch.uint8)
    labels = torch.randint(0, 10, (64,), generator=gen)
    images = Images(pixels, labels, torch.arange(64), "random")
    return Task("random", images, images, 10, (0.5,), (0.5,), architecture, Recipe(epochs=1))


def pair(architecture: str) -> tuple[Network, Network]:
    on_cpu = network(task(architecture), generator(1, "weights"))
    on_gpu = network(task(architecture))
    on_gpu.load_state_dict(on_cpu.state_dict())
    return on_cpu, on_gpu.cuda()


@pytest.mark.parametrize("architecture", ["lenet5", "resnet20"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", [Fgsm, Bim, Mim])
def test_deterministic_attacks_agree(kind: type, norm: str, architecture: str) -> None:
    on_cpu, on_gpu = pair(architecture)
    x = task().train.floats()
    y = on_cpu.predict(x)
    attack = kind(norm=norm, eps=0.05 if norm == "linf" else 0.5)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        one, other = attack(on_cpu, x, y), attack(on_gpu, x.cuda(), y.cuda())
    # The sign of a gradient of about 0 may differ, so single pixels may; verdicts may at ties only.
    assert (one.broken == other.broken.cpu()).float().mean() >= 0.98
    assert torch.allclose(one.distance, other.distance.cpu(), atol=1e-4)


@pytest.mark.parametrize("architecture", ["lenet5", "resnet20"])
def test_votes_on_given_noise_agree(architecture: str) -> None:
    on_cpu, on_gpu = pair(architecture)
    noisy = task().train.floats() + 0.25 * torch.randn(64, 1, 28, 28, generator=generator(2, "noise"))
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert torch.allclose(on_cpu(noisy), on_gpu(noisy.cuda()).cpu(), atol=1e-4)


def test_a_whole_run_on_the_gpu(tiny: Path) -> None:
    request = Request(defense="cear_rw@members=2", suite=str(tiny), runs=tiny.parent / "runs", device="cuda")
    records = Run(request).execute()
    assert [record.status for record in records] == ["success"] * 3
    assert all(record.numerics["rng"] == "torch-cuda" for record in records)
