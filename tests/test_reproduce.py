"""``bench reproduce``: the plan before the work, the work in pieces that survive a kill, the table after it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pandas as pd
import pytest
from elsewhere import Scripted

from bench import cli, published, suites
from bench.papers import layout as layouts
from bench.papers.layout import load
from bench.papers.reproduce import plan, prepare
from bench.pieces import Pieces
from bench.progress import Progress
from bench.request import Wish
from bench.runner import Run
from bench.store import Store

LAYOUT = """
published = "digits_table1"
title = "Digits, table 1"
caption = "Accuracy of two ensembles"
rows = ["defense"]
columns = ["attack", "eps"]
seeds = [0]
[suites]
digits = ["tiny"]
[[runs]]
run = "{defense}@members={members}"
[[answers]]
of = { attack = "" }
eval = "clean"
metric = "clean_accuracy"
[[answers]]
eval = "pgd"
metric = "robust_accuracy"
facts = { eps = "{eps}", denominator = "all" }
"""


@pytest.fixture
def paper(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of two defenses, three numbers each, answered by the tiny suite; returns a folder for runs."""
    rows = []
    for defense in ("naive", "adp"):
        for attack, eps in (("", ""), ("pgd", 0.02), ("pgd", 0.1)):
            facts = {"defense": defense, "attack": attack, "eps": eps, "dataset": "digits", "members": 2.0, "paper": "smd"}
            rows.append(
                {**dict.fromkeys(published.COLUMNS, ""), "file": "digits_table1", "value": 50.0, "printed": "50", **facts}
            )
    frame = pd.DataFrame(rows).assign(unit="percent", metric="accuracy")
    monkeypatch.setattr(published, "frame", lambda: frame)
    monkeypatch.setattr(suites, "SUITES", tiny.parent)
    monkeypatch.setattr(layouts, "TABLES", tiny.parent / "tables")
    layouts.TABLES.mkdir()
    (layouts.TABLES / "digits_table1.toml").write_text(LAYOUT)
    return tiny.parent / "runs"


def told(runs: Path) -> str:
    wish = Wish(runs=runs, device="cpu")
    steps = prepare(load("digits_table1"), wish, Progress(None))
    return "\n".join(plan(load("digits_table1"), wish, steps))


def bench(*words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_plan_says_what_is_to_do_and_runs_nothing(
    paper: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        bench("reproduce", "digits_table1", "--dry-run", "--runs", str(paper), "--device", "cpu", monkeypatch=monkeypatch) == 0
    )
    text = capsys.readouterr().out
    assert "tiny, seeds 0: 0 of 4 records are there" in text
    assert "to do  naive@members=2, seed 0: clean, pgd" in text and "to do  adp@members=2, seed 0: clean, pgd" in text
    assert "certified" not in text, "an evaluation that the table does not ask for"
    assert re.search(
        r"memory: 0\.\d+ MB of images on cpu; of networks and attacks unknown\n +plan: about \d.* from a probe", text
    )
    assert not paper.exists()


def test_a_killed_run_goes_on_and_the_table_is_filled(
    paper: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, real = [], Run._measure

    def killed(self: Run, pieces: Pieces) -> None:
        measured.append([one.job.blank.eval["name"] for one in pieces.ready])
        if len(measured) == 3:
            raise KeyboardInterrupt
        real(self, pieces)

    words = ("reproduce", "digits_table1", "--runs", str(paper), "--device", "cpu")
    monkeypatch.setattr(Run, "_measure", killed)
    assert bench(*words, monkeypatch=monkeypatch) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    kept = {path: path.stat().st_mtime_ns for path in paper.glob("*/*/*/*/*.parquet")}
    assert {path.name for path in kept} == {"clean.parquet", "pgd.parquet", "pgd.examples.parquet"}
    monkeypatch.setattr(Run, "_measure", real)
    assert bench(*words, monkeypatch=monkeypatch) == 0
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items()), "what was finished was computed again"
    text = capsys.readouterr().out
    assert "2 of 4 records are there" in text and "Budget quick (reduced budget): 6 of 6 cells filled" in text
    assert "4 of 4 records are there" in told(paper) and "plan:" not in told(paper)
    # Other seeds cost what this one did: two networks of two members, and four evaluations.
    wish = Wish(runs=paper, device="cpu", seeds=(1,))
    later = "\n".join(plan(load("digits_table1"), wish, prepare(load("digits_table1"), wish, Progress(None))))
    assert "0 of 4 records" in later and re.search(r"plan: about .* 4 estimates from stored records, \d+ from a probe\)", later)
    assert {record.eval["name"] for record in Store(paper).records()} == {"clean", "pgd"}


def test_what_lacks_its_data_is_named_and_fails(
    paper: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (suites.SUITES / "tiny.toml").read_text()
    (suites.SUITES / "tiny.toml").write_text(text.replace("images = 30", "images = 1000000"))
    words = ("reproduce", "digits_table1", "--runs", str(paper), "--device", "cpu")
    assert bench(*words, monkeypatch=monkeypatch) == 1
    assert "tiny: cannot run: tiny: asks for 1000000 test" in capsys.readouterr().out


def test_all_suites_of_a_table_use_the_workers_that_are_asked_for(paper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Scripted()
    monkeypatch.setattr("bench.executors.opened", lambda *asked: workers if asked == ("ray", "auto", "cpu") else None)
    words = ("--executor", "ray", "--address", "auto", "--device", "cpu", "--runs", str(paper))
    assert bench("reproduce", "digits_table1", *words, monkeypatch=monkeypatch) == 0
    assert workers.seen and workers.closed
    assert len([record for record in Store(paper).records() if record.status == "success"]) == 4


def test_an_unknown_executor_is_refused(
    paper: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("reproduce", "digits_table1", "--executor", "slurm", monkeypatch=monkeypatch) == 2
    assert "--executor: unknown 'slurm'; known are local, ray" in capsys.readouterr().err
