"""Tables in LaTeX: nothing is lost in parts, no part is wider than a page, and an article compiles where TeX is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import latex
from bench.latex import GAP, LINES, LONGEST, WIDTH, Cell, floats
from bench.papers.formats import render
from bench.papers.join import join
from bench.papers.layout import load
from bench.store import Store
from bench.tables import render_all, summaries

RESULTS = Path(__file__).parents[1] / "leaderboards/results"

needs_tex = pytest.mark.skipif(
    shutil.which("pdflatex") is None, reason="pdflatex is not installed; on Debian: texlive-latex-recommended"
)

WORDS = st.text("abcXYZ0123456789.-_%&", min_size=1, max_size=14)


def tabulars(text: str) -> list[list[list[str]]]:
    """The lines of each tabular as cells, headings first."""
    found = re.findall(r"\\begin\{tabular\}\{[lr]+\}\n\\toprule\n(.*?)\n\\bottomrule", text, re.S)
    return [[line.removesuffix(r" \\").split(" & ") for line in one.splitlines() if line != r"\midrule"] for one in found]


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 40), st.data())
def test_every_cell_stands_once_beside_its_labels(labels: int, numbers: int, rows: int, data: st.DataObject) -> None:
    heads = [f"h{c}" for c in range(labels + numbers)]
    cells = [[data.draw(WORDS) if c < labels else f"{r}.{c}" for c in range(labels + numbers)] for r in range(rows)]
    found: dict[tuple[str, ...], list[str]] = {}
    for top, *lines in tabulars(floats("T", "C", heads, [[[*map(Cell.of, line)]] for line in cells], labels)):
        assert top[:labels] == heads[:labels]
        for line in lines:
            for head, cell in zip(top[labels:], line[labels:], strict=True):
                found.setdefault((head, *line[:labels]), []).append(cell)
    wanted: dict[tuple[str, ...], list[str]] = {}
    for line in cells:
        for c in range(labels, labels + numbers):
            wanted.setdefault((heads[c], *map(latex.escaped, line[:labels])), []).append(line[c])
    assert found == wanted


def test_parts_fit_on_a_page() -> None:
    cells = [["name", *[f"{r}.{c} [0.0, 100.0]" for c in range(20)]] for r in range(100)]
    text = floats(
        "T", "C", ["defense", *(f"attack linf {c}" for c in range(20))], [[[*map(Cell.of, line)]] for line in cells], 1
    )
    for lines in tabulars(text):
        assert sum(max(len(line[c]) for line in lines) + GAP for c in range(len(lines[0]))) <= WIDTH
    pages = text.split("\n\n")
    assert all(len(page.splitlines()) <= LINES + 6 for page in pages)
    assert text.count("(continued)") == len(pages) - 1 and text.count("T. C") == 1


def test_lines_of_a_group_stay_together() -> None:
    groups = [[[Cell.of(f"{g}"), Cell.of(f"{line}")] for line in range(7)] for g in range(30)]
    for _, *lines in tabulars(floats("T", "C", ["a", "b"], groups, 1)):
        assert len(lines) % 7 == 0


def test_long_texts_and_headings_are_broken_but_not_styled_cells() -> None:
    status = "autoattack-ok; weak_attack; fgsm_beats_pgd, seed 1,seed 2"
    styled = Cell("x" * (LONGEST + 9), r"\textbf{" + "x" * (LONGEST + 9) + "}")
    (lines,) = tabulars(
        floats("T", "C", ["a", "one two three"], [[[Cell.of(status), styled]], [[Cell.of("b"), Cell.of("4")]]], 1)
    )
    told = [line[0] for line in lines[1:-1]]
    assert "".join(told).replace(" ", "") == latex.escaped(status).replace(" ", "") and len(told) > 1
    assert all(len(part.replace("\\", "")) <= LONGEST for part in told)
    assert lines[1][1] == styled.written and [line[1] for line in lines[2:-1]] == [""] * (len(told) - 1)
    (narrow,) = tabulars(floats("T", "C", ["a", "one two three"], [[[Cell.of("b"), Cell.of("4")]]], 1))
    assert [line[1] for line in narrow] == ["one", "two", "three", "4"]


@needs_tex
@pytest.mark.parametrize("suite", ["mnist", "smd_cifar10", "smd_fashion_mnist", None])
def test_summaries_compile_within_the_page(suite: str | None, tmp_path: Path) -> None:
    compiles(render_all(summaries(Store(RESULTS), suite), "latex"), tmp_path)


@needs_tex
@pytest.mark.parametrize("name", ["cear_table1", "edlcm_table2", "kap_table3", "smd_table1"])
def test_tables_of_papers_compile_within_the_page(name: str, tmp_path: Path) -> None:
    compiles(render(join(load(name), Store(RESULTS)), "latex"), tmp_path)


def compiles(text: str, folder: Path) -> None:
    article = "\n".join([r"\documentclass{article}\usepackage{booktabs}\begin{document}", text, r"\end{document}"])
    (folder / "article.tex").write_text(article)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "article.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    log = (folder / "article.log").read_text(errors="replace")
    assert done.returncode == 0, log[-2000:]
    assert not re.findall(r"Overfull \\hbox.*|Float too large.*|Too many unprocessed.*", log)
