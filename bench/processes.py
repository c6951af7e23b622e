"""Workers as processes of this machine, one a GPU, each seeing its own alone; a lost one is started anew."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import torch

from bench import environment
from bench.executors import Answer, Desk, Lost, Setting, Token, Told, attempt
from bench.plugins import executed


def visible() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(place) for place in range(torch.cuda.device_count())]


@dataclass
class Worker:
    """A process, the line to it, the task that it is at, and what it was handed."""

    gpu: str | None
    process: subprocess.Popen[bytes]
    line: Connection
    task: int | None = None
    holds: set[str] = field(default_factory=set)


class Processes:
    """An :class:`bench.executors.Executor` of processes.

    Args:
        gpus: what each may see of the GPUs, as CUDA_VISIBLE_DEVICES names it; None for one that computes on the CPU.
    """

    def __init__(self, gpus: Sequence[str | None]) -> None:
        self.device = "cpu" if None in gpus else "cuda"
        self._setting = Setting.here(self.device)
        self._number = 0
        self._things: dict[str, bytes] = {}
        self._workers = [_start(gpu) for gpu in gpus]
        self.device_name = environment.device_name(self.device)

    @property
    def workers(self) -> str:
        count = len(self._workers)
        return f"{count} processes" + (", one a GPU" if self.device == "cuda" else "")

    def places(self) -> int:
        return len(self._workers)

    def room(self) -> int:
        return sum(worker.task is None for worker in self._workers)

    def put(self, value: Any) -> Token:
        token = Token()
        self._things[token.key] = pickle.dumps(value)
        return token

    def forget(self, token: Token) -> None:
        del self._things[token.key]

    def submit(self, function: Callable[..., Any], *arguments: Any) -> int:
        worker = next(worker for worker in self._workers if worker.task is None)
        self._number += 1
        worker.task = self._number
        gone = worker.holds - self._things.keys()
        new = {key: thing for key, thing in self._things.items() if key not in worker.holds}
        worker.holds = set(self._things)
        with suppress(OSError):  # it died while it was idle: its line is at an end, as events() will find
            worker.line.send_bytes(pickle.dumps((_files(), pickle.dumps((self._setting, function, arguments, new, gone)))))
        return self._number

    def events(self, seconds: float) -> list[tuple[int, Told | Answer]]:
        found: list[tuple[int, Told | Answer]] = []
        by_line = {worker.line: place for place, worker in enumerate(self._workers)}
        for line in wait(list(by_line), seconds):
            place = by_line[line]  # type: ignore[index]
            worker = self._workers[place]
            try:
                news = pickle.loads(worker.line.recv_bytes())
            except (EOFError, OSError):
                news = Answer(error=Lost(f"process {worker.process.pid} ended by {_ending(worker.process.wait())}"))
                self._workers[place] = _start(worker.gpu)
            if worker.task is not None:
                found.append((worker.task, news))
            if isinstance(news, Answer):
                worker.task = None
        return found

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
            worker.line.close()


def _start(gpu: str | None) -> Worker:
    ours, theirs = Pipe()
    descriptor = theirs.fileno()
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if gpu is not None:
        variables["CUDA_VISIBLE_DEVICES"] = gpu
    command = [sys.executable, "-m", "bench.processes", str(descriptor)]
    process = subprocess.Popen(command, env=variables, pass_fds=[descriptor], stdin=subprocess.DEVNULL)
    theirs.close()
    return Worker(gpu, process, ours)


def _ending(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"


def _files() -> list[str]:
    """Files of the user's defenses and attacks, which no installation holds."""
    return [str(module.__file__) for name, module in list(sys.modules.items()) if name.startswith("bench_file_")]


def serve(line: Connection) -> None:
    """Do tasks until the driver is gone. What is unpickled comes from it alone, over a line that nobody else holds."""
    files: set[str] = set()
    things: dict[str, Any] = {}

    def tell(told: Told) -> None:
        line.send_bytes(pickle.dumps(told))

    while True:
        try:
            own, message = pickle.loads(line.recv_bytes())
            for file in own:
                if file not in files:
                    files.add(file)
                    executed(Path(file))
            setting, function, arguments, new, gone = pickle.loads(message)
            for key in gone:
                del things[key]
            things.update({key: pickle.loads(thing) for key, thing in new.items()})
            desk = Desk(setting.device, lambda token: things[token.key], tell)
            line.send_bytes(pickle.dumps(attempt(setting, desk, function, arguments)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is the driver's to handle
    serve(Connection(int(sys.argv[1])))
