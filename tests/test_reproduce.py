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
from bench.wanted import suite as read_once

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
    read_once.cache_clear()
    monkeypatch.setattr(suites, "SUITES", tiny.parent)
    monkeypatch.setattr(layouts, "TABLES", tiny.parent / "tables")
    layouts.TABLES.mkdir()
    (layouts.TABLES / "digits_table1.toml").write_text(LAYOUT)
    frame = print_of("digits")
    monkeypatch.setattr(published, "frame", lambda: frame)
    return tiny.parent / "runs"


@pytest.fixture
def two(paper: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The table for two data sets, answered by tiny and other, whose images are digits, too: no other data is always there."""
    (suites.SUITES / "other.toml").write_text((suites.SUITES / "tiny.toml").read_text().replace('"tiny"', '"other"'))
    text = LAYOUT.replace('["defense"]', '["dataset", "defense"]').replace('["tiny"]', '["tiny"]\nmore = ["other"]')
    (layouts.TABLES / "digits_table1.toml").write_text(text)
    frame = print_of("digits", "more")
    monkeypatch.setattr(published, "frame", lambda: frame)
    monkeypatch.setattr(layouts, "check", lambda layout: None)  # it would ask for a suite about the data set "more"
    return paper


def print_of(*datasets: str) -> pd.DataFrame:
    """Published numbers: three of two defenses on each data set."""
    rows = []
    for dataset in datasets:
        for defense in ("naive", "adp"):
            for attack, eps in (("", ""), ("pgd", 0.02), ("pgd", 0.1)):
                facts = {"defense": defense, "attack": attack, "eps": eps, "dataset": dataset, "members": 2.0, "paper": "smd"}
                whole = {"file": "digits_table1", "value": 50.0, "printed": "50", **facts}
                rows.append({**dict.fromkeys(published.COLUMNS, ""), **whole})
    return pd.DataFrame(rows).assign(unit="percent", metric="accuracy")


def edit(suite: str, **changes: str) -> None:
    """Give keys of a suite other values; a process reads a suite once, and commands are processes."""
    read_once.cache_clear()
    path = suites.SUITES / f"{suite}.toml"
    for name, value in changes.items():
        path.write_text(re.sub(rf"(?m)^{name} = .*$", f"{name} = {value}", path.read_text()))


def times(runs: Path) -> dict[Path, int]:
    """When every record was written."""
    return {path.relative_to(runs): path.stat().st_mtime_ns for path in runs.glob("*/*/*/*/*.json")}


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
    assert re.search(r"memory: 0\.\d+ MB of images on cpu\n +plan: about \d.* from a probe.*; about \d+ MB a worker", text)
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


WORDS = ("reproduce", "digits_table1", "--device", "cpu", "--runs")


def test_what_stands_in_the_way_of_a_suite_is_told_and_the_others_go_on(
    two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records of an older version of a suite: its commands say --fresh, which moves them aside and leaves what answers."""
    assert bench(*WORDS, str(two), monkeypatch=monkeypatch) == 0
    (two / "other/naive@members=2/quick/seed0/pgd.json").unlink()
    edit("tiny", version="2", epochs="3")
    kept = times(two)
    capsys.readouterr()
    assert bench(*WORDS, str(two), monkeypatch=monkeypatch) == 1
    text = capsys.readouterr().out
    assert re.search(r"(?m)^tiny: cannot run: .* answers another request: suite.version was 1, now 2; task.*use --fresh", text)
    assert "6 of 12 cells filled" in text and "to do  naive@members=2, seed 0: pgd" in text, "the other suite did not go on"
    both = "bench run --defense naive@members=2,adp@members=2 --suite tiny --budget quick --seeds 0 --only clean,pgd --fresh"
    there = f"--runs {two}"
    assert f"  bench reproduce digits_table1 --budget quick --fresh {there}\n" in text and f"  {both} {there}\n" in text
    now = times(two)
    assert len(now) == len(kept) + 1 and all(now[path] == at for path, at in kept.items())

    assert bench(*WORDS, str(two), "--fresh", monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    assert "tiny, seeds 0: 0 of 4" in text and "other, seeds 0: 4 of 4" in text and "12 of 12 cells filled" in text
    assert {record.suite["version"] for record in Store(two).records("tiny")} == {2}
    aside = sorted(path.name for path in two.rglob("*.json.old*"))
    assert aside == ["clean.json.old1"] * 2 + ["pgd.json.old1"] * 2 and not list((two / "other").rglob("*.old*"))
    after = times(two)
    assert all(after[path] == at for path, at in now.items() if path.parts[0] == "other")
    assert bench(*WORDS, str(two), "--fresh", monkeypatch=monkeypatch) == 0
    assert times(two) == after and "--fresh" not in capsys.readouterr().out, "what answers was made again"


def test_a_record_without_the_number_is_to_do_and_the_printed_command_makes_it(
    paper: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*WORDS, str(paper), monkeypatch=monkeypatch) == 0
    store = Store(paper)
    for record in store.records():
        if record.defense["name"] == "adp" or record.eval["name"] == "pgd":
            few = [one for one in record.metrics if one.eps == 0.1] if record.eval["name"] == "pgd" else []
            store.write(record.model_copy(update={"metrics": few}))
    kept = times(paper)
    capsys.readouterr()
    assert bench(*WORDS, str(paper), monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    assert "tiny, seeds 0: 1 of 4 records are there" in text and "3 of 6 cells filled" in text and times(paper) == kept
    assert "to do with --fresh  naive@members=2, seed 0: pgd: the record has no such number" in text
    assert "to do with --fresh  adp@members=2, seed 0: clean, pgd: the record has no such number" in text
    commands = [line.split() for line in text.partition(" is filled by")[2].splitlines() if line.startswith("  bench run ")]
    assert [line[3] for line in commands] == ["naive@members=2", "adp@members=2"]
    for line in commands:
        assert line[-3:] == ["--fresh", "--runs", str(paper)]
        assert bench(*line[1:], "--device", "cpu", monkeypatch=monkeypatch) == 0
    assert bench(*WORDS, str(paper), monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    assert "tiny, seeds 0: 4 of 4 records are there" in text and "6 of 6 cells filled" in text and len(times(paper)) == 4


def test_fresh_makes_what_lacks_the_number_and_nothing_else(paper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench(*WORDS, str(paper), monkeypatch=monkeypatch) == 0
    store = Store(paper)
    (one,) = [record for record in store.records() if (record.defense["name"], record.eval["name"]) == ("adp", "clean")]
    path = store.write(one.model_copy(update={"metrics": []}))
    kept = times(paper)
    assert bench(*WORDS, str(paper), "--fresh", monkeypatch=monkeypatch) == 0
    assert {name for name, at in times(paper).items() if at != kept[name]} == {path.relative_to(paper)}
    assert store.read(path).metrics == one.metrics and path.with_suffix(".json.old1").exists()


def test_pieces_of_an_older_question_stop_their_suite_alone(
    two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Run._measure

    def killed(self: Run, pieces: Pieces) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_measure", killed)
    assert bench(*WORDS, str(two), monkeypatch=monkeypatch) == 130
    monkeypatch.setattr(Run, "_measure", real)
    edit("tiny", version="2")
    for _ in range(2):  # the second time the record itself is of the new question, and only the pieces are not
        capsys.readouterr()
        assert bench(*WORDS, str(two), monkeypatch=monkeypatch) == 1
        shown = capsys.readouterr()
        assert re.search(r"(?m)^tiny: .*clean.partial holds pieces of another request: suite.version was 1, now 2", shown.err)
        assert "6 of 12 cells filled" in shown.out
    assert bench(*WORDS, str(two), "--fresh", monkeypatch=monkeypatch) == 0
    assert "12 of 12 cells filled" in capsys.readouterr().out
    assert [path.name for path in two.rglob("*.partial.old*")] == ["clean.partial.old1"]
