"""The table of data sets: shapes, normalisation (methods 2.1), checksums, and how one of their images is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

MODES = {1: {"L", "1"}, 3: {"RGB", "L", "1", "P", "RGBA", "LA", "CMYK"}}
"""Modes of Pillow that may become a data set's channels, by the number of channels."""

TEST_NAMES = ("test", "val", "validation", "valid")
VALIDATION_FIRST = ("val", "validation", "valid", "test")
STORED = ("parquet", "torchvision", "folder")
"""How images can be stored, in the word that their source has for it."""


class DataError(ValueError):
    """Data that is absent, damaged or not what was announced; says what was given, what is allowed and what to do."""


@dataclass(frozen=True)
class Dataset:
    """Facts of a data set.

    Attributes:
        name: as suites and the command line spell it.
        classes: number of labels, 0 to classes - 1.
        shape: (channels, height, width).
        mean, std: of the in-model normalisation, per channel, pixels in [0,1].
        note: what a reader should know.
        lossless: the original is lossless, so JPEG files are not its pixels.
        torchvision: class that downloads it; empty: none does.
        layout: folder that this class reads.
        tests: names a folder or Parquet file of the test split may have, the preferred one first.
        resize: shorter side before the centre crop to ``shape``; 0: images must already have the size.
    """

    name: str
    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    note: str = ""
    lossless: bool = False
    torchvision: str = ""
    layout: str = ""
    tests: tuple[str, ...] = TEST_NAMES
    resize: int = 0

    def names(self, split: str) -> tuple[str, ...]:
        """Names that a folder or Parquet file of a split may have."""
        return ("train",) if split == "train" else self.tests

    def checksums(self, split: str) -> list[tuple[str, str]]:
        """(file, md5) of the files of a split in torchvision's layout."""
        if self.name in IDX_MD5:
            return IDX_MD5[self.name][split]
        import torchvision

        known = getattr(torchvision.datasets, self.torchvision)
        return [(file, md5) for file, md5 in (known.train_list if split == "train" else known.test_list)]

    def decode(self, where: str, content: bytes) -> np.ndarray:
        """One PNG or JPEG as uint8 (c h w); greyscale becomes RGB where the data set is in colour.

        Raises:
            DataError: names ``where`` if the image is damaged or has another size or mode.
        """
        channels, height, width = self.shape
        try:
            image: Image.Image = Image.open(BytesIO(content), formats=("PNG", "JPEG"))
            image.load()
        except Exception as error:  # a damaged file makes Pillow raise OSError, SyntaxError, struct.error or its own
            why = str(error).split(" <")[0]  # without the address of the buffer
            raise DataError(f"{where} is no readable PNG or JPEG ({why}); replace it by an undamaged copy") from error
        if image.mode not in MODES[channels]:
            allowed = ", ".join(sorted(MODES[channels]))
            raise DataError(f"{where} has mode {image.mode}, allowed for {self.name} are {allowed}; convert it")
        mode = "L" if channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        if self.resize:
            image = _centre(image, self.resize, height)
        if image.size != (width, height):
            given = f"{image.width}x{image.height}"
            raise DataError(f"{where} is {given} (width x height), {self.name} is {width}x{height}; resize it")
        return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def _centre(image: Image.Image, shorter: int, size: int) -> Image.Image:
    """Shorter side to ``shorter`` (bilinear), then the centre ``size`` x ``size``, rounded as torchvision does."""
    least = min(image.size)
    width, height = (shorter * side // least for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


_ALL = [
    Dataset(
        name="digits",
        classes=10,
        shape=(1, 28, 28),
        mean=(0.2237,),
        std=(0.3485,),
        note="scikit-learn's 8x8 digits, every pixel shown 3x3 times, 2 zeros around; mean and std of the training split",
    ),
    Dataset(
        name="mnist",
        classes=10,
        shape=(1, 28, 28),
        mean=(0.1307,),
        std=(0.3081,),
        lossless=True,
        torchvision="MNIST",
        layout="MNIST/raw",
    ),
    Dataset(
        name="fashion_mnist",
        classes=10,
        shape=(1, 28, 28),
        mean=(0.2860,),
        std=(0.3530,),
        lossless=True,
        torchvision="FashionMNIST",
        layout="FashionMNIST/raw",
    ),
    Dataset(
        name="cifar10",
        classes=10,
        shape=(3, 32, 32),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        note="std is the mean of the per-image stds, as Cohen and DVERGE use it, not the std of all pixels",
        lossless=True,
        torchvision="CIFAR10",
        layout="cifar-10-batches-py",
    ),
    Dataset(
        name="cifar100",
        classes=100,
        shape=(3, 32, 32),
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        note="the fine labels",
        lossless=True,
        torchvision="CIFAR100",
        layout="cifar-100-python",
    ),
    Dataset(
        name="tiny_imagenet",
        classes=200,
        shape=(3, 64, 64),
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2302, 0.2265, 0.2262),
        note="the official validation split is the test split; in the original archive it must be regrouped into class folders",
        tests=VALIDATION_FIRST,
    ),
    Dataset(
        name="imagenet",
        classes=1000,
        shape=(3, 224, 224),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        note="the official validation split is the test split; shorter side to 256, centre crop 224",
        tests=VALIDATION_FIRST,
        resize=256,
    ),
]

DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in _ALL}

IDX_MD5: dict[str, dict[str, list[tuple[str, str]]]] = {
    "mnist": {
        "train": [
            ("train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb"),
            ("train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624"),
        ],
        "test": [
            ("t10k-images-idx3-ubyte", "2646ac647ad5339dbf082846283269ea"),
            ("t10k-labels-idx1-ubyte", "27ae3e4e09519cfbb04c329615203637"),
        ],
    },
    "fashion_mnist": {
        "train": [
            ("train-images-idx3-ubyte", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
            ("train-labels-idx1-ubyte", "9018921c3c673c538a1fc5bad174d6f9"),
        ],
        "test": [
            ("t10k-images-idx3-ubyte", "8181f5470baa50b63fa0f6fddb340f0a"),
            ("t10k-labels-idx1-ubyte", "15d484375f8d13e6eb1aabb0c3f46965"),
        ],
    },
}
"""Images and labels of each split, unpacked; torchvision itself only carries the md5 of the packed files."""
