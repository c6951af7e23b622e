"""Suites and names: everything that comes with the project is valid, everything a user mistypes is explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.evals import Robust
from bench.registry import RegistryError, registered, resolve
from bench.suites import BUDGETS, SuiteError, available, load_suite


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", available())
def test_every_suite_loads_at_every_budget(name: str, budget: str) -> None:
    suite = load_suite(name, budget)
    assert suite.name == name and suite.training().epochs >= 1


@pytest.mark.parametrize("name", available())
def test_a_budget_changes_amounts_but_no_question(name: str) -> None:
    paper = load_suite(name, "paper")
    for budget in ("smoke", "quick"):
        suite = load_suite(name, budget)
        assert suite.evals.keys() == paper.evals.keys()
        for key, evaluation in suite.evals.items():
            asked, given = evaluation.model_dump(), paper.evals[key].model_dump()
            for free in ("images", "n", "steps", "restarts", "eot"):
                asked.pop(free, None), given.pop(free, None)
            assert asked == given


def test_quick_mnist_is_the_budget_that_is_promised() -> None:
    suite = load_suite("mnist", "quick")
    assert suite.sweep["sigma"] == (0.25,)
    assert suite.training().epochs <= 10
    assert suite.evals["certified"].images == 200 and suite.evals["certified"].n == 10_000  # type: ignore[union-attr]
    assert suite.evals["pgd"].images == 500 and suite.evals["pgd"].steps == 20  # type: ignore[union-attr]


def test_fractions_are_numbers(tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace('"0.02"', '"8/255"'))
    pgd = load_suite(tiny).evals["pgd"]
    assert isinstance(pgd, Robust) and pgd.eps[0] == 8 / 255


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("restarts = 2", "restart = 2", r"evals\.pgd\.restart: unknown key"),
        ('"0.1"', '"1.1"', r"evals\.pgd\.eps: 1\.1 is out of range; in linf 0 < eps <= 1"),
        ('"0.1"', '"-1/255"', r"out of range"),
        ('"0.1"', '"eight"', r"not a number: 'eight'"),
        ('attack = "pgd"', 'attack = "pdg"', r"unknown 'pdg'; known are fgsm"),
        ('norm = "linf"', 'norm = "l3"', r"unknown 'l3'; known are linf, l2"),
        ('dataset = "digits"', 'dataset = "digit"', r"did you mean 'digits'"),
        ('architecture = "lenet5"', 'architecture = "lenet"', r"did you mean 'lenet5'"),
        ("batch = 32", "bach = 32", r"recipe: unknown 'bach'; did you mean 'batch'"),
        ("n = 200", "n = 0", r"evals\.certified\.n"),
        ("version = 1", "", r"version"),
        ('kind = "clean"', 'kind = "cleen"', r"evals\.clean"),
        ("[recipe]", "[recipe", r"not valid TOML"),
        ("radii = { step = 0.1 }", "radii = [0.2, 0.1]", r"increasing"),
        ("steps = 3", 'step = "eps/7"\nsteps = 3', r"unknown step 'eps/7'"),
    ],
)
def test_a_wrong_suite_names_the_key(tiny: Path, old: str, new: str, message: str) -> None:
    text = tiny.read_text()
    assert old in text
    tiny.write_text(text.replace(old, new, 1))
    with pytest.raises(SuiteError, match=message):
        load_suite(tiny)


@pytest.mark.parametrize("key", ["evals.pgd.eps", "evals.certified.alpha", "evals.pgd.norm", "recipe.lr", "dataset"])
def test_a_budget_may_not_change_the_question(tiny: Path, key: str) -> None:
    tiny.write_text(tiny.read_text() + f'\n[budget.quick]\n"{key}" = 1\n')
    with pytest.raises(SuiteError, match="may not change with the budget"):
        load_suite(tiny)


def test_a_budget_may_not_invent_a_sigma(tiny: Path) -> None:
    tiny.write_text(tiny.read_text() + '\n[sweep]\nsigma = [0.25]\n[budget.quick]\n"sweep.sigma" = [0.1]\n')
    with pytest.raises(SuiteError, match="may only choose among"):
        load_suite(tiny)


def test_unknown_suite_and_budget_get_the_nearest_name() -> None:
    with pytest.raises(SuiteError, match="did you mean 'mnist'"):
        load_suite("minst")
    with pytest.raises(SuiteError, match="did you mean 'quick'"):
        load_suite("digits", "quik")


def test_defenses_register_by_existing() -> None:
    assert {"naive", "randsmooth", "cear_rw", "cear_gm", "cear_minus_rw", "cear_minus_gm"} <= registered().keys()


def test_variants_are_named_by_what_differs() -> None:
    labels = [v.label for v in resolve("cear_rw@sigma=0.5,members=3,randsmooth", {})]
    assert labels == ["cear_rw@members=3,sigma=0.5", "randsmooth"]
    assert [v.label for v in resolve("cear_rw@sigma=0.25", {})] == ["cear_rw"]


def test_a_sweep_runs_through_fields_that_exist_and_are_not_fixed() -> None:
    sweep = {"sigma": (0.25, 0.5)}
    assert [v.label for v in resolve("randsmooth,naive", sweep)] == ["randsmooth", "randsmooth@sigma=0.5", "naive"]
    assert [v.label for v in resolve("randsmooth@sigma=1.0", sweep)] == ["randsmooth@sigma=1.0"]


def test_all_stands_for_every_registered_name() -> None:
    assert {v.name for v in resolve("all", {})} == set(registered())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cear_wr", "did you mean 'cear_rw'"),
        ("cear_rw@sgma=1", "no field: unknown 'sgma'; did you mean 'sigma'"),
        ("cear_rw@sigma=big", "'big' is no float"),
        ("cear_rw@sigma", "write a variant as name@field=value"),
        ("cear_rw@aggregate=mode", "unknown aggregate 'mode'"),
        ("./nowhere.py", "there is no file"),
    ],
)
def test_a_wrong_name_is_explained(spec: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        resolve(spec, {})


def test_a_file_of_the_user_provides_defenses(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from defenses.naive import Naive\nduo = Naive(members=2)\ntrio = Naive(members=3)\n")
    assert [v.name for v in resolve(str(path), {})] == ["duo", "trio"]
    assert [v.label for v in resolve(f"{path}:duo", {})] == ["duo"]
    with pytest.raises(RegistryError, match="did you mean 'trio'"):
        resolve(f"{path}:tri", {})
    path.write_text("x = 1\n")
    with pytest.raises(RegistryError, match="defines no defense"):
        resolve(str(path), {})
    path.write_text("1/0\n")
    with pytest.raises(RegistryError, match="ZeroDivisionError"):
        resolve(str(path), {})
