"""Workers of a Ray cluster: data and models go into its object store once, results come back to the driver."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bench import environment
from bench.executors import Answer, Desk, ExecutorError, Lost, Setting, Token, Told, attempt, mismatch

AHEAD = 1.25
"""Tasks in flight for each that can run: a worker finds the next one waiting, and the queue stays short."""

PATIENCE = 120.0
"""Seconds that a cluster may be without any worker that could do the tasks."""

TELL = 0.5
"""Seconds between two words of one task, but for checkpoints."""


class Inbox:
    """An actor that keeps what tasks say until the driver asks."""

    def __init__(self) -> None:
        self._news: list[tuple[int, Told]] = []

    def tell(self, number: int, told: Told) -> None:
        """Leave a word."""
        self._news.append((number, told))

    def take(self) -> list[tuple[int, Told]]:
        """Everything since the last time."""
        news, self._news = self._news, []
        return news


def task(setting: Setting, inbox: Any, number: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Answer:
    """Do a task in a worker of the cluster."""
    last = 0.0

    def tell(told: Told) -> None:
        nonlocal last
        if told.checkpoint is not None or time.monotonic() - last >= TELL:
            last = last if told.checkpoint is not None else time.monotonic()
            inbox.tell.remote(number, told)

    return attempt(setting, Desk(setting.device, lambda token: ray.get(token.value), tell), function, arguments)


def survey(setting: Setting) -> tuple[ExecutorError | None, str]:
    """What a node is: why it cannot take part, and what its device calls itself."""
    name = environment.device_name(setting.device) if setting.device == "cpu" or torch.cuda.is_available() else "no CUDA device"
    return mismatch(setting, f"node {environment.host()} ({ray.util.get_node_ip_address()})"), name


class Cluster:
    """An :class:`bench.executors.Executor` on Ray.

    Args:
        address: of a cluster, "auto" for the one of this machine; of $RAY_ADDRESS by default, and else Ray is started here.
        device: auto, cpu or cuda.

    Raises:
        ExecutorError: if there is no cluster, it lacks the device, or a node has other versions than this one.
    """

    def __init__(self, address: str | None, device: str) -> None:
        if device not in ("auto", "cpu", "cuda"):
            raise ExecutorError(f"--device {device}: Ray chooses which one a task gets; allowed are auto, cpu, cuda")
        self._number = 0
        self._running: dict[Any, int] = {}
        self._ours = not ray.is_initialized()
        if self._ours:
            _connect(address)
        try:
            have = ray.cluster_resources()
            self.device = ("cuda" if have.get("GPU") else "cpu") if device == "auto" else device
            self._setting = Setting.here(self.device)
            self._needs = {"num_cpus": self._setting.threads, "num_gpus": 1 if self.device == "cuda" else 0}
            self._refuse(have)
            self.device_name = self._survey()
        except BaseException:
            self.close()
            raise
        self._slots, self._counted, self._empty = 0, -PATIENCE, time.monotonic()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._inbox = ray.remote(Inbox).options(num_cpus=0, scheduling_strategy=here).remote()
        # Retries are the driver's: it goes on from checkpoints, and halves what was ended for lack of memory.
        self._task = ray.remote(max_retries=0, max_calls=0, **self._needs)(task)

    @property
    def workers(self) -> str:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        return f"{len(nodes)} Ray nodes ({self.places()} tasks at a time, {self.device})"

    def _refuse(self, have: dict[str, float]) -> None:
        """Refuse a cluster on which no task could ever run."""
        if self.places():
            return
        wanted = f"{self._needs['num_cpus']} CPU" + (" and 1 GPU" if self.device == "cuda" else "")
        there = ", ".join(f"{have.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
        raise ExecutorError(
            f"a task needs {wanted} on one node; this cluster has {there} on {len(ray.nodes())} nodes"
            + ("; use --device cpu, or add a node with a GPU" if self.device == "cuda" else "; lower OMP_NUM_THREADS")
        )

    def places(self) -> int:
        cpus, gpus = self._needs["num_cpus"], self._needs["num_gpus"]
        found = 0
        for node in ray.nodes():
            if node["Alive"]:
                places = int(node["Resources"].get("CPU", 0) // cpus)
                found += min(places, int(node["Resources"].get("GPU", 0))) if gpus else places
        return found

    def _survey(self) -> str:
        """Ask every node that would work for its versions; what their devices call themselves."""
        _carry()
        ask = ray.remote(survey)
        kind = "GPU" if self.device == "cuda" else "CPU"
        answers = [
            ask.options(
                num_cpus=0,
                num_gpus=0.01 if kind == "GPU" else 0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(self._setting)
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get(kind)
        ]
        try:
            found = ray.get(answers)
        except RayTaskError as error:
            text = str(error.cause or error).strip().splitlines()[-1]
            raise ExecutorError(f"a node cannot take part: {text}; install the same cear-bench on all nodes") from error
        for refusal, _ in found:
            if refusal:
                raise refusal
        return ", ".join(sorted({name for _, name in found}))

    def room(self) -> int:
        now = time.monotonic()
        if now - self._counted > 5:
            self._slots, self._counted = self.places(), now
            if self._slots:
                self._empty = now
            elif now - self._empty > PATIENCE:
                raise ConnectionError(
                    f"for {PATIENCE:.0f} s no node of the cluster could do a task; everything finished is kept"
                )
        return int(self._slots * AHEAD + 0.5) - len(self._running)

    def put(self, value: Any) -> Token:
        return Token(ray.put(value))

    def forget(self, token: Token) -> None:
        """Nothing to do: the store lets go of what no token holds."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> int:
        _carry()
        self._number += 1
        self._running[self._task.remote(self._setting, self._inbox, self._number, function, arguments)] = self._number
        return self._number

    def events(self, seconds: float) -> list[tuple[int, Told | Answer]]:
        ready: list[Any] = []
        if not self._running:
            time.sleep(seconds)  # nodes may come back
        else:
            ray.wait(list(self._running), timeout=seconds)  # until the first is done, then all that are
            ready, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return [*self._told(), *((self._running.pop(reference), _answer(reference)) for reference in ready)]

    def _told(self) -> list[tuple[int, Told]]:
        try:
            news: list[tuple[int, Told]] = ray.get(self._inbox.take.remote())
            return news
        except RayError:  # words of progress are worth no failure
            return []

    def close(self) -> None:
        for reference in self._running:
            ray.cancel(reference, force=True)
        if self._ours:
            ray.shutdown()


def _answer(reference: Any) -> Answer:
    try:
        answer: Answer = ray.get(reference)
        return answer
    except OutOfMemoryError:
        return Answer(error=Lost("the worker was ended for lack of memory", memory=True))
    except RayTaskError as error:  # before the task began, since it catches what happens later
        return Answer(error=RuntimeError(f"the task could not be read on its node: {error}"))
    except RayError as error:
        return Answer(error=Lost(f"the worker is gone ({type(error).__name__})"))


def _carry() -> None:
    """Let modules of the user's files travel as a whole: no node has them."""
    for name, module in list(sys.modules.items()):
        if name.startswith("bench_file_"):
            ray.cloudpickle.register_pickle_by_value(module)


def _connect(address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    _reach(address)
    try:
        ray.init(address=address, include_dashboard=None if address else False, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        told = str(error).strip().splitlines()[0]
        raise ExecutorError(f"--address {address}: there is no Ray cluster ({told}); `ray start --head` begins one") from None


def _reach(address: str | None) -> None:
    """Refuse HOST:PORT where nobody listens; Ray itself would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            told = f"nobody answers there ({error}); `ray start --head` begins a cluster"
            raise ExecutorError(f"--address {address}: {told}") from None
