"""KAP's protocols as suites: the paper's numbers, and a run of each at its smallest, on images that come with the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.evals import Certified, Robust, UnderNoise
from bench.registry import resolve
from bench.request import Request
from bench.runner import Run
from bench.suites import BUDGETS, load_suite
from bench.tasks import prepare

SUITES = ("kap_cifar10", "kap_small_cifar10", "kap_small_mnist")

VARIANTS = "kap@architecture=cnn1,nt@architecture=cnn3,kap@kernel=5,stride=5,architecture=cnn2_400,kap@noise=0.1"


def test_the_protocol_is_the_papers() -> None:
    suite = load_suite("kap_cifar10", "paper")
    recipe = suite.training("kernels")
    assert (suite.architecture, recipe.epochs, recipe.batch, recipe.optimizer) == ("resnet18", 200, 128, "sgd")
    assert (recipe.momentum, recipe.weight_decay, recipe.augment) == (0.9, 1e-4, "crop_flip")
    assert [recipe.rate(epoch) for epoch in (0, 149, 150, 199)] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    pgd, auto, sweep, noise, certified = (suite.evals[n] for n in ("pgd", "autoattack", "sweep", "noise", "certified"))
    assert isinstance(pgd, Robust) and (pgd.norm, pgd.eps, pgd.steps, pgd.step, pgd.restarts) == ("l2", (1.0,), 100, "4/255", 1)
    assert isinstance(auto, Robust) and (auto.norm, auto.eps, auto.images) == ("l2", (1.0,), 1000)
    assert isinstance(sweep, Robust) and sweep.eps == (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
    assert isinstance(noise, UnderNoise) and (noise.attack, noise.eps, noise.sigma) == ("autoattack", (1.0,), 0.1)
    assert noise.places == ("none", "input", "activations", "both")
    assert isinstance(certified, Certified) and (certified.sigma, certified.images, certified.n) == (0.1, 500, 100_000)


@pytest.mark.parametrize("name", SUITES)
def test_every_norm_is_l2_and_quick_is_small(name: str) -> None:
    for budget in BUDGETS:
        suite = load_suite(name, budget)
        assert {getattr(own, "norm", "l2") for own in suite.evals.values()} == {"l2"}
    quick = load_suite(name)
    assert (quick.train_images, quick.training().epochs) == ((20_000, 4) if name == "kap_small_mnist" else (5000, 15))
    assert quick.architecture == ("cnn3" if name == "kap_cifar10" else "cnn2")


def on_digits(name: str, folder: Path) -> Path:
    """The suite with the embedded digits in place of its images."""
    path = folder / "kid.toml"
    path.write_text(f'extends = "{name}"\nname = "kid"\nversion = 1\ndataset = "digits"\n')
    return path


@pytest.mark.parametrize(
    "name", [name if name == "kap_small_mnist" else pytest.param(name, marks=pytest.mark.slow) for name in SUITES]
)
def test_it_runs_at_smoke(name: str, tmp_path: Path) -> None:
    request = Request(
        defense="kap@noise=0.1", suite=str(on_digits(name, tmp_path)), budget="smoke", runs=tmp_path, device="cpu"
    )
    records = Run(request).execute()
    assert {record.status for record in records} == {"success"}, [record.error for record in records]
    assert {record.eval["name"] for record in records} == set(load_suite(name, "smoke").evals)


def test_the_variants_of_its_description_suit_it(tmp_path: Path) -> None:
    suite = load_suite("kap_small_cifar10", "smoke")
    assert all(spec in suite.description for spec in ("kap@architecture=cnn1", "kap@kernel=5,stride=5,architecture=cnn2_400"))
    task, _ = prepare(load_suite(on_digits("kap_small_cifar10", tmp_path), "smoke"), "cpu", None)
    variants = resolve(VARIANTS, {})
    assert len(variants) == 4 and not any(variant.defense.unsuited(task) for variant in variants)
