"""What a user asks for, in the words of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How something is to be run, whatever it is.

    Attributes:
        budget: smoke, quick or paper.
        seeds: training seeds; every one trains its own networks. Empty: those of a table.
        device: auto, cpu, cuda, cuda:1.
        data: folder of data sets; the environment variable BENCH_DATA by default.
        runs: folder of results.
        executor: local (this process, or one process a GPU where there are several) or ray.
        address: of a Ray cluster; of $RAY_ADDRESS by default, and else Ray is started on this machine.
        fresh: move stored results aside, never deleted, and compute them again: everything that a run asks for, and of a
            table what does not answer it.
    """

    budget: str = "quick"
    seeds: tuple[int, ...] = ()
    device: str = "auto"
    data: Path | None = None
    runs: Path = Path("runs")
    executor: str = "local"
    address: str | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        """Refuse seeds that are none.

        Raises:
            ValueError: names the smallest.
        """
        if min(self.seeds, default=0) < 0:
            raise ValueError(f"--seeds: training seeds are 0 or more, got {min(self.seeds)}")


@dataclass(frozen=True, kw_only=True)
class Request(Wish):
    """Defenses, a suite, and how to run them.

    Attributes:
        defense: "a,b", "all", "name@field=value", "./mine.py" or "./mine.py:name".
        suite: name of a suite, or the path of a TOML file.
        only: evaluations to run; all by default.
        shard: (i, k), do every k-th piece of work, from the i-th of 1 to k; :mod:`bench.merge` brings shards together.
    """

    defense: str
    suite: str
    seeds: tuple[int, ...] = (0,)
    only: tuple[str, ...] = ()
    shard: tuple[int, int] = (1, 1)
