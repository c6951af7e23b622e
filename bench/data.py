"""Loading data sets: Parquet, torchvision's layouts or folders of images become one uint8 tensor, or an error says why not."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attacks.streams import generator
from bench.arrays import published
from bench.datasets import DATASETS, IDX_MD5, DataError, Dataset
from bench.downloads import fetch
from defenses.api import Images

Row = tuple[str, bytes | None, int | None]
"""Where an image is (for errors), its encoded bytes, its label."""

SUFFIXES = {".png", ".jpg", ".jpeg"}
LAYOUTS = "train.parquet and test.parquet (or shards train-00000-of-00002.parquet), train/<class>/*.png, or torchvision's files"


def load(
    name: str,
    split: str,
    *,
    data: Path | None = None,
    download: bool = True,
    device: str | torch.device = "cpu",
) -> Images:
    """One split of a data set, pixels uint8 (n c h w), in its stored order.

    Args:
        name: one of :data:`DATASETS`.
        split: "train" or "test".
        data: folder with the data sets, searched for Parquet, torchvision's layout and an ImageFolder, in this order;
            without it the environment's BENCH_DATA. A set that is not there comes from the cache of downloads.
        download: whether a set that is nowhere may be downloaded.
        device: where the tensors live.

    Raises:
        DataError: for an unknown name or split, and for data that is absent or damaged.
    """
    if name not in DATASETS:
        near = get_close_matches(name, DATASETS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"unknown data set {name!r}: allowed are {', '.join(DATASETS)}{hint}")
    if split not in ("train", "test"):
        raise DataError(f"unknown split {split!r} of {name}: allowed are train and test; hold_out makes a validation split")
    dataset = DATASETS[name]
    if name == "digits":
        return _digits(split).to(device)
    root = data or os.environ.get("BENCH_DATA")
    found = _search(dataset, split, Path(root)) if root else None
    return (_cached(dataset, split, root, download) if found is None else found).to(device)


def hold_out(images: Images, count: int, seed: int = 0) -> tuple[Images, Images]:
    """Split off ``count`` random images: (train, validation), each in stored order, a function of n, count and seed alone.

    Raises:
        DataError: if fewer than one image would be left to train on.
    """
    if not 0 <= count < len(images):
        raise DataError(
            f"cannot hold out {count} of the {len(images)} images of {images.source}: allowed are 0 to {len(images) - 1}; "
            "lower the number of validation images"
        )
    order = torch.randperm(len(images), generator=generator(seed, "hold out"))
    order = order.to(images.labels.device)
    return images.take(order[count:].sort().values), images.take(order[:count].sort().values)


def _digits(split: str) -> Images:
    """scikit-learn's digits as 1x28x28: 1,400 to train, 397 to test; ids are scikit-learn's order."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    shown = (bunch.images.astype(np.int64) * 255 + 8) // 16
    pixels = np.pad(shown.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = _stratified(labels, "digits")
    ids = order[:397] if split == "test" else order[397:]
    return Images(torch.from_numpy(pixels)[ids].unsqueeze(1), labels[ids], ids, "digits scikit-learn")


def _stratified(labels: Tensor, *purpose: str) -> Tensor:
    """A fixed random order (n) in which every prefix has the classes in nearly the proportions of the whole."""
    order = torch.randperm(len(labels), generator=generator(0, *purpose))
    shuffled = labels[order]
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in shuffled.unique():
        rows = (shuffled == label).nonzero().flatten()
        place[rows] = (torch.arange(len(rows), dtype=torch.float64) + 0.5) / len(rows)
    return order[place.sort(stable=True).indices]


def _search(dataset: Dataset, split: str, root: Path) -> Images | None:
    """The split out of ``root``, None if the data set is not there at all; a damaged or partial one is an error."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: --data and BENCH_DATA name the folder that holds the data sets")
    home = root / dataset.name
    if files := _shards(home, dataset.names(split)):
        return _parquet(dataset, files)
    for place in (home, root):
        if dataset.layout and (place / dataset.layout).is_dir():
            return _torchvision(dataset, split, place / dataset.layout)
    for folder in (home / name for name in dataset.names(split)):
        if folder.is_dir():
            return _image_folder(dataset, folder)
    if home.exists():
        raise DataError(
            f"{home} exists, but has no {split} split of {dataset.name} (names searched: {', '.join(dataset.names(split))}); "
            f"allowed are {LAYOUTS}; complete or remove the folder"
        )
    return None


def _cached(dataset: Dataset, split: str, root: str | Path | None, download: bool) -> Images:
    """The split out of the cache of downloads, downloaded if need be."""
    cache = Path.home() / ".cache" / "cear-bench"
    if not dataset.torchvision:
        reason = f"there is no download of {dataset.name}"
    elif all((cache / dataset.layout / file).is_file() for file, _ in dataset.checksums(split)):
        return _torchvision(dataset, split, cache / dataset.layout)
    elif not download:
        reason = "downloading is switched off"
    else:
        reason = fetch(dataset, cache)
        if not reason:
            return _torchvision(dataset, split, cache / dataset.layout)
    looked = [str(Path(root) / dataset.name)] if root else ["no folder, since neither --data nor BENCH_DATA is given"]
    looked += [str(Path(root) / dataset.layout)] if root and dataset.layout else []
    looked += [str(cache / dataset.layout)] if dataset.layout else []
    third = "run once where the network is reachable" if dataset.torchvision else "fetch it by hand, and then do one of these"
    raise DataError(
        f"no {split} split of {dataset.name}: looked in {', '.join(looked)}; {reason}. Three ways: (1) give --data DIR, "
        f"(2) set BENCH_DATA=DIR, where DIR/{dataset.name} holds {LAYOUTS}, (3) {third}."
    )


def _torchvision(dataset: Dataset, split: str, folder: Path) -> Images:
    """The files torchvision reads, after their checksum: CIFAR's are pickles, of which arrays alone are read."""
    contents = []
    for file, md5 in dataset.checksums(split):
        path = folder / file
        if not path.is_file():
            raise DataError(f"{path} is missing; complete the folder or remove it")
        content = path.read_bytes()  # the very bytes that are checked are the ones that are read below
        given = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if given != md5:
            raise DataError(
                f"{path} has md5 {given}, allowed is {md5}; it was not read; replace it by the original or remove it"
            )
        contents.append(content)
    if dataset.name in IDX_MD5:
        pixels, labels = np.frombuffer(contents[0], np.uint8, offset=16), np.frombuffer(contents[1], np.uint8, offset=8)
    else:
        batches = [published(content) for content in contents]
        pixels = np.concatenate([batch["data"] for batch in batches])
        labels = np.concatenate([batch["labels"] if "labels" in batch else batch["fine_labels"] for batch in batches])
    stored = torch.from_numpy(pixels.reshape(-1, *dataset.shape).copy())
    return Images(stored, torch.from_numpy(labels.astype(np.int64)), torch.arange(len(labels)), f"{dataset.name} torchvision")


def _shards(home: Path, names: Iterable[str]) -> list[Path]:
    """The Parquet files of a split in their order, all of them."""
    for name in names:
        for place in (home, home / "data"):
            pattern = re.compile(rf"{name}(?:-\d+-of-(\d+).*)?\.parquet")
            matches = [match for file in sorted(place.glob("*.parquet")) if (match := pattern.fullmatch(file.name))]
            counts = {int(match[1] or 1) for match in matches}
            if counts and counts != {len(matches)}:
                given = ", ".join(match.string for match in matches)
                raise DataError(
                    f"{place} has {given}: allowed is {name}.parquet or all of its shards, once; complete the folder"
                )
            if matches:
                return [place / match.string for match in matches]
    return []


def _parquet(dataset: Dataset, files: list[Path]) -> Images:
    """Parquet files in the manner of Hugging Face; ids are the position in the stored order."""
    from pyarrow.parquet import read_metadata

    count = 0
    for file in files:
        with _parquet_errors(file):
            count += read_metadata(file).num_rows
    rows = (row for file in files for row in _parquet_rows(file))
    return _decode(dataset, "parquet", files[0].parent, rows, torch.arange(count))


def _parquet_rows(file: Path) -> Iterator[Row]:
    """Image bytes and labels of a Parquet file, its other columns unread."""
    from pyarrow import types
    from pyarrow.parquet import ParquetFile

    with _parquet_errors(file), ParquetFile(file) as table:
        schema = table.schema_arrow
        image = next((name for name in ("image", "img") if name in schema.names), None)
        label = next((name for name in ("fine_label", "label") if name in schema.names), None)
        if image is None or label is None:
            raise DataError(f"{file} has the columns {schema.names}: allowed are image or img, and label or fine_label")
        kind, nested = schema.field(image).type, types.is_struct(schema.field(image).type)
        held = next((part.type for part in kind if part.name == "bytes"), None) if nested else kind
        encodes = held is not None and (types.is_binary(held) or types.is_large_binary(held))
        if not encodes or not types.is_integer(schema.field(label).type):
            given = f"{image} of type {kind} and {label} of type {schema.field(label).type}"
            raise DataError(f"{file} has {given}: allowed are encoded images (binary, or a struct with bytes) and integers")
        row = 0
        for batch in table.iter_batches(1000, columns=[f"{image}.bytes" if nested else image, label]):
            encoded = batch.column(image).field("bytes") if nested else batch.column(image)
            for content, number in zip(encoded.to_pylist(), batch.column(label).to_pylist(), strict=True):
                yield f"{file}, row {row}", content, number
                row += 1


@contextmanager
def _parquet_errors(file: Path) -> Iterator[None]:
    """Whatever pyarrow finds wrong with a file, as a DataError that names it."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        raise DataError(f"{file} is not readable as Parquet ({error}); replace it by an undamaged copy") from error


def _image_folder(dataset: Dataset, folder: Path) -> Images:
    """A folder of class folders, sorted by name; ids count the files class by class, the order is stratified.

    The order of the files would make the first N images a single class, and evaluations take the first N.
    """
    names = _class_names(folder)
    if len(names) != dataset.classes:
        raise DataError(f"{folder} has {len(names)} class folders, {dataset.name} has {dataset.classes}; regroup its images")
    train = folder.parent / "train"
    if train.is_dir() and _class_names(train) != names:
        raise DataError(f"{folder} and {train} have different class folders, so their labels would differ; make them equal")
    files = [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted((folder / name).rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]
    ids = _stratified(torch.tensor([label for _, label in files]), "folder")
    rows = ((str(files[i][0]), files[i][0].read_bytes(), files[i][1]) for i in ids.tolist())
    return _decode(dataset, "folder", folder, rows, ids)


def _class_names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir() if item.is_dir() and not item.name.startswith("."))


def _decode(dataset: Dataset, layout: str, folder: Path, rows: Iterable[Row], ids: Tensor) -> Images:
    """Encoded images to one uint8 tensor, in one pass; every image and label is checked."""
    if not len(ids):
        raise DataError(f"{folder} holds no images of {dataset.name}; allowed are {LAYOUTS}; complete or remove it")
    try:
        pixels = np.empty((len(ids), *dataset.shape), np.uint8)
    except MemoryError as error:
        size = len(ids) * np.prod(dataset.shape) / 1e9
        raise DataError(f"the {len(ids)} images of {folder} need {size:.0f} GB of memory; keep fewer there") from error
    labels = np.empty(len(ids), np.int64)
    jpeg = False
    for i, (where, content, label) in enumerate(rows):
        if label is None or not 0 <= label < dataset.classes:
            raise DataError(f"{where} has label {label}: {dataset.name} has 0 to {dataset.classes - 1}; correct the file")
        if not content:
            raise DataError(f"{where} has no image bytes; a path alone is not enough, write the encoded image into the file")
        jpeg |= content.startswith(b"\xff\xd8")
        pixels[i] = dataset.decode(where, content)
        labels[i] = label
    source = f"{dataset.name} {layout}" + (" (JPEG re-encoding)" if jpeg and dataset.lossless else "")
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels), ids, source)
