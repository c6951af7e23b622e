"""JOINING.md is followed word by word: its files are written, its commands run, and what it promises is there."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench import submit
from bench.store import Store
from bench.submissions import submissions
from bench.suites import load_suite

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "leaderboards/JOINING.md").read_text()
FIRST, _, SECOND = TEXT.partition("## A plug-in instead of a file")


def commands(text: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def written() -> None:
    """The files that the page shows under their names, here."""
    for name, body in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXT, re.DOTALL):
        Path(name).write_text(body)


def test_a_model_comes_onto_the_board_by_the_commands_of_the_page(
    bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "SUITES", Path("clone/leaderboards/suites").absolute())  # a checkout that may be written to
    Path("clone/leaderboards").mkdir(parents=True)
    Path("clone/pyproject.toml").touch()
    written()
    shown = {}
    for command, *words in commands(FIRST):
        if command == "python":
            subprocess.run([sys.executable, *words], check=True, env={"PYTHONPATH": str(ROOT)})
        else:
            assert command == "bench" and bench(*words) == 0, words
            shown[words[0]] = capsys.readouterr().out
    assert "class_means" in shown["list"] and re.search(r"(?m)^class_means +0 ", shown["table"])
    assert "class_means" in Path("board/index.html").read_text()
    assert "digits, smoke, class_means, seed 0: autoattack-ok" in shown["diagnose"]
    assert re.search(r"(\d+) records: (\d+) holds but for times, (\d+) skipped; no mismatch", shown["verify"])
    results = Store("clone/leaderboards/results")
    (own,) = submissions(results).values()
    assert own.answers.name == "Class means" and {r.defense["name"] for r in results.records()} == {"class_means"}
    assert any(r.status == "success" and r.metrics[0].value > 0.85 for r in results.records() if r.eval["name"] == "clean")


def installed() -> set[str]:
    """Names of distributions. Looking for pip's module instead would make setuptools break torch.compile in this process."""
    return {one.name for one in importlib.metadata.distributions()}


def test_the_plugin_of_the_page_installs_and_its_commands_run(
    bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own: an installed package is there from the start."""
    if not {"setuptools", "pip"} <= installed():
        pytest.skip("installing a package without a network needs pip and setuptools in this environment")
    install, *others = commands(SECOND)
    assert install == ["pip", "install", "./tests/plugin_sample"]
    source = tmp_path / "source"
    subprocess.run(["cp", "-r", str(ROOT / install[2]), str(source)], check=True)  # a build leaves files behind
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(tmp_path / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, str(source)], check=True, cwd=tmp_path)
    code = f"import sys; from bench import cli\nfor words in {[words[1:] for words in others]!r}:\n"
    code += "    sys.argv = ['bench', *words]\n    try: cli.main()\n    except SystemExit as end: assert not end.code\n"
    paths = f"{ROOT}:{tmp_path / 'site'}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": paths}, check=False)
    assert done.returncode == 0, done.stderr
    assert "[bench-plugin-sample 0.3.1]" in done.stdout and "light linf 0.1" in done.stdout


def test_the_suite_of_the_page_can_be_read(tmp_path: Path) -> None:
    (text,) = [block for block in re.findall(r"```toml\n(.*?)```", SECOND, re.DOTALL) if "extends" in block]
    (tmp_path / "mine.toml").write_text(
        text.replace("light = ", "light_of_the_page = ").replace('"light"', '"light_of_the_page"')
    )
    (tmp_path / "light.py").write_text((ROOT / "tests/plugin_sample/bench_plugin_sample/attacks.py").read_text())
    suite = load_suite(tmp_path / "mine.toml")
    assert suite.evals["light"].attack == "light_of_the_page"  # type: ignore[union-attr]


def test_its_links_lead_somewhere_and_it_names_no_machine() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert links and all((ROOT / "leaderboards" / link).exists() for link in links)
    assert not re.search(r"/(home|root|work|tmp)/", TEXT)
    assert "leaderboards/JOINING.md" in (ROOT / "README.md").read_text()
