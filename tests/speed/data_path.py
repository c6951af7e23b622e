"""Images a second through the resident, batched data path, as a ratio over a per-image loader, in one process, interleaved.

    python tests/speed/data_path.py [--rounds 5] [--images 2000]

The reference crops, flips and converts image by image with torchvision's transforms, as a loader without workers does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchvision.transforms as T
from PIL import Image

from attacks.streams import generator
from defenses.api import Images
from defenses.training import augment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pixels = torch.randint(0, 256, (options.images, 3, 32, 32), generator=generator(0), dtype=torch.uint8)
    images = Images(pixels, torch.zeros(len(pixels), dtype=torch.int64), torch.arange(len(pixels)), "random")
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    transform = T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(), T.ToTensor()])

    def by_image() -> None:
        for start in range(0, len(pictures), 128):
            torch.stack([transform(picture) for picture in pictures[start : start + 128]])

    def resident() -> None:
        gen = generator(1)
        for rows in torch.randperm(len(images), generator=gen).split(128):
            augment(images.pixels[rows], "crop_flip", gen).float().div_(255)

    works: dict[str, Callable[[], None]] = {"per image": by_image, "resident": resident}
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(options.rounds + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            if turn:
                times[name].append(time.process_time() - began)
    speed = {name: len(images) / statistics.median(values) for name, values in times.items()}
    print(f"torch {torch.__version__}, one thread, 3x32x32, batches of 128")
    for name, rate in speed.items():
        print(f"{name:10} {rate:10.0f} images/s  {rate / speed['per image']:.1f}x")


if __name__ == "__main__":
    main()
