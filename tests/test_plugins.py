"""Plug-ins: what installed packages bring is listed, runs and is recorded; what is broken or clashes is named and left out."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from bench import plugins, registry, suites
from bench.store import Store
from bench.suites import SuiteError, load_suite
from bench.verify import verify

SAMPLE = Path(__file__).parent / "plugin_sample"

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a distribution on the import path, as pip would leave it: its modules, and what it says of itself."""
    site, before = tmp_path / "site", set(sys.modules)
    monkeypatch.syspath_prepend(site)

    def put(name: str, files: Mapping[str, str], points: Mapping[str, Mapping[str, str]], version: str = "1.0") -> None:
        info = {f"{name}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}
        groups = [f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in own.items()) for group, own in points.items()]
        for path, text in {**files, **info, f"{name}.dist-info/entry_points.txt": "".join(groups)}.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(text)
        plugins._loaded.cache_clear()

    yield put
    plugins._loaded.cache_clear()
    for module in set(sys.modules) - before:  # another test's package of the same name is another one
        if str(getattr(sys.modules[module], "__file__", None) or "").startswith(str(site)):
            del sys.modules[module]


@pytest.fixture
def sample(install: Install) -> None:
    """The package of ``plugin_sample``, installed."""
    project = tomllib.loads((SAMPLE / "pyproject.toml").read_text())["project"]
    sources = [path for ending in ("py", "toml") for path in (SAMPLE / "bench_plugin_sample").rglob(f"*.{ending}")]
    files = {str(path.relative_to(SAMPLE)): path.read_text() for path in sources}
    install(project["name"], files, project["entry-points"], project["version"])


GOOD = "from defenses.naive import Naive\nduo = Naive(members=2)\n"


def test_what_a_plugin_brings_is_listed_with_where_it_comes_from(
    sample: None, bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BENCH_DATA", raising=False)
    assert bench("list") == 0
    shown = capsys.readouterr()
    lines = {line.split()[0]: line for line in shown.out.partition("tables:")[0].splitlines()}
    for name in ("class_means", "brightness", "sample_digits"):
        assert lines[name].endswith("[bench-plugin-sample 0.3.1]")
    origins = {"naive": "defenses.naive", "pgd": "attacks.gradient", "digits": "leaderboards/suites"}
    assert all(lines[name].endswith(f"[{origin}]") for name, origin in origins.items()) and not shown.err
    assert bench("doctor") == 0
    assert "bench-plugin-sample 0.3.1: class_means, brightness, sample_digits" in capsys.readouterr().out


def test_it_runs_at_smoke_with_its_own_attack_and_the_record_names_it(
    sample: None, bench, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--suite", "sample_digits", "--budget", "smoke", "--only", "clean,light", "--device", "cpu")
    assert bench("run", "--defense", "class_means,randsmooth", *words) == 0
    assert "light linf 0.1" in capsys.readouterr().out
    records = Store("runs").records()
    made = {(r.defense["name"], r.eval["name"]): r.made["versions"].get("bench-plugin-sample") for r in records}
    assert set(made.values()) == {"0.3.1"} and len(made) == 4
    (light,) = [r for r in records if r.eval["name"] == "light" and r.defense["name"] == "randsmooth"]
    assert light.eval["fields"]["attack"] == "brightness"
    rows = Store("runs").rows(light)
    assert rows.broken[rows.clean_correct].any() and (rows.distance <= rows.eps * 1.000001).all()
    reports = verify(Path("runs"))
    assert [report.verdict for report in reports] == ["holds but for times"] * 4
    assert "request" in reports[0].checked


def test_records_of_the_project_alone_name_no_plugin(sample: None, bench) -> None:
    assert (
        bench("run", "--defense", "randsmooth", "--suite", "digits", "--budget", "smoke", "--only", "clean", "--device", "cpu")
        == 0
    )
    (record,) = Store("runs").records()
    assert "bench-plugin-sample" not in record.made["versions"]


def test_what_was_measured_with_a_plugin_that_is_gone_is_said(
    sample: None, bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ("--suite", "sample_digits", "--budget", "smoke", "--only", "light", "--device", "cpu")
    assert bench("run", "--defense", "class_means", *words) == 0
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not place.startswith(str(tmp_path))])
    (report,) = verify(Path("runs"))
    assert not report.mismatches
    assert {"rows", "numbers", "data"} <= set(report.checked), "numbers follow from rows, whatever the attack was"
    assert report.not_checked["request"].endswith("no suite 'sample_digits' comes with this version")


ATTACK = "from attacks import Attack\nclass A(Attack):\n    "
INSIDE, SUITE = "bad/__init__.py", "bad/own.toml"
EXTENDS = "name = 'own'\nversion = 1\nextends = 'digits'\n"


@pytest.mark.parametrize(
    "case",
    [
        ({"bad.py": "1/0\n"}, "defenses", "bad", "ZeroDivisionError: division by zero"),
        ({"bad.py": "import sys\nsys.exit('no')\n"}, "defenses", "bad", "SystemExit: no"),
        ({"bad.py": "x = 1\n"}, "defenses", "bad", "the module has no Defense at its top level"),
        ({"bad.py": "x = 1\n"}, "defenses", "bad:x", "neither a module nor a Defense, but int"),
        ({}, "defenses", "nowhere", "No module named 'nowhere'"),
        ({"bad.py": "x = 1\n"}, "attacks", "bad:x", "1 is no subclass of attacks.Attack"),
        ({"bad.py": f"{ATTACK}pass\n"}, "attacks", "bad:A", "A does not implement run"),
        ({"bad.py": f"{ATTACK}def run(self): pass\n"}, "attacks", "bad:A", "A is no dataclass"),
        ({INSIDE: ""}, "suites", "bad", "there is no .toml file"),
        ({INSIDE: "", SUITE: "name = "}, "suites", "bad", "TOMLDecodeError"),
        ({INSIDE: "", SUITE: "name = 'mnist'"}, "suites", "bad:own.toml", "its name is 'mnist'"),
        ({INSIDE: "", SUITE: f"{EXTENDS}x = 1"}, "suites", "bad", "x: unknown key"),
    ],
    ids=lambda case: case[3],
)
def test_a_broken_plugin_is_named_and_left_out(
    install: Install, sample: None, case: tuple[dict[str, str], str, str, str]
) -> None:
    files, group, value, told = case
    install("broken-one", files, {f"bench.{group}": {"mine": value}}, "2.5")
    (problem,) = registry.problems()
    assert "plug-in broken-one 2.5" in problem and told in problem and "\n" not in problem
    assert (
        "class_means" in registry.registered() and "brightness" in plugins.attack_classes() and "digits" in suites.available()
    )


def test_everything_else_works_beside_broken_plugins(
    install: Install, sample: None, bench, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"bad.py": "1/0\n", "bad_suites/__init__.py": "", "bad_suites/own.toml": f"{EXTENDS}x = 1"}
    points = {"bench.defenses": {"a": "bad"}, "bench.attacks": {"b": "bad:B"}, "bench.suites": {"c": "bad_suites"}}
    install("broken-one", files, points, "2.5")
    problems = registry.problems()
    assert len(problems) == 3
    assert bench("list") == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines() == problems
    assert all(f" {name} " in shown.out for name in ("naive", "class_means", "brightness", "sample_digits", "digits"))
    monkeypatch.delenv("BENCH_DATA", raising=False)
    assert bench("doctor") == 1
    out = capsys.readouterr().out
    assert all(f"BAD  plug-ins             {problem}" in out for problem in problems)
    assert bench("run", "--defense", "class_means", "--suite", str(tiny), "--only", "clean", "--device", "cpu") == 0
    err = capsys.readouterr().err
    assert all(problem in err for problem in problems)


def test_a_name_in_use_is_refused_and_never_shadowed(install: Install, sample: None) -> None:
    good = "from defenses.naive import Naive, naive\nrandsmooth = Naive(members=2)\nmine = Naive(members=3)\n"
    attack = (SAMPLE / "bench_plugin_sample/attacks.py").read_text()
    suite = "name = 'digits'\nversion = 1\nextends = 'mnist'"
    points = {
        "bench.defenses": {"own": "clash", "all": "clash:mine", "class_means": "clash:mine"},
        "bench.attacks": {"pgd": "clash.attacks:Brightness"},
        "bench.suites": {"own": "clash"},
    }
    install("z-clash", {"clash/__init__.py": good, "clash/attacks.py": attack, "clash/digits.toml": suite}, points)
    problems = registry.problems()
    for kind, name, whose in (
        ("defense", "randsmooth", "the project"),
        ("defense", "all", "the project"),
        ("defense", "class_means", "bench-plugin-sample 0.3.1"),
        ("attack", "pgd", "the project"),
        ("suite", "digits", "the project"),
    ):
        told = f"plug-in z-clash 1.0 is left out: {kind} {name!r} is a name of {whose}; rename it"
        assert told in problems
    assert len(problems) == 5, "what it handed on from the project under its own name is no clash"
    known = registry.registered()
    assert known["randsmooth"][1] == "defenses.randsmooth" and known["class_means"][1] == "bench-plugin-sample 0.3.1"
    assert known["mine"][1] == "z-clash 1.0" and "all" not in known
    assert plugins.attack_classes()["pgd"].__module__ == "attacks.gradient"
    assert load_suite("digits").dataset == "digits"


def test_an_instance_goes_by_the_name_of_its_entry_point(install: Install) -> None:
    install("one", {"one.py": GOOD}, {"bench.defenses": {"two_of_them": "one:duo", "a/b": "one:duo"}})
    assert registry.plugged().keys() == {"two_of_them"}
    (problem,) = registry.problems()
    assert "one 1.0" in problem and "'a/b' is no name" in problem


def test_a_plugin_that_cannot_say_what_it_suits_does_not_stop_the_rest(
    install: Install, bench, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = "class Odd(Naive):\n    def unsuited(self, task): raise KeyError('odd')\n"
    text = f"from defenses.naive import Naive\n{odd}odd = Odd()\n"
    install("odd-one", {"odd_one.py": text}, {"bench.defenses": {"odd": "odd_one"}})
    assert bench("run", "--defense", "randsmooth", "--suite", str(tiny), "--only", "clean", "--dry-run") == 0
    shown = capsys.readouterr()
    assert "plug-in odd-one 1.0: odd is left out: KeyError: 'odd'" in shown.err and "randsmooth" in shown.out


def test_a_suite_file_brings_an_attack_of_a_file_beside_it(bench, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sub").mkdir()
    Path("sub/light.py").write_text((SAMPLE / "bench_plugin_sample/attacks.py").read_text())
    suite = (SAMPLE / "bench_plugin_sample/suites/sample_digits.toml").read_text().replace('"brightness"', '"beside_it"')
    Path("sub/mine.toml").write_text(suite + '[attacks]\nbeside_it = "light.py:Brightness"\n')
    words = ("--suite", "sub/mine.toml", "--budget", "smoke", "--only", "light", "--device", "cpu")
    assert bench("run", "--defense", "randsmooth", *words) == 0
    (record,) = Store("runs").records()
    assert record.status == "success" and record.eval["fields"]["attack"] == "beside_it"
    assert "light.py" not in json.dumps(record.model_dump(mode="json")), "a record never says which file to execute"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ('pgd = "light.py:Brightness"', r"attacks\.pgd: the name is in use, by attacks\.gradient"),
        ('mine_a = "light.py:Nothing"', "light.py has no usable Nothing"),
        ('mine_b = "dark.py:Brightness"', "there is no file .*dark.py"),
        ('mine_c = "light.py"', 'write NAME = "FILE.py:CLASS"'),
        ("mine_d = 3", 'write NAME = "FILE.py:CLASS"'),
    ],
)
def test_an_attack_of_a_file_that_cannot_be_used(tmp_path: Path, given: str, told: str) -> None:
    (tmp_path / "light.py").write_text((SAMPLE / "bench_plugin_sample/attacks.py").read_text())
    (tmp_path / "own.toml").write_text(f'name = "own"\nversion = 1\nextends = "digits"\n[attacks]\n{given}\n')
    with pytest.raises(SuiteError, match=told):
        load_suite(tmp_path / "own.toml")


def test_a_file_that_takes_a_name_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from defenses.naive import Naive, naive\nrandsmooth = Naive(members=2)\n")
    with pytest.raises(registry.RegistryError, match=r"mine\.py: randsmooth is a name of defenses\.randsmooth already; rename"):
        registry.resolve(str(path), {})
    path.write_text("from defenses.naive import Naive, naive\nmine = Naive(members=2)\n")
    assert [variant.name for variant in registry.resolve(str(path), {})] == ["naive", "mine"]
