"""Downloads of data sets: torchvision fetches, and what is not the original is removed."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from bench.datasets import Dataset

ARCHIVES: dict[str, dict[str, str]] = {
    "mnist": {
        "MNIST/raw/train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "MNIST/raw/train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "MNIST/raw/t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "MNIST/raw/t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    "fashion_mnist": {
        "FashionMNIST/raw/train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "FashionMNIST/raw/train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "FashionMNIST/raw/t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "FashionMNIST/raw/t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
    "cifar10": {"cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"},
    "cifar100": {"cifar-100-python.tar.gz": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"},
}
"""sha256 of what torchvision downloads, by its place in the cache, as published by TensorFlow Datasets 4.9.10 (MNIST and
Fashion-MNIST) and Keras 3.15.1 (CIFAR)."""


def fetch(dataset: Dataset, cache: Path) -> str:
    """Let torchvision fill the cache; returns why it failed, empty if it did not. What is not the original is removed."""
    import torchvision

    try:  # torchvision raises whatever its sockets, archives and mirrors raise, and prints failures in between
        with redirect_stdout(StringIO()):
            getattr(torchvision.datasets, dataset.torchvision)(cache, download=True)
    except Exception as error:
        return f"the download failed ({type(error).__name__}: {error})"
    archives = ARCHIVES[dataset.name]
    for name, known in archives.items():
        given = hashlib.sha256((cache / name).read_bytes()).hexdigest()
        if given != known:
            shutil.rmtree(cache / dataset.layout)
            for other in archives:
                (cache / other).unlink(missing_ok=True)
            return f"what was downloaded is not the original and was removed ({name} has sha256 {given}, allowed is {known})"
    return ""
