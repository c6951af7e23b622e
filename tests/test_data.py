"""Data sets: each layout read, each kind of damage named, nothing downloaded or unpickled unasked."""

import hashlib
import os
import pickle
import re
import struct
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bench.data import DATASETS, DataError, hold_out, load
from bench.datasets import IDX_MD5
from bench.downloads import ARCHIVES
from bench.suites import load_suite
from defenses.api import Images

REAL = os.environ.get("BENCH_DATA")
DIGITS_TRAIN = "sha256:b4d1e68aa6b2e0ad411851eaa3cb6c2f188d49a5deb46860d7ddfdd36ff29981"
DIGITS_TEST = "sha256:b0c36ef5d3ec9542d829c31e3e866f0f5f675c2bf06540a1d60001a7c5a8d897"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network, no BENCH_DATA, an empty home."""

    def unreachable(*args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", unreachable)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", unreachable)
    monkeypatch.delenv("BENCH_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def pixels(count, shape, seed=0):
    """Random uint8 images (n h w) or (n h w 3)."""
    channels, height, width = shape
    size = (count, height, width) if channels == 1 else (count, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def encoded(array, kind="PNG"):
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(file, images, labels, *, image="image", label="label", nested=True):
    file.parent.mkdir(parents=True, exist_ok=True)
    contents = [{"bytes": content, "path": None} for content in images] if nested else images
    pq.write_table(pa.table({label: labels, "extra": ["x"] * len(labels), image: contents}), file)


def write_mnist(folder, monkeypatch, count=4, name="mnist"):
    """idx files of all splits, accepted by a replaced checksum table; returns pixels (n h w) and labels."""
    folder.mkdir(parents=True)
    array, labels = pixels(count, (1, 28, 28)), np.arange(count, dtype=np.uint8)
    for split, files in IDX_MD5[name].items():
        contents = (
            struct.pack(">iiii", 0x803, count, 28, 28) + array.tobytes(),
            struct.pack(">ii", 0x801, count) + labels.tobytes(),
        )
        table = []
        for (file, _), content in zip(files, contents, strict=True):
            (folder / file).write_bytes(content)
            table.append((file, hashlib.md5(content).hexdigest()))
        monkeypatch.setitem(IDX_MD5[name], split, table)
    return array, labels


def write_folder(home, name, split, *, per_class=1, suffix=".png", kind="PNG"):
    dataset = DATASETS[name]
    array = pixels(dataset.classes * per_class, dataset.shape)
    for i, image in enumerate(array):
        file = home / split / f"class{i // per_class:04d}" / f"{i:05d}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(image, kind))
    return array


def refused(match, name, split="train", **options):
    with pytest.raises(DataError) as caught:
        load(name, split, **options)
    for text in [match] if isinstance(match, (str, Path)) else match:
        assert str(text) in str(caught.value)


# names


def test_table_is_complete_and_consistent():
    assert list(DATASETS) == ["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet", "imagenet"]
    for name, dataset in DATASETS.items():
        assert dataset.name == name
        assert len(dataset.mean) == len(dataset.std) == dataset.shape[0]
        assert bool(dataset.torchvision) == bool(dataset.layout)
    assert DATASETS["cifar10"].std == (0.2023, 0.1994, 0.2010)


def test_unknown_names_list_the_allowed_ones_and_the_nearest():
    refused(["unknown data set 'cifar-10'", "fashion_mnist", "did you mean cifar10?"], "cifar-10")
    refused(["unknown split 'val'", "train and test", "hold_out"], "mnist", "val")


# digits


def test_digits_need_no_files_and_never_change():
    train, test = load("digits", "train"), load("digits", "test")
    assert (train.hash, test.hash) == (DIGITS_TRAIN, DIGITS_TEST)
    assert (len(train), len(test), train.shape, train.source) == (1400, 397, (1, 28, 28), "digits scikit-learn")
    assert sorted(torch.cat([train.ids, test.ids]).tolist()) == list(range(1797))
    assert DATASETS["digits"].mean[0] == pytest.approx(train.floats().mean().item(), abs=5e-5)
    assert DATASETS["digits"].std[0] == pytest.approx(train.floats().std().item(), abs=5e-5)


def test_digits_are_scikit_learns_pixels_enlarged():
    from sklearn.datasets import load_digits

    test, bunch = load("digits", "test"), load_digits()
    image, original = test.pixels[0, 0], bunch.images[int(test.ids[0])]
    assert test.labels[0] == bunch.target[int(test.ids[0])]
    assert image[2:26:3, 2:26:3].numpy() == pytest.approx(original * 255 / 16, abs=0.5)
    assert torch.equal(image[2:26:3, 2:26:3], image[4:26:3, 4:26:3])
    assert image[:2].sum() == image[26:].sum() == image[:, :2].sum() == image[:, 26:].sum() == 0


@pytest.mark.parametrize("split", ["train", "test"])
def test_any_prefix_of_digits_has_all_classes_in_proportion(split):
    labels = load("digits", split).labels
    share = labels.bincount() / len(labels)
    for count in (10, 50, 100, 333):
        assert (labels[:count].bincount(minlength=10) - count * share).abs().max() < 2


# Parquet


def test_parquet_of_png_is_read_losslessly_in_stored_order(data):
    array, labels = pixels(5, (1, 28, 28)), [3, 1, 4, 1, 5]
    write_parquet(data / "mnist" / "train.parquet", [encoded(image) for image in array], labels)
    images = load("mnist", "train", data=data)
    assert np.array_equal(images.pixels[:, 0], array) and images.pixels.dtype == torch.uint8
    assert images.labels.tolist() == labels and images.labels.dtype == torch.int64
    assert images.ids.tolist() == [0, 1, 2, 3, 4]
    assert images.source == "mnist parquet"


def test_the_environment_names_the_folder_when_no_argument_does(data, monkeypatch):
    write_parquet(data / "mnist" / "train.parquet", [encoded(pixels(1, (1, 28, 28))[0])], [7])
    monkeypatch.setenv("BENCH_DATA", str(data))
    assert load("mnist", "train").labels.tolist() == [7]
    (data / "other").mkdir()
    refused(data / "other" / "mnist", "mnist", data=data / "other")


def test_shards_are_joined_in_their_order_from_the_data_folder(data):
    array = pixels(4, (3, 32, 32))
    for shard in (1, 0):
        half = [encoded(image) for image in array[2 * shard : 2 * shard + 2]]
        file = data / "cifar100" / "data" / f"test-0000{shard}-of-00002-ab12.parquet"
        write_parquet(file, half, [99 - shard, 5], image="img", label="fine_label", nested=False)
    images = load("cifar100", "test", data=data)
    assert images.labels.tolist() == [99, 5, 98, 5] and images.ids.tolist() == [0, 1, 2, 3]
    assert np.array_equal(images.pixels.permute(0, 2, 3, 1), array)
    assert images.source == "cifar100 parquet"
    (data / "cifar100" / "data" / "test-00001-of-00002-ab12.parquet").unlink()
    refused(["test-00000-of-00002-ab12.parquet", "all of its shards"], "cifar100", "test", data=data)


def test_several_thousand_rows_cross_the_batches_of_the_reader(data):
    content = [encoded(image) for image in pixels(3, (1, 28, 28))]
    labels = [i % 10 for i in range(2500)]
    write_parquet(data / "mnist" / "test.parquet", [content[i % 3] for i in range(2500)], labels)
    images = load("mnist", "test", data=data)
    assert images.labels.tolist() == labels
    assert torch.equal(images.pixels[2499], images.pixels[0]) and not torch.equal(images.pixels[2499], images.pixels[1])
    write_parquet(data / "mnist" / "test.parquet", [content[0]] * 2500, [*labels[:2300], 10, *labels[2301:]])
    refused(["test.parquet, row 2300", "label 10", "0 to 9"], "mnist", "test", data=data)


@pytest.mark.parametrize(("name", "marked"), [("cifar10", True), ("tiny_imagenet", False)])
def test_jpeg_copies_of_lossless_sets_say_so(data, name, marked):
    array = pixels(2, DATASETS[name].shape)
    write_parquet(data / name / "train.parquet", [encoded(array[0]), encoded(array[1], "JPEG")], [0, 1])
    images = load(name, "train", data=data)
    assert images.source == f"{name} parquet" + " (JPEG re-encoding)" * marked
    assert np.array_equal(images.pixels[0].permute(1, 2, 0), array[0])


def test_greyscale_becomes_rgb_in_a_colour_set(data):
    grey, colour = pixels(1, (1, 64, 64))[0], pixels(1, (3, 64, 64))[0]
    write_parquet(data / "tiny_imagenet" / "val.parquet", [encoded(grey), encoded(colour)], [199, 0])
    images = load("tiny_imagenet", "test", data=data)
    assert images.shape == (3, 64, 64)
    assert all(np.array_equal(channel, grey) for channel in images.pixels[0])


def test_the_official_validation_split_is_the_test_split_of_tiny_imagenet(data):
    image = encoded(pixels(1, (3, 64, 64))[0])
    for split, label in (("test", 1), ("val", 2)):
        write_parquet(data / "tiny_imagenet" / f"{split}.parquet", [image], [label])
    assert load("tiny_imagenet", "test", data=data).labels.tolist() == [2]


def test_imagenet_is_resized_and_cropped_as_torchvision_does(data):
    image = pixels(1, (3, 300, 412))[0]
    write_parquet(data / "imagenet" / "val.parquet", [encoded(image)], [999])
    images = load("imagenet", "test", data=data)
    from torchvision.transforms import CenterCrop, Compose, Resize

    wanted = np.asarray(Compose([Resize(256), CenterCrop(224)])(Image.fromarray(image)))
    assert np.array_equal(images.pixels[0].permute(1, 2, 0), wanted)


PNG = encoded(pixels(1, (1, 28, 28))[0])


@pytest.mark.parametrize(
    ("content", "label", "match"),
    [
        (PNG[:200], 0, "train.parquet, row 1 is no readable PNG or JPEG"),
        (PNG[:35] + b"\0" + PNG[36:], 0, "row 1 is no readable PNG or JPEG (broken PNG file"),
        (b"GIF89a", 0, "row 1 is no readable PNG or JPEG (cannot identify image file); replace it"),
        (encoded(pixels(1, (1, 30, 28))[0]), 0, "row 1 is 28x30 (width x height), mnist is 28x28"),
        (encoded(pixels(1, (3, 28, 28))[0]), 0, "row 1 has mode RGB, allowed for mnist are 1, L"),
        (PNG, 10, "row 1 has label 10: mnist has 0 to 9"),
        (PNG, -1, "row 1 has label -1"),
        (PNG, None, "row 1 has label None"),
        (None, 0, "row 1 has no image bytes"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_downloaded_instead(data, content, label, match):
    write_parquet(data / "mnist" / "train.parquet", [PNG, content], [0, label])
    refused([data / "mnist" / "train.parquet", match], "mnist", data=data)


def test_sixteen_bit_pixels_are_refused_rather_than_clipped(data):
    deep = encoded(np.full((64, 64), 40000, np.uint16))
    write_parquet(data / "tiny_imagenet" / "train.parquet", [deep], [0])
    refused("row 0 has mode I;16", "tiny_imagenet", data=data)


@pytest.mark.parametrize("cut", [0, 4, 300])
def test_a_broken_parquet_file_is_named(data, cut):
    file = data / "mnist" / "train.parquet"
    write_parquet(file, [PNG], [0])
    file.write_bytes(file.read_bytes()[:cut])
    refused([file, "not readable as Parquet"], "mnist", data=data)


def test_a_damaged_page_is_named_though_the_footer_is_whole(data):
    file = data / "mnist" / "train.parquet"
    write_parquet(file, [PNG] * 20, [0] * 20)
    content = bytearray(file.read_bytes())
    content[4:200] = bytes(196)
    file.write_bytes(content)
    refused([file, "not readable as Parquet"], "mnist", data=data)


def test_wrong_columns_are_named(data):
    file = data / "mnist" / "train.parquet"
    write_parquet(file, [PNG], [0], image="pixels")
    refused([file, "['label', 'extra', 'pixels']", "image or img"], "mnist", data=data)
    write_parquet(file, [PNG], [0], label="coarse_label")
    refused("label or fine_label", "mnist", data=data)
    write_parquet(file, ["a.png"], [0], nested=False)
    refused(["image of type string", "encoded images"], "mnist", data=data)
    write_parquet(file, [PNG], ["seven"])
    refused("label of type string", "mnist", data=data)


def test_no_rows_is_an_error(data):
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary())])), ("label", pa.int64())])
    (data / "mnist").mkdir()
    pq.write_table(schema.empty_table(), data / "mnist" / "train.parquet")
    refused([data / "mnist", "no images"], "mnist", data=data)


# torchvision's layouts


@pytest.mark.parametrize("place", [".", "mnist"])
def test_idx_files_with_the_right_checksum_are_read(data, monkeypatch, place):
    array, labels = write_mnist(data / place / "MNIST" / "raw", monkeypatch)
    images = load("mnist", "test", data=data)
    assert np.array_equal(images.pixels[:, 0], array) and images.labels.tolist() == labels.tolist()
    assert images.source == "mnist torchvision" and images.ids.tolist() == [0, 1, 2, 3]


def test_idx_files_with_another_checksum_are_refused(data, monkeypatch):
    folder = data / "MNIST" / "raw"
    with monkeypatch.context() as accepted:
        write_mnist(folder, accepted)
    given = hashlib.md5((folder / "train-images-idx3-ubyte").read_bytes()).hexdigest()
    refused([folder / "train-images-idx3-ubyte", given, "6bbc9ace898e44ae57da46a324031adb", "not read"], "mnist", data=data)
    (folder / "t10k-images-idx3-ubyte").unlink()
    refused([folder / "t10k-images-idx3-ubyte", "is missing"], "mnist", "test", data=data)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("name", "key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_batches_are_joined_after_their_checksum(data, monkeypatch, name, key, split):
    folder, listed = data / DATASETS[name].layout, []
    folder.mkdir()
    array = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    for part in (0, 1):
        batch = {"data": array[2 * part : 2 * part + 2], key: [part, 9], "coarse_labels": [0, 0]}
        content = pickle.dumps(batch)
        (folder / f"part{part}").write_bytes(content)
        listed.append([f"part{part}", hashlib.md5(content).hexdigest()])
    monkeypatch.setattr(getattr(torchvision.datasets, DATASETS[name].torchvision), f"{split}_list", listed)
    images = load(name, split, data=data)
    assert np.array_equal(images.pixels, array.reshape(4, 3, 32, 32))
    assert images.labels.tolist() == [0, 9, 1, 9] and images.source == f"{name} torchvision"


class Trap:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_foreign_pickle_is_never_executed(data, tmp_path):
    folder, trap = data / "cifar-10-batches-py", Trap()
    trap.path = str(tmp_path / "executed")
    folder.mkdir()
    for file in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (folder / file).write_bytes(pickle.dumps(trap))
    for split in ("train", "test"):
        refused([folder, "has md5", "not read"], "cifar10", split, data=data)
    assert not (tmp_path / "executed").exists()


# folders of images


@pytest.mark.parametrize("split", ["test", "val", "validation"])
def test_image_folders_are_read_in_a_stratified_order(data, split):
    array = write_folder(data / "mnist", "mnist", split, per_class=3, suffix=".PNG")
    images = load("mnist", "test", data=data)
    assert sorted(images.ids.tolist()) == list(range(30))
    assert np.array_equal(images.pixels[:, 0], array[images.ids]) and torch.equal(images.labels, images.ids // 3)
    assert sorted(images.first(10).labels.tolist()) == list(range(10))
    assert images.source == "mnist folder"


def test_image_folders_may_nest_and_jpeg_is_named(data):
    write_folder(data / "cifar10", "cifar10", "train", suffix="/images/a.jpeg", kind="JPEG")
    assert load("cifar10", "train", data=data).source == "cifar10 folder (JPEG re-encoding)"


def test_tiny_imagenets_archive_is_read_once_its_validation_is_regrouped(data):
    home = data / "tiny_imagenet"
    array = write_folder(home, "tiny_imagenet", "train", suffix="/images/n_0.JPEG", kind="JPEG")
    (home / "val" / "images").mkdir(parents=True)
    (home / "val" / "images" / "val_0.JPEG").write_bytes(encoded(array[0], "JPEG"))
    train = load("tiny_imagenet", "train", data=data)
    assert (len(train), train.shape, train.source) == (200, (3, 64, 64), "tiny_imagenet folder")
    assert train.labels.sort().values.tolist() == list(range(200))
    refused([home / "val", "has 1 class folders, tiny_imagenet has 200; regroup"], "tiny_imagenet", "test", data=data)
    (home / "val" / "images" / "val_0.JPEG").unlink()
    (home / "val" / "images").rmdir()
    write_folder(home, "tiny_imagenet", "val", kind="JPEG", suffix=".JPEG")
    assert load("tiny_imagenet", "test", data=data).labels.unique().numel() == 200


def test_imagenets_class_folders_hold_jpeg_of_any_size(data, monkeypatch):
    monkeypatch.setitem(DATASETS, "imagenet", replace(DATASETS["imagenet"], classes=3))
    sizes = {"n01440764": (40, 60), "n01443537": (300, 256), "n01484850": (256, 500)}
    for split in ("train", "val"):
        for number, (wnid, size) in enumerate(sizes.items()):
            file = data / "imagenet" / split / wnid / f"{wnid}_{number}.JPEG"
            file.parent.mkdir(parents=True)
            grey = split == "val" and number == 0
            file.write_bytes(encoded(pixels(1, (1 if grey else 3, *size))[0], "JPEG"))
    train, test = load("imagenet", "train", data=data), load("imagenet", "test", data=data)
    for images in (train, test):
        assert images.pixels.shape == (3, 3, 224, 224) and sorted(images.labels.tolist()) == [0, 1, 2]
        assert images.source == "imagenet folder"
    first = test.pixels[test.labels.tolist().index(0)]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])


def test_image_folder_errors(data):
    home = data / "mnist"
    write_folder(home, "mnist", "train")
    write_folder(home, "mnist", "test")
    bad = home / "train" / "class0003" / "00003.png"
    bad.write_bytes(encoded(pixels(1, (1, 32, 32))[0]))
    refused([bad, "is 32x32", "mnist is 28x28"], "mnist", data=data)
    bad.write_bytes(PNG[:100])
    refused([bad, "no readable PNG"], "mnist", data=data)
    (home / "test" / "class0009").rename(home / "test" / "class9")
    refused([home / "test", "different class folders"], "mnist", "test", data=data)
    (home / "test" / "extra").mkdir()
    refused("has 11 class folders, mnist has 10", "mnist", "test", data=data)


def test_class_folders_without_images_are_an_error(data):
    for label in range(10):
        (data / "mnist" / "train" / str(label)).mkdir(parents=True)
    refused([data / "mnist" / "train", "no images"], "mnist", data=data)


# absent data and downloads


def test_offline_and_absent_names_three_ways_and_where_it_looked(data, tmp_path):
    cache = tmp_path / "home" / ".cache" / "cear-bench" / "MNIST" / "raw"
    ways = [
        "--data DIR",
        "BENCH_DATA=DIR",
        "train.parquet",
        "<class>",
        "torchvision",
        "run once where the network is reachable",
    ]
    looked = [data / "mnist", data / "MNIST", cache, "the download failed (RuntimeError", "no network in tests"]
    refused(ways + looked, "mnist", data=data)
    refused([*ways, "neither --data nor BENCH_DATA"], "mnist")
    refused([*ways, "switched off"], "mnist", download=False)
    refused("the download failed (URLError", "cifar100")


@pytest.mark.parametrize("name", ["tiny_imagenet", "imagenet"])
def test_sets_without_a_download_say_so(name):
    refused([f"there is no download of {name}", "by hand"], name, "test")


def test_a_folder_that_is_there_is_never_replaced_by_a_download(data):
    (data / "mnist").mkdir()
    refused([data / "mnist", "no test split of mnist", "complete or remove"], "mnist", "test", data=data)
    refused([data / "typo", "is not a folder"], "mnist", data=data / "typo")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The folder of downloads, which are archives with the file's own name in them."""
    own = {name: hashlib.sha256(Path(name).name.encode()).hexdigest() for name in ARCHIVES["mnist"]}
    monkeypatch.setitem(ARCHIVES, "mnist", own)
    return tmp_path / "home" / ".cache" / "cear-bench"


def fetched(monkeypatch):
    """A download that does what torchvision's does, without a network."""

    def fetch(url, download_root, filename, md5):
        folder = Path(download_root)
        if not (folder / "train-images-idx3-ubyte").exists():
            print("a mirror failed")
            folder.rmdir()
            write_mnist(folder, monkeypatch)
        (folder / filename).write_text(filename)

    return fetch


def test_a_download_that_is_not_the_original_is_removed(monkeypatch, cache):
    first = next(iter(ARCHIVES["mnist"]))
    monkeypatch.setitem(ARCHIVES["mnist"], first, "0" * 64)
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fetched(monkeypatch))
    refused(["is not the original and was removed", f"{first} has sha256 ", "allowed is 0000"], "mnist")
    assert not [path for path in cache.rglob("*") if path.is_file()]
    refused("switched off", "mnist", download=False)


def test_every_download_has_a_checksum():
    for name, dataset in DATASETS.items():
        assert set(ARCHIVES.get(name, {})) == (set(downloads(dataset)) if dataset.torchvision else set())


def downloads(dataset):
    """Places in the cache of what torchvision fetches."""
    known = getattr(torchvision.datasets, dataset.torchvision)
    if hasattr(known, "resources"):
        return [f"{dataset.layout}/{file}" for file, _ in known.resources]
    return [known.filename]


def test_a_download_is_checked_kept_and_used_again(monkeypatch, cache, capsys):
    fetch = fetched(monkeypatch)

    with monkeypatch.context() as online:
        online.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fetch)
        assert load("mnist", "train").labels.tolist() == [0, 1, 2, 3]
    assert capsys.readouterr().out == ""
    assert load("mnist", "test", download=False).source == "mnist torchvision"
    file = cache / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    refused([file, "has md5"], "mnist")


# Images and hold_out


def tiny(count):
    ids = torch.arange(count)
    return Images((ids % 251).to(torch.uint8).view(count, 1, 1, 1), ids % 10, ids + 1000, "made up")


def test_first_says_how_many_there_are():
    assert tiny(5).first(3).ids.tolist() == [1000, 1001, 1002]
    with pytest.raises(ValueError, match="6 images asked for, made up has 5"):
        tiny(5).first(6)


@given(count=st.integers(1, 300), share=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 2**31))
def test_hold_out_is_a_partition_in_stored_order(count, share, seed):
    images, held = tiny(count), int(count * share)
    train, validation = hold_out(images, held, seed)
    assert len(validation) == held and train.source == validation.source == "made up"
    assert sorted(train.ids.tolist() + validation.ids.tolist()) == images.ids.tolist()
    for part in (train, validation):
        assert torch.equal(part.ids, part.ids.sort().values)
        assert torch.equal(part.labels, (part.ids - 1000) % 10)


def test_hold_out_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = hold_out(tiny(1000), 100)
    torch.manual_seed(2)
    again = hold_out(tiny(1000), 100)
    assert [part.hash for part in first] == [part.hash for part in again]
    assert first[1].hash != hold_out(tiny(1000), 100, seed=1)[1].hash
    state = torch.get_rng_state()
    hold_out(tiny(1000), 100)
    assert torch.equal(state, torch.get_rng_state())
    assert first[1].ids[:5].tolist() == [1020, 1022, 1039, 1048, 1067]


@pytest.mark.parametrize("count", [-1, 10, 11])
def test_hold_out_leaves_something_to_train_on(count):
    with pytest.raises(DataError, match=f"cannot hold out {count} of the 10 images of made up: allowed are 0 to 9"):
        hold_out(tiny(10), count)


# the real files


def real(name, split):
    if not REAL:
        pytest.skip("BENCH_DATA is not set: it names the folder with the real data sets")
    if not (Path(REAL) / name).is_dir():
        pytest.skip(f"the folder that BENCH_DATA names has no {name}")
    return load(name, split, data=Path(REAL), download=False)


def test_real_mnist():
    images = real("mnist", "test")
    assert images.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert images.shape == (1, 28, 28) and images.pixels.dtype == torch.uint8
    assert images.source in ("mnist parquet", "mnist torchvision")
    assert images.floats().mean() == pytest.approx(0.1325, abs=1e-3)


def test_real_cifar10_names_its_re_encoding():
    images = real("cifar10", "test")
    assert images.labels.bincount().tolist() == [1000] * 10 and images.shape == (3, 32, 32)
    if images.source != "cifar10 torchvision":
        assert images.source == "cifar10 parquet (JPEG re-encoding)"


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "tiny_imagenet"])
def test_a_source_says_re_encoded_where_the_folders_readme_says_jpeg(real_data, name):
    readme = real_data / name / "README.md"
    if not readme.is_file():
        pytest.skip(f"no README.md that describes {name}")
    formats = set(re.findall(r"^\| (?:test|val) \| (PNG|JPEG) \|", readme.read_text(), re.MULTILINE))
    images = load(name, "test", data=real_data)
    assert ("re-encoding" in images.source) == (DATASETS[name].lossless and "JPEG" in formats), images.source


def pictures(images):
    """A digest of each image's pixels."""
    return [hashlib.sha256(image.numpy().tobytes()).digest() for image in images.pixels]


def test_real_tiny_imagenet_splits_into_18000_2000_and_2000(real_data):
    if not (real_data / "tiny_imagenet").is_dir():
        pytest.skip("the folder that BENCH_DATA names has no tiny_imagenet")
    stored = load("tiny_imagenet", "train", data=real_data)
    if len(stored) != 20_000:
        pytest.skip("not the subset of 100 training images per class")
    train, validation = hold_out(stored, load_suite("tiny_imagenet", "paper").validation_images)
    test = load("tiny_imagenet", "test", data=real_data)
    assert (len(train), len(validation), len(test)) == (18_000, 2_000, 2_000)
    assert not set(train.ids.tolist()) & set(validation.ids.tolist())
    assert train.labels.unique().numel() == test.labels.unique().numel() == 200
    seen = pictures(train)
    assert not set(seen) & set(pictures(test))
    # The data set holds one picture twice, under two labels: the README counts it.
    twice = len(stored) - len(set(pictures(stored)))
    assert twice == 1 and len(set(seen) & set(pictures(validation))) <= twice


def test_real_tiny_imagenet_has_greyscale_images_as_rgb():
    images = real("tiny_imagenet", "test")
    assert images.shape == (3, 64, 64) and images.labels.unique().numel() == 200
    grey = (images.pixels == images.pixels[:, :1]).flatten(1).all(1)
    assert 0 < grey.sum() < len(images) / 10
