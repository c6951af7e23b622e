"""A paper's table shows the stored numbers beside the published ones, cell by cell, and says what may be read off them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_store import record

from bench.papers.cells import Cell
from bench.papers.formats import render
from bench.papers.join import PaperTable, join
from bench.papers.layout import load
from bench.store import Finding, Metric, Record, Store
from bench.tables import HOLE

CERTIFIED = {"kind": "certified", "estimator": "grid", "n0": 100, "n": 100_000, "alpha": 0.001, "images": 500}
ROBUST = {"kind": "robust", "norm": "linf", "images": 200, "eps": [0.3]}


def certified(
    variant: str, values: dict[float, float], sigma: float = 0.5, suite: str = "cear_cifar10", **changes: Any
) -> Record:
    return record(**{
        "suite": {"name": suite, "version": 1, "budget": "quick"},
        "defense": {"name": variant.partition("@")[0], "variant": variant, "fields": {}},
        "eval": {"name": "certified", "fields": {**CERTIFIED, "sigma": sigma}},
        "metrics": [
            Metric(metric="certified_accuracy", value=v, n=500, lower=v - 0.03, upper=v + 0.03, radius=r)
            for r, v in values.items()
        ],
        "hashes": {"data": "cifar10 parquet (JPEG re-encoding)", "images": "sha256:1"},
        "seed": 0,
        **changes,
    })  # fmt: skip


def attacked(variant: str, value: float, evaluation: str = "pgd", **changes: Any) -> Record:
    number = Metric(
        metric="robust_accuracy", value=value, n=200, lower=value - 0.05, upper=value + 0.05, eps=0.3, denominator="all"
    )
    return record(**{
        "suite": {"name": "smd_mnist", "version": 1, "budget": "quick"},
        "defense": {"name": variant, "variant": variant, "fields": {}},
        "eval": {"name": evaluation, "fields": {**ROBUST, "attack": evaluation}},
        "metrics": [number, number.model_copy(update={"denominator": "clean_correct", "value": 0.99})],
        "hashes": {"data": "mnist parquet", "images": "sha256:1"},
        "seed": 0,
        **changes,
    })  # fmt: skip


def rows_of(stands: np.ndarray) -> pd.DataFrame:
    ids = np.arange(len(stands))
    return pd.DataFrame({"id": ids, "label": 0, "eps": 0.3, "clean_correct": True, "broken": ~stands, "distance": 0.1})


def cell(table: PaperTable, **facts: Any) -> Cell:
    (found,) = [one for one in table.cells.values() if all(one.row[name] == value for name, value in facts.items())]
    return found


def lines(table: PaperTable, fmt: str = "text") -> list[str]:
    return render(table, fmt).splitlines()


def test_one_seed_shows_value_interval_difference_and_what_is_outside(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(certified("cear_rw@sigma=0.5", {0.0: 0.67, 0.25: 0.40}))
    table = join(load("cear_table1"), store)
    own = cell(table, dataset="cifar10", defense="cear_rw", sigma=0.5, radius=0.0)
    assert own.printed == 68 and own.value == pytest.approx(67) and own.interval == pytest.approx((64, 70))
    assert own.difference == pytest.approx(-1) and own.inside is True
    other = cell(table, dataset="cifar10", defense="cear_rw", sigma=0.5, radius=0.25)
    assert other.printed == 56 and other.inside is False and table.filled == 3  # and radius 2, which n cannot prove
    at = next(
        i for i, line in enumerate(lines(table)) if "CEAR(RW)" in line and line.startswith("CIFAR-10") and " 0.5 " in line
    )
    shown = [line.split() for line in lines(table)[at : at + 4]]
    assert shown[0][3:6] == ["paper", "68", "56"]
    assert shown[1][:3] == ["ours", "67.0", "40.0"] and shown[1][3] == HOLE
    assert shown[2][2:9] == ["64.0", "to", "70.0", "37.0", "to", "43.0"]
    assert shown[3] == ["difference", "-1.0", "-16.0", "out"]


def test_an_impossible_number_is_struck_out_with_its_reason_and_gets_no_difference(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(certified("cear_rw@sigma=0.5", {0.0: 0.67}))
    table = join(load("cear_table1"), store)
    own = cell(table, dataset="cifar10", defense="cear_rw", sigma=0.5, radius=2.0)
    assert own.row["flag"] == "impossible" and own.inside is None
    assert own.ours[0].too_few and own.value == 0  # by the same arithmetic
    struck = {"text": "~~5~~ (", "md": "~~5~~<sup>", "latex": r"\rlap{\rule[0.6ex]{0.6em}{0.5pt}}5", "html": "<s>5</s><sup>"}
    for fmt, text in struck.items():
        assert render(table, fmt).count(text) == 1
        assert "no radius exceeds 3.81 sigma" in render(table, fmt)
    raw = [row for row in json.loads(render(table, "json")) if row["flag"] == "impossible"]
    assert [(row["printed"], row["ours"], row["published_inside"]) for row in raw] == [("5", 0.0, None)]


def test_radii_beyond_the_draws_are_no_difference(tmp_path: Path) -> None:
    store = Store(tmp_path)
    few = {**CERTIFIED, "n": 1000, "sigma": 0.5}
    store.write(certified("cear_rw@sigma=0.5", {0.0: 0.67}, eval={"name": "certified", "fields": few}))
    table = join(load("cear_table1"), store)
    own = cell(table, dataset="cifar10", defense="cear_rw", sigma=0.5, radius=1.75)
    assert own.printed == 8 and own.ours[0].too_few and own.inside is None
    assert "0 by n" in render(table) and "-8.0" not in render(table)
    raw = [row for row in json.loads(render(table, "json")) if row["too_few_draws"]]
    assert raw and {(row["ours"], row["difference"]) for row in raw} == {(0.0, None)}
    # A radius that n could prove, but that was not asked, is a hole.
    assert not cell(table, dataset="cifar10", defense="cear_rw", sigma=0.5, radius=0.25).filled


def test_a_hole_stays_a_hole_with_the_command_that_fills_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(attacked("naive", 0.5, "fgsm"))
    store.write(attacked("gal", 0.5, "fgsm", status="error", metrics=[], error="Traceback\nValueError: no"))
    table = join(load("smd_table1"), store)
    hole = cell(table, dataset="mnist", defense="naive", attack="pgd")
    assert not hole.filled and hole.command((0,)) == (
        "bench run --defense naive@members=3 --suite smd_mnist --budget quick --seeds 0 --only pgd"
    )
    text = render(table)
    assert (
        "bench run --defense naive@members=3 --suite smd_mnist --budget quick --seeds 0 --only clean,r_fgsm,pgd,bim,mim" in text
    )
    assert "gal fgsm: failed: ValueError: no" in text
    (raw,) = [row for row in json.loads(render(table, "json")) if row["ours"] is not None]
    assert (raw["published"], raw["ours"], raw["difference"], raw["command"]) == (20.3, 50.0, pytest.approx(29.7), None)


def test_several_seeds_are_mean_and_deviation_with_an_interval_over_both(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed, value in enumerate((0.2, 0.3, 0.4)):
        store.write(attacked("naive", value, seed=seed))
    own = cell(join(load("smd_table1"), store), dataset="mnist", defense="naive", attack="pgd")
    assert own.value == pytest.approx(30) and own.spread == pytest.approx(10)
    half = np.hypot(5, stats.t.ppf(0.975, 2) * 10 / np.sqrt(3))
    assert own.interval == pytest.approx((max(0, 30 - half), 30 + half))
    for seed in range(3):  # three seeds of 0 of 200 are no surer about other images than one is
        none = Metric(metric="robust_accuracy", value=0.0, n=200, lower=0.0, upper=0.019, eps=0.3, denominator="all")
        store.write(attacked("gal", 0.0, seed=seed, metrics=[none]))
    gal = cell(join(load("smd_table1"), store), dataset="mnist", defense="gal", attack="pgd")
    assert gal.spread == 0 and gal.interval == pytest.approx((0.0, 1.9))
    same = cell(join(load("smd_table3"), store), dataset="mnist", defense="gal", attack="pgd")
    assert same.value == 0 and same.interval is None and same.inside is None, "seeds that agree to an image prove no steadiness"
    table = join(load("smd_table1"), store)
    assert "30.0 ± 10.0 (3)" in render(table) and r"30.0 $\pm$ 10.0 (3)" in render(table, "latex")
    deviations = cell(join(load("smd_table3"), store), dataset="mnist", defense="naive", attack="pgd")
    assert deviations.value == pytest.approx(10) and deviations.printed == 0.7
    low, high = deviations.interval or (0, 0)
    assert low == pytest.approx(10 * np.sqrt(2 / stats.chi2.ppf(0.975, 2))) and high == pytest.approx(
        10 * np.sqrt(2 / stats.chi2.ppf(0.025, 2))
    )


def test_a_deviation_needs_two_seeds(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(attacked("naive", 0.2))
    table = join(load("smd_table3"), store)
    assert table.filled == 0 and "--seeds 0,1,2" in render(table)


def test_seeds_that_were_asked_otherwise_and_other_versions_are_left_out_and_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(attacked("naive", 0.2))
    store.write(attacked("naive", 0.9, seed=1, hashes={"data": "mnist parquet", "images": "sha256:2"}))
    store.write(attacked("adp", 0.9, suite={"name": "smd_mnist", "version": 0, "budget": "quick"}))
    table = join(load("smd_table1"), store)
    assert cell(table, dataset="mnist", defense="naive", attack="pgd").value == pytest.approx(20)
    assert not cell(table, dataset="mnist", defense="adp", attack="pgd").filled
    text = render(table)
    assert "bench reproduce smd_table1 --budget quick --fresh" in text
    asked = "--suite smd_mnist --budget quick --seeds 0 --only"
    run = f"bench run --defense adp@members=3 {asked}"
    both = f"bench run --defense naive@members=3,adp@members=3 {asked}"
    assert f"{both} clean,fgsm,r_fgsm,bim,mim\n" in text and f"{run} pgd --fresh\n" in text
    assert cell(table, dataset="mnist", defense="adp", attack="pgd").command((0,)) == f"{run} pgd --fresh"
    assert "smd_mnist/quick/naive/pgd: 1 seeds that were asked otherwise than the first" in text
    assert "smd_mnist/quick/adp/pgd: 1 records of another version of the suite" in text


def test_budgets_never_mix_and_the_largest_with_records_is_shown(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(attacked("naive", 0.2))
    store.write(attacked("adp", 0.6, suite={"name": "smd_mnist", "version": 1, "budget": "paper"}))
    table = join(load("smd_table1"), store)
    assert (table.budget, table.filled) == ("paper", 1) and "Budget paper (published size): 1 of 108" in render(table)
    table = join(load("smd_table1"), store, "quick")
    assert table.filled == 1 and "Budget quick (reduced budget)" in render(table)
    assert "epochs 5 instead of 50, training images 20000 instead of all" in render(table)
    assert join(load("smd_table1"), store, "smoke").filled == 0


def test_a_block_of_a_data_set_is_answered_by_the_suite_with_most_of_it_of_equals_by_the_papers(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(certified("cear_rw", {0.0: 0.9}, 0.25, "mnist"))
    table = join(load("cear_table1"), store)
    assert cell(table, dataset="mnist", defense="cear_rw", sigma=0.25, radius=0.0).value == pytest.approx(90)
    assert "suite mnist version 1" in render(table) and {own.suite for own in table.cells.values() if own.filled} == {"mnist"}
    store.write(certified("cear_gm", {0.0: 0.8}, 0.25, "cear_mnist"))
    table = join(load("cear_table1"), store)
    assert cell(table, dataset="mnist", defense="cear_gm", sigma=0.25, radius=0.0).value == pytest.approx(80)
    assert not cell(table, dataset="mnist", defense="cear_rw", sigma=0.25, radius=0.0).filled
    assert "suite mnist version 1" not in render(table) and "the first runs" not in render(table)
    store.write(certified("cear_minus_gm", {0.0: 0.7}, 0.25, "mnist"))
    table = join(load("cear_table1"), store)
    assert cell(table, dataset="mnist", defense="cear_minus_gm", sigma=0.25, radius=0.0).value == pytest.approx(70)
    assert not cell(table, dataset="mnist", defense="cear_gm", sigma=0.25, radius=0.0).filled, "one suite a block"
    assert "the first runs all of the paper's protocol, suite cear_mnist where mnist is shown; the others" in render(table)
    assert table.layout.protocol.suites["mnist"] == ("cear_mnist",)
    assert "not shown: 9 of 54 cells by suite cear_mnist (dataset mnist, sigma 0.25); mnist has 18, and what" in render(table)
    store.write(certified("cear_rw", {0.0: 0.9}, 0.25, "cear_mnist"))
    store.write(certified("cear_rw@sigma=0.5", {0.0: 0.7}, 0.5, "mnist"))
    store.write(certified("cear_rw@sigma=1.0", {0.0: 0.6}, 1.0, "mnist"))
    store.write(certified("cear_gm@sigma=1.0", {0.0: 0.5}, 1.0, "cear_mnist_20"))
    table = join(load("cear_table1"), store)
    by = {sigma: {own.suite for own in table.cells.values() if own.row["sigma"] == sigma} for sigma in (0.25, 0.5, 1.0)}
    assert by == {
        0.25: {"cear_mnist", "cear_cifar10"},
        0.5: {"mnist", "cear_cifar10"},
        1.0: {"cear_mnist_20", "cear_cifar10"},
    }
    assert cell(table, dataset="mnist", defense="cear_rw", sigma=0.5, radius=0.0).value == pytest.approx(70)
    assert not cell(table, dataset="mnist", defense="cear_rw", sigma=1.0, radius=0.0).filled


def test_the_caption_says_what_the_images_are(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(certified("cear_rw@sigma=0.5", {0.0: 0.67}))
    text = render(join(load("cear_table1"), store))
    assert "data: cifar10 parquet (JPEG re-encoding); images: certified 500" in text
    assert "network resnet20 instead of resnet110, epochs 15 instead of 90, training images 5000 instead of all" in text
    assert "unreviewed in cear_cifar10: cear_rw@sigma=0.5" in text or "flagged in cear_cifar10: cear_rw@sigma=0.5" in text


def test_it_is_told_which_part_of_which_seeds_a_suite_answers(tmp_path: Path) -> None:
    """One word of status for each defense, however its seeds were attacked; queries only of what asks them."""
    store = Store(tmp_path)
    standing(store, "naive", [20, 30])
    whole = {"kind": "robust", "attack": "autoattack", "version": "standard", "images": 50, "proposals": 1000}
    store.write(attacked("naive", 0.1, eval={"name": "autoattack", "fields": {**ROBUST, **whole}}))
    store.write_rows(attacked("naive", 0.1, "autoattack"), rows_of(np.arange(50) < 5))
    clean = Metric(metric="clean_accuracy", value=0.98, n=10_000, lower=0.97, upper=0.99)
    asked = {"name": "clean", "fields": {"kind": "clean", "images": 10_000}}
    store.write(attacked("naive", 0.0, seed=2, eval=asked, metrics=[clean]))
    text = render(join(load("smd_table1"), store))
    assert "suite smd_mnist version 1 (MNIST), budget quick" in text
    assert "images: clean 10000 (seed 2), pgd 200 (seed 0, 1)" in text
    assert "evaluations ask different numbers of images (Ours)" in text
    assert "autoattack-ok (seed 0); unreviewed (seed 1, 2) in smd_mnist: naive\n" in text, "two cells, one line"
    deviations = render(join(load("smd_table3"), store))
    assert "of deviations: ours is over the training seeds" in deviations and "of deviations" not in text

    store.write(certified("cear_rw@sigma=0.5", {0.0: 0.67}))
    text = render(join(load("cear_table1"), store))
    assert "suite cear_cifar10 version 1 (CIFAR-10, sigma 0.25, 0.5, 1), budget quick" in text
    assert "images: certified 500 (grid estimator" in text
    fields = {"kind": "robust", "attack": "square", "norm": "l2", "eps": [1.0], "images": 9, "proposals": 700}
    number = Metric(metric="robust_accuracy", value=0.5, n=9, lower=0.4, upper=0.6, eps=1.0, denominator="all")
    suite = {"name": "kap_cifar10", "version": 2, "budget": "quick"}
    store.write(attacked("nt", 0.5, suite=suite, eval={"name": "square", "fields": fields}, metrics=[number]))
    assert "images: square 9 (700 queries)" in render(join(load("kap_table1"), store))


def test_numbers_that_are_zero_for_want_of_draws_are_counted_apart(tmp_path: Path) -> None:
    store = Store(tmp_path)
    few = {**CERTIFIED, "n": 1000, "sigma": 0.5}
    store.write(certified("cear_rw@sigma=0.5", {0.0: 0.67}, eval={"name": "certified", "fields": few}))
    table = join(load("cear_table1"), store)
    zero = sum(one.too_few for one in table.cells.values())
    assert 0 < zero < table.filled and f"{table.filled} of 324 cells filled, {zero} of them by 0 for want of draws." in render(
        table
    )


def winner(tmp_path: Path, stands: dict[str, int], stored: bool = True, n: int = 200) -> list[str]:
    """Which defenses are bold under PGD, when so many of n images stand, the first ones of each."""
    store = Store(tmp_path)
    for name, count in stands.items():
        made = attacked(name, count / n)
        store.write(made)
        if stored:
            store.write_rows(made, rows_of(np.arange(n) < count))
    table = join(load("smd_table1"), store)
    return [one.row["defense"] for one in table.cells.values() if one.best]


def test_the_best_is_bold_only_where_it_differs_from_every_other(tmp_path: Path) -> None:
    assert winner(tmp_path / "far", {"naive": 20, "gal": 60, "smd": 100}) == ["smd"]
    assert winner(tmp_path / "near", {"naive": 20, "gal": 97, "smd": 100}) == []  # 3 of 3 discordant images: p = 0.25
    # 6 images against nothing are p = 0.03 alone, and 0.06 where two comparisons are made.
    assert winner(tmp_path / "two", {"gal": 94, "smd": 100}) == ["smd"]
    assert winner(tmp_path / "three", {"naive": 94, "gal": 94, "smd": 100}) == []
    assert winner(tmp_path / "without", {"naive": 20, "smd": 100}, stored=False) == []
    assert winner(tmp_path / "alone", {"smd": 100}) == []


def test_a_flagged_number_is_not_crowned(tmp_path: Path) -> None:
    store = Store(tmp_path)
    masked = Finding(kind="zero_gradients", detail="gradients of 90 of 200 images are zero")
    for findings in ([], [masked]):
        for name, count in {"naive": 20, "smd": 100}.items():
            made = attacked(name, count / 200, findings=findings if name == "smd" else [])
            store.write(made)
            store.write_rows(made, rows_of(np.arange(200) < count))
        table = join(load("smd_table1"), store)
        best = [own for own in table.cells.values() if own.best]
        assert [own.row["defense"] for own in best] == ([] if findings else ["smd"])
        assert ("50.0 (!)" in render(table)) == bool(findings) and "10.0 (!)" not in render(table)
    assert "flagged in smd_mnist: smd" in render(table)


def standing(store: Store, defense: str, counts: list[int], **changes: Any) -> None:
    """Of a defense under PGD, a record a training seed: so many of 200 images stand, the first ones."""
    for seed, count in enumerate(counts):
        made = attacked(defense, count / 200, seed=seed, **changes)
        store.write(made)
        store.write_rows(made, rows_of(np.arange(200) < count))


@pytest.mark.parametrize(
    ("counts", "bold"),
    [
        ([40, 41, 42], ["gal"]),
        ([0, 80, 30], []),  # 80 images of 200 stand more often, and over trainings p = 0.26
        ([6, 6, 6], ["gal"]),  # no deviation counts as that of an image: p = 0.009
        ([6, 6], []),  # p = 0.07
        ([4, 4, 4], []),  # trainings agree (p = 0.02), but four images may be chance (p = 0.12)
    ],
)
def test_bold_of_several_seeds_holds_over_trainings(tmp_path: Path, counts: list[int], bold: list[str]) -> None:
    store = Store(tmp_path)
    standing(store, "naive", [0] * len(counts))
    standing(store, "gal", counts)
    table = join(load("smd_table1"), store)
    assert [one.row["defense"] for one in table.cells.values() if one.best] == bold
    assert "of several seeds, over trainings (paired t)" in render(table)


def test_nothing_is_bold_where_another_question_was_asked(tmp_path: Path) -> None:
    """Other images, other settings, other seeds: each alone leaves a far better defense without bold."""
    fields = {**ROBUST, "attack": "pgd", "steps": 7}
    others = {
        "images": {"hashes": {"data": "mnist parquet", "images": "sha256:2"}},
        "settings": {"eval": {"name": "pgd", "fields": fields}},
        "nothing": {},
    }
    for name, changes in others.items():
        store = Store(tmp_path / name)
        standing(store, "naive", [20])
        standing(store, "gal", [100], **changes)
        best = [one.row["defense"] for one in join(load("smd_table1"), store).cells.values() if one.best]
        assert best == ([] if changes else ["gal"]), name
    store = Store(tmp_path / "seeds")
    standing(store, "naive", [20])
    standing(store, "gal", [100, 100, 100])
    assert not any(one.best for one in join(load("smd_table1"), store).cells.values())


def test_damaged_rows_take_the_bold_and_leave_the_table(tmp_path: Path) -> None:
    assert winner(tmp_path, {"naive": 20, "smd": 100}) == ["smd"]
    (rows,) = tmp_path.glob("*/smd/*/*/*.parquet")
    rows.write_bytes(rows.read_bytes()[:100])
    table = join(load("smd_table1"), Store(tmp_path))
    assert sorted(one.value for one in table.cells.values() if one.filled) == [10.0, 50.0]
    assert not any(one.best for one in table.cells.values())


def test_bold_is_written_in_every_format(tmp_path: Path) -> None:
    assert winner(tmp_path, {"naive": 20, "smd": 100}) == ["smd"]
    table = join(load("smd_table1"), Store(tmp_path))
    for fmt, text in {"text": "**50.0**", "md": "**50.0**", "latex": r"\textbf{50.0}", "html": "<b>50.0</b>"}.items():
        assert render(table, fmt).count(text) == 1


def test_success_rates_are_complements_and_lower_is_better(tmp_path: Path) -> None:
    store = Store(tmp_path)
    suite = {"name": "cear_mnist", "version": 1, "budget": "quick"}
    right = Metric(metric="robust_accuracy", value=0.9, n=100, lower=0.8, upper=0.95, eps=1.0, denominator="clean_correct")
    fields = {"kind": "robust", "attack": "autoattack", "norm": "l2", "eps": [1.0], "images": 100}
    store.write(attacked("randsmooth", 0.5, suite=suite, eval={"name": "cear_attack_l2", "fields": fields}, metrics=[right]))
    passed = Metric(
        metric="asr_members", value=0.1, n=90, lower=0.05, upper=0.2, eps=1.0, denominator="ensemble_correct", target="ensemble"
    )
    whole = passed.model_copy(update={"metric": "asr_ensemble", "value": 0.7, "source": "ensemble"})
    fields = {**fields, "kind": "transfer"}
    made = attacked("cear_rw", 0.5, suite=suite, eval={"name": "cear_transfer_l2", "fields": fields}, metrics=[passed, whole])
    store.write(made)
    table = join(load("cear_table3"), store)
    own = cell(table, dataset="mnist", defense="randsmooth", metric="attack_success_rate", norm="l2")
    assert own.value == pytest.approx(10) and own.interval == pytest.approx((5, 20)) and own.lower_is_better
    assert own.difference == pytest.approx(10 - 12.20)
    at = next(i for i, line in enumerate(lines(table)) if line.startswith("MNIST") and "CEAR(RW)" in line)
    assert [line.split() for line in lines(table)[at : at + 5]][-1] == ["white-box", "70.0"]
    assert (
        next(
            row["white-box"] for row in json.loads(render(table, "json")) if row["ours"] == 10.0 and row["defense"] == "cear_rw"
        )
        == "70"
    )


def test_times_come_from_what_records_cost(tmp_path: Path) -> None:
    store = Store(tmp_path)
    clean = attacked(
        "naive", 0.5,
        eval={"name": "clean", "fields": {"kind": "clean", "images": 1000}},
        task={"architecture": "lenet5", "recipe": {"epochs": 5}, "train_images": 20_000},
        cost={"seconds": 2.0, "training_seconds_per_epoch": 3.0, "measured_together": 1.0},
        metrics=[Metric(metric="clean_accuracy", value=0.99, n=1000)],
    )  # fmt: skip
    store.write(clean)
    own = cell(join(load("smd_runtime"), store), defense="naive")
    assert own.value == pytest.approx(3 * 60_000 / 20_000 * 50) and own.printed == 240  # images and epochs of the paper
    assert own.ratio == pytest.approx(450 / 240) and "x 1.9" in render(join(load("smd_runtime"), store))
    store.write(clean.model_copy(update={"cost": {**clean.cost, "training_seconds_per_epoch": 300.0}}))
    assert "x 188" in render(join(load("smd_runtime"), store))
    gal = {"name": "gal", "variant": "smd", "fields": {}}
    store.write(clean.model_copy(update={"defense": gal, "cost": {**clean.cost, "training_seconds_per_epoch": 600.0}}))
    table = join(load("smd_runtime"), store)
    both = [cell(table, defense=name).printed for name in ("naive", "smd")]
    both_told = f"x 2 (paper x {both[1] / both[0]:.2g})"
    assert all(both_told in render(table, fmt) for fmt in ("text", "md", "latex", "html"))
    raw = {row["defense"]: row for row in json.loads(render(table, "json"))}["naive"]
    assert [row["multiple_of_first"] for row in json.loads(render(table, "json"))].count(2.0) == 1
    assert raw["multiple_of_first"] is None
    assert raw["difference"] is None and raw["ratio"] == pytest.approx(45000 / 240), (
        "seconds of two machines have no difference"
    )
    assert "times on: " in render(table)
    suite, who = (
        {"name": "cear_mnist", "version": 1, "budget": "quick"},
        {"name": "cear_rw", "variant": "cear_rw", "fields": {}},
    )
    store.write(clean.model_copy(update={"suite": suite, "defense": who}))
    assert cell(join(load("cear_runtime"), store), dataset="mnist", defense="cear_rw").value == pytest.approx(20)


def test_times_of_another_network_than_the_papers_get_no_ratio(tmp_path: Path) -> None:
    store = Store(tmp_path)
    clean = attacked(
        "randsmooth", 0.5,
        suite={"name": "cear_cifar10", "version": 1, "budget": "quick"},
        eval={"name": "clean", "fields": {"kind": "clean", "images": 1000}},
        task={"architecture": "resnet20", "recipe": {"epochs": 5}},
        cost={"seconds": 2.0},
    )  # fmt: skip
    store.write(clean)
    own = cell(join(load("cear_runtime"), store), dataset="cifar10", defense="randsmooth")
    assert own.row["architecture"] == "resnet110" and own.value == pytest.approx(20) and own.ratio is None
    assert any(line.split() == ["difference", "other", "network"] for line in lines(join(load("cear_runtime"), store)))


def test_of_images_of_others_the_right_source_answers(tmp_path: Path) -> None:
    store = Store(tmp_path)
    given = [
        Metric(
            metric="black_box_accuracy", value=v, n=200, lower=v - 0.05, upper=v + 0.05, eps=0.3, source=s, denominator="all"
        )
        for s, v in (("itself", 0.4), ("naive", 0.6))
    ]
    fields = {**ROBUST, "kind": "black_box", "attack": "pgd", "sources": ["itself", "naive"]}
    store.write(attacked("smd", 0.1, eval={"name": "black_box_pgd", "fields": fields}, metrics=given))
    table = join(load("smd_table2"), store)
    assert cell(table, dataset="mnist", defense="smd", attack="pgd").value == pytest.approx(40)
    assert any(line.split() == ["naive's", "images", "60.0"] for line in lines(table))
    for seed, share in ((1, 0.5), (2, 0.4)):
        other = [one.model_copy(update={"value": share}) for one in given]
        store.write(attacked("smd", 0.1, seed=seed, eval={"name": "black_box_pgd", "fields": fields}, metrics=other))
    assert any(
        line.split() == ["naive's", "images", "50.0", "±", "10.0", "(3)"] for line in lines(join(load("smd_table2"), store))
    )
    assert any(line.split() == ["naive's", "images", "10.0"] for line in lines(join(load("smd_table4"), store)))


def test_an_interval_without_width_says_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    equal = Metric(metric="robust_accuracy", value=0.0, n=5, lower=0.0, upper=0.0, eps=0.3, denominator="all")
    store.write(attacked("naive", 0.1, metrics=[equal]))
    own = cell(join(load("smd_table1"), store), dataset="mnist", defense="naive", attack="pgd")
    assert own.value == 0 and own.interval is None and own.inside is None


def test_a_skipped_question_is_told_and_asks_for_no_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("clean", "fgsm", "r_fgsm", "pgd", "bim", "mim"):
        store.write(attacked("naive", 0.1, name, status="skipped", metrics=[], error="one network only"))
    text = render(join(load("smd_table1"), store))
    assert "makes no sense here: one network only" in text
    assert [line.split()[3].split(",")[0] for line in text.splitlines() if "--suite smd_mnist" in line] == ["adp@members=3"]
    # What an older version of the suite skipped, the present one may ask.
    old = {"name": "smd_mnist", "version": 0, "budget": "quick"}
    store.write(attacked("naive", 0.1, "pgd", suite=old, status="skipped", metrics=[], error="one network only"))
    text = render(join(load("smd_table1"), store))
    assert "bench run --defense naive@members=3 --suite smd_mnist --budget quick --seeds 0 --only pgd --fresh" in text
