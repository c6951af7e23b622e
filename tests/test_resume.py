"""A run that is killed anywhere goes on and ends with the records of a run that was never killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import sklearn.datasets  # noqa: F401 (children are forked: what is imported here is not imported twenty times there)

import bench.evals
import bench.evals.certified
import bench.store
import defenses.cear
import defenses.training
from bench.request import Request
from bench.runner import Run


def execute(suite: Path, runs: Path) -> None:
    Run(Request(defense="cear_rw@members=2", suite=str(suite), runs=runs, device="cpu")).execute()


def in_a_process(work: Callable[[], None]) -> int:
    """Exit status, or minus the signal, of a forked child that does the work."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # the child must never return into pytest
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(owner: Any, name: str, call: int) -> None:
    """Kill this process, as kill -9 does, when ``owner.name`` is entered for the ``call``-th time."""
    original, seen = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def results(runs: Path) -> dict[str, Any]:
    """Every record without timings, and every row per image."""
    found: dict[str, Any] = {}
    for path in sorted(runs.glob("tiny/*/*/seed*/*")):
        if path.suffix == ".json":
            record = json.loads(path.read_text())
            del record["cost"], record["made"]
            found[path.name] = record
        elif path.suffix == ".parquet":
            found[path.name] = pd.read_parquet(path).to_dict("list")
        else:
            found[path.name] = "left over"
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from conftest import TINY

    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "tiny.toml").write_text(TINY)
    assert in_a_process(lambda: execute(folder / "tiny.toml", folder)) == 0
    found = results(folder)
    assert {name for name in found if name.endswith(".json")} == {"clean.json", "pgd.json", "certified.json"}
    assert all(found[name]["status"] == "success" for name in found if name.endswith(".json"))
    return found


POINTS = {
    "training: first epoch of the teacher": (defenses.training, "accuracy", 1),
    "training: second epoch of a student": (defenses.training, "accuracy", 4),
    "training: while the robust weights are measured": (defenses.cear, "certify", 2),
    "attack: first budget": (bench.evals.Robust, "measure", 1),
    "attack: second budget, the first is on disk": (bench.evals.Robust, "measure", 2),
    "certification: first piece": (bench.evals.Certified, "measure", 1),
    "certification: second piece": (bench.evals.Certified, "measure", 2),
    "certification: inside the last piece": (bench.evals.certified, "certify_together", 3),
    "write: before a checkpoint is synced": (os, "fsync", 3),
    "write: before a record is renamed": (os, "replace", 14),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on_and_ends_the_same(point: str, tiny: Path, undisturbed: dict[str, Any]) -> None:
    runs = tiny.parent / "runs"

    def killed() -> None:
        die_at(*POINTS[point])
        execute(tiny, runs)

    assert in_a_process(killed) == -signal.SIGKILL, "the run must die at this point for the test to mean anything"
    assert results(runs) != undisturbed
    assert in_a_process(lambda: execute(tiny, runs)) == 0
    found = results(runs)
    temporary = {name for name in found if name.startswith(".")}
    assert {name: found[name] for name in found if name not in temporary} == undisturbed


def test_a_continued_run_keeps_what_was_finished(tiny: Path) -> None:
    runs = tiny.parent / "runs"

    def killed() -> None:
        die_at(bench.evals.Certified, "measure", 3)
        execute(tiny, runs)

    in_a_process(killed)
    times = {path: path.stat().st_mtime_ns for path in runs.glob("tiny/parts/*.safetensors")}
    pieces = sorted(runs.glob("tiny/*/*/seed0/certified.partial/*.parquet"))
    assert len(times) == 4  # teacher, two students, weights
    assert len(pieces) == 2

    def counting() -> None:
        die_at(bench.evals.Certified, "measure", 2)  # only the third piece is left to compute
        execute(tiny, runs)

    assert in_a_process(counting) == 0
    assert times == {path: path.stat().st_mtime_ns for path in runs.glob("tiny/parts/*.safetensors")}
