"""Where the work of a run is done: in this process, in one process a GPU, or on a Ray cluster; what these have in common."""

from __future__ import annotations

import pickle
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import torch

from attacks import Attack
from bench import environment, plugins
from bench.jobs import storage_failed
from bench.partial import differences
from bench.suites import unknown

EXECUTORS = ("local", "ray")

LOSSES = 3
"""How often a task is tried again after its worker was lost."""


class ExecutorError(ValueError):
    """An executor that cannot be used as asked; says what is there, and what to do."""


class Lost(RuntimeError):
    """The worker of a task is gone.

    Attributes:
        memory: whether it was ended for lack of memory.
    """

    def __init__(self, message: str, memory: bool = False) -> None:
        super().__init__(message)
        self.memory = memory


@dataclass(frozen=True)
class Setting:
    """What must be the same wherever a task is done.

    Attributes:
        versions: of what decides numbers.
        device: "cpu" or "cuda".
        threads: of torch on the CPU, which may change the order of sums.
        attacks: of the user's files, by name.
    """

    versions: dict[str, str]
    device: str
    threads: int
    attacks: Mapping[str, tuple[type[Attack], Path]] = field(default_factory=dict)

    @classmethod
    def here(cls, device: str) -> Setting:
        """As in this process."""
        return cls(packages(), device, torch.get_num_threads(), plugins.attacks_of_files())


@cache
def packages() -> dict[str, str]:
    """Versions of packages, plug-ins among them, and a digest of this project's own code."""
    return {**environment.versions(), **plugins.installed(), "cear-bench's code": environment.source()}


def mismatch(setting: Setting, place: str) -> ExecutorError | None:
    """The refusal of a worker whose packages differ from the driver's; None if they agree."""
    wrong = differences(setting.versions, packages()).replace(" was ", " is ").replace(", now ", " here and ")
    if not wrong:
        return None
    return ExecutorError(
        f"{place} cannot take part, its numbers could differ: {wrong} there; install the same versions on all nodes"
    )


@dataclass(frozen=True)
class Token:
    """Stands for something that was put where all workers can get it; no two have the same key, whatever the executor."""

    value: Any = field(default=None, compare=False)
    key: str = field(default_factory=lambda: uuid4().hex)


@dataclass(frozen=True)
class Told:
    """What a task says while it goes on: how far it is, or a checkpoint to keep."""

    done: int = 0
    total: int = 0
    facts: dict[str, float] = field(default_factory=dict)
    checkpoint: bytes | None = None


@dataclass(frozen=True)
class Answer:
    """How a task ended: with a value, or an error."""

    value: Any = None
    error: Exception | None = None


class Executor(Protocol):
    """Does tasks elsewhere. A task is a function of a module, called with a :class:`Desk` and its arguments; both travel.

    Attributes:
        device: where tasks compute, "cpu" or "cuda".
        device_name: what the devices call themselves.
    """

    device: str
    device_name: str

    @property
    def workers(self) -> str:
        """Who does the work, in words."""

    def places(self) -> int:
        """How many tasks run at a time."""

    def room(self) -> int:
        """How many more tasks it takes now; those in flight are bounded.

        Raises:
            ExecutorError: if no worker is left and none came back.
        """

    def put(self, value: Any) -> Token:
        """Hand something over once for all tasks."""

    def forget(self, token: Token) -> None:
        """Nobody needs this any more."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> int:
        """Begin a task; its number."""

    def events(self, seconds: float) -> list[tuple[int, Told | Answer]]:
        """What happened, by the task's number; waits at most so long."""

    def close(self) -> None:
        """End all tasks."""


class Desk:
    """A worker's place: its device, an empty folder, what it was handed, and a line to the driver.

    Args:
        device: where to compute.
        get: the thing behind a token.
        tell: says something to the driver.
    """

    _kept: dict[tuple[str, str], Any] = {}  # noqa: RUF012 (of the process: tasks that follow each other need the same)

    def __init__(self, device: str, get: Callable[[Token], Any], tell: Callable[[Told], None]) -> None:
        self.device = device
        self.tell = tell
        self._get = get
        self._room = tempfile.TemporaryDirectory(prefix="bench-")
        self.folder = Path(self._room.name)
        self._used: dict[tuple[str, str], Any] = {}

    def fetch(self, token: Token, move: Callable[[Any], Any] = lambda thing: thing) -> Any:
        """What a token stands for, moved to the device once and kept as long as every task asks for it."""
        place = (token.key, self.device)
        if place not in self._used:
            self._used[place] = Desk._kept[place] if place in Desk._kept else move(self._get(token))
        return self._used[place]

    def leave(self) -> None:
        """Keep only what was used, and remove the folder."""
        Desk._kept = self._used
        self._room.cleanup()


def attempt(setting: Setting, desk: Desk, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Answer:
    """Do a task in this process, under the setting; whatever goes wrong is the answer."""
    refusal = mismatch(setting, environment.host())
    if refusal:
        return Answer(error=refusal)
    try:
        plugins.adopt(setting.attacks)
        torch.set_num_threads(setting.threads)
        with environment.measuring():
            return Answer(function(desk, *arguments))
    except Exception as error:
        return Answer(error=portable(error))
    finally:
        desk.leave()


def portable(error: Exception) -> Exception:
    """The error as it can travel, with where it happened as a note."""
    told = "".join(traceback.format_exception(error)).rstrip()
    plain = RuntimeError(f"{type(error).__name__}: {error}")
    try:
        # A worker's full disk is not that of the run folder, which ends the run.
        found: Exception = plain if storage_failed(error) else pickle.loads(pickle.dumps(error))
    except Exception:  # of a class that wants other arguments, or holds what cannot travel
        found = plain
    found.add_note(f"on {environment.host()}:\n{told}")
    return found


def opened(name: str, address: str | None, device: str) -> Executor | None:
    """The executor of a request; None for work in this process.

    Args:
        name: of :data:`EXECUTORS`.
        address: of a Ray cluster.
        device: as the user gave it.

    Raises:
        ExecutorError: for an unknown name, an address without Ray, or workers that are not as asked for.
    """
    if name not in EXECUTORS:
        raise ExecutorError(f"--executor: {unknown(name, EXECUTORS)}")
    if name == "ray":
        try:
            from bench.cluster import Cluster
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise ExecutorError("--executor ray needs Ray, which is not installed: pip install 'cear-bench[ray]'") from None
        return Cluster(address, device)
    if address:
        raise ExecutorError(f"--address {address} is of a Ray cluster; give --executor ray, too")
    if environment.device(device) == "cuda" and torch.cuda.device_count() > 1:
        from bench.processes import Processes, visible

        return Processes(visible())
    return None
