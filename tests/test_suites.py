"""Suites and names: everything that comes with the project is valid, everything a user mistypes is explained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import defenses
from bench.evals import Robust
from bench.registry import RegistryError, registered, resolve
from bench.suites import BUDGETS, ROLES, SuiteError, available, load_suite
from defenses.api import Recipe


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", available())
def test_every_suite_loads_at_every_budget(name: str, budget: str) -> None:
    suite = load_suite(name, budget)
    assert suite.name == name and suite.training().epochs >= 1
    for role in suite.roles:
        # A role that sets its epochs does not follow recipe.epochs, so that a budget must name it.
        assert budget == "paper" or suite.training(role).epochs <= suite.training().epochs


@pytest.mark.parametrize("name", available())
def test_a_budget_changes_amounts_but_no_question(name: str) -> None:
    paper = load_suite(name, "paper")
    for budget in ("smoke", "quick"):
        suite = load_suite(name, budget)
        assert suite.evals.keys() == paper.evals.keys()
        for key, evaluation in suite.evals.items():
            asked, given = evaluation.model_dump(), paper.evals[key].model_dump()
            for free in ("images", "n", "steps", "pgd_steps", "restarts", "eot", "proposals", "repeats", "distilled", "maps"):
                asked.pop(free, None), given.pop(free, None)
            assert asked == given
        for role in (*ROLES, ""):
            asked, given = vars(suite.training(role)), vars(paper.training(role))
            assert {key for key in asked if asked[key] != given[key]} <= {"epochs", "batch", "decay_at"}


def test_quick_mnist_is_the_budget_that_is_promised() -> None:
    suite = load_suite("mnist", "quick")
    assert suite.sweep["sigma"] == (0.25, 0.5, 1.0)
    assert suite.training().epochs <= 10 and suite.evals["clean"].images == 10_000
    assert suite.evals["certified"].images == 200 and suite.evals["certified"].n == 10_000  # type: ignore[union-attr]
    assert suite.evals["pgd"].images == 500 and suite.evals["pgd"].steps == 20  # type: ignore[union-attr]


def rates(recipe: Recipe, *epochs: int) -> list[float]:
    return [pytest.approx(recipe.rate(epoch)) for epoch in epochs]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny_imagenet", "imagenet"])
def test_colour_suites_train_by_cohens_recipe(name: str) -> None:
    recipe = load_suite(name, "paper").training()
    assert (recipe.epochs, recipe.batch, recipe.optimizer, recipe.momentum) == (90, 256, "sgd", 0.9)
    assert (recipe.weight_decay, recipe.augment, recipe.nesterov) == (1e-4, "crop_flip", False)
    assert rates(recipe, 0, 29, 30, 59, 60, 89) == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]


@pytest.mark.parametrize(
    ("name", "role", "epochs", "steps"),
    [
        ("cear_cifar10", "teacher", 110, {0: 0.1, 39: 0.1, 40: 0.01, 69: 0.01, 70: 0.001, 109: 0.001}),
        ("cear_cifar10", "student", 90, {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 0.001}),
        ("cear_cifar10", "gaussian", 130, {0: 0.1, 89: 0.1, 90: 0.01, 119: 0.01, 120: 0.001}),
        ("cear_mnist", "student", 80, {0: 0.001, 79: 0.001}),
        ("cear_mnist", "gaussian", 75, {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 0.001}),
        ("cear_tiny_imagenet", "teacher", 30, {0: 0.1, 14: 0.1, 15: 0.05, 29: 0.05}),
        ("cear_tiny_imagenet", "student", 25, {0: 0.1, 14: 0.1, 15: 0.01, 24: 0.01}),
        ("cear_tiny_imagenet", "gaussian", 30, {0: 0.1}),
    ],
)
def test_cear_trains_each_role_by_its_own_schedule(name: str, role: str, epochs: int, steps: dict[int, float]) -> None:
    """The numbers of methods 3.1 and 3.4: teacher, students and CEAR's version of RandSmooth."""
    recipe = load_suite(name, "paper").training(role)
    assert recipe.epochs == epochs
    assert rates(recipe, *steps) == list(steps.values())


def test_cears_other_settings_are_those_of_the_paper_and_its_code() -> None:
    mnist, cifar, tiny = (load_suite(f"cear_{name}", "paper") for name in ("mnist", "cifar10", "tiny_imagenet"))
    student, baseline = mnist.training("student"), mnist.training("gaussian")
    assert (student.optimizer, student.batch, student.weight_decay) == ("adam", 256, 1e-4)
    assert (baseline.optimizer, baseline.batch, baseline.momentum) == ("sgd", 128, 0.8)
    assert {role for role in ROLES if cifar.training(role).nesterov} == {"teacher"}
    assert {cifar.training(role).batch for role in ROLES} == {256} and {tiny.training(role).batch for role in ROLES} == {128}
    assert {role: tiny.training(role).label_smoothing for role in ROLES[:3]} == {
        "teacher": 0.1,
        "student": 0.0,
        "gaussian": 0.1,
    }
    assert [suite.architecture for suite in (mnist, cifar, tiny)] == ["lenet5", "resnet110", "resnet18_dropout"]
    assert [suite.sweep["sigma"] for suite in (mnist, cifar, tiny)] == [(0.25, 0.5, 1.0)] * 2 + [(0.125, 0.25)]
    steps = [suite.evals["certified"].radii.step for suite in (mnist, cifar, tiny)]  # type: ignore[union-attr]
    assert steps == [0.25, 0.25, 0.1]


def test_fashion_mnist_is_mnist_with_other_images() -> None:
    one, other = (load_suite(name, "paper").model_dump() for name in ("mnist", "fashion_mnist"))
    assert {key for key in one if one[key] != other[key]} == {"name", "description", "dataset"}
    assert load_suite("fashion_mnist", "quick").sweep["sigma"] == (0.25,)


def child_of(parent: Path, text: str, name: str = "kid") -> Path:
    """A suite beside ``parent`` that extends it."""
    path = parent.with_name(f"{name}.toml")
    path.write_text(f'extends = "{parent.name}"\nname = "{name}"\nversion = 1\n{text}')
    return path


def test_a_child_starts_from_its_parent_and_merges_tables(tiny: Path) -> None:
    tiny.write_text(tiny.read_text() + '\n[budget.quick]\ntrain_images = 32\n"recipe.epochs" = 1\n"evals.pgd.steps" = 2\n')
    text = '[recipe]\nlr = 0.5\n[evals.pgd]\neps = ["0.3"]\n[evals.again]\nkind = "clean"\nimages = 5\n'
    suite = load_suite(child_of(tiny, text + '[budget.quick]\n"evals.pgd.steps" = 1\n'))
    assert (suite.name, suite.train_images) == ("kid", 32)
    assert (suite.training().lr, suite.training().batch, suite.training().epochs) == (0.5, 32, 1)
    pgd = suite.evals["pgd"]
    assert isinstance(pgd, Robust) and (pgd.eps, pgd.steps, pgd.restarts) == ((0.3,), 1, 2)
    assert list(suite.evals) == ["clean", "pgd", "certified", "again"]
    assert load_suite(tiny).evals["pgd"].eps == (0.02, 0.1)  # type: ignore[union-attr]


def test_a_child_removes_an_evaluation_and_what_budgets_say_of_it(tiny: Path) -> None:
    tiny.write_text(tiny.read_text() + '\n[budget.quick]\n"evals.pgd.steps" = 1\n"evals.clean.images" = 7\n')
    suite = load_suite(child_of(tiny, "[evals]\npgd = false\n"))
    assert list(suite.evals) == ["clean", "certified"] and suite.evals["clean"].images == 7
    with pytest.raises(SuiteError, match=r"kid\.toml: evals\.pdg = false: unknown 'pdg'; did you mean 'pgd'"):
        load_suite(child_of(tiny, "[evals]\npdg = false\n"))
    with pytest.raises(SuiteError, match=r"budget\.quick\.evals\.pgd\.steps: there is no 'pgd' in the suite"):
        load_suite(child_of(tiny, '[evals]\npgd = false\n[budget.quick]\n"evals.pgd.steps" = 1\n'))


def test_a_child_may_keep_only_the_evaluations_that_it_names(tiny: Path) -> None:
    tiny.write_text(tiny.read_text() + '\n[budget.quick]\n"evals.pgd.steps" = 1\n"evals.clean.images" = 7\n')
    kept = child_of(tiny, '[evals]\nothers = false\n[evals.clean]\nimages = 9\n[evals.second]\nkind = "clean"\nimages = 5\n')
    suite = load_suite(kept)
    assert {name: item.images for name, item in suite.evals.items()} == {"clean": 7, "second": 5}
    with pytest.raises(SuiteError, match=r"kid\.toml: evals\.others: .*got True"):
        load_suite(child_of(tiny, "[evals]\nothers = true\n"))


def test_a_suite_extends_a_shipped_one_or_a_grandparent_elsewhere(tiny: Path) -> None:
    kid = child_of(tiny, 'description = "kid"\n')
    folder = tiny.parent / "below"
    folder.mkdir()
    (folder / "grandkid.toml").write_text('extends = "../kid.toml"\nname = "grandkid"\nversion = 3\n')
    suite = load_suite(folder / "grandkid.toml")
    assert (suite.name, suite.version, suite.description, suite.dataset) == ("grandkid", 3, "kid", "digits")
    kid.write_text('extends = "mnist"\nname = "kid"\nversion = 1\n')
    assert load_suite(folder / "grandkid.toml").dataset == "mnist"


def test_circles_and_unknown_parents_name_the_chain(tiny: Path) -> None:
    kid = child_of(tiny, "")
    tiny.write_text('extends = "kid.toml"\n' + tiny.read_text())
    with pytest.raises(SuiteError, match=r"kid\.toml extends tiny\.toml extends kid\.toml: that is a circle"):
        load_suite(kid)
    tiny.write_text(tiny.read_text().replace("kid.toml", "minst"))
    with pytest.raises(SuiteError, match=r"kid\.toml extends tiny\.toml extends minst: unknown 'minst'; did you mean 'mnist'"):
        load_suite(kid)
    tiny.write_text(tiny.read_text().replace("minst", "nowhere.toml"))
    with pytest.raises(SuiteError, match=r"tiny\.toml extends nowhere\.toml: .* from the folder of tiny\.toml"):
        load_suite(kid)


@pytest.mark.parametrize("key", ["name", "version"])
def test_a_child_has_a_name_and_version_of_its_own(tiny: Path, key: str) -> None:
    kid = child_of(tiny, "")
    kid.write_text(re.sub(rf"{key} = .*", "", kid.read_text()))
    with pytest.raises(SuiteError, match=rf"kid\.toml: {key} is missing; a suite that extends tiny\.toml must give its own"):
        load_suite(kid)


def test_a_role_overrides_the_recipe_key_by_key(tiny: Path) -> None:
    text = "[roles.teacher]\nepochs = 11\ndecay_at = [0.5]\nnesterov = true\n[roles.student]\nlr = 0.2\n"
    kid = child_of(tiny, text + '[budget.smoke]\n"recipe.epochs" = 1\n"roles.student.epochs" = 3\n')
    suite = load_suite(kid, "paper")
    base = suite.training()
    assert suite.training("teacher") == Recipe(**{**vars(base), "epochs": 11, "decay_at": (0.5,), "nesterov": True})
    assert suite.training("student") == Recipe(**{**vars(base), "lr": 0.2}) and suite.training("plain") == base
    smoke = load_suite(kid, "smoke")
    assert [smoke.training(role).epochs for role in ("", "teacher", "student", "plain")] == [1, 11, 3, 1]
    kid.write_text(kid.read_text().replace('"roles.student.epochs" = 3', ""))
    assert load_suite(kid, "smoke").training("student").epochs == 1


def test_a_task_trains_each_role_by_its_recipe_and_the_record_shows_it(tiny: Path, tmp_path: Path) -> None:
    from bench.request import Request
    from bench.runner import Run

    kid = child_of(tiny, "[roles.gaussian]\nlr = 0.2\n")
    for path, roles in ((tiny, set()), (kid, {"gaussian"})):
        run = Run(Request(defense="randsmooth", suite=str(path), device="cpu", runs=tmp_path))
        assert run.task.roles.keys() == roles
        assert run.task.recipe_for("gaussian").lr == (0.2 if roles else 0.01) and run.task.recipe_for("plain").lr == 0.01
        shown = run.jobs[0].blank.task
        assert {role: own["lr"] for role, own in shown.get("roles", {}).items()} == dict.fromkeys(roles, 0.2)


def test_every_role_that_a_defense_asks_for_is_known() -> None:
    folder = Path(defenses.__file__).parent
    asked = {role for path in folder.glob("*.py") for role in re.findall(r'recipe_for\("([^"]+)"\)', path.read_text())}
    assert asked and asked <= set(ROLES)


def test_batch_and_schedule_may_follow_the_number_of_images(tiny: Path) -> None:
    text = '\n[budget.quick]\ntrain_images = 32\n"recipe.batch" = 8\n"recipe.decay_at" = [0.6, 0.85]\n'
    tiny.write_text(tiny.read_text() + text)
    assert (load_suite(tiny).training().batch, load_suite(tiny).training().decay_at) == (8, (0.6, 0.85))


def test_architectures_of_torchvision_go_by_their_prefix(tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace('"lenet5"', '"torchvision/resnet50"'))
    assert load_suite(tiny).architecture == "torchvision/resnet50"


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
        ('attack = "pgd"', 'attack = "pdg"', r"unknown 'pdg'; known are autoattack"),
        ('norm = "linf"', 'norm = "l3"', r"unknown 'l3'; known are linf, l2"),
        ('dataset = "digits"', 'dataset = "digit"', r"did you mean 'digits'"),
        ('architecture = "lenet5"', 'architecture = "lenet"', r"did you mean 'lenet5'"),
        ("batch = 32", "bach = 32", r"recipe: unknown 'bach'; did you mean 'batch'"),
        ("n = 200", "n = 0", r"evals\.certified\.n"),
        ("version = 1", "", r"version"),
        ('kind = "clean"', 'kind = "cleen"', r"evals\.clean"),
        ("[recipe]", "[recipe", r"not valid TOML"),
        ("batch = 32", 'batch = "many"', r"recipe\.batch: .*valid integer.*'many'"),
        ("batch = 32", "batch = 0", r"recipe: epochs and batch must be at least 1, got 2 and 0"),
        ("batch = 32", "decay_at = 0.5", r"recipe\.decay_at: .*valid tuple.*0\.5"),
        ("batch = 32", "decay_at = [30, 60]", r"recipe\.decay_at: shares of the epochs, from 0 to 1, got \[30\.0, 60\.0\]"),
        (
            "[recipe]",
            "[roles.techer]\nlr = 1.0\n[recipe]",
            r"roles: unknown 'techer'; did you mean 'teacher'\? Known are at, fast_at, gauss",
        ),
        ("[recipe]", "[roles.teacher]\nepoch = 1\n[recipe]", r"roles\.teacher: unknown 'epoch'; did you mean 'epochs'"),
        ("[recipe]", "[roles.teacher]\nlr = []\n[recipe]", r"roles\.teacher\.lr: .*valid number"),
        ("[recipe]", "budget = 3\n[recipe]", r"tiny\.toml: budget must be a table, got 3"),
        ("[recipe]", "[budget]\nquick = 3\n[recipe]", r"budget\.quick must be a table, got 3"),
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


@pytest.mark.parametrize(
    "key", ["evals.pgd.eps", "evals.certified.alpha", "evals.pgd.norm", "recipe.lr", "roles.teacher.lr", "dataset"]
)
def test_a_budget_may_not_change_the_question(tiny: Path, key: str) -> None:
    tiny.write_text(tiny.read_text() + f'\n[budget.quick]\n"{key}" = 1\n')
    with pytest.raises(SuiteError, match=r"may not change with the budget; allowed are .*recipe\.\(epochs\|batch\|decay_at\)"):
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
