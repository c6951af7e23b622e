"""`bench verify`: a fresh run holds, every kind of tampering is named, and nothing is trained or written."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import HEAD
from PIL import Image

from attacks import Pgd, Streams
from attacks.api import verdicts
from attacks.streams import Draws
from bench import cli
from bench.checks import RARE
from bench.data import hold_out, load
from bench.evals import Adaptive, Piece, Subject
from bench.mismatch import named
from bench.request import Request
from bench.restore import Case
from bench.runner import Run
from bench.stock import Stock
from bench.store import Store
from bench.verify import Report, render, verify
from defenses.api import Classifier, Images, Task
from defenses.naive import Naive

SUITE = f"""
name = "tiny"
{HEAD}
[evals.clean]
kind = "clean"
images = 30
[evals.pgd]
kind = "robust"
attack = "pgd"
norm = "linf"
eps = ["0.02", "0.1"]
steps = 3
restarts = 1
images = 30
[evals.noisy]
kind = "robust"
attack = "pgd"
norm = "l2"
eps = [0.5]
steps = 2
restarts = 1
images = 10
noise = 0.2
eot = 2
[evals.nearest]
kind = "robust"
attack = "fmn"
norm = "linf"
eps = [0.1]
steps = 5
images = 10
[evals.adaptive]
kind = "adaptive"
norm = "linf"
eps = [0.05]
steps = 2
pgd_steps = 2
proposals = 10
eot = 2
images = 10
[evals.others]
kind = "black_box"
attack = "fgsm"
norm = "linf"
eps = [0.1]
sources = ["itself"]
images = 10
[evals.certified]
kind = "certified"
radii = {{ step = 0.1 }}
n = 200
images = 20
[evals.pooled]
kind = "certified"
estimator = "pooled (unsound)"
radii = {{ step = 0.1 }}
n = 200
images = 10
[evals.votes]
kind = "votes"
radii = {{ step = 0.1 }}
n = 10_000
images = 2
"""

RESULTS = Path(__file__).parents[1] / "leaderboards/results"
NAIVE, SMOOTHED = "tiny/naive@members=2/quick/seed0", "tiny/randsmooth/quick/seed0"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two members without noise, two seeds, and of a smoothed network."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "tiny.toml").write_text(SUITE)
    whole = {"suite": str(folder / "tiny.toml"), "device": "cpu", "runs": folder / "runs"}
    wanted = ("clean", "pgd", "noisy", "nearest", "adaptive", "others")
    smoothed = ("clean", "adaptive", "certified", "pooled", "votes")
    records = Run(Request(defense="naive@members=2", only=wanted, **whole)).execute()
    records += Run(Request(defense="naive@members=2", only=("clean",), seeds=(1,), **whole)).execute()
    records += Run(Request(defense="randsmooth", only=smoothed, **whole)).execute()
    assert all(record.status == "success" for record in records), [record.error for record in records if record.error]
    return folder / "runs"


@pytest.fixture
def runs(fresh: Path, tmp_path: Path) -> Path:
    """A copy of it to tamper with."""
    return Path(shutil.copytree(fresh, tmp_path / "runs"))


def hashes(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_rows(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(pd.read_parquet(path)).to_parquet(path, index=False)


def one(path: Path, **settings: Any) -> Report:
    (report,) = verify(path, **settings)
    return report


def found(report: Report) -> str:
    return "\n".join(f"{own.what} | {own.stored} | {own.recomputed}" for own in report.mismatches)


def bench(*words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", "verify", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_a_fresh_run_holds_and_nothing_is_written_or_drawn(fresh: Path) -> None:
    before, drawn, numpy_drawn = hashes(fresh), torch.get_rng_state(), np.random.get_state()[1].copy()
    reports = {report.record.removeprefix(f"{fresh}/tiny/"): report for report in verify(fresh)}
    assert len(reports) == 12 and not [found(report) for report in reports.values() if report.mismatches]
    checked = {name: report.checked[-1] for name, report in reports.items()}
    assert checked["naive@members=2/quick/seed0/clean.json"] == "clean decisions (30 of 30 images)"
    assert checked["randsmooth/quick/seed0/certified.json"] == "certificates (5 of 20 images, 25 %)"
    for name in ("pgd", "noisy", "nearest", "adaptive"):
        assert checked[f"naive@members=2/quick/seed0/{name}.json"] == "adversarial examples"
    for report in reports.values():
        made = {"rows", "numbers", "data", "weights"} <= set(report.checked)
        assert made and report.not_checked["request"] == "no suite 'tiny' comes with this version"
    black_box = reports["naive@members=2/quick/seed0/others.json"]
    assert black_box.not_checked["measurements"] == "evaluations of kind black_box store nothing that could be judged again"
    assert hashes(fresh) == before
    assert torch.equal(torch.get_rng_state(), drawn) and (np.random.get_state()[1] == numpy_drawn).all()


@pytest.mark.parametrize("level", ["tiny", "tiny/naive@members=2", "tiny/naive@members=2/quick", NAIVE, f"{NAIVE}/clean.json"])
def test_a_record_or_any_folder_above_can_be_named(fresh: Path, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench.verify as module

    monkeypatch.setattr(module, "_verify", lambda path, stock, sample: Report(str(path), "success"))
    assert f"{fresh / NAIVE}/clean.json" in [report.record for report in verify(fresh / level)]


def test_a_changed_number(runs: Path) -> None:
    path = runs / NAIVE / "pgd.json"
    edit(path, lambda record: record["metrics"][0].update(value=0.987))
    report = one(path)
    value = pd.read_parquet(path.with_suffix(".parquet")).query("eps == 0.02").broken.eq(False).mean()
    (mismatch,) = report.mismatches
    assert mismatch.what == "robust_accuracy, eps 0.02, denominator all: value"
    assert (mismatch.stored, mismatch.recomputed) == (0.987, value)


def test_an_interval_a_count_a_removed_and_an_invented_number(runs: Path) -> None:
    path = runs / NAIVE / "pgd.json"

    def change(record: dict[str, Any]) -> None:
        record["metrics"][0].update(lower=0.5, n=31)
        record["metrics"][2].update(metric="accuracy_of_my_dreams")

    edit(path, change)
    text = found(one(path))
    assert "denominator all: lower | 0.5" in text and "denominator all: n | 31 | 30" in text
    assert "accuracy_of_my_dreams" in text and "does not follow from the rows" in text
    assert "robust_accuracy_8bit, eps 0.02, denominator all | not in the record" in text


def test_a_removed_and_an_invented_finding(runs: Path) -> None:
    path = runs / SMOOTHED / "pooled.json"
    edit(path, lambda record: record["findings"].clear())
    (mismatch,) = one(path).mismatches
    assert mismatch.what == "finding unsound" and mismatch.stored == "not in the record"
    clean = runs / SMOOTHED / "clean.json"
    edit(clean, lambda record: record["findings"].append({"kind": "certified", "detail": "all is well", "evidence": {}}))
    assert "finding certified" in found(one(clean)) and "does not follow" in found(one(clean))


def test_weights_of_another_seed(runs: Path) -> None:
    notes = {path: json.loads(path.read_text())["part"]["fields"] for path in (runs / "tiny/parts").glob("*.json")}
    seeds = {fields["seed"]: path for path, fields in notes.items() if fields["role"] == "plain" and fields["member"] == 0}
    shutil.copy(seeds[1].with_suffix(".safetensors"), seeds[0].with_suffix(".safetensors"))
    report = one(runs / NAIVE / "clean.json")
    (mismatch,) = report.mismatches
    assert mismatch.what == "hashes.weights" and mismatch.stored != mismatch.recomputed
    assert list(report.not_checked.values())[-1] == "the weights here are not those of the record"


def test_a_record_of_other_networks_than_those_of_its_seed(runs: Path) -> None:
    """Found without weights, which records outlive: one evaluation was made anew after another training."""
    shutil.rmtree(runs / "tiny/parts")
    edit(runs / NAIVE / "clean.json", lambda record: record["hashes"].update(weights="sha256:0"))
    reports = {Path(report.record).name: found(report) for report in verify(runs / NAIVE)}
    assert re.search(
        r"hashes\.weights \| sha256:0 \| sha256:[0-9a-f]{64}, of 5 other records of this seed", reports["clean.json"]
    )
    assert not any(text for name, text in reports.items() if name != "clean.json")
    # Of two records nobody knows which is of the seed's networks.
    for path in (runs / NAIVE).glob("*.json"):
        if path.name not in ("clean.json", "pgd.json"):
            path.unlink()
    found_both = [found(report) for report in verify(runs / NAIVE)]
    assert len(found_both) == 2 and all("of 1 other record of this seed" in text for text in found_both)


def test_damaged_weights_stay_where_they_are(runs: Path) -> None:
    for path in (runs / "tiny/parts").glob("*.safetensors"):
        path.write_bytes(b"damaged")
    before = hashes(runs)
    report = one(runs / NAIVE / "clean.json")
    assert "weights | could be computed" in found(report) and "is damaged" in found(report)
    assert hashes(runs) == before


def test_weights_of_the_attacking_model(runs: Path) -> None:
    path = runs / NAIVE / "others.json"
    edit(path, lambda record: record["hashes"].update({"source itself": "sha256:0"}))
    assert "hashes.source itself | sha256:0 | sha256:" in found(one(path))


def test_a_fact_of_the_model(runs: Path) -> None:
    path = runs / NAIVE / "clean.json"
    edit(path, lambda record: record["facts"].update(largest_weight_deviation=0.5))
    assert "facts.largest_weight_deviation | 0.5 | None" in found(one(path))


def moved(runs: Path, change: Callable[[np.ndarray, np.ndarray], np.ndarray], eps: float, *, broken: bool = True) -> int:
    """Change the point of an image that was broken, or wrong as it was; returns the image's id."""
    path = runs / NAIVE / "pgd.parquet"
    rows = pd.read_parquet(path).query("eps == @eps and broken and clean_correct == @broken")
    chosen = int(rows.id.iloc[0])
    test = load("digits", "test")
    image = test.floats(test.ids == chosen).numpy().ravel()

    def replace(points: pd.DataFrame) -> pd.DataFrame:
        place = points.index[(points.id == chosen) & (points.eps == eps)][0]
        old = np.frombuffer(points.x_adv[place], np.float32)
        points.at[place, "x_adv"] = change(image, old).astype(np.float32).tobytes()
        return points

    edit_rows(path.with_suffix(".examples.parquet"), replace)
    return chosen


def test_a_point_outside_the_ball(runs: Path) -> None:
    def out(image: np.ndarray, point: np.ndarray) -> np.ndarray:
        point = point.copy()
        point[0] = image[0] + 0.125
        return point

    chosen = moved(runs, out, 0.1)
    text = found(one(runs / NAIVE / "pgd.json"))
    assert f"x_adv of image {chosen}, eps 0.1 | in the linf ball of 0.1 | 0.125" in text
    assert f"distance of image {chosen}, eps 0.1" in text


def test_a_point_a_hair_outside_the_ball(runs: Path) -> None:
    """A contract is eps (1 + 1e-6) and the rounding of float32, no more."""
    chosen = moved(runs, lambda image, point: np.where(np.arange(784) == 0, image + np.float32(0.100002), point), 0.1)
    assert f"x_adv of image {chosen}, eps 0.1 | in the linf ball of 0.1" in found(one(runs / NAIVE / "pgd.json"))


def test_a_point_outside_the_box(runs: Path) -> None:
    chosen = moved(runs, lambda image, point: np.where(np.arange(784) == 0, -0.01, point), 0.1)
    assert f"x_adv of image {chosen}, eps 0.1 | in the box [0,1] | -0.01" in found(one(runs / NAIVE / "pgd.json"))


def test_a_point_of_nothing(runs: Path) -> None:
    chosen = moved(runs, lambda image, point: np.full(784, np.nan), 0.1)
    assert f"x_adv of image {chosen}, eps 0.1 | in the box [0,1]" in found(one(runs / NAIVE / "pgd.json"))


def test_a_point_of_another_size(runs: Path) -> None:
    chosen = moved(runs, lambda image, point: point[1:], 0.1)
    assert f"x_adv of image {chosen}, eps 0.1 | pixels (1, 28, 28) in float32" in found(one(runs / NAIVE / "pgd.json"))


def test_the_clean_image_as_a_point(runs: Path) -> None:
    chosen = moved(runs, lambda image, point: image, 0.1)
    text = found(one(runs / NAIVE / "pgd.json"))
    assert f"broken of image {chosen}, eps 0.1 | True | False" in text and f"distance of image {chosen}" in text


def test_a_moved_point_of_an_image_that_was_wrong(runs: Path) -> None:
    chosen = moved(runs, lambda image, point: (image + 0.01).clip(0, 1), 0.1, broken=False)
    assert f"x_adv of image {chosen}, eps 0.1 | the image itself, which was wrong as it is | 0.01" in found(
        one(runs / NAIVE / "pgd.json")
    )


def test_a_deleted_row(runs: Path) -> None:
    path = runs / NAIVE / "pgd.parquet"
    gone = int(pd.read_parquet(path).id[3])
    edit_rows(path, lambda rows: rows.drop(index=3))
    text = found(one(runs / NAIVE / "pgd.json"))
    assert f"rows, eps 0.02 | 29 rows | there is none of image {gone}" in text
    assert "robust_accuracy, eps 0.02, denominator all: n | 30 | 29" in text
    assert f"rows | 59 | those of image {gone} are missing" in text


def test_an_image_that_is_nowhere_and_one_that_is_there_twice(runs: Path) -> None:
    path = runs / NAIVE / "clean.parquet"
    ids = pd.read_parquet(path).id
    edit_rows(path, lambda rows: rows.assign(id=rows.id.where(rows.index != 2, rows.id[1])))
    text = found(one(runs / NAIVE / "clean.json"))
    assert f"several of image {ids[1]}" in text and "of 29 images | 30 images were asked for" in text
    assert f"ids of the rows | not image {ids[2]} | the first 30 test images" in text


def test_a_whole_setting_that_is_missing(runs: Path) -> None:
    path = runs / NAIVE / "pgd.parquet"
    edit_rows(path, lambda rows: rows[rows.eps != 0.1])
    text = found(one(runs / NAIVE / "pgd.json"))
    assert "rows, eps 0.1 | none | 30 images were asked for" in text and "numbers | could be computed" in text


def test_a_flipped_verdict(runs: Path) -> None:
    path = runs / NAIVE / "pgd.parquet"
    rows = pd.read_parquet(path)
    chosen = rows.index[(rows.eps == 0.1) & rows.broken & rows.clean_correct][0]
    edit_rows(path, lambda rows: rows.assign(broken=rows.broken & (rows.index != chosen)))
    text = found(one(runs / NAIVE / "pgd.json"))
    assert f"broken of image {rows.id[chosen]}, eps 0.1 | False | True" in text
    assert "robust_accuracy, eps 0.1, denominator all: value" in text


@pytest.mark.parametrize(("name", "column"), [("noisy", "broken"), ("adaptive", "broken_by"), ("nearest", "clean_correct")])
def test_a_flipped_verdict_of_other_attacks(runs: Path, name: str, column: str) -> None:
    """Also where no number moves: they are compared row by row."""
    path = runs / NAIVE / f"{name}.parquet"

    def flip(rows: pd.DataFrame) -> pd.DataFrame:
        rows.loc[0, column] = "made up" if column == "broken_by" else not rows[column][0]
        return rows

    edit_rows(path, flip)
    assert f"{column} of image {pd.read_parquet(path).id[0]}, eps" in found(one(runs / NAIVE / f"{name}.json"))


def test_a_decision_that_changes_no_number(runs: Path) -> None:
    path = runs / NAIVE / "clean.parquet"
    rows = pd.read_parquet(path)
    wrong = rows.index[rows.prediction != rows.label][0]
    other = next(k for k in range(10) if k not in (rows.prediction[wrong], rows.label[wrong]))
    edit_rows(path, lambda rows: rows.assign(prediction=rows.prediction.where(rows.index != wrong, other)))
    (mismatch,) = one(runs / NAIVE / "clean.json").mismatches
    assert mismatch.what == f"prediction of image {rows.id[wrong]}"
    assert (mismatch.stored, mismatch.recomputed) == (str(other), str(rows.prediction[wrong]))


def test_another_label(runs: Path) -> None:
    path = runs / NAIVE / "clean.parquet"
    label = int(pd.read_parquet(path).label[0])
    edit_rows(path, lambda rows: rows.assign(label=rows.label.where(rows.index != 0, (label + 1) % 10)))
    assert f"label of image {pd.read_parquet(path).id[0]} | {(label + 1) % 10} | {label}" in found(
        one(runs / NAIVE / "clean.json")
    )


def test_a_certificate_is_found_by_certifying_anew_once_it_is_in_the_sample(runs: Path) -> None:
    path = runs / SMOOTHED / "certified.parquet"
    rows = pd.read_parquet(path)
    chosen = rows.index[rows.draws == 200][-1]
    edit_rows(path, lambda rows: rows.assign(count=rows["count"] - (rows.index == chosen)))
    (mismatch,) = one(runs / SMOOTHED / "certified.json", sample=20).mismatches
    assert mismatch.what == f"count of image {rows.id[chosen]}"
    samples = [bool(one(runs / SMOOTHED / "certified.json", sample=size).mismatches) for size in (0, 1, 10)]
    assert samples == sorted(samples), "a larger sample holds the smaller one"
    assert one(runs / SMOOTHED / "certified.json", sample=0).not_checked["certificates (0 of 20 images, 0 %)"]


def test_a_vote(runs: Path) -> None:
    path = runs / SMOOTHED / "votes.parquet"
    rows = pd.read_parquet(path)
    changed = rows.votes[1].copy()
    changed[0] -= 1
    edit_rows(path, lambda rows: rows.assign(votes=[rows.votes[0], changed]))
    assert f"votes of image {rows.id[1]} | [" in found(one(runs / SMOOTHED / "votes.json"))


def resummed(path: Path) -> None:
    """Let the metrics of a record follow from its rows again."""
    case = Case(path, Store(path.parent).read(path), Stock(), 0)
    metrics = [own.model_dump() for own in case.evaluation.summarise(case.rows, case.outline).metrics]
    edit(path, lambda record: record.update(metrics=metrics))


def copied(name: str, folder: Path) -> Path:
    """A copy of a committed record, which comes without weights. Its radii need no data either, which take long to load."""
    shutil.copytree((RESULTS / name).parent, (folder / name).parent)
    return folder / name


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """One at sigma 1, where votes prove many radii."""
    return copied("mnist/randsmooth@sigma=1.0/quick/seed0/certified.json", tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "mnist/randsmooth/quick/seed0/certified",
        "unsound_mnist/cear_gm/quick/seed0/certified",
        "unsound_mnist/cear_gm/quick/seed0/pooled",
    ],
)
def test_radii_that_the_votes_of_a_committed_record_do_not_prove(name: str, tmp_path: Path) -> None:
    path = copied(f"{name}.json", tmp_path)
    assert "radii" in one(path, data=tmp_path).checked and not one(path, data=tmp_path).mismatches
    rows = pd.read_parquet(path.with_suffix(".parquet"))
    top, zero = rows.radius.max(), rows.radius == 0
    assert 0 < zero.sum() < 10
    edit_rows(
        path.with_suffix(".parquet"), lambda rows: rows.assign(prediction=rows.label, radius=rows.radius.where(~zero, top))
    )
    resummed(path)
    (mismatch,) = one(path, data=tmp_path).mismatches
    assert mismatch.what == f"radius of {named(rows.id[zero])}" and mismatch.stored.startswith(f"{top:g}")


def test_an_abstention_a_smaller_radius_and_other_draws_are_told_from_the_votes(committed: Path, tmp_path: Path) -> None:
    rows = pd.read_parquet(committed.with_suffix(".parquet"))
    first, second, third = rows.index[rows.radius > 0.25][:3]

    def change(rows: pd.DataFrame) -> pd.DataFrame:
        rows.loc[first, ["prediction", "radius"]] = -1, 0.0
        rows.loc[second, "radius"] -= 0.25
        rows.loc[third, "draws"] += 100
        return rows

    edit_rows(committed.with_suffix(".parquet"), change)
    resummed(committed)
    radius, draws = one(committed, data=tmp_path).mismatches
    assert radius.what == f"radius of {named(rows.id[[first, second, third]])}" and radius.stored.startswith("abstains, ")
    assert draws.what == f"draws of image {rows.id[third]}"
    edit_rows(committed.with_suffix(".parquet"), lambda rows: rows.assign(prediction=-1))
    assert "0 of abstentions" in found(one(committed, data=tmp_path))


def test_radii_each_of_which_may_be_but_not_all_of_them(committed: Path, tmp_path: Path) -> None:
    """An earlier look, which is not stored, may have proven a little more than the last one: of a few images, not of most."""
    case = Case(committed, Store(committed.parent).read(committed), Stock(), 0)
    most = case.evaluation.recounted(case.rows, case.outline, RARE).high.clip(lower=0)
    above = (most > case.rows.radius) & (case.rows.prediction >= 0)
    assert above.sum() > 100

    def raised(count: int) -> Report:
        some = above & (above.cumsum() <= count)
        case.rows.assign(radius=most.where(some, case.rows.radius)).to_parquet(committed.with_suffix(".parquet"), index=False)
        resummed(committed)
        return one(committed, data=tmp_path)

    assert not raised(3).mismatches
    (mismatch,) = raised(200).mismatches
    assert "of the images are above what their last votes prove" in mismatch.recomputed


def test_sizes_times_of_training_and_arithmetic_that_were_changed(runs: Path) -> None:
    path = runs / NAIVE / "clean.json"
    assert one(path).times == ["seconds", "measured_together", "forward_milliseconds"]

    def change(record: dict[str, Any]) -> None:
        for name in ("seconds", "training_seconds_per_epoch", "parameters"):
            record["cost"][name] *= 100
        record["numerics"]["dtype"] = "bfloat16"
        record["hashes"]["data"] = "digits of mine"

    edit(path, change)
    report = one(path)
    assert {own.what for own in report.mismatches} == {
        "cost.training_seconds_per_epoch", "cost.parameters", "numerics.dtype", "hashes.data",
    }  # fmt: skip
    assert render([report]).endswith("never measured again: seconds, measured_together, forward_milliseconds")


def test_a_record_holds_at_most_but_for_its_times() -> None:
    assert Report("a", "success", ["rows"]).verdict == "holds"
    assert Report("a", "success", ["rows"], times=["seconds"]).verdict == "holds but for times"
    assert Report("a", "success", ["rows"], {"data": "no data"}, times=["seconds"]).verdict == "holds in part"


def test_what_is_told_of_training_cannot_be_checked_without_weights(runs: Path) -> None:
    shutil.rmtree(runs / "tiny/parts")
    assert "no weights" in one(runs / NAIVE / "clean.json").not_checked["cost"]


def test_a_radius_above_what_can_be_certified(runs: Path) -> None:
    path = runs / SMOOTHED / "certified.parquet"
    edit_rows(path, lambda rows: rows.assign(radius=rows.radius + 5.0 * (rows.index == 4)))
    assert "numbers | could be computed" in found(one(runs / SMOOTHED / "certified.json", sample=0))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on a data set that can be changed: (data, runs)."""
    folder = tmp_path_factory.mktemp("parquet")
    (folder / "data/mnist").mkdir(parents=True)
    for split, count in (("train", 84), ("test", 30)):
        some = load("digits", split).first(count)
        write(folder / f"data/mnist/{split}.parquet", some.pixels[:, 0].numpy(), some.labels.tolist())
    suite = SUITE[: SUITE.index("[evals.noisy]")].replace('"digits"', '"mnist"')
    (folder / "tiny.toml").write_text(suite)
    request = Request(
        defense="naive@members=1", suite=str(folder / "tiny.toml"), device="cpu", data=folder / "data", runs=folder / "runs"
    )
    assert all(record.status == "success" for record in Run(request).execute())
    return folder / "data", folder / "runs"


def write(path: Path, pixels: np.ndarray, labels: list[int]) -> None:
    files = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        files.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"image": files, "label": labels}), path)


@pytest.mark.parametrize("split", ["test", "train", "validation", "labels", "none"])
def test_a_data_set_with_one_image_changed(parquet: tuple[Path, Path], split: str, tmp_path: Path) -> None:
    data, runs = Path(shutil.copytree(parquet[0], tmp_path / "data")), parquet[1]
    if split in ("train", "validation"):
        change_one(data, split)
    else:
        some = load("digits", "test").first(30)
        pixels, labels = some.pixels[:, 0].numpy().copy(), some.labels.tolist()
        if split == "labels":
            labels[7] = (labels[7] + 1) % 10
        elif split == "test":
            pixels[7, 3, 3] ^= 1
        write(data / "mnist/test.parquet", pixels, labels)
    reports = verify(runs, data)
    text = "".join(map(found, reports))
    if split == "none":
        assert not text
    elif split in ("train", "validation"):
        assert f"hashes.{split}" in text and text.count("hashes.") == len(reports)
        told = {"train": "training", "validation": "validation"}[split]
        assert {r.not_checked["weights"] for r in reports} == {
            f"the {told} images here are not those of the record, and so no weights are"
        }
    else:
        assert "hashes.images" in text and "hashes.train" not in text
        assert ("label of image 7" in text) == (split == "labels")
        assert all("the test images here are not those of the record" in r.not_checked.values() for r in reports)


def change_one(data: Path, split: str) -> None:
    """Another pixel in one of the images that train, or are held out."""
    some = load("digits", "train").first(84)
    pixels, chosen = some.pixels[:, 0].numpy().copy(), hold_out(some, 20)[split == "validation"].ids[0]
    pixels[int((some.ids == chosen).nonzero()), 3, 3] ^= 1
    write(data / "mnist/train.parquet", pixels, some.labels.tolist())


def test_a_validation_image_changed_under_a_record_that_is_older_than_their_hash(
    parquet: tuple[Path, Path], tmp_path: Path
) -> None:
    """Notes beside parts tell then, of those made from the record's training images; without them nobody does."""
    data, runs = (Path(shutil.copytree(own, tmp_path / own.name)) for own in parquet)
    for path in runs.rglob("seed0/*.json"):
        edit(path, lambda record: record["hashes"].pop("validation"))
    (note,) = (runs / "tiny/parts").glob("*.json")
    foreign = json.loads(note.read_text())
    foreign["part"]["task"] |= {"train": "sha256:1", "validation": "sha256:2"}
    (note.parent / "foreign.json").write_text(json.dumps(foreign))
    (note.parent / "damaged.json").write_text("{")
    assert not [found(report) for report in verify(runs, data) if report.mismatches]
    change_one(data, "validation")
    for report in verify(runs, data):
        assert [own.what for own in report.mismatches] == ["hashes.validation"]
    note.unlink()
    for report in verify(runs, data):
        assert not report.mismatches and "data" in report.checked
        assert report.not_checked["validation images"].startswith("the record is older than their hash")


def test_the_same_images_in_another_layout(parquet: tuple[Path, Path], tmp_path: Path) -> None:
    runs = Path(shutil.copytree(parquet[1], tmp_path / "runs"))
    path = runs / "tiny/naive@members=1/quick/seed0/clean.json"
    edit(path, lambda record: record["hashes"].update(data="mnist torchvision"))
    report = one(path, data=parquet[0])
    assert not report.mismatches and "as 'mnist parquet', not as 'mnist torchvision'" in report.not_checked["hashes.data"]
    edit(path, lambda record: record["hashes"].update(data="mnist parquet (JPEG re-encoding)"))
    assert found(one(path, data=parquet[0])) == "hashes.data | mnist parquet (JPEG re-encoding) | mnist parquet"


def test_data_that_is_not_here(parquet: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    reports = verify(parquet[1], tmp_path)
    for report in reports:
        assert report.verdict == "holds in part" and {"rows", "numbers"} <= set(report.checked)
        assert "downloading is switched off" in report.not_checked["data"]
    assert not list(tmp_path.iterdir())


def test_missing_weights_and_examples_are_told_and_nothing_is_trained(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with committed records."""
    shutil.rmtree(runs / "tiny/parts")
    for path in runs.rglob("*.examples.parquet"):
        path.unlink()
    before = hashes(runs)
    assert bench(str(runs), monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert (
        f"no weights: plain 0 is not in {runs / 'tiny/parts'}" in out
        and "there is no pgd.examples.parquet beside the record" in out
    )
    assert out.splitlines()[-1].startswith("12 records: 12 holds in part; no mismatch; never measured again: ")
    assert hashes(runs) == before and not (runs / "tiny/parts").exists()


def test_a_mismatch_is_code_1_with_everything_in_the_output(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / NAIVE / "clean.json"
    edit(path, lambda record: record["metrics"][0].update(value=0.987))
    assert bench(str(path), monkeypatch=monkeypatch) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"MISMATCH            {path}: checked networks, rows, numbers, data")
    assert out[1] == f"{path}: clean_accuracy: value" and out[2].split() == ["stored", "0.987"]
    assert out[-1].startswith("1 record: 1 MISMATCH; 1 mismatch in 1 record; never measured again: ")
    assert bench(str(path), "--format", "json", monkeypatch=monkeypatch) == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "MISMATCH" and report["mismatches"][0]["stored"] == 0.987


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "there is no record at or below nowhere"),
        (("{runs}/tiny/parts",), "there is no record at or below"),
        (("{runs}", "--format", "pdf"), "--format: unknown 'pdf'; known are json, text"),
        (("{runs}", "--sample", "-1"), "--sample: how many images"),
    ],
)
def test_wrong_requests_get_one_line_and_code_2(
    fresh: Path, words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*(word.replace("{runs}", str(fresh)) for word in words), monkeypatch=monkeypatch) == 2
    shown = capsys.readouterr()
    assert message in shown.err and len(shown.err.splitlines()) == 1 and not shown.out


def test_what_is_no_finished_record(runs: Path) -> None:
    folder = runs / NAIVE
    edit(folder / "clean.json", lambda record: record.update(status="running"))
    edit(folder / "pgd.json", lambda record: record.update(status="error", error="Traceback\nValueError: no"))
    edit(folder / "noisy.json", lambda record: record.update(format=2))
    (folder / "nearest.json").write_text("{")
    (folder / "others.parquet").unlink()
    reports = {Path(report.record).stem: report for report in verify(folder)}
    assert (reports["clean"].verdict, reports["clean"].note) == ("running", "it is not finished")
    assert (reports["pgd"].verdict, reports["pgd"].note) == ("error", "ValueError: no")
    assert (reports["noisy"].verdict, reports["noisy"].note) == ("unreadable", "format 2; this version reads 1")
    assert reports["nearest"].verdict == "MISMATCH" and "is no record of format 1" in found(reports["nearest"])
    assert "rows | a finished record has rows of every image | there is no others.parquet" in found(reports["others"])
    assert "note" not in render(list(reports.values())) and "it is not finished" in render(list(reports.values()))


def test_a_record_in_another_place(runs: Path) -> None:
    for ending in (".json", ".parquet"):
        (runs / NAIVE / f"clean{ending}").rename(runs / NAIVE / f"spotless{ending}")
    (mismatch,) = one(runs / NAIVE / "spotless.json").mismatches
    assert mismatch.what == "place of the record" and str(mismatch.recomputed).endswith("seed0/clean.json")


def test_a_suite_that_asks_something_else(runs: Path) -> None:
    """A record that calls itself one of `digits` must ask what `digits` asks."""
    path = runs / NAIVE / "pgd.json"
    edit(path, lambda record: record["suite"].update(name="digits"))
    text = found(one(path))
    assert "eval.fields.steps | 3 | 20" in text and "task.recipe.epochs | 2 |" in text and "task.train_images | 64" in text
    edit(path, lambda record: record["suite"].update(version=99))
    assert "is at version 1 here, not 99" in one(path).not_checked["request"]


def test_a_defense_with_other_fields_than_its_label_says(runs: Path) -> None:
    path = runs / SMOOTHED / "clean.json"
    edit(path, lambda record: record["defense"]["fields"].update(sigma=1.0))
    assert "defense.fields.sigma | 1.0 | 0.25" in found(one(path))


def test_a_defense_that_is_not_registered_and_a_file_that_is_not_executed(runs: Path) -> None:
    evil = runs / "evil.py"
    evil.write_text(f"open({str(runs / 'executed')!r}, 'w')")
    for label in ("somebodys", str(evil)):
        path = runs / NAIVE / "pgd.json"
        edit(path, lambda record: record["defense"].update(variant=label))  # noqa: B023
        report = one(path)
        assert {"rows", "numbers", "data"} <= set(report.checked)
        assert report.not_checked["weights"] == f"the defense {label!r} is not registered here"
    assert not (runs / "executed").exists()


def test_what_a_defense_draws_globally_leaves_no_trace(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Naive.build

    def drawing(self: Naive, task: Task) -> Any:
        torch.rand(3)
        return build(self, task)

    monkeypatch.setattr(Naive, "build", drawing)
    drawn = torch.get_rng_state()
    assert one(fresh / NAIVE / "clean.json").verdict == "holds in part"
    assert torch.equal(torch.get_rng_state(), drawn)


class Hesitant(Classifier, Draws):
    """Nearly every decision depends on the draw."""

    randomized = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x.flatten(1)[:, :2] - 0.5
        return 0.02 * first + self.normal_like(first)


def hesitating(count: int = 60) -> tuple[Hesitant, Images, Streams]:
    images = load("digits", "test").first(count)
    halves = Images(images.pixels, images.ids % 2, images.ids, "digits, even or odd")
    return Hesitant().eval(), halves, Streams(3, "hesitant", ids=images.ids)


def test_verdicts_repeat_the_noise_of_an_attack() -> None:
    model, images, streams = hesitating()
    found = Pgd(norm="linf", eps=0.1, steps=1, restarts=1)(model, images.floats(), images.labels, streams)
    wrong, broken = verdicts(model, images.floats(), found.x_adv, images.labels, streams)
    assert torch.equal(wrong, found.forwards == 0) and torch.equal(broken, found.broken)
    _, others = verdicts(model, images.floats(), found.x_adv, images.labels, streams.child("others"))
    assert not torch.equal(others, found.broken), "the verdict depends on the noise"


def test_an_adaptive_attacks_verdicts_repeat_its_noise() -> None:
    model, images, _ = hesitating(30)
    evaluation = Adaptive(norm="linf", eps=(0.1,), steps=1, pgd_steps=1, proposals=2, eot=1, images=30)
    subject = Subject(model, None, 0)
    (rows,) = evaluation.measure([subject], images, Piece(slice(0, 30), {"eps": 0.1}))
    assert (rows.broken_by[rows.clean_correct] != "").any() and not rows.clean_correct.all()
    points = torch.from_numpy(np.stack([np.frombuffer(own, np.float32) for own in rows.x_adv])).reshape(30, 1, 28, 28)
    again = evaluation.judged(subject, images, rows, points)
    assert (again.clean_correct == rows.clean_correct).all() and (again.broken_by == rows.broken_by).all()
    others = evaluation.judged(Subject(model, None, 1), images, rows, points)
    assert (others.broken_by != rows.broken_by).any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to repeat it on")
def test_what_another_kind_of_device_measured(runs: Path) -> None:
    for path in (runs / SMOOTHED / "certified.json", runs / NAIVE / "pgd.json"):
        edit(path, lambda record: record["numerics"].update(rng="torch-cuda"))
        report = one(path)
        assert "weights" in report.checked and not report.mismatches
        assert "measured with torch-cuda" in list(report.not_checked.values())[-1]
