"""Paired comparisons: tests with known answers, differences by hand, and the command."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench import cli
from bench.compare import Between, compare, notes, summary, table
from bench.differences import Difference, difference
from bench.metrics import holm, mcnemar, over_images, over_trainings, paired_difference, sign_flip, wilson
from bench.request import Request
from bench.runner import Run
from bench.store import Finding, Store


def test_mcnemar_is_a_fair_coin_over_the_discordant_images() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32) and mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(10, 10) == pytest.approx(1.0)
    assert mcnemar(2, 8) == pytest.approx(2 * sum(stats.binom.pmf(k, 10, 0.5) for k in range(3)))


def test_newcombes_interval_has_a_width_where_no_image_differs_and_covers_as_it_says() -> None:
    right, wrong = np.ones(50, bool), np.zeros(50, bool)
    low, high = paired_difference(wrong, wrong)
    assert high == pytest.approx(wilson(0, 50)[1]) and low == -high, "nothing fell to either: each may be above 0 elsewhere"
    assert paired_difference(right, wrong) == pytest.approx((1 - np.hypot(*[wilson(0, 50)[1]] * 2), 1))
    # By hand: 36 right by both, 12 by the first alone, 2 by the second alone.
    first = np.repeat([True, True, False], [36, 12, 2])
    second = np.repeat([True, False, True], [36, 12, 2])
    (low_a, high_a), (low_b, high_b), phi = wilson(48, 50), wilson(38, 50), -24 / np.sqrt(48 * 2 * 38 * 12)
    down, up = np.array([0.96 - low_a, high_b - 0.76]), np.array([high_a - 0.96, 0.76 - low_b])
    expected = [0.2 - np.sqrt(down @ down - 2 * phi * down.prod()), 0.2 + np.sqrt(up @ up - 2 * phi * up.prod())]
    assert paired_difference(first, second) == pytest.approx(expected)
    low, high = paired_difference(second, first)
    assert (-high, -low) == pytest.approx(expected)
    rng, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        draw = rng.choice(4, 50, p=[0.6, 0.15, 0.05, 0.2])
        low, high = paired_difference((draw == 0) | (draw == 1), (draw == 0) | (draw == 2))
        covered += low <= 0.1 <= high
    assert 0.93 < covered / 2000 < 0.98


def test_holm_multiplies_the_smallest_most_and_never_reorders() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_monotone_and_no_smaller_than_what_it_corrects(ps: list[float]) -> None:
    corrected = holm(ps)
    assert all(p <= q <= 1 for p, q in zip(ps, corrected, strict=True))
    order = np.argsort(ps, kind="stable")
    assert all(corrected[a] <= corrected[b] for a, b in pairwise(order))


def test_sign_flips_are_exact_for_few_and_uniform_under_no_difference() -> None:
    """All of 8 differences 1: only the two constant signs of 256 reach the sum. Under symmetry p < .05 in 5 % of samples."""
    assert sign_flip(np.ones(8)) == pytest.approx(2 / 256, abs=0.004)
    assert sign_flip(np.zeros(5)) == 1.0
    rng = np.random.default_rng(1)
    low = sum(sign_flip(rng.normal(size=40), flips=199) <= 0.05 for _ in range(1000))
    assert 25 <= low <= 80
    assert sign_flip(rng.normal(size=40) + 2) == pytest.approx(1e-4)


def test_over_trainings_is_students_paired_t() -> None:
    gaps = np.array([0.0, 4.0, 1.5])  # of GAL on Fashion-MNIST under PGD: mean 1.8, but 0 once
    assert over_trainings(gaps, 0.0) == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue) == pytest.approx(0.257, abs=5e-4)
    assert over_trainings(-gaps, 0.0) == over_trainings(gaps, 0.0)
    two = np.array([9.0, 11.0])
    assert over_trainings(two, 0.5) == pytest.approx(stats.ttest_1samp(two, 0).pvalue)
    for nothing in (np.zeros(3), np.array([-1.0, 1.0])):
        assert over_trainings(nothing, 0.5) == over_trainings(nothing, 0.0) == 1


def test_seeds_that_agree_exactly_prove_no_more_than_seeds_that_are_an_image_apart() -> None:
    """By hand: the deviation is a step; of 4 steps, t = 4 sqrt(2) with one degree of freedom, whose p is 1 - 2 atan(t) / pi."""
    assert over_trainings(np.full(2, 2.0), 0.5) == pytest.approx(1 - 2 * np.arctan(4 * 2**0.5) / np.pi)
    assert over_trainings(np.full(2, 2.0), 0.5) > 0.1 and over_trainings(np.full(5, 2.0), 0.5) < 0.001


def verdicts(right: int, images: int = 100) -> pd.Series:
    return pd.Series(np.arange(images) < right)


def test_verdicts_of_one_seed_go_through_mcnemar() -> None:
    """Twenty images against none are p = 2e-6, which signs never reach."""
    row = difference("pgd", "accuracy", [(verdicts(70), verdicts(50))])
    assert row.p == mcnemar(20, 0) < 1e-5 and (row.trainings, row.again) == (None, "one seed")
    crossed = pd.Series([True] * 3 + [False] * 9), pd.Series([False] * 3 + [True] * 8 + [False])
    assert difference("pgd", "accuracy", [crossed]).p == mcnemar(3, 8)
    parts = difference("acr", "radius", [(verdicts(70) * 0.7, verdicts(50) * 0.7)])
    assert parts.p == sign_flip(np.repeat([0.0, 0.7, 0.0], [50, 20, 30])) == pytest.approx(1e-4)


def test_of_several_seeds_it_is_told_whether_trainings_agree() -> None:
    """Of 60 images, 20, 0 and 40 that stand more: beyond chance for these networks, and nothing about others."""
    uneven = difference("pgd", "accuracy", [(verdicts(30 + more), verdicts(30)) for more in (20, 0, 40)])
    alike = difference("pgd", "accuracy", [(verdicts(30 + more), verdicts(30)) for more in (20, 19, 21)])
    assert uneven.p == alike.p == pytest.approx(1e-4)
    assert uneven.trainings == pytest.approx(stats.ttest_1samp([20, 0, 40], 0).pvalue)
    assert alike.trainings == pytest.approx(stats.ttest_1samp([20, 19, 21], 0).pvalue) and alike.trainings < 0.001
    # What trainings agree on may still be the chance of few images.
    few = difference("pgd", "accuracy", [(verdicts(52), verdicts(50))] * 9)
    means = verdicts(52).to_numpy(float), verdicts(50).to_numpy(float)
    assert few.trainings == few.p == over_images(*means) == mcnemar(2, 0)


def test_seeds_that_agree_exactly_have_the_step_of_an_image() -> None:
    row = difference("pgd", "accuracy", [(verdicts(60), verdicts(50))] * 2)
    assert row.trainings == pytest.approx(over_trainings(np.full(2, 0.1), 0.01))


def test_sums_that_float32_cannot_tell_apart_do_not_differ() -> None:
    sixths = np.array([1 / 6, 5 / 6, 1 / 3], dtype="float32")
    a, b = pd.Series(sixths), pd.Series(np.array([5 / 6, 1 / 6, 1 / 3], dtype="float32") + np.float32(1e-9))
    row = difference("diversity", "share", [(a, b), (a, a + 1e-6)])
    assert row.each == (0.0, pytest.approx(-1e-6, rel=0.1)) and row.difference == pytest.approx(-5e-7, rel=0.1)
    assert difference("diversity", "share", [(a, b)]).difference == 0.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """naive and adp on digits, two seeds."""
    folder = tmp_path_factory.mktemp("compare")
    suite = folder / "pair.toml"
    suite.write_text(
        'name = "pair"\nversion = 1\ndataset = "digits"\narchitecture = "lenet5"\ntrain_images = 128\nvalidation_images = 20\n'
        '[recipe]\nepochs = 3\nbatch = 32\noptimizer = "adam"\nlr = 0.01\n'
        '[evals.clean]\nkind = "clean"\nimages = 60\n'
        '[evals.fgsm]\nkind = "robust"\nattack = "fgsm"\nnorm = "linf"\neps = ["0.02", "0.1"]\nimages = 60\n'
        '[evals.diversity]\nkind = "diversity"\nimages = 20\ndistilled = 10\n'
    )
    request = Request(defense="naive,adp", suite=str(suite), device="cpu", runs=folder / "runs", seeds=(0, 1))
    records = Run(request).execute()
    assert all(record.status == "success" for record in records)
    return Store(folder / "runs")


def of(rows: list[Difference], evaluation: str, number: str) -> Difference:
    (row,) = [row for row in rows if (row.evaluation, row.number) == (evaluation, number)]
    return row


def test_differences_are_those_of_the_records_numbers(store: Store) -> None:
    rows = compare(store, Between("adp", "naive", "pair"))
    values = {(r.defense["variant"], r.seed, m.metric, m.eps): m.value for r in store.records() for m in r.metrics if m.n == 60}
    clean = of(rows, "clean", "clean accuracy")
    assert clean.n == 60 and clean.seeds == 2
    for seed in (0, 1):
        apart = values["adp", seed, "clean_accuracy", None] - values["naive", seed, "clean_accuracy", None]
        assert clean.each[seed] == pytest.approx(apart)
    assert clean.difference == pytest.approx(sum(clean.each) / 2) and clean.lower <= clean.difference <= clean.upper
    fgsm = of(rows, "fgsm", "accuracy at eps 0.1")
    assert fgsm.a == pytest.approx(sum(values["adp", seed, "robust_accuracy", 0.1] for seed in (0, 1)) / 2)
    turned = of(compare(store, Between("naive", "adp", "pair")), "fgsm", "accuracy at eps 0.1")
    assert turned.difference == pytest.approx(-fgsm.difference) and turned.p == pytest.approx(fgsm.p)


def test_what_adp_is_for_is_shown_on_the_same_images(store: Store) -> None:
    rows = compare(store, Between("adp", "naive", "pair", only=("diversity",)))
    assert {row.evaluation for row in rows} == {"diversity"}
    diversity = of(rows, "diversity", "log diversity")
    assert diversity.difference > 0 and diversity.n == 20
    assert of(rows, "diversity", "vulnerability diversity").n == 10
    assert replace(diversity, holm=0.01).verdict == "higher" and replace(diversity, holm=0.2).verdict == "no difference shown"


def test_the_sentence_counts_what_differs_and_names_the_clearest() -> None:
    def row(number: str, difference: float, holm: float) -> Difference:
        ends = (difference - 0.01, difference + 0.01)
        return Difference("pgd", number, 100, 1, 0.5, 0.5 - difference, difference, *ends, (difference,), holm, holm)

    rows = [
        row("accuracy at eps 0.1", 0.2, 0.001),
        row("accuracy at eps 0.2", 0.3, 0.001),
        row("accuracy at eps 0.3", 0.05, 0.5),
    ]
    assert summary(rows, "gal", "naive") == (
        "Beyond chance gal is higher than naive in 2 numbers (most clearly in pgd: accuracy at eps 0.2, by 30.0 points, "
        "95 % interval 29.0 to 31.0); 1 of 3 numbers show no difference. That is for these networks: one training seed does "
        "not tell whether networks trained again would differ, too."
    )
    lower = summary([row("ln ED", -0.2, 0.001)], "gal", "naive")
    assert lower.startswith(
        "Beyond chance gal is lower than naive in 1 number (pgd: ln ED, by 0.2, 95 % interval 0.19 to 0.21). That is"
    )
    assert "none shows a difference" in summary(rows[2:], "gal", "naive")


def test_p_of_all_rows_are_corrected_together(store: Store) -> None:
    rows = compare(store, Between("adp", "naive", "pair"))
    assert [row.holm for row in rows] == holm([row.p for row in rows])
    assert [row.trainings_holm for row in rows] == holm([row.trainings or 0.0 for row in rows])
    assert any(row.p < row.holm < 1 for row in rows), "there is nothing that a correction would change"
    assert any(row.trainings_holm < 1 and row.trainings < row.trainings_holm for row in rows)  # type: ignore[operator]
    assert all(row.p <= row.trainings for row in rows if row.trainings is not None)


def test_what_one_seed_alone_has_counts_in_the_correction_of_trainings(store: Store, tmp_path: Path) -> None:
    """Else a difference could hold for networks trained again that is none for these."""
    copied = Store(tmp_path)
    for record in store.records():
        if record.seed == 0 or record.eval["name"] == "clean":
            copied.write(record)
            copied.write_rows(record, store.rows(record))
    clean, *others = compare(copied, Between("adp", "naive", "pair"))
    assert clean.seeds == 2 and len(others) > 5 and {row.again for row in others} == {"one seed"}
    assert clean.trainings is not None and clean.trainings_holm == min(1.0, clean.trainings * (1 + len(others)))


def test_the_words_follow_the_corrected_p() -> None:
    row = Difference("pgd", "accuracy", 100, 3, 0.5, 0.4, 0.1, 0.08, 0.12, (0.1,) * 3, 0.001, 0.01, 0.02, 0.2)
    assert (row.verdict, row.again) == ("higher", "not shown")
    other = replace(row, number="accuracy at eps 0.2", trainings_holm=0.04)
    assert other.again == "higher" and replace(other, difference=-0.1).again == "lower"
    assert summary([row], "gal", "naive").endswith(
        "That is for these networks; that networks trained again would differ, too, is shown in none."
    )
    assert summary([row, other], "gal", "naive").endswith("too, is shown in 1 of these 2 (pgd: accuracy at eps 0.2).")
    text = table([row, replace(other, trainings=None, trainings_holm=None)], "gal", "naive")
    assert "not shown (p 0.2)" in text and "one seed" in text and "paired t over seeds" in text


def test_a_defense_does_not_differ_from_itself(store: Store) -> None:
    rows = compare(store, Between("naive", "naive", "pair"))
    for row in rows:
        assert (row.difference, row.p, row.holm, row.verdict) == (0, 1, 1, "no difference shown")
        assert row.lower is None or row.lower < 0 < row.upper  # type: ignore[operator]
    assert notes(store, Between("naive", "naive", "pair"), rows) == []
    assert "[0.0, 0.0]" not in table(rows, "naive", "naive") and "-0.0" not in table(rows, "naive", "naive")


def test_what_is_damaged_is_told_and_the_rest_is_compared(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs/pair"
    shutil.copytree(store.root / "pair", folder)
    rows, broken = folder / "adp/quick/seed1/fgsm.parquet", folder / "naive/quick/seed0/diversity.json"
    for path in (rows, broken):
        path.write_bytes(path.read_bytes()[:100])
    monkeypatch.setattr(sys, "argv", ["bench", "compare", "adp", "naive", "--suite", "pair", "--runs", str(folder.parent)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    text = capsys.readouterr().out
    assert not end.value.code and "clean" in text
    assert "fgsm (rows that cannot be read: see bench verify)" in text and f"{broken} is no record" in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("gal", "naive"), "unknown 'gal'; known are adp, naive"),
        (("adp", "naive", "--budget", "paper"), "no finished records of budget paper under "),
        (("adp", "naive", "--suite", "pear"), "of that suite: unknown 'pear'; did you mean 'pair'?"),
        (("adp@members=5", "naive"), "unknown 'adp@members=5'; known are adp, naive"),
        (("adp", "naive", "--only", "clean,clen"), "--only: unknown evaluation 'clen'; did you mean 'clean'? Known are clean"),
        (("adp", "naive", "--format", "pdf"), "--format: unknown 'pdf'; known are csv, json, md, text"),
    ],
)
def test_wrong_requests_get_one_line(
    store: Store, words: tuple[str, ...], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = () if "--suite" in words else ("--suite", "pair")
    monkeypatch.setattr(sys, "argv", ["bench", "compare", *suite, "--runs", str(store.root), *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr()
    assert end.value.code == 2 and text in shown.err and len(shown.err.splitlines()) == 1 and not shown.out


def test_variants_are_compared_as_commands_write_them(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three members are the default, so that records call both by their names alone."""
    shown = []
    for words in (("adp", "naive"), ("adp@members=3", "naive@members=3")):
        monkeypatch.setattr(sys, "argv", ["bench", "compare", *words, "--suite", "pair", "--runs", str(store.root)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "Beyond chance adp is" in shown[0]


@pytest.mark.parametrize("fmt", ["text", "md", "csv", "json"])
def test_every_format_holds_every_row(store: Store, fmt: str) -> None:
    rows = compare(store, Between("adp", "naive", "pair"))
    text = table(rows, "adp", "naive", fmt)
    assert all(row.number in text for row in rows)
    if fmt == "json":
        assert json.loads(text)[0]["difference"] == pytest.approx(rows[0].difference, abs=1e-9)
    elif fmt != "csv":
        assert "Paired on the same images" in text and f"{100 * rows[0].a:.1f}" in text


def test_other_images_are_not_compared(store: Store, tmp_path: Path) -> None:
    """Records of the same name that asked about other images share no number."""
    copied = Store(tmp_path)
    for record in store.records():
        changed = {**record.hashes, "images": "sha256:0"} if record.defense["name"] == "adp" else record.hashes
        twin = record.model_copy(update={"hashes": changed})
        copied.write(twin)
        copied.write_rows(twin, store.rows(record))
    with pytest.raises(ValueError, match="share no number"):
        compare(copied, Between("adp", "naive", "pair"))


def test_it_is_told_what_was_not_compared_and_who_is_flagged(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Store(tmp_path)
    masked = Finding(kind="zero_gradients", detail="gradients of 50 of 60 images are zero")
    for record in store.records():
        naive, evaluation = record.defense["name"] == "naive", record.eval["name"]
        if naive and evaluation == "diversity":
            continue
        fields = record.eval["fields"] | ({"random_start": True} if naive and evaluation == "fgsm" else {})
        changes = {"eval": record.eval | {"fields": fields}, "findings": [masked] if naive and record.seed == 1 else []}
        own = record.model_copy(update=changes)
        copied.write(own)
        copied.write_rows(own, store.rows(record))
    rows = compare(copied, Between("adp", "naive", "pair"))
    flagged, rest = notes(copied, Between("adp", "naive", "pair"), rows)
    assert flagged == f"naive is flagged (seed 1): read what `bench diagnose {tmp_path / 'pair/naive'}` says first."
    assert rest == "Not compared: diversity (naive has none); fgsm (asked otherwise, or of other images)."
    assert rest in table(rows, "adp", "naive", notes=[rest])
    words = ("adp", "naive", "--suite", "pair", "--runs", str(tmp_path), "--format", "csv")
    monkeypatch.setattr(sys, "argv", ["bench", "compare", *words])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr()
    assert len(pd.read_csv(io.StringIO(shown.out))) == len(rows) and shown.err.splitlines() == [flagged, rest]
    with pytest.raises(ValueError, match=r"share no number .*: diversity \(naive has none\)"):
        compare(copied, Between("adp", "naive", "pair", only=["diversity"]))
    assert notes(store, Between("adp", "naive", "pair"), compare(store, Between("adp", "naive", "pair"))) == []


def test_a_p_that_random_signs_cannot_go_below_is_a_bound() -> None:
    far = pd.Series(np.linspace(1, 2, 100))
    row = difference("certified", "average certified radius", [(far, far * 0)])
    assert replace(row, holm=0.0047).p_in_words == "<= 0.0047"
    assert pd.read_csv(io.StringIO(table([row], "a", "b", "csv"))).p_is_bound.tolist() == [True]
    assert replace(row, p=0.01, holm=0.0047).p_in_words == "0.0047"


def test_records_of_before_a_field_are_compared(store: Store, tmp_path: Path) -> None:
    copied = Store(tmp_path)
    for record in store.records():
        fields = {name: value for name, value in record.eval["fields"].items() if name not in ("nearest", "engine")}
        twin = record.model_copy(update={"eval": record.eval | {"fields": fields}})
        copied.write(twin)
        copied.write_rows(twin, store.rows(record))
    assert compare(copied, Between("adp", "naive", "pair")) == compare(store, Between("adp", "naive", "pair"))
