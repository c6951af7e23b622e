"""Run folders that must be equal, whoever did the work, and an executor whose faults a test decides."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from test_plugins import SAMPLE

import bench.runner
from bench.executors import Answer, Desk, Setting, Token, Told, attempt
from bench.request import Request
from bench.runner import Run
from bench.store import Record

Fault = Callable[[int, Any, tuple[Any, ...]], Exception | None]
"""(number of the task, its function, its arguments) -> what befalls it instead of its end, or nothing."""


def contents(runs: Path) -> dict[str, Any]:
    """Every file of a run folder: records without what differs from run to run, and the bytes of everything else."""
    found: dict[str, Any] = {}
    for path in sorted(runs.rglob("*")):
        name = path.relative_to(runs).as_posix()
        if not path.is_file() or path.name in (".lock", "log.jsonl"):
            continue
        if path.suffix == ".json":
            told = json.loads(path.read_text())
            found[name] = {key: value for key, value in told.items() if key not in ("cost", "made", "log", "seconds", "error")}
        else:
            found[name] = path.read_bytes()
    return found


class Scripted:
    """Does tasks in this process, two in flight, the latest first; what travels is pickled as anywhere."""

    device, device_name, workers = "cpu", "cpu test", "scripted workers"

    def __init__(self, fault: Fault = lambda *task: None) -> None:
        self.fault = fault
        self.setting = Setting.here("cpu")
        self.things: dict[str, bytes] = {}
        self.waiting: list[tuple[int, Any, bytes]] = []
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []
        self.closed = False

    def places(self) -> int:
        return 2

    def room(self) -> int:
        return 2 - len(self.waiting)

    def put(self, value: Any) -> Token:
        token, thing = Token(), pickle.dumps(value)
        assert thing not in self.things.values(), "handed over once"
        self.things[token.key] = thing
        return token

    def forget(self, token: Token) -> None:
        del self.things[token.key]

    def submit(self, function: Any, *arguments: Any) -> int:
        self.seen.append((function, arguments))
        self.waiting.append((len(self.seen), function, pickle.dumps(arguments)))
        return len(self.seen)

    def events(self, seconds: float) -> list[tuple[int, Told | Answer]]:
        if not self.waiting:
            return []
        number, function, content = self.waiting.pop()
        arguments, told = pickle.loads(content), []
        answer = attempt(
            self.setting, Desk("cpu", lambda token: pickle.loads(self.things[token.key]), told.append), function, arguments
        )
        fault = self.fault(number, function, arguments)
        return [*((number, word) for word in told), (number, Answer(error=fault) if fault else answer)]

    def close(self) -> None:
        self.closed = True


def with_own_files(suite: Path, name: str, defenses: str) -> str:
    """Give a suite an attack, and the user a defense, of files that no installation holds; the defense as it is asked for."""
    (suite.parent / f"{name}.py").write_text(defenses)
    (suite.parent / f"light_of_{name}.py").write_text((SAMPLE / "bench_plugin_sample/attacks.py").read_text())
    attack = f'kind = "robust"\nattack = "own_{name}"\nnorm = "linf"\neps = ["0.1"]\nimages = 30\n'
    known = f'[attacks]\nown_{name} = "light_of_{name}.py:Brightness"\n'
    suite.write_text(f"{suite.read_text()}[evals.light]\n{attack}{known}")
    return str(suite.parent / f"{name}.py")


def elsewhere(executor: Any, monkeypatch: Any, **words: Any) -> list[Record]:
    """Do a request by an executor."""
    with monkeypatch.context() as patch:
        patch.setattr(bench.runner, "opened", lambda *asked: executor)
        run = Run(Request(**words))
    return run.execute()
