"""Where tests find real data, and what they skip without it or without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import environment

# Small networks gain nothing from threads, and a child forked after OpenMP has started some would wait for them for ever.
torch.set_num_threads(1)
environment.steady_sums()  # as importing `bench` does, which some tests never do

HEAD = """\
version = 1
dataset = "digits"
architecture = "lenet5"
train_images = 64
validation_images = 20
[recipe]
epochs = 2
batch = 32
optimizer = "adam"
lr = 0.01"""
"""A suite behind its name and before its evaluations: digits, a network that trains in a second."""

TINY = f"""
name = "tiny"
{HEAD}
[evals.clean]
kind = "clean"
images = 30
[evals.pgd]
kind = "robust"
attack = "pgd"
norm = "linf"
eps = ["0.02", "0.1"]
steps = 3
restarts = 2
images = 30
[evals.certified]
kind = "certified"
radii = {{ step = 0.1 }}
n = 200
images = 30
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A suite on the embedded digits that trains and evaluates in a second."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """``bench WORDS`` in this process and an empty folder; gives the exit code."""
    from test_cli import call

    monkeypatch.chdir(tmp_path)
    return lambda *words: call(*words, monkeypatch=monkeypatch)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, or a skip that says how to provide it."""
    folder = os.environ.get("BENCH_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("real data: set BENCH_DATA to a folder of Parquet data sets")
    return Path(folder)


@pytest.hookimpl(tryfirst=True)  # before `-m` picks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "resnet18_x4" in item.name:  # 178 million weights, in whatever test runs over all architectures
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
