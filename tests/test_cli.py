"""The command line as a user meets it: output, exit codes, and one clear line for every wrong request."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import cli
from bench.registry import resolve


def call(*words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of ``bench words``, in this process."""
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_a_run_prints_numbers_and_where_everything_is(bench, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("run", "--defense", "cear_rw@members=2", "--suite", str(tiny), "--device", "cpu") == 0
    out = capsys.readouterr().out
    for expected in ("cear_rw@members=2", "pgd", "CA 0", "records: runs/tiny", "certified.png"):
        assert expected in out
    assert list(Path("runs/tiny/plots").glob("*.pdf"))
    for fmt, mark in {"md": "|", "latex": "toprule", "csv": "robust_accuracy", "json": "[", "html": "<table"}.items():
        assert bench("table", "summary", "--format", fmt) == 0
        assert mark in capsys.readouterr().out
    assert bench("table", "summary", "--suite", "tinny") == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err
    for words in (("table", "cear_table1"), ("plot", "cear_figure2"), ("list", "tables")):
        assert bench(*words, "--runs", "runs/tiny") == 2
        assert "--runs: runs/tiny holds the variants of one suite; give the folder above it" in capsys.readouterr().err
    Path("file").touch()
    for words in (("plot", "--suite", "tiny", "--out"), ("reproduce", "cear_table1", "--dry-run", "--runs")):
        assert bench(*words, "file") == 2
        assert "is a file" in capsys.readouterr().err
    assert bench("compare", "cear_rw@members=2", "cear_rw@members=2", "--suite", "tiny") == 2
    assert "give two variants, not cear_rw@members=2 twice" in capsys.readouterr().err
    assert bench("status") == 0
    assert "success" in capsys.readouterr().out
    assert bench("plot", "--suite", "tiny", "--out", "figures") == 0
    assert list(Path("figures").glob("*.png"))
    assert bench("leaderboard", "--with", "runs", "--out", "board") == 0
    assert "cear_rw@members=2" in next(Path("board").glob("*.html")).read_text()


def test_a_dry_run_writes_nothing(bench, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("run", "--defense", "naive", "--suite", str(tiny), "--dry-run") == 0
    out = capsys.readouterr().out
    assert "to make  plain 0 (seed 0): " in out and "(2 epochs of 2 steps, three timed)" in out
    assert "to do  naive  seed 0  pgd: " in out and "plan: about " in out
    assert bench("run", "--defense", "naive", "--suite", str(tiny), "--seeds", "1,0,1", "--only", "pgd,pgd", "--dry-run") == 0
    todo = [line.split()[4] for line in capsys.readouterr().out.splitlines() if line.startswith("to do")]
    assert todo == ["1", "0"], "what is given twice is done once"
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "--defense", "cear_wr", "--suite", "digits"), "did you mean 'cear_rw'"),
        (
            ("run", "--defense", "naive", "--suite", "digits", "--seeds", "0,-1"),
            "--seeds: training seeds are 0 or more, got -1",
        ),
        (("table", "cear_table1", "--runs", ""), "--runs: nothing was given"),
        (("plot", "cear_figure2", "--out", ""), "--out: nothing was given"),
        (("verify", ""), "path: nothing was given"),
        (("table", "CEAR_Table1"), "did you mean 'cear_table1'"),
        (("run", "--defense", "naive", "--defense", "gal", "--suite", "digits"), "--defense: given 2 times; give it once"),
        (("table", "summary", "--suite", "a", "--suite=b"), "--suite: given 2 times"),
        (("run", "--defense", "naive", "--suite", "digit"), "did you mean 'digits'"),
        (("run", "--defense", "naive", "--suite", "digits", "--budget", "quik"), "did you mean 'quick'"),
        (("run", "--defense", "naive", "--suite", "digits", "--only", "pgdd"), "did you mean 'pgd'"),
        (("run", "--defense", "naive", "--suite", "digits", "--seeds", "a"), "list of integers"),
        (("run", "--defense", "naive", "--suite", "digits", "--device", "gpu"), "unknown device 'gpu'"),
        (("run", "--defense", "naive", "--suite", "digits", "--executor", "rey"), "did you mean 'ray'"),
        (("run", "--defense", "naive", "--suite", "digits", "--address", "auto"), "give --executor ray, too"),
        (("run", "--defense", "naive", "--suite", "mnist", "--data", "nowhere"), "nowhere"),
        (("reproduce", "summary"), "table: unknown 'summary'; known are cear_runtime, cear_table1"),
        (("table", "summry"), "did you mean 'summary'"),
        (("table", "summary", "--format", "pdf"), "unknown 'pdf'"),
        (("table", "summary", "--runs", "nowhere"), "no records"),
        (("table", "cear_table1", "--runs", "nowhere"), "there is no folder nowhere"),
        (("plot", "cear_figure2", "--runs", "nowhere"), "there is no folder nowhere"),
        (("list", "tables", "--runs", "nowhere"), "there is no folder nowhere"),
        (("plot", "--suite", "digits"), "no records"),
        (("list", "defences"), "did you mean 'defenses'"),
        (("run", "--defense", "naive"), "suite"),
    ],
)
def test_a_wrong_request_is_one_line_and_code_2(bench, words, message, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.delenv("BENCH_DATA", raising=False)
    assert bench(*words) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_clearly(bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("run", "--defense", "naive", "--suite", "digits", "--device", "cuda") == 2
    assert "no CUDA device; use --device cpu or auto" in capsys.readouterr().err


def test_a_failed_evaluation_gives_code_1(bench, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_text(tiny.read_text().replace("lr = 0.01", "lr = 1e30"))
    assert bench("run", "--defense", "randsmooth", "--suite", str(tiny), "--device", "cpu") == 1
    out = capsys.readouterr().out
    assert "failed: randsmooth clean" in out and "lower recipe.lr" in out


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--debug", "table", "nothing"])
    with pytest.raises(ValueError, match="unknown 'nothing'"):
        cli.main()


def test_lists_show_what_there_is(bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("list") == 0
    out = capsys.readouterr().out
    for name in ("cear_rw", "randsmooth", "pgd", "group_sequential", "digits", "mnist", "summary"):
        assert name in out


def test_doctor_looks_at_the_installation(bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("doctor") == 0
    assert "ok   torch" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_finished_and_says_so(tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace("epochs = 2", "epochs = 5000"))
    words = ["run", "--defense", "randsmooth", "--suite", str(tiny), "--runs", str(tiny.parent / "runs"), "--device", "cpu"]
    # Jobs that a shell runs in the background ignore SIGINT, and so would their children.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; import sys; sys.argv = ['bench', *{words!r}]; from bench.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=os.environ)
    until = time.monotonic() + 60
    while not list((tiny.parent / "runs").rglob("*.checkpoint")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED
    assert "everything finished is kept" in err and "Traceback" not in err


def test_the_defense_that_the_readme_shows_is_a_whole_one_of_thirty_lines(bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Written into a file, it is trained, attacked, listed, and in the table, by the commands that the README gives."""
    readme = (Path(cli.__file__).parent.parent / "README.md").read_text()
    (text,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if block.startswith("# mine.py")]
    assert len(text.splitlines()) <= 30
    Path("mine.py").write_text(text)
    command = "bench run --defense ./mine.py --suite digits --budget smoke"
    assert command in readme and bench(*command.split()[1:], "--device", "cpu") == 0
    capsys.readouterr()
    assert bench("list", "./mine.py") == 0
    assert "Members that share little of their wrong classes' probability." in capsys.readouterr().out
    assert bench("table", "summary") == 0
    assert re.search(r"(?m)^mine +0 ", capsys.readouterr().out.partition("digits, smoke: accuracy under attack")[2])
    logs = [json.loads(path.read_text())["log"] for path in Path("runs/digits/parts").glob("*.json")]
    assert logs and all({"ce", "shared", "validation_robust"} <= line.keys() for log in logs for line in log)
    for variant, label in {"@weight=2.0,members=5": "mine@members=5,weight=2.0", "+eat": "mine+eat"}.items():
        assert f"./mine.py{variant}" in readme and resolve(f"./mine.py{variant}", {})[0].label == label
