"""The arrows of the design: attacks <- defenses <- bench, and nothing heavy behind ``bench --help``."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {"attacks": {"attacks"}, "defenses": {"attacks", "defenses"}, "bench": {"attacks", "defenses", "bench"}}
FILES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows_and_files_stay_small(path: Path) -> None:
    ours = imported(path) & {*ALLOWED, "tests"}
    allowed = ALLOWED[path.relative_to(ROOT).parts[0]]
    assert ours <= allowed, f"{path} imports {ours - allowed}"
    assert len(path.read_text().splitlines()) <= 350
    assert path.stem not in {"utils", "util", "common", "helpers", "misc"}


def test_leaderboards_hold_no_python() -> None:
    assert not list((ROOT / "leaderboards").rglob("*.py"))


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {".".join(path.parent.relative_to(ROOT).parts) for path in FILES} <= set(listed)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom bench import cli\nsys.argv = ['bench', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'torchvision', 'scipy', 'pandas', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "leaderboard" in done.stdout
