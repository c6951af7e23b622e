"""`bench submit`: what verifies is bundled whole, what was tampered with is refused with the reason and nothing is written."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_verify import edit, edit_rows, hashes

from bench import submit
from bench.data import load
from bench.request import Request
from bench.runner import Run
from bench.store import Store
from bench.submissions import checked, submissions
from bench.verify import verify

ANSWERS = {
    "--name": "Two of them",
    "--paper": "https://example.org/paper.pdf",
    "--code": "none",
    "--contact": "me@example.org",
}
SAID = [word for pair in ANSWERS.items() for word in pair]

Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two members without noise, of two seeds, on `digits`."""
    runs = tmp_path_factory.mktemp("submit") / "runs"
    asked = {"suite": "digits", "budget": "smoke", "only": ("clean", "pgd", "certified"), "device": "cpu", "runs": runs}
    records = Run(Request(defense="naive@members=2", seeds=(0, 1), **asked)).execute()  # type: ignore[arg-type]
    assert [record.status for record in records] == ["success", "success", "skipped"] * 2
    return runs


@pytest.fixture
def runs(fresh: Path, bench: Callable[..., int]) -> Path:
    """A copy of it to tamper with, in the folder that commands run in."""
    return Path(shutil.copytree(fresh, "runs"))


@pytest.fixture
def variant(runs: Path) -> Path:
    return runs / "digits/naive@members=2"


def test_a_run_that_verifies_is_bundled_and_can_be_read_back(bench, variant: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = hashes(Path("runs"))
    assert bench("submit", str(variant), *SAID, "--out", "results") == 0
    out = capsys.readouterr().out
    assert "6 records: 2 skipped, 4 holds but for times; no mismatch" in out
    assert "written to results/digits/naive@members=2" in out
    assert hashes(Path("runs")) == before
    store = Store("results")
    assert store.records() == Store("runs").records() and not store.problems
    for record in store.records():
        if record.status == "success":
            assert store.rows(record).equals(Store("runs").rows(record))
    written = {path.relative_to("results").as_posix() for path in Path("results").rglob("*") if path.is_file()}
    seeds = [f"digits/naive@members=2/smoke/seed{seed}/" for seed in (0, 1)]
    files = ("clean.json", "clean.parquet", "pgd.json", "pgd.parquet", "certified.json")
    assert written == {"digits/naive@members=2/submission.json", *(f"{seed}{file}" for seed in seeds for file in files)}
    ((place, own),) = submissions(store).items()
    assert place == ("digits", "naive@members=2") and own.date == datetime.now(UTC).date()
    assert {f"--{field}": text for field, text in own.answers} == ANSWERS
    assert len(own.files) == 10
    assert not [report for report in verify(Path("results")) if report.mismatches]


def test_a_seed_is_added_by_the_same_answers_and_the_same_again_changes_nothing(bench, variant: Path) -> None:
    for seed in ("seed0", "seed1"):
        assert bench("submit", str(variant / "smoke" / seed), *SAID, "--out", "results") == 0
        assert (Path("results/digits/naive@members=2/smoke") / seed).is_dir()
    problems: list[str] = []
    (own,) = submissions(Store("results"), problems).values()
    assert len(own.files) == 10 and not problems
    before = hashes(Path("results"))
    assert bench("submit", str(variant), *SAID, "--out", "results") == 0
    assert hashes(Path("results")) == before


def test_it_goes_to_the_checkout_s_results(bench, variant: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    clone = Path("clone/leaderboards/suites").absolute()
    monkeypatch.setattr(submit, "SUITES", clone)
    assert bench("submit", str(variant), *SAID) == 2
    assert "is an installed package, no checkout: clone the repository, and give --out" in capsys.readouterr().err
    clone.mkdir(parents=True)
    Path("clone/pyproject.toml").touch()
    assert bench("submit", str(variant), *SAID) == 0
    assert Path("clone/leaderboards/results/digits/naive@members=2/submission.json").is_file()


def moved_out(variant: Path) -> None:
    """A pixel of the first point of seed 0, half a grey level beyond the ball of its eps."""

    def change(points: pd.DataFrame) -> pd.DataFrame:
        point, test = np.frombuffer(points.x_adv[0], np.float32).copy(), load("digits", "test")
        image = test.floats(test.ids == points.id[0]).numpy().ravel()
        point[300] = image[300] + (1 if image[300] < 0.5 else -1) * (points.eps[0] + 0.002)
        points.at[0, "x_adv"] = point.tobytes()
        return points

    edit_rows(variant / "smoke/seed0/pgd.examples.parquet", change)


def other_weights(variant: Path) -> None:
    """Every network of seed 0 has the weights of seed 1."""
    notes = {path: json.loads(path.read_text())["part"]["fields"] for path in (variant.parent / "parts").glob("*.json")}
    places = {(own["seed"], own["member"]): path.with_suffix(".safetensors") for path, own in notes.items()}
    for member in (0, 1):
        shutil.copy(places[1, member], places[0, member])


def number(variant: Path) -> None:
    edit(variant / "smoke/seed0/pgd.json", lambda record: record["metrics"][0].update(value=0.987))


def deleted_row(variant: Path) -> None:
    edit_rows(variant / "smoke/seed1/clean.parquet", lambda rows: rows.drop(index=7))


def of(name: str, **fields: Any) -> Edit:
    """Sets fields of a record of seed 0."""
    return lambda variant: edit(variant / f"smoke/seed0/{name}.json", lambda record: record.update(fields))


def setting(variant: Path) -> None:
    edit(variant / "smoke/seed0/pgd.json", lambda record: record["eval"]["fields"].update(steps=1))


def unknown_attack(variant: Path) -> None:
    edit(variant / "smoke/seed0/pgd.json", lambda record: record["eval"]["fields"].update(attack="mine"))


def unknown_kind(variant: Path) -> None:
    edit(variant / "smoke/seed0/pgd.json", lambda record: record["eval"].update(fields={"kind": "mine"}))


def in_rows(variant: Path) -> None:
    edit_rows(variant / "smoke/seed0/clean.parquet", lambda rows: rows.assign(x_adv=b"0"))


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (number, "pgd.json: robust_accuracy, eps 0.05, denominator all: value: stored 0.987, recomputed"),
        (deleted_row, "clean.json: rows: stored of 49 images, recomputed 50 images were asked for"),
        (other_weights, "hashes.weights: stored sha256:"),
        (moved_out, "eps 0.05: stored in the linf ball of 0.05, recomputed 0.052"),
        (setting, "eval.fields.steps: stored 1, recomputed 5"),
        (unknown_attack, "eval.fields.attack: stored mine, recomputed pgd"),
        (unknown_kind, "refused: rows of "),
        (of("pgd", status="error", error="Traceback\nValueError: no"), "pgd.json is error (ValueError: no)"),
        (of("pgd", status="running"), "pgd.json is running (it is not finished)"),
        (of("pgd", status="skipped", error="hard"), "pgd.json was skipped, and has numbers"),
        (of("pgd", format=2), "pgd.json is unreadable (format 2; this version reads 1)"),
        (of("certified", seed=3), "certified.json is not where its record belongs"),
        (in_rows, "clean.parquet holds adversarial examples"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_refused_says_why_and_writes_nothing(
    bench, variant: Path, capsys: pytest.CaptureFixture[str], tamper: Edit, told: str
) -> None:
    tamper(variant)
    assert bench("submit", str(variant), *SAID, "--out", "results") == 1
    err = capsys.readouterr().err
    assert "refused" in err and told in err and "Traceback" not in err
    assert not Path("results").exists()


def test_what_is_there_is_never_replaced(bench, variant: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("submit", str(variant), *SAID, "--out", "results") == 0
    before = hashes(Path("results"))
    capsys.readouterr()
    assert bench("submit", str(variant), *SAID[:1], "Somebody else", *SAID[2:], "--out", "results") == 1
    assert "was submitted by 'Two of them' on 20" in (err := capsys.readouterr().err) and "with another name" in err
    edit(variant / "smoke/seed0/clean.json", lambda record: record["cost"].update(seconds=1.0))
    assert bench("submit", str(variant), *SAID, "--out", "results") == 1
    assert "holds other results already (smoke/seed0/clean.json)" in capsys.readouterr().err
    assert hashes(Path("results")) == before
    Path("results/digits/naive@members=2/submission.json").write_text("{")
    assert bench("submit", str(variant), *SAID, "--out", "results") == 1
    assert "submission.json is no submission" in capsys.readouterr().err


def test_all_results_together_have_a_limit(bench, variant: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(submit, "LIMIT", 10_000)
    assert bench("submit", str(variant), *SAID, "--out", "results") == 1
    assert "all results together may have 0 MB" in capsys.readouterr().err
    assert not Path("results").exists() and submit.LIMIT == 10_000


def test_a_failure_in_the_middle_leaves_what_was_there(bench, variant: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert bench("submit", str(variant / "smoke/seed0"), *SAID, "--out", "results") == 0
    before, replace = hashes(Path("results")), os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "naive@members=2":
            monkeypatch.setattr(os, "replace", replace)
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert bench("submit", str(variant), *SAID, "--out", "results") == 1
    assert "No space left on device); nothing was submitted" in capsys.readouterr().err
    assert hashes(Path("results")) == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "missing: --name (what the board calls it"),
        (SAID[:6], "missing: --contact (an e-mail address or a page"),
        (("nowhere", *SAID), "nowhere is no folder; give RUNS/SUITE/VARIANT"),
        (("runs", *SAID), "one variant is submitted at a time, in runs are naive@members=2; give e.g. "),
        (("runs/digits/parts", *SAID), "there is no record at or below"),
        ((*SAID, "--defense", "no.py"), "there is no file no.py"),
    ],
)
def test_a_wrong_request_is_one_line_and_code_2(bench, variant: Path, capsys, words: tuple[str, ...], told: str) -> None:
    run = () if words and not words[0].startswith("--") else (str(variant),)
    assert bench("submit", *run, *words, "--out", "results") == 2
    err = capsys.readouterr().err
    assert told in err and "Traceback" not in err and not Path("results").exists()


@pytest.mark.parametrize(
    ("field", "text", "told"),
    [
        ("name", " ", "1 to 80 characters, got 0"),
        ("name", "x" * 81, "1 to 80 characters, got 81"),
        ("name", "a\x1b[31mb", "cannot be seen"),
        ("name", "a\u202eb", "cannot be seen"),
        ("paper", "javascript:alert(1)", "begins with https://"),
        ("paper", "https://", "begins with https://"),
        ("paper", "https://a.b/\"onclick='x'", "begins with https://"),
        ("code", "https://user@evil.org", "begins with https://"),
        ("code", "https://example.org/\nx", "cannot be seen"),
        ("code", f"https://example.org/{'x' * 300}", "1 to 300 characters"),
        ("contact", "me", "an e-mail address"),
        ("contact", "none", "an e-mail address"),
    ],
)
def test_answers_are_checked(field: str, text: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"--{field}: .*{told}"):
        checked(field, text)


def test_answers_that_can_be_used() -> None:
    assert checked("name", "  Ensembles für alle 集成 ") == "Ensembles für alle 集成"
    assert checked("contact", "https://example.org/~me") == "https://example.org/~me"


def test_on_a_terminal_it_asks_until_it_can_use_the_answer(
    bench, variant: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.StringIO("Two of them\nnot an address\nnone\n")
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    assert bench("submit", str(variant), *SAID[4:], "--out", "results") == 0
    assert "an address that begins with https://" in "".join(capsys.readouterr())
    (own,) = submissions(Store("results")).values()
    assert (own.answers.name, own.answers.paper, own.answers.contact) == ("Two of them", "none", "me@example.org")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda own: own["answers"].update(paper="javascript:alert(1)"), "begins with https://"),
        (lambda own: own["answers"].update(name="x" * 10_000_000), "1 to 80 characters"),
        (lambda own: own.update(variant="randsmooth"), "says that it is of 'randsmooth'"),
        (lambda own: own.update(files={"../../x/y": "sha256:0"}), "files are BUDGET/SEED/FILE"),
        (lambda own: own.update(files={"smoke/seed0/clean.json": "sha256:0"}), "1 files are not as they were submitted"),
        (lambda own: own.update(more=1), "more: Extra inputs"),
    ],
)
def test_a_submission_file_that_was_changed_is_a_problem_and_no_record_is_lost(bench, variant: Path, change, told: str) -> None:
    assert bench("submit", str(variant), *SAID, "--out", "results") == 0
    edit(Path("results/digits/naive@members=2/submission.json"), change)
    problems: list[str] = []
    submissions(Store("results"), problems)
    assert len(problems) == 1 and told in problems[0] and len(problems[0]) < 1000
    assert len(Store("results").records()) == 6
