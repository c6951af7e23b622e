"""Published numbers are those of the papers, and what is wrong with them stands beside them."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench import published
from bench.data import DATASETS
from bench.registry import registered
from defenses.nets import ARCHITECTURES

OURS = {"fmnist": "fashion_mnist", "tinyimagenet": "tiny_imagenet", "resnet18_widex4": "resnet18_x4", "rfgsm": "r_fgsm"}
"""What the transcription calls by other names."""


def test_it_is_the_transcription() -> None:
    folder = Path(os.environ.get("BENCH_DATA", "")).parent / "published"
    if not os.environ.get("BENCH_DATA") or not folder.is_dir():
        pytest.skip("no transcription beside BENCH_DATA")
    names = sorted(path.name for path in published.PUBLISHED.glob("*.csv"))
    assert names == sorted(path.name for path in folder.glob("*.csv"))
    same = ("paper", "table", "metric", "threat", "norm", "members", "radius", "value", "std", "unit")
    for name in names:
        with (folder / name).open() as theirs, (published.PUBLISHED / name).open() as ours:
            pairs = list(zip(csv.DictReader(theirs), csv.DictReader(ours), strict=True))
        for number, (raw, own) in enumerate(pairs, 2):
            for column in same:
                assert own[column] == raw[column], f"{name}:{number} {column}"
            for column in ("dataset", "architecture", "defense", "attack"):
                assert own[column] == OURS.get(raw[column], raw[column]), f"{name}:{number} {column}"
            assert own["eps"] == raw["epsilon"]
            assert raw["sigma"] in (own["sigma"], own["noise"]), f"{name}:{number} sigma"
            assert not raw["note"] or own["remark"] or own["note"] or raw["note"] == "K=3", f"{name}:{number} lost its note"


def test_names_are_those_of_the_project() -> None:
    rows = published.frame()
    assert list(rows) == list(published.COLUMNS) and len(rows) == 1826
    assert set(rows.paper) == set(published.PAPERS)
    assert set(rows.defense) <= {"", *registered()}
    assert set(rows.dataset) <= {"", *DATASETS} and set(rows.architecture) <= {"", *ARCHITECTURES}
    for flag, column in (("impossible", "remark"), ("suspicious", "remark"), ("conflicting", "remark"), ("inferred", "note")):
        assert all(rows[column][rows.flag == flag] != ""), f"{flag} without its reason"


def test_an_impossible_number_is_flagged_and_never_the_best() -> None:
    cell = {"defense": "cear_rw", "dataset": "cifar10", "sigma": 0.5, "radius": 2.0}
    (row,) = published.known(**cell).itertuples()
    assert (row.value, row.flag) == (5, "impossible") and "3.81 sigma" in row.remark
    assert published.best(**cell) is None
    every = published.best(dataset="cifar10", metric="certified_accuracy", sigma=0.5, radius=2.0)
    assert every is not None and every.value == 0


def test_known_values_can_be_asked_for_fact_by_fact() -> None:
    best = published.best(dataset="cifar100", metric="robust_accuracy", attack="apgd", norm="linf", eps=0.02)
    assert best is not None and (best.defense, best.printed) == ("edlcm", "11.359")
    least = published.best(dataset="mnist", metric="attack_success_rate", norm="l2", eps=1.0)
    assert least is not None and (least.defense, least.printed) == ("cear_minus_gm", "9.07")
    assert set(published.known(paper="smd", attack="pgd", eps=None).eps.isna()) == {True}
    assert published.best(defense="naive", dataset="imagenet") is None
    with pytest.raises(ValueError, match="several metrics"):
        published.best(dataset="mnist")
    with pytest.raises(KeyError):
        published.known(epsilon=0.1)


def test_what_cannot_hold_together_is_marked() -> None:
    rows = published.frame()
    # White-box numbers above the black box, by more than the deviations that are printed for three members allow five trials.
    same = ["dataset", "defense", "attack"]
    of = {number: rows[(rows.file == f"smd_table{number}") & (rows.attack != "")].set_index(same) for number in range(1, 11)}
    scatter = np.hypot(of[3]["std"], of[4]["std"][of[3].index]) / np.sqrt(5)
    for white, black, above, marked in ((1, 2, 27, 19), (5, 6, 36, 24), (7, 8, 36, 22), (9, 10, 3, 1)):
        gap = of[white].value - of[black].value[of[white].index]
        told = of[white].remark.str.contains("images of a surrogate leave less")
        assert list(told) == list(gap > 2.78 * scatter[of[white].index])
        assert set(of[white].flag[told]) == {"suspicious"}
        assert (int((gap > 0).sum()), int(told.sum())) == (above, marked)
    rising = rows[(rows.file == "cear_table2") & (rows.flag == "conflicting")]
    assert list(rising.radius) == [0.4, 0.5] and list(rising.value) == [7, 9]


def test_remarks_quote_the_numbers_that_they_hold_against_the_text() -> None:
    rows = published.frame()
    alike = ("paper", "dataset", "metric", "attack", "source", "members", "eat", "eps")
    quoted = 0
    for _, row in rows[rows.remark.str.contains("although")].iterrows():
        for name, printed in re.findall(r"([A-Z-]+)'s ([0-9.]+)", row.remark):
            same = (rows[list(alike)].fillna(-1) == row[list(alike)].fillna(-1)).all(axis=1)
            found = rows[same & (rows.printed == printed) & (rows.defense == name.lower().replace("-", "_"))]
            assert len(found), f"{row.file}: {row.remark}"
            above = found.value.iloc[0] - row.value
            told = "is level" if abs(above) < 0.2 else "higher, although" if above > 0 else "lower"
            assert told in row.remark, f"{row.file}: {row.remark}"
            quoted += 1
    assert quoted == 18


def test_a_damaged_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "PUBLISHED", tmp_path)
    rows = pd.read_csv(Path(__file__).parent.parent / "leaderboards" / "published" / "smd_runtime.csv", dtype=str)
    rows.assign(flag="wrong").to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(ValueError, match=r"bad\.csv: unknown flag wrong; known are impossible"):
        published.frame.__wrapped__()
    rows.drop(columns="flag").to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(ValueError, match=r"bad\.csv: columns differ.*flag"):
        published.frame.__wrapped__()
