"""Work done elsewhere ends in the same files, and every fault on the way is survived or named."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from elsewhere import Scripted, contents, elsewhere, with_own_files
from test_runner import TWO

import bench.work
from bench import work
from bench.executors import Answer, ExecutorError, Lost, Setting, Told, opened
from bench.partial import StoreError
from bench.processes import Processes
from bench.request import Request
from bench.runner import Run
from bench.store import Record
from bench.suites import load_suite

THREE = "cear_rw@members=2,randsmooth,dverge@members=2"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A suite with a black-box attack, and the run folder of three defenses done in this process."""
    from conftest import TINY

    folder = tmp_path_factory.mktemp("here")
    suite = folder / "tiny.toml"
    black_box = (
        'kind = "black_box"\nattack = "pgd"\nnorm = "linf"\neps = ["0.1"]\nsteps = 2\nsources = ["randsmooth"]\nimages = 30\n'
    )
    suite.write_text(f"{TINY}[evals.black_box]\n{black_box}")
    Run(Request(defense=THREE, suite=str(suite), runs=folder / "runs", device="cpu")).execute()
    return suite, contents(folder / "runs")


def one(tiny: Path, executor: Any, monkeypatch: pytest.MonkeyPatch, **words: Any) -> list[Record]:
    return elsewhere(
        executor, monkeypatch, **{"defense": "randsmooth", "suite": str(tiny), "runs": tiny.parent / "runs", **words}
    )


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run folder of one defense done in this process."""
    from conftest import TINY

    folder = tmp_path_factory.mktemp("untouched")
    (folder / "tiny.toml").write_text(TINY)
    Run(Request(defense="randsmooth", suite=str(folder / "tiny.toml"), runs=folder / "runs", device="cpu")).execute()
    return contents(folder / "runs")


def test_work_elsewhere_ends_in_the_same_files(here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    suite, files = here
    executor = Scripted()
    records = elsewhere(executor, monkeypatch, defense=THREE, suite=str(suite), runs=tmp_path)
    assert [record.status for record in records].count("success") == len(records) - 1  # one has no noise of its own
    assert contents(tmp_path) == files
    assert {record.made["device"] for record in records} == {"cpu test"}
    assert all(("forward_milliseconds" in record.cost) == (record.eval["name"] == "clean") for record in records)
    trained = [arguments[1] for function, arguments in executor.seen if function is work.make_part]
    assert len(trained) == len({str(part) for part in trained}), "a part that defenses share is made once"
    assert not executor.things and executor.closed, "everything is let go of"


def test_runs_that_share_workers_see_their_own_data_and_leave_nothing(tiny: Path) -> None:
    """Of the second run no worker may take what it kept of the first."""
    other = tiny.with_name("other.toml")
    other.write_text(tiny.read_text().replace("train_images = 64", "train_images = 40").replace('"tiny"', '"other"'))
    workers = Scripted()
    for place in (tiny, other):
        words: dict[str, Any] = {"defense": "naive@members=2", "suite": str(place), "device": "cpu", "only": ("clean", "pgd")}
        Run(Request(**words, runs=tiny.parent / "away"), executor=workers).execute()
        Run(Request(**words, runs=tiny.parent / "here")).execute()
        assert not workers.things and not workers.closed
    assert contents(tiny.parent / "away") == contents(tiny.parent / "here")


@pytest.mark.parametrize("lost", ["make_part", "measure"])
def test_a_lost_worker_s_task_is_tried_again(lost: str, tiny: Path, untouched, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    done = []

    def fault(number: int, function: Any, arguments: Any) -> Exception | None:
        if function.__name__ == lost and len(done) < 2:
            done.append(number)
            return Lost("the node is gone")
        return None

    records = one(tiny, Scripted(fault), monkeypatch)
    assert len(done) == 2 and {record.status for record in records} == {"success"}
    assert contents(tiny.parent / "runs") == untouched


def test_a_task_that_ends_every_worker_is_given_up_and_the_others_go_on(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(number: int, function: Any, arguments: Any) -> Exception | None:
        return Lost("killed") if function is work.make_part and arguments[1].role == "gaussian" else None

    records = one(tiny, Scripted(fault), monkeypatch, defense="randsmooth,naive@members=2", only=("clean",))
    failed, fine = records
    assert (failed.status, fine.status) == ("error", "success")
    assert "gaussian 0 (seed 0): given up, its worker was lost again and again: killed" in str(failed.error)


def test_a_worker_that_runs_out_of_memory_gets_half_the_shard(tiny: Path, untouched, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def fault(number: int, function: Any, arguments: Any) -> Exception | None:
        big = function is work.measure and (arguments[5] or 100) > 8 and arguments[2].kind == "robust"
        return Lost("ended for lack of memory", memory=True) if big else None

    executor = Scripted(fault)
    one(tiny, executor, monkeypatch)
    sizes = [
        arguments[5] for function, arguments in executor.seen if function is work.measure and arguments[2].kind == "robust"
    ]
    assert sorted(sizes, key=str) == [15, 15, 7, 7, None, None]
    assert contents(tiny.parent / "runs") == untouched


def test_a_training_that_runs_out_of_memory_is_an_error_that_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(number: int, function: Any, arguments: Any) -> Exception | None:
        return Lost("the worker was ended for lack of memory", memory=True) if function is work.make_part else None

    (record,) = one(tiny, Scripted(fault), monkeypatch, only=("clean",))
    assert record.status == "error" and "lack of memory" in str(record.error)


def test_what_fails_on_a_worker_fails_what_needs_it_and_tells_where(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_text(tiny.read_text() + "[roles.teacher]\nlr = 1e30\n")
    defenses = "cear_rw@members=2,randsmooth"
    rw, plain = one(tiny, Scripted(), monkeypatch, defense=defenses, only=("clean",))
    assert (rw.status, plain.status) == ("error", "success")
    assert "TrainingDiverged: teacher 0" in str(rw.error) and "lower recipe.lr" in str(rw.error).splitlines()[-1]
    assert "in make_part" in str(rw.error), "the worker's traceback is kept"


def test_one_broken_model_does_not_spoil_what_is_measured_with_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tiny.parent / "two.py").write_text(TWO)
    records = one(tiny, Scripted(), monkeypatch, defense=str(tiny.parent / "two.py"), only=("certified",))
    assert {r.defense["name"]: r.status for r in records} == {"sound": "success", "broken": "error", "louder": "success"}


def test_a_lost_training_goes_on_from_the_checkpoint_that_the_driver_keeps(tiny: Path, untouched, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(bench.work, "CHECKPOINT", 0.0)
    executor = Scripted(lambda number, function, arguments: Lost("killed") if number == 1 else None)
    one(tiny, executor, monkeypatch, only=("clean",))
    first, again = [arguments[3] for function, arguments in executor.seen if function is work.make_part]
    assert first is None and again
    (weights,) = (tiny.parent / "runs").rglob("*.safetensors")
    assert weights.read_bytes() == untouched[weights.relative_to(tiny.parent / "runs").as_posix()]
    assert not list((tiny.parent / "runs").rglob("*.checkpoint"))


def test_a_driver_that_is_killed_goes_on_with_what_it_has(tiny: Path, untouched, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    class Ended(BaseException):
        """As abrupt as a kill: nothing of the driver runs after it but the release of the lock."""

    def fault(number: int, function: Any, arguments: Any) -> Exception | None:
        if number == 4:
            raise Ended
        return None

    with pytest.raises(Ended):
        one(tiny, Scripted(fault), monkeypatch)
    before = len(list((tiny.parent / "runs").rglob("*.parquet")))
    assert before > 0
    again = Scripted()
    one(tiny, again, monkeypatch)
    assert all(function is work.measure for function, _ in again.seen), "the trained network is kept"
    assert contents(tiny.parent / "runs") == untouched


def test_a_damaged_network_is_moved_aside_and_made_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one(tiny, Scripted(), monkeypatch, only=("clean",))
    (weights,) = (tiny.parent / "runs").rglob("*.safetensors")
    sound = weights.read_bytes()
    weights.write_bytes(sound[:50])
    executor = Scripted()
    one(tiny, executor, monkeypatch, only=("pgd",))
    assert [function for function, _ in executor.seen].count(work.make_part) == 1
    assert weights.read_bytes() == sound and weights.with_name(f"{weights.name}.corrupt").exists()


def test_a_full_disk_of_the_driver_ends_the_run_and_keeps_what_was_finished(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one(tiny, Scripted(), monkeypatch, only=("clean",))

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StoreError, match=r"No space left on device.*finished is kept"):
        patch.setattr("bench.partial.os.fsync", full)
        one(tiny, Scripted(), monkeypatch)
    assert {record.status for record in one(tiny, Scripted(), monkeypatch)} == {"success"}


def test_a_full_disk_of_a_worker_is_an_error_of_what_it_did(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **words: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bench.work.AwayStore.get", full)
    (record,) = one(tiny, Scripted(), monkeypatch, only=("clean",))
    assert record.status == "error" and "OSError: [Errno 28] No space left on device" in str(record.error)


def test_a_worker_with_other_versions_is_refused_with_both(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = Scripted()
    versions = {**executor.setting.versions, "torch": "1.2.3"}
    executor.setting = Setting(versions, "cpu", 1)
    with pytest.raises(ExecutorError, match=rf"torch is '1.2.3' here and '{Setting.here('cpu').versions['torch']}' there"):
        one(tiny, executor, monkeypatch)
    assert executor.closed and not list((tiny.parent / "runs").rglob("*.safetensors"))


class Murdered(Processes):
    """Two processes, of which the first is killed when it first says how far it is, as if its memory had run out."""

    killed = 0

    def events(self, seconds: float) -> list[tuple[int, Told | Answer]]:
        found = super().events(seconds)
        for worker in self._workers:
            if not self.killed and any(isinstance(news, Told) and worker.task == number for number, news in found):
                self.killed = worker.process.pid
                os.kill(worker.process.pid, signal.SIGKILL)
        return found


def test_a_process_that_is_killed_in_the_middle_is_replaced(tiny: Path, untouched, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    defense = f"randsmooth,{with_own_files(tiny, 'two_by_processes', TWO)}:sound"
    load_suite(tiny)  # as a run does before it opens its executor: the attack is known by then
    executor = Murdered([None, None])
    records = one(tiny, executor, monkeypatch, defense=defense)
    assert [record.eval["name"] for record in records].count("light") == 2
    assert executor.killed and {record.status for record in records} == {"success"}
    found = contents(tiny.parent / "runs")
    assert {name: found[name] for name in untouched} == untouched
    assert all(worker.process.poll() is not None for worker in executor._workers), "no process is left"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rey", None, "cpu"), "did you mean 'ray'"),
        (("local", "auto", "cpu"), "give --executor ray, too"),
    ],
)
def test_an_executor_that_cannot_be_is_refused(words: tuple[str, str | None, str], message: str) -> None:
    with pytest.raises(ExecutorError, match=message):
        opened(*words)


def test_without_ray_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    monkeypatch.delitem(__import__("sys").modules, "bench.cluster", raising=False)
    with pytest.raises(ExecutorError, match=r"pip install 'cear-bench\[ray\]'"):
        opened("ray", None, "auto")
