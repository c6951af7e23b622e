"""With what a number was made: code, versions, device; and `bench doctor`, which looks at an installation."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("cear-bench", "torch", "torchvision", "numpy", "scipy", "pandas")
HERE = Path(__file__).parent


class DeviceError(ValueError):
    """A device that is not there."""


def steady_sums() -> None:
    """Ask MKL to round a row of a matrix product in the same way however many rows there are; it listens before its first one.

    Without that, logits of up to 15 images (AVX-512; AVX2: 68) differ from those of the same images in a larger batch. MKL has
    this mode for Intel's processors alone. What is set in MKL_CBWR stays.
    """
    if intel():
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


@cache
def intel() -> bool:
    """Whether this is a processor of Intel."""
    facts = Path("/proc/cpuinfo")
    return "GenuineIntel" in (facts.read_text() if facts.exists() else platform.processor())


def one_thread() -> None:
    """Let torch use one thread, unless OMP_NUM_THREADS says how many.

    Small networks gain little from threads, and lose tenfold where the cores are busy.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


@contextmanager
def measuring() -> Iterator[None]:
    """The arithmetic that numbers are made with.

    float32 means float32: cuDNN would round to TF32 by itself, and choose kernels by timing.
    """
    import torch

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def device(name: str = "auto") -> str:
    """The torch device for "auto", "cpu", "cuda" or "cuda:1".

    Raises:
        DeviceError: if it does not exist.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if count else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise DeviceError(f"unknown device {name!r}; allowed are auto, cpu, cuda, cuda:0, ...")
    if kind == "cuda" and int(index or 0) >= count:
        found = f"{count} CUDA device(s)" if count else "no CUDA device"
        raise DeviceError(f"device {name!r} asked for, but torch sees {found}; use --device cpu or auto")
    return name


@cache
def versions() -> dict[str, str]:
    """Installed versions of what decides numbers, and of Python."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@cache
def code() -> dict[str, Any]:
    """Commit of the checkout that runs, and whether tracked files differ from it; empty outside a checkout."""
    try:
        top = _git("rev-parse", "--show-toplevel")
        if Path(top).resolve() != HERE.parent.resolve():
            return {}
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


@cache
def source() -> str:
    """Digest of this project's code as it is installed here; development versions have the same number and other code."""
    digest = hashlib.sha256()
    for package in ("attacks", "bench", "defenses"):
        for path in sorted((HERE.parent / package).rglob("*.py")):
            digest.update(path.relative_to(HERE.parent).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def host() -> str:
    """What this machine calls itself."""
    return platform.node() or "a machine without a name"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def device_name(device: str) -> str:
    """What the device calls itself."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.machine()}"


def doctor(data: Path | None, runs: Path) -> list[tuple[str, bool, str]]:
    """Checks of an installation: (what, whether it is well, detail)."""
    import torch

    from bench.data import DATASETS, DataError, load
    from bench.registry import RegistryError, registered

    checks = [(name, value != "not installed", value) for name, value in versions().items()]
    cuda = torch.cuda.is_available()
    checks.append(("cuda", True, torch.cuda.get_device_name() if cuda else "no CUDA device; the CPU is used"))
    checks.append(("threads", True, f"{torch.get_num_threads()} of {os.cpu_count()} cores"))
    for name in DATASETS:
        try:
            images = load(name, "test", data=data, download=False)
            checks.append((f"data {name}", True, f"{len(images)} test images, {images.source}"))
        except DataError as error:
            checks.append((f"data {name}", True, f"not at hand: {str(error)[:120]}"))
    try:
        checks.append(("defenses", True, f"{len(registered())} registered"))
    except RegistryError as error:
        checks.append(("defenses", False, str(error)))
    else:
        checks += _plugins()
    place = next(folder for folder in (runs, *runs.absolute().parents) if folder.exists())
    checks.append(("runs folder", os.access(place, os.W_OK), str(runs)))
    return checks


def _plugins() -> list[tuple[str, bool, str]]:
    """What every installed plug-in brings, and what is wrong with plug-ins."""
    from bench import plugins, registry, suites

    brought: dict[str, list[str]] = {}
    for some in (registry.plugged(), plugins.attack_offers(), suites.plugged()):
        for offer in some.values():
            brought.setdefault(offer.origin, []).append(offer.name)
    told = "; ".join(f"{origin}: {', '.join(names)}" for origin, names in sorted(brought.items()))
    return [("plug-ins", True, told or "none"), *(("plug-ins", False, text) for text in registry.problems())]
