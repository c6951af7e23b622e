"""Every table of a paper finds what it refers to, and shows holes where there is nothing; wrong files are explained."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path

import pytest

from bench import cli, published
from bench.papers import layout as layouts
from bench.papers.formats import render
from bench.papers.join import PaperTable, join
from bench.papers.layout import available, check, load
from bench.registry import RegistryError, resolve, variant_of
from bench.store import Store
from bench.suites import BUDGETS
from bench.tables import FORMATS, HOLE

WANTED = {
    *(f"cear_{what}" for what in ("table1", "table2", "table3", "runtime")),
    *(f"edlcm_{what}" for what in ("table1", "table2", "table3", "table4", "runtime")),
    *(f"kap_{what}" for what in ("table1", "table2", "table3", "tableA2", "tableA3")),
    *(f"smd_table{number}" for number in range(1, 11)),
    "smd_runtime",
}


def test_all_tables_of_the_papers_are_there() -> None:
    assert set(available()) == WANTED
    assert available().index("smd_table9") < available().index("smd_table10")


@pytest.fixture(scope="module", params=sorted(WANTED))
def empty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PaperTable:
    """A table from a store without records."""
    return join(load(request.param), Store(tmp_path_factory.getbasetemp() / "nothing"))


def test_it_refers_to_what_exists_at_every_budget_and_shows_every_number(empty: PaperTable) -> None:
    for budget in BUDGETS:
        check(empty.layout, budget)
    file = published.frame()[published.frame().file == empty.layout.published]
    shown = [cell.row["printed"] for cell in empty.cells.values()]
    if not empty.layout.where.of:
        assert shown == list(file.printed)
    assert empty.layout.name in WANTED and len(shown) > 3 and set(shown) <= set(file.printed)


def test_it_renders_holes_in_every_format(empty: PaperTable) -> None:
    assert (empty.filled, empty.budget) == (0, "quick")
    assert {cell.label for cell in empty.cells.values()} == {resolve(cell.spec, {})[0].label for cell in empty.cells.values()}
    text = {fmt: render(empty, fmt) for fmt in FORMATS}
    for fmt in ("text", "md", "html"):
        assert HOLE in text[fmt] and f"bench reproduce {empty.layout.name} --budget quick" in text[fmt]
    for rows in (json.loads(text["json"]), list(csv.DictReader(io.StringIO(text["csv"])))):
        assert len(rows) == len(empty.cells)
        assert all(row["ours"] in (None, "") and row["command"].startswith("bench run --defense ") for row in rows)
        assert [row["printed"] for row in rows] == [cell.row["printed"] for cell in empty.cells.values()]
    check_latex(text["latex"])
    assert text["html"].count("<td>") == text["html"].count("</td>") and text["html"].count("<table>") == 1


def check_latex(text: str) -> None:
    """Without TeX: environments nest, braces match, rows have all columns, nothing special stands bare."""
    stack = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack and text.count(r"\begingroup") == text.count(r"\endgroup")
    bare = re.sub(r"\\[\\{}&%$#_]", "", text)
    assert bare.count("{") == bare.count("}")
    for spec, body in re.findall(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", bare_rows(text), re.S):
        rows = [line for line in body.splitlines() if line.endswith("ROWEND")]
        assert rows and {line.count("&") + 1 for line in rows} == {len(spec)}
    outside = re.sub(
        r"\$\\(pm|leq|geq)\$|\\begin\{tabular\}.*?\\end\{tabular\}", "", re.sub(r"\\[&%_#$]", "", text), flags=re.S
    )
    assert not re.search(r"[&%_#$~^]", outside), re.search(r".{20}[&%_#$~^].{20}", outside)
    assert all(ord(sign) < 128 for sign in text), {sign for sign in text if ord(sign) > 127}


def bare_rows(text: str) -> str:
    """Ends of rows as a word, escaped signs gone."""
    return re.sub(r"\\[&%_#$]", "", text.replace(r" \\", " ROWEND"))


def test_smd_is_asked_at_the_largest_strength_and_every_defense_is_its_own(tmp_path: Path) -> None:
    table = join(load("smd_table5"), Store(tmp_path))
    assert {cell.label for cell in table.cells.values()} == {
        f"{name}@members=5" for name in ("naive", "adp", "gal", "dverge", "smd", "smd_plus")
    }
    assert {cell.answer.facts.get("eps") for cell in table.cells.values()} == {None, 0.3}
    table = join(load("smd_table9"), Store(tmp_path))
    assert {cell.label for cell in table.cells.values()} >= {"naive+eat", "smd_plus+eat"}
    table = join(load("cear_table1"), Store(tmp_path))
    assert {cell.label for cell in table.cells.values()} >= {"randsmooth", "randsmooth@sigma=0.5", "sween_cear@sigma=1.0"}
    assert variant_of("kap@noise=0.1").label == "kap@noise=0.1"
    with pytest.raises(RegistryError, match="one defense is meant, 'kap,nt' are 2: kap, nt"):
        variant_of("kap,nt")


WRONG = [
    ("title = ", "titel = ", "titel: unknown key"),
    ('rows = ["dataset", "defense"]', 'rows = ["data", "defense"]', "rows: unknown 'data'; did you mean 'dataset'?"),
    ('rows = ["dataset", "defense"]', 'rows = ["dataset"]', "two published numbers at ('mnist', 'clean_accuracy', '')"),
    ('published = "cear_table3"', 'published = "cear_table4"', "published: unknown 'cear_table4'; did you mean"),
    ('mnist = ["cear_mnist", "mnist"]', 'mnist = ["cear_mnits"]', "suite: unknown 'cear_mnits'; did you mean 'cear_mnist'?"),
    (
        'mnist = ["cear_mnist", "mnist"]',
        'mnist = ["cear_cifar10"]',
        "suites: cear_cifar10 is about cifar10, the published number about mnist",
    ),
    ('mnist = ["cear_mnist", "mnist"]\n', "", "suites: mnist is missing"),
    ('eval = "clean"', 'eval = "cleen"', "cear_mnist has no evaluation: unknown 'cleen'; did you mean 'clean'?"),
    (
        'of = { metric = "clean_accuracy" }',
        'of = { metric = "speed" }',
        "answers: nothing fits the published number with dataset mnist",
    ),
    ('of = { metric = "clean_accuracy" }', 'of = { metrik = "x" }', "of: unknown 'metrik'; did you mean 'metric'?"),
    ('run = "{defense}@sigma=0.25"', 'run = "{defense}@sigmas=0.25"', "has no field: unknown 'sigmas'"),
    ('facts = { eps = "{eps}", denominator = "clean_correct" }', "facts = { eps = 0.7 }", "is not asked at eps 0.7"),
    ('of = { threat = "whitebox", norm = "l2" }', 'of = { threat = "whitebox" }', "is in l2, the published number in linf"),
    ("[suites]", "[suites", "not valid TOML"),
    ("published = ", 'extends = "smd_tabel1"\npublished = ', "extends: unknown 'smd_tabel1'; known are bad"),
]


@pytest.mark.parametrize(("old", "new", "message"), WRONG, ids=[message[:30] for _, _, message in WRONG])
def test_a_wrong_layout_says_where(old: str, new: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (layouts.TABLES / "cear_table3.toml").read_text()
    assert old in text
    (tmp_path / "bad.toml").write_text(text.replace(old, new))
    monkeypatch.setattr(layouts, "TABLES", tmp_path)
    with pytest.raises(ValueError, match=r"^bad\.toml: ") as error:
        load("bad")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("table", "cear_tabel1"), "table: unknown 'cear_tabel1'; did you mean 'cear_table1'?"),
        (("table", "cear_table3", "--budget", "papr"), "budget: unknown 'papr'; did you mean 'paper'?"),
        (("table", "cear_table3", "--format", "pdf"), "--format: unknown 'pdf'"),
        (("table", "cear_table3", "--suite", "mnist"), "--suite: the table of a paper names its suites"),
        (("table", "summary", "--budget", "quick"), "--budget: the summary shows every budget"),
        (("reproduce", "smd_tabel1"), "table: unknown 'smd_tabel1'; did you mean 'smd_table1'?"),
    ],
)
def test_wrong_words_get_one_line(
    words: tuple[str, ...], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *words, "--runs", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and text in capsys.readouterr().err
