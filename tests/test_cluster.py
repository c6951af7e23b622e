"""Runs on a Ray cluster: the same files as here, whatever dies; a cluster that cannot do the work is refused by what it has."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from elsewhere import contents, with_own_files
from test_runner import TWO

from bench.executors import ExecutorError, opened
from bench.request import Request
from bench.runner import Run

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'cear-bench[ray]'")

import psutil  # noqa: E402 (Ray brings it)
from ray.cluster_utils import Cluster  # noqa: E402

ROOT = Path(__file__).parent.parent

FIVE = "cear_rw@members=2,sween@members=2,randsmooth,adp@members=2,dverge@members=2"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A cluster of one node with one CPU; tests add more. Nodes find this checkout."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args=node(1))
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def node(cpus: int, **more: Any) -> dict[str, Any]:
    """Arguments of a node that is small in memory."""
    return {"num_cpus": cpus, "object_store_memory": 100 * 2**20, "include_dashboard": False, **more}


def workers() -> list[int]:
    """Processes that are at a task, among those that descend from this one."""
    here = psutil.Process().children(recursive=True)
    return [one.pid for one in here if one.is_running() and "ray::task" in " ".join(one.cmdline())]


def when(there: Callable[[], Any], act: Callable[[Any], None]) -> threading.Thread:
    """Act on the first thing that is there, meanwhile."""

    def watch() -> None:
        until = time.monotonic() + 240
        while time.monotonic() < until:
            if found := there():
                act(found)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_run_on_ray_ends_in_the_same_files(nodes: Cluster, tiny: Path) -> None:
    words: dict[str, Any] = {"defense": f"randsmooth,{with_own_files(tiny, 'two_by_ray', TWO)}:sound", "suite": str(tiny)}
    away = Run(Request(**words, runs=tiny.parent / "away", executor="ray", address=nodes.address))
    assert {record.status for record in away.execute()} == {"success"}
    Run(Request(**words, runs=tiny.parent / "here", device="cpu")).execute()
    assert contents(tiny.parent / "away") == contents(tiny.parent / "here")


def test_a_cluster_without_the_gpu_is_refused_with_what_is_there(nodes: Cluster) -> None:
    with pytest.raises(ExecutorError, match=r"a task needs 1 CPU and 1 GPU on one node; this cluster has 1 CPU, 0 GPU"):
        opened("ray", nodes.address, "cuda")
    with pytest.raises(ExecutorError, match="Ray chooses which one"):
        opened("ray", nodes.address, "cuda:1")


def test_a_node_with_other_versions_is_refused_with_both(
    nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = tmp_path / "scipy-0.0.1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: scipy\nVersion: 0.0.1\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    other = nodes.add_node(**node(1))
    try:
        with pytest.raises(ExecutorError, match=r"cannot take part.*scipy is '1\.\S+' here and '0\.0\.1' there"):
            opened("ray", nodes.address, "cpu")
    finally:
        nodes.remove_node(other)


def test_no_cluster_at_an_address_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExecutorError, match="nobody answers there"):
        opened("ray", "127.0.0.1:1", "cpu")


@pytest.mark.slow  # two minutes on two cores
def test_five_defenses_on_two_nodes_while_a_worker_and_a_node_are_killed(nodes: Cluster, tmp_path: Path) -> None:
    second = nodes.add_node(**node(1))
    words: dict[str, Any] = {"defense": FIVE, "suite": "digits", "budget": "smoke", "only": ("clean", "pgd", "certified")}
    away = Run(Request(**words, runs=tmp_path / "away", executor="ray", address=nodes.address))
    died: list[Any] = []

    def kill_worker(pids: list[int]) -> None:
        os.kill(pids[0], signal.SIGKILL)
        died.append(pids[0])

    def kill_node(pieces: list[Path]) -> None:
        nodes.remove_node(second, allow_graceful=False)
        died.append(second)

    first = when(workers, kill_worker)
    then = when(lambda: list((tmp_path / "away").rglob("*.partial/*.parquet")), kill_node)
    records = away.execute()
    first.join(), then.join()
    assert len(died) == 2, "a worker and a node must die for the test to mean anything"
    assert {record.status for record in records} == {"success", "skipped"}
    Run(Request(**words, runs=tmp_path / "here", device="cpu")).execute()
    assert contents(tmp_path / "away") == contents(tmp_path / "here")


@pytest.mark.slow  # a minute on two cores
def test_a_driver_that_is_killed_and_started_again_ends_the_same(nodes: Cluster, tiny: Path) -> None:
    words = ["--defense", "randsmooth", "--suite", str(tiny), "--executor", "ray", "--address", nodes.address]
    command = [sys.executable, "-c", "from bench.cli import main; main()", "run", *words, "--runs", str(tiny.parent / "away")]
    first = subprocess.Popen(command, cwd=tiny.parent)
    when(lambda: list((tiny.parent / "away").rglob("*.partial/*.parquet")), lambda found: first.kill()).join()
    assert first.wait() == -signal.SIGKILL, "the driver must die for the test to mean anything"
    assert subprocess.run(command, cwd=tiny.parent, check=False).returncode == 0
    shutil.rmtree(tiny.parent / "away/tiny/plots")
    Run(Request(defense="randsmooth", suite=str(tiny), runs=tiny.parent / "here", device="cpu")).execute()
    assert contents(tiny.parent / "away") == contents(tiny.parent / "here")
