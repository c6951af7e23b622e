"""The one training loop: images resident on the device, augmentation there, a schedule, checkpoints at every epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.api import Attack
from attacks.streams import Shared, Streams, drawing, generator
from defenses.api import Classifier, Images, Part, Recipe, Task, Weights, Workshop
from defenses.checkpoint import checkpoint, optimizer_of, restore
from defenses.nets import Network, network

Log = Sequence[Mapping[str, float]]
"""A line an epoch, see :func:`train`."""


class TrainingDiverged(RuntimeError):
    """A loss part became NaN or infinite; says where, and what to change."""


@dataclass(frozen=True)
class Batch:
    """What a loss sees.

    Attributes:
        x: augmented images (n c h w) in [0,1].
        y: labels (n).
        gen: generator for its own noise.
        label_smoothing: how much of a hard label is spread over all classes.
        epoch: counted from 0.
        partner: as many other training images (n c h w) with their labels (n), from a second shuffle.
    """

    x: Tensor
    y: Tensor
    gen: torch.Generator
    label_smoothing: float = 0.0
    epoch: int = 0
    partner: Callable[[], tuple[Tensor, Tensor]] | None = None

    def noise(self) -> Tensor:
        """Standard normal numbers of the images' shape."""
        return torch.randn(self.x.shape, generator=self.gen, device=self.x.device)


class Loss(Protocol):
    """A frozen dataclass: what a model is trained for. Its fields are part of the content key."""

    def __call__(self, net: Any, batch: Batch, needs: Sequence[Any]) -> dict[str, Tensor]:
        """Named scalars whose sum is minimised. ``needs`` are the finished networks of the part's needs."""


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy on images with Gaussian noise of standard deviation ``sigma`` in pixel space (0: clean; not clipped)."""

    sigma: float = 0.0

    def __call__(self, net: Network, batch: Batch, needs: Sequence[Network]) -> dict[str, Tensor]:
        x = batch.x + self.sigma * batch.noise() if self.sigma else batch.x
        return {"ce": F.cross_entropy(net(x), batch.y, label_smoothing=batch.label_smoothing)}


@dataclass(frozen=True, kw_only=True)
class Trained(Part):
    """A network trained by :func:`train`."""

    architecture: str
    recipe: Recipe
    loss: Any = field(default_factory=CrossEntropy)

    @property
    def order(self) -> tuple[str, int]:
        """What, beside seed and epoch, keys the order and augmentation of images."""
        return self.role, self.member

    def generators(self, epoch: int, device: torch.device) -> tuple[torch.Generator, torch.Generator]:
        """Randomness of an epoch: for order and augmentation, and for the loss."""
        gen = generator(self.seed, "train", *self.order, epoch, device=device)
        return gen, gen

    def checks(self, net: Classifier, task: Task) -> dict[str, float]:
        """What is measured after every epoch."""
        return {"validation_accuracy": accuracy(net, task.validation)}

    def keeps(self, log: Log, task: Task) -> bool:
        """Whether the weights after the log's last epoch take the place of those kept before; if none are, the last stay."""
        return False

    def enough(self, log: Log, task: Task) -> str:
        """Why training ends here, before the recipe does; empty if it goes on."""
        return ""

    def make(self, task: Task, needs: Sequence[Weights], workshop: Workshop) -> Weights:
        teachers = []
        for part, weights in zip(self.needs, needs, strict=True):
            teacher = network(task, architecture=getattr(part, "architecture", None))
            teacher.load_state_dict(weights)
            teachers.append(teacher)
        net = self.untrained(task)
        train(net, task, self, teachers, workshop)
        return net.state_dict()

    def outline(self, task: Task) -> Weights | None:
        return self.untrained(task).state_dict()

    def untrained(self, task: Task) -> Classifier:
        """The network as training begins."""
        return network(task, generator(self.seed, "init", self.role, self.member), self.architecture)


def train(net: Classifier, task: Task, part: Trained, needs: Sequence[Classifier], workshop: Workshop) -> None:
    """Train in place; goes on from the workshop's checkpoint and leaves one after every epoch.

    Every epoch draws from a generator of its own, keyed by (seed, role, member, epoch), so that a continued run is the same
    run. Of every epoch the log keeps its number from 1, the learning rate halfway through it, the mean of every loss part and
    of their sum, what the part checks afterwards, the seconds of its steps, and, where a part keeps the weights of an epoch
    that need not be the last, the number of that epoch so far: "kept".

    Raises:
        TrainingDiverged: if a loss part is not finite.
    """
    recipe = part.recipe
    optimizer = optimizer_of(net, recipe)
    log: list[dict[str, float]] = []
    kept: Weights = {}
    saved = workshop.load()
    if saved is not None:
        kept = restore(net, optimizer, saved[0])
        log = saved[1]["log"]
    ended = part.enough(log, task)
    while len(log) < recipe.epochs and not ended:
        epoch, began = len(log), time.perf_counter()
        gens = part.generators(epoch, task.device)
        with _dropout_from(gens[0], net), drawing(net, Shared(gens[1])):
            facts = _epoch(net, task.train, optimizer, part, needs, gens, epoch)
        seconds = time.perf_counter() - began
        _check_finite(facts, part, epoch)
        facts |= part.checks(net, task)
        _check_finite(facts, part, epoch)
        log.append({"epoch": epoch + 1, "lr": recipe.rate(epoch + 0.5), **facts, "seconds": seconds})
        if part.keeps(log, task):
            kept = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            log[-1]["kept"] = epoch + 1
        elif kept:
            log[-1]["kept"] = log[-2]["kept"]
        ended = part.enough(log, task)
        workshop.save(checkpoint(net, optimizer, kept), {"log": log, "ended": ended})
        workshop.report(len(log), len(log) if ended else recipe.epochs, log[-1])
    if kept:
        net.load_state_dict(kept)
    net.eval()


def _check_finite(facts: dict[str, float], part: Trained, epoch: int) -> None:
    """Refuse to go on with numbers that are none."""
    broken = [name for name, value in facts.items() if not math.isfinite(value)]
    if broken:
        raise TrainingDiverged(
            f"{part.role} {part.member} (seed {part.seed}): {', '.join(broken)} is not finite in epoch {epoch + 1} of "
            f"{part.recipe.epochs} at learning rate {part.recipe.rate(epoch + 0.5):g}; "
            "lower recipe.lr or the defense's loss weights"
        )


def accuracy(net: nn.Module, images: Images, batch: int = 500) -> float:
    """Share of images that the network, in eval mode, decides rightly."""
    net.eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            rows = slice(start, start + batch)
            right += int((net(images.floats(rows)).argmax(-1) == images.labels[rows]).sum())
    return right / len(images)


def robust_accuracy(net: nn.Module, images: Images, attack: Attack, streams: Streams, batch: int = 250) -> float:
    """Share of images that the network, in eval mode, decides rightly under an attack; NaN if its answers are not finite."""
    net.eval()
    robust = 0
    for rows in torch.arange(len(images), device=images.pixels.device).split(batch):
        x = images.floats(rows)
        with torch.inference_mode():
            if not net(x).isfinite().all():  # the last step broke the weights: no attack can look at that
                return float("nan")
        robust += int((~attack(net, x, images.labels[rows], streams.take(rows)).broken).sum())
    return robust / len(images)


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Every layer in eval mode meanwhile: running statistics are used and stay. Each layer gets its own mode back."""
    training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _dropout_from(gen: torch.Generator, net: nn.Module) -> Iterator[None]:
    """Dropout layers draw from torch's global generator: seed it from ``gen`` meanwhile, and give it back as it was."""
    if not any(_draws(module) for module in net.modules()):
        yield
        return
    cuda = gen.device.type == "cuda"
    with torch.random.fork_rng(devices=[gen.device] if cuda else []):
        seed = int(torch.randint(2**62, (), generator=gen, device=gen.device))
        # torch.manual_seed would reseed every device, and only this one is given back as it was.
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(gen.device):
                torch.cuda.manual_seed(seed)
        yield


def _draws(module: nn.Module) -> bool:
    """Whether a layer draws numbers in training; torchvision's stochastic depth by its name, to spare the import."""
    return isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth"


def _epoch(  # noqa: PLR0913, PLR0917
    net: Classifier,
    images: Images,
    optimizer: torch.optim.Optimizer,
    part: Trained,
    needs: Sequence[Classifier],
    gens: tuple[torch.Generator, torch.Generator],
    epoch: int,
) -> dict[str, float]:
    """One pass; sums stay on the device, so the host waits once per epoch."""
    recipe, device, (gen, own) = part.recipe, images.pixels.device, gens
    partner = _partners(images, recipe, own)
    net.train()
    order = torch.randperm(len(images), generator=gen, device=device)
    # A last step of one image would give BatchNorm nothing to normalise over.
    steps = [rows for rows in order.split(recipe.batch) if len(rows) > 1]
    sums: dict[str, Tensor] = {}
    for number, rows in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(epoch + (number + 0.5) / len(steps))
        # Cropped as bytes, a quarter of the memory traffic of floats, and the same numbers.
        x = augment(images.pixels[rows], recipe.augment, gen).float().div_(255)
        seen = Batch(x, images.labels[rows], own, recipe.label_smoothing, epoch, partial(next, partner))
        parts = part.loss(net, seen, needs)
        total = torch.stack(list(parts.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        for name, value in {**parts, "loss": total}.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach()
    return {name: float(value / len(steps)) for name, value in sums.items()}


def _partners(images: Images, recipe: Recipe, gen: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of a second shuffle; nothing is drawn before somebody asks."""
    while True:
        order = torch.randperm(len(images), generator=gen, device=images.pixels.device)
        for rows in order.split(recipe.batch):
            if len(rows) > 1:
                yield augment(images.pixels[rows], recipe.augment, gen).float().div_(255), images.labels[rows]


def augment(x: Tensor, kind: str, gen: torch.Generator) -> Tensor:
    """Augment images (n c h w), bytes or floats, on their device: "none", or "crop_flip" (zero-pad by 4, random crop, flip).

    Raises:
        ValueError: for another kind.
    """
    if kind == "none":
        return x
    if kind != "crop_flip":
        raise ValueError(f"unknown augmentation {kind!r}; known are none, crop_flip")
    n, c, h, w = x.shape
    shift = torch.randint(0, 9, (2, n), generator=gen, device=x.device)
    flip = torch.randint(0, 2, (n, 1), generator=gen, device=x.device).bool()
    columns = torch.arange(w, device=x.device).expand(n, w)
    columns = torch.where(flip, w - 1 - columns, columns) + shift[1].unsqueeze(1)
    rows = torch.arange(h, device=x.device) + shift[0].unsqueeze(1)
    # One gather of flat positions is twice as fast as indexing by image, row and column.
    place = (rows.unsqueeze(2) * (w + 8) + columns.unsqueeze(1)).flatten(1)
    padded = F.pad(x, (4, 4, 4, 4)).flatten(2)
    return padded.gather(2, place.unsqueeze(1).expand(n, c, -1)).view(n, c, h, w)
