"""The runner: what it stores, shares, refuses and survives."""

from __future__ import annotations

import errno
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import bench.store
from bench.evals import Robust
from bench.locks import locked
from bench.partial import StoreError
from bench.request import Request
from bench.runner import Run, run
from bench.store import Store
from bench.suites import SuiteError
from defenses.nets import network


def request(tiny: Path, **changes: Any) -> Request:
    fields = {"defense": "randsmooth", "suite": str(tiny), "runs": tiny.parent / "runs", "device": "cpu", **changes}
    return Request(**fields)


def test_a_run_stores_a_record_and_rows_for_every_evaluation(tiny: Path) -> None:
    records = Run(request(tiny)).execute()
    assert [record.status for record in records] == ["success"] * 3
    store = Store(tiny.parent / "runs")
    for record in records:
        rows = store.rows(record)
        assert set(rows.id) and record.hashes["weights"].startswith("sha256:")
        assert record.hashes["data"] == "digits scikit-learn"
        assert torch.__version__.startswith(record.made["versions"]["torch"])
        assert record.task["recipe"]["epochs"] == 2
    clean = store.rows(records[0])
    value = next(m.value for m in records[0].metrics if m.metric == "clean_accuracy")
    assert value == (clean.label == clean.prediction).mean()


def test_a_record_tells_what_the_defense_costs(tiny: Path) -> None:
    job = Run(request(tiny))
    clean, pgd, _ = job.execute()
    parameters = sum(own.numel() for own in network(job.task).parameters())
    assert clean.cost["parameters"] == pgd.cost["parameters"] == parameters > 10_000
    assert clean.cost["forward_milliseconds"] > 0 and "forward_milliseconds" not in pgd.cost


def test_a_second_run_computes_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Run(request(tiny)).execute()
    monkeypatch.setattr(Robust, "measure", lambda *args: pytest.fail("computed again"))
    assert Run(request(tiny)).execute() == first


def test_the_teacher_and_each_student_are_trained_once_for_all_variants(tiny: Path) -> None:
    runs = tiny.parent / "runs"
    Run(request(tiny, defense="randsmooth,cear_minus_rw,cear_minus_gm,cear_rw,cear_gm", only=("clean",))).execute()
    events = [json.loads(line) for line in (runs / "tiny/parts/log.jsonl").read_text().splitlines()]
    made = [event["role"] for event in events if event["event"] == "made"]
    assert made.count("teacher") == 1
    assert made.count("student") == 10  # five with variable noise, five without
    assert made.count("gaussian") == 1
    assert made.count("robust weights") == 2
    assert len({event["key"] for event in events}) == len(events)


def test_seeds_train_networks_of_their_own(tiny: Path) -> None:
    one, two = Run(request(tiny, seeds=(0, 1), only=("clean",))).execute()
    assert one.hashes["weights"] != two.hashes["weights"]
    assert (one.seed, two.seed) == (0, 1)


def test_a_changed_suite_is_refused_by_field_and_fresh_moves_aside(tiny: Path) -> None:
    Run(request(tiny, only=("clean",))).execute()
    tiny.write_text(tiny.read_text().replace("epochs = 2", "epochs = 3"))
    with pytest.raises(StoreError, match=r"task\.recipe\.epochs was 2, now 3.*--fresh"):
        Run(request(tiny, only=("clean",))).execute()
    record = Run(request(tiny, only=("clean",), fresh=True)).execute()[0]
    assert record.task["recipe"]["epochs"] == 3
    assert len(list((tiny.parent / "runs").rglob("clean.json.old1"))) == 1


def test_pieces_of_another_request_are_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Robust.measure
    calls = []

    def interrupted(self: Robust, *args: Any) -> pd.DataFrame:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Robust, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Run(request(tiny, only=("pgd",))).execute()
    monkeypatch.setattr(Robust, "measure", original)
    tiny.write_text(tiny.read_text().replace("steps = 3", "steps = 4"))
    with pytest.raises(StoreError, match=r"eval\.fields\.steps was 3, now 4"):
        Run(request(tiny, only=("pgd",))).execute()


def test_a_defense_that_fails_is_a_record_and_the_others_go_on(tiny: Path) -> None:
    mine = tiny.parent / "mine.py"
    mine.write_text(
        "from dataclasses import dataclass\n"
        "from defenses.naive import Naive\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Broken(Naive):\n"
        "    def fit(self, model, task, parts, seed):\n"
        "        raise ArithmeticError('no such luck')\n"
        "broken = Broken()\n"
        "fine = Naive(members=1)\n"
    )
    records = Run(request(tiny, defense=f"{mine}", only=("clean",))).execute()
    assert [(r.defense["name"], r.status) for r in records] == [("broken", "error"), ("fine", "success")]
    assert "ArithmeticError: no such luck" in (records[0].error or "")
    mine.write_text(mine.read_text().replace("raise ArithmeticError('no such luck')", "super().fit(model, task, parts, seed)"))
    assert [r.status for r in Run(request(tiny, defense=f"{mine}:broken", only=("clean",))).execute()] == ["success"]


def test_a_loss_that_becomes_nan_names_part_epoch_and_remedy(tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace("lr = 0.01", "lr = 1e30"))
    record = Run(request(tiny, only=("clean",))).execute()[0]
    assert record.status == "error"
    assert (
        "gaussian 0" in (record.error or "") and "epoch" in (record.error or "") and "lower recipe.lr" in (record.error or "")
    )


def test_an_evaluation_that_makes_no_sense_is_skipped_with_the_reason(tiny: Path) -> None:
    record = Run(request(tiny, defense="naive@members=1", only=("certified",))).execute()[0]
    assert record.status == "skipped"
    assert "no noise level" in (record.error or "")


def _hold(folder: str, ready: Any, done: Any) -> None:
    with locked(Path(folder) / "tiny"):
        ready.set()
        done.wait(30)


def test_two_runs_in_one_folder_do_not_mix(tiny: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tiny.parent / "runs"), ready, done))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(StoreError, match="another run is working"):
            Run(request(tiny)).execute()
    finally:
        done.set()
        other.join()
    assert Run(request(tiny, only=("clean",))).execute()[0].status == "success"


def test_a_full_disk_says_so_and_keeps_what_was_finished(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run(request(tiny, only=("clean",))).execute()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bench.store.os, "fsync", full)
        with pytest.raises(StoreError, match=r"No space left on device.*finished is kept") as caught:
            Run(request(tiny)).execute()
    assert caught.value.broken
    assert [r.status for r in Run(request(tiny)).execute()] == ["success"] * 3


def test_a_run_folder_that_cannot_be_made_is_refused(tiny: Path) -> None:
    blocked = tiny.parent / "file"
    blocked.write_text("")
    with pytest.raises(StoreError, match="choose another folder"):
        Run(request(tiny, runs=blocked)).execute()


def test_a_damaged_record_is_moved_aside_and_computed_again(tiny: Path) -> None:
    first = Run(request(tiny, only=("clean",))).execute()[0]
    store = Store(tiny.parent / "runs")
    store.path(first).write_text('{"format": 1, "status": "succ')
    again = Run(request(tiny, only=("clean",)))
    record = again.execute()[0]
    assert record.metrics == first.metrics
    assert "moved to clean.json.corrupt" in again.store.problems[0]


def without(path: Path, name: str) -> None:
    """Leave a field out of a record or of the request of its pieces."""
    content = json.loads(path.read_text())
    del (content if name in content else content["hashes"])[name]
    path.write_text(json.dumps(content))


def test_a_record_that_is_older_than_the_hash_of_validation_images_is_no_other_request(tiny: Path) -> None:
    (first,) = Run(request(tiny, only=("clean",))).execute()
    path = Store(tiny.parent / "runs").path(first)
    without(path, "validation")
    before = path.read_text()
    assert not Run(request(tiny, only=("clean",))).missing()
    assert [record.metrics for record in Run(request(tiny, only=("clean",))).execute()] == [first.metrics]
    assert path.read_text() == before
    path.write_text(json.dumps({**json.loads(before), "hashes": {**first.hashes, "validation": "sha256:0"}}))
    with pytest.raises(StoreError, match=r"hashes\.validation was 'sha256:0', now 'sha256:"):
        Run(request(tiny, only=("clean",))).execute()


def test_pieces_that_are_older_than_the_hash_of_validation_images_are_gone_on_with(tiny: Path) -> None:
    half = Run(request(tiny, only=("certified",), shard=(1, 2)))
    half.execute()
    (note,) = (tiny.parent / "runs").rglob("request.json")
    without(note, "hashes.validation")
    (record,) = Run(request(tiny, only=("certified",))).execute()
    assert record.status == "success" and record.hashes["validation"] == half.task.validation.hash


def test_a_damaged_network_is_moved_aside_and_trained_again(tiny: Path) -> None:
    first = Run(request(tiny, only=("clean",))).execute()[0]
    parts = tiny.parent / "runs/tiny/parts"
    (network,) = parts.glob("*.safetensors")
    network.write_bytes(network.read_bytes()[:100])
    again = Run(request(tiny, only=("clean",), fresh=True)).execute()[0]
    assert again.hashes["weights"] == first.hashes["weights"]
    assert len(list(parts.glob("*.corrupt"))) == 1


def test_results_do_not_depend_on_which_evaluations_run_together(tiny: Path) -> None:
    together = {r.eval["name"]: r.metrics for r in Run(request(tiny)).execute()}
    alone = Run(request(tiny, runs=tiny.parent / "other", only=("certified",))).execute()[0]
    assert alone.metrics == together["certified"]


def test_the_callers_generators_are_untouched(tiny: Path) -> None:
    before = torch.random.get_rng_state()
    Run(request(tiny)).execute()
    assert torch.equal(before, torch.random.get_rng_state())


def test_unknown_evaluation_gets_the_nearest_name(tiny: Path) -> None:
    with pytest.raises(SuiteError, match="did you mean 'certified'"):
        Run(request(tiny, only=("certifid",)))


def test_asking_for_more_images_than_there_are_is_refused(tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace("images = 64", "images = 64000"))
    with pytest.raises(SuiteError, match="64000 training images"):
        Run(request(tiny))


def test_run_is_a_function_of_its_request(tiny: Path) -> None:
    records = run(defense="randsmooth", suite=str(tiny), runs=tiny.parent / "runs", device="cpu", only=("clean",))
    assert records[0].status == "success"


def test_no_certificate_passes_its_ceiling(tiny: Path) -> None:
    from defenses.bounds import ceiling

    record = Run(request(tiny, only=("certified",))).execute()[0]
    rows = Store(tiny.parent / "runs").rows(record)
    assert rows.radius.max() <= ceiling(0.25, 200, 0.9 * 0.001)
    assert all(m.radius <= ceiling(0.25, 200, 0.9 * 0.001) for m in record.metrics if m.radius is not None)


def test_a_pretrained_model_of_the_user_runs_and_its_record_is_found_again(tiny: Path) -> None:
    mine = tiny.parent / "mine.py"
    mine.write_text(
        "import torch\n"
        "from defenses.api import Pretrained\n"
        "def load_model():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))\n"
        "mine = Pretrained(load=load_model)\n"
    )
    first = Run(request(tiny, defense=str(mine), only=("clean", "pgd"))).execute()
    assert [r.status for r in first] == ["success", "success"]
    again = Run(request(tiny, defense=str(mine), only=("clean", "pgd")))
    assert again.missing() == [] and again.execute() == first


OWN_LOSS = """
from dataclasses import dataclass
from defenses.joint import EnsembleLoss, TrainedTogether

@dataclass(frozen=True)
class Scaled(EnsembleLoss):
    def __call__(self, net, batch, needs):
        return {"ce": 1.0 * self.errors(net, batch.x, batch)}

class Own(TrainedTogether):
    def loss(self, task):
        return Scaled()

own = Own(members=2)
"""


def test_who_edits_a_file_gets_new_networks_and_no_old_record(tiny: Path) -> None:
    """No field tells of the edit: the same name, the same settings, another loss."""
    mine = tiny.parent / "mine.py"
    mine.write_text(OWN_LOSS)
    (before,) = Run(request(tiny, defense=str(mine), only=("clean",))).execute()
    assert Run(request(tiny, defense=str(mine), only=("clean",))).missing() == []
    mine.write_text(OWN_LOSS.replace("1.0 *", "-1.0 *"))
    with pytest.raises(StoreError, match=r"defense\.file_hash was '\w+', now '\w+'.*use --fresh"):
        Run(request(tiny, defense=str(mine), only=("clean",))).execute()
    (after,) = Run(request(tiny, defense=str(mine), only=("clean",), fresh=True)).execute()
    assert after.hashes["weights"] != before.hashes["weights"] and after.metrics[0].value < before.metrics[0].value


TWO = '''
from dataclasses import dataclass
import torch
from defenses.api import Classifier, Defense


class Bright(Classifier):
    """Class 3 where the mean pixel exceeds a threshold, else class 5; scale 0 makes all of it NaN."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        logits = torch.zeros(len(x), 10)
        score = x.flatten(1).mean(1) - 0.22
        logits[:, 3], logits[:, 5] = score, -score
        return logits * self.scale if self.scale else 0 * logits / 0


@dataclass(frozen=True, kw_only=True)
class Fixed(Defense):
    scale: float
    sigma: float = 0.25

    def build(self, task):
        return Bright(self.scale).eval()

    def fit(self, model, task, parts, seed):
        pass


sound = Fixed(scale=1.0)
broken = Fixed(scale=0.0)
louder = Fixed(scale=2.0)
'''


def test_one_broken_model_does_not_spoil_what_is_measured_with_it(tiny: Path) -> None:
    (tiny.parent / "two.py").write_text(TWO)
    request = {"suite": str(tiny), "only": ("certified",)}
    file = str(tiny.parent / "two.py")
    together = Run(Request(defense=file, runs=tiny.parent / "both", **request)).execute()
    assert {r.defense["name"]: r.status for r in together} == {"sound": "success", "broken": "error", "louder": "success"}
    assert "NaN" in next(r.error for r in together if r.status == "error")
    (alone,) = Run(Request(defense=f"{file}:sound", runs=tiny.parent / "one", **request)).execute()
    one, other = Store(tiny.parent / "both").rows(together[0]), Store(tiny.parent / "one").rows(alone)
    assert together[0].defense["name"] == "sound" and one.equals(other)


def test_what_is_measured_together_is_not_measured_again_after_an_interruption(tiny: Path) -> None:
    file, runs = tiny.parent / "two.py", tiny.parent / "runs"
    file.write_text(TWO)
    request = {"suite": str(tiny), "only": ("certified",), "runs": runs}
    Run(Request(defense=f"{file}:sound", **request)).execute()
    before = (runs / "tiny/sound/quick/seed0/certified.json").read_text()
    records = Run(Request(defense=f"{file}:sound,{file}:louder", **request)).execute()
    assert [record.status for record in records] == ["success", "success"]
    assert (runs / "tiny/sound/quick/seed0/certified.json").read_text() == before
    assert records[1].cost["measured_together"] == 1
    assert Store(runs).rows(records[0]).equals(Store(runs).rows(records[1]))  # twice the logits, the same decisions


def test_a_defense_that_cannot_find_its_files_leaves_a_record_and_the_others_go_on(tiny: Path) -> None:
    text = (
        TWO + "\n\n@dataclass(frozen=True, kw_only=True)\nclass Absent(Fixed):\n    def fit(self, model, task, parts, seed):\n"
    )
    text += "        open('/nowhere/weights.pt')\n\n\nabsent = Absent(scale=1.0)\n"
    (tiny.parent / "two.py").write_text(text)
    names = ",".join(f"{tiny.parent / 'two.py'}:{name}" for name in ("absent", "sound"))
    absent, sound = Run(Request(defense=names, suite=str(tiny), runs=tiny.parent / "r", only=("certified",))).execute()
    assert absent.status == "error" and "/nowhere/weights.pt" in absent.error and sound.status == "success"


def test_two_files_with_one_name_are_refused(tiny: Path) -> None:
    for folder in ("a", "b"):
        (tiny.parent / folder).mkdir()
        (tiny.parent / folder / "mine.py").write_text(TWO)
    with pytest.raises(ValueError, match="rename one"):
        Run(Request(defense=f"{tiny.parent}/a/mine.py:sound,{tiny.parent}/b/mine.py:sound", suite=str(tiny)))
