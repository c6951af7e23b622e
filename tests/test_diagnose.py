"""Records that cannot all be true, each in one way: what is found, in which images, and what the status says."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from attacks import ATTACKS, DiverseMim
from attacks.apgd import Apgd
from attacks.gradient import Fgsm, Pgd
from bench import cli
from bench.diagnose import STATUSES, Diagnosis, diagnose, render
from bench.findings import SIGNS
from bench.store import Finding, Metric, Record, Store
from bench.suites import load_suite
from bench.tables import body, summaries
from bench.verdicts import BLACK_BOX, ITERATED, KNOWN, ROLES, SINGLE
from defenses import bounds

ROOT = Path(__file__).parent.parent

N = 60
IDS = np.arange(100, 100 + N)
EDGE = np.linspace(0.02, 0.5, N)
"""Distance of each image's nearest adversarial point: what a perfect attack finds."""

HIT, MANY = slice(14, 22), slice(14, 34)
"""Images that a test makes something of: eight that a perfect attack breaks between .1 and .2, and twenty."""

NAMES, FIRST, LAST = IDS[HIT].tolist(), IDS[:8].tolist(), IDS[-8:].tolist()

FAR = 9.0
"""Of points that an attack does not find."""


class Case:
    """Records of one variant, written as they are made."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)

    def write(self, kind: str, name: str, rows: pd.DataFrame | None, fields: dict[str, Any], **changes: Any) -> Record:
        given: dict[str, Any] = {
            "status": "success",
            "suite": {"name": "made", "version": 1, "budget": "quick"},
            "defense": {"name": "d", "variant": "d", "fields": {}},
            "eval": {"name": name, "fields": {"kind": kind, "images": N, **fields}},
            "seed": 0,
            "task": {"dataset": "digits", "architecture": "lenet5"},
            "metrics": [Metric(metric="robust_accuracy", value=0.5, n=N, eps=0.1, denominator="all")],
        }
        record = Record(**{**given, **changes})
        self.store.write(record)
        if rows is not None:
            self.store.write_rows(record, rows)
        return record

    def robust(self, name: str, attack: str, reach: np.ndarray, eps: Sequence[float] = (0.1, 0.2), **changes: Any) -> Record:
        """An attack that breaks image i within ``reach[i]``."""
        fields = {"attack": attack, "norm": "linf", "eps": list(eps), "noise": 0.0, **changes.pop("fields", {})}
        columns = changes.pop("columns", {})
        rows = pd.concat([self.rows(reach, own) for own in eps], ignore_index=True).assign(**columns)
        return self.write("robust", name, changes.pop("table", rows), fields, **changes)

    @staticmethod
    def rows(reach: np.ndarray, eps: float) -> pd.DataFrame:
        columns = {"id": IDS, "label": 0, "eps": eps, "clean_correct": True, "broken": reach <= eps, "distance": eps}
        return pd.DataFrame({**columns, "forwards": 5, "backwards": 5, "zeros": 0})

    def pgd(self, name: str = "pgd", reach: np.ndarray = EDGE, steps: int = 20, **changes: Any) -> Record:
        settings = {"steps": steps, "restarts": 1, "loss": "ce", "step": "2.5eps/T", "start": "random"}
        return self.robust(name, "pgd", reach, fields={**settings, **changes.pop("fields", {})}, **changes)

    def autoattack(self, reach: np.ndarray = EDGE, by: Any = 0, **changes: Any) -> Record:
        names = ("apgd_ce", "apgd_t", "fab_t", "square")
        after = [Metric(metric="robust_accuracy_after", value=0.5, n=N, source=name, eps=0.1) for name in names]
        broken_by = np.concatenate([np.where(reach <= eps, by, -1) for eps in (0.1, 0.2)])
        found = {"version": "standard", **changes.pop("fields", {})}
        return self.robust(
            "autoattack", "autoattack", reach, fields=found, columns={"broken_by": broken_by}, metrics=after, **changes
        )

    def adaptive(self, reach: np.ndarray = EDGE, by: Any = "apgd_ce", **changes: Any) -> Record:
        tables = [
            pd.DataFrame({"id": IDS, "eps": eps, "clean_correct": True, "broken_by": np.where(reach <= eps, by, "")})
            for eps in (0.1, 0.2)
        ]
        return self.write("adaptive", "adaptive", pd.concat(tables), {"norm": "linf", "eps": [0.1, 0.2]}, **changes)

    def black_box(self, reach: np.ndarray, attack: str = "diverse_mim", name: str = "surrogates", **changes: Any) -> Record:
        tables = [
            pd.DataFrame({"id": IDS, "eps": eps, "clean_correct": True, "wrong naive": reach <= eps, "wrong nt": False})
            for eps in (0.1, 0.2)
        ]
        fields = {"attack": attack, "norm": "linf", "eps": [0.1, 0.2], "sources": ["naive", "nt"]}
        return self.write("black_box", name, pd.concat(tables), fields, **changes)

    def transfer(self, own: np.ndarray, *others: np.ndarray, **settings: Any) -> Record:
        """Images that the ensemble finds, and those that its first members do; the others' fool nobody."""
        reached, tables = [*others, np.full(N, FAR)], []
        for eps in (0.1, 0.2):
            columns = {f"correct_{name}": True for name in ("0", "1", "ensemble")}
            wrong = {f"{member}_ensemble": reached[member] <= eps for member in (0, 1)}
            wrong |= {"ensemble_ensemble": own <= eps, "0_1": np.full(N, True)}
            tables.append(pd.DataFrame({"id": IDS, "eps": eps, **columns, **{f"wrong_{k}": v for k, v in wrong.items()}}))
        fields = {"attack": "pgd", "norm": "linf", "eps": [0.1, 0.2], "steps": 50, "restarts": 1, "step": "eps/5"}
        return self.write("transfer", "transfer", pd.concat(tables), {**fields, **settings})

    def certified(self, fewest: int = 600, radius: np.ndarray | None = None, **changes: Any) -> Record:
        """Fixed estimator, more votes from image to image, and the radius that they prove."""
        count = np.linspace(fewest, 1000, N).astype(int)
        proven = 0.5 * np.asarray(bounds.radius(bounds.lower(count, 1000, 0.001), 1.0))
        rows = pd.DataFrame({"id": IDS, "label": 0, "prediction": 0, "count": count, "draws": 1000})
        table = rows.assign(radius=proven if radius is None else radius)
        fields = {"estimator": "fixed", "sigma": 0.5, "n": 1000, "n0": 100, "alpha": 0.001, "radii": [0.0, 0.25, 0.5]}
        return self.write(
            "certified", "certified", changes.pop("table", table), {**fields, **changes.pop("fields", {})}, **changes
        )

    def smoothed(self, reach: np.ndarray, **changes: Any) -> Record:
        fields = {"norm": "l2", "noise": 0.5, "eot": 20, "steps": 20, "restarts": 1, **changes}
        return self.robust("smoothed", "pgd", reach, eps=(0.25, 0.5), fields=fields)

    @property
    def found(self) -> Diagnosis:
        (one,) = diagnose(self.store, self.store.records())
        return one

    @property
    def kinds(self) -> list[str]:
        return [finding.kind for finding in self.found.findings]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path / "runs")


def changed(values: np.ndarray, to: Any, rows: slice = HIT) -> np.ndarray:
    new = values.copy()
    new[rows] = to
    return new


def whole(case: Case) -> None:
    """Everything that there is, with nothing wrong: weaker attacks need more room, certificates less."""
    case.robust("r_fgsm", "r_fgsm", 1.8 * EDGE, fields={"loss": "ce", "steps": 1, "restarts": 1})
    case.robust("fgsm", "fgsm", 1.5 * EDGE, fields={"loss": "ce", "steps": 1, "restarts": 1})
    case.pgd(reach=1.1 * EDGE)
    case.pgd("pgd50", 1.05 * EDGE, steps=50)
    case.robust("square", "square", 1.3 * EDGE, fields={"proposals": 1000})
    case.autoattack()
    case.adaptive()
    case.black_box(2 * EDGE)
    case.transfer(1.05 * EDGE, 1.6 * EDGE)
    case.certified()
    case.smoothed(np.linspace(0.3, 2.0, N))


def test_nothing_is_wrong_where_nothing_is(case: Case) -> None:
    whole(case)
    assert case.kinds == []
    assert case.found.status == "certified" and case.found.attacks.status == "adaptive"


# One violation at a time


def i1(case: Case) -> None:
    reach = [EDGE <= 0.1, (EDGE <= 0.1) & ~np.isin(IDS, FIRST)]
    tables = [Case.rows(EDGE, eps).assign(broken=own) for eps, own in zip((0.1, 0.2), reach, strict=True)]
    case.pgd(table=pd.concat(tables, ignore_index=True))


def i2_steps(case: Case) -> None:
    case.pgd()
    case.pgd("pgd50", changed(EDGE, FAR), steps=50)


def i2_proposals(case: Case) -> None:
    case.robust("square", "square", EDGE, fields={"proposals": 1000})
    case.robust("square5", "square", changed(EDGE, FAR), fields={"proposals": 5000})


def i2_family(case: Case) -> None:
    case.pgd()
    case.robust("apgd", "apgd", changed(EDGE, FAR), fields={"loss": "ce", "steps": 100, "restarts": 1})


def i2_random_start(case: Case) -> None:
    case.robust("r_fgsm", "r_fgsm", EDGE)
    case.robust("fgsm", "fgsm", changed(EDGE, FAR))


def i2_on_itself(case: Case) -> None:
    """Of a transfer, what is crafted on the ensemble is an attack on the ensemble."""
    case.transfer(changed(EDGE, FAR), EDGE + 1, attack="fgsm", steps=1)
    case.robust("r_fgsm", "r_fgsm", EDGE)


def i3_square(case: Case) -> None:
    case.pgd(reach=changed(EDGE, FAR))
    case.robust("square", "square", EDGE, fields={"proposals": 1000})


def i3_surrogates(case: Case) -> None:
    case.pgd(reach=changed(EDGE, FAR))
    case.black_box(EDGE)


def i3_transfer(case: Case) -> None:
    case.transfer(changed(EDGE, FAR), EDGE)


def i3_second_member(case: Case) -> None:
    case.transfer(changed(EDGE, FAR), 2 * EDGE, EDGE)


def i3_single_step(case: Case) -> None:
    case.robust("fgsm", "fgsm", changed(EDGE, FAR))
    case.black_box(EDGE, "fgsm")


def i3_cascade(case: Case) -> None:
    """AutoAttack's gradients found less than a long search without any, which its own Square repeats."""
    case.autoattack(by=changed(np.zeros(N, int), 3))
    case.robust("square", "square", EDGE)


def i4_component(case: Case) -> None:
    case.pgd()
    case.autoattack(changed(EDGE, FAR))


def i4_adaptive(case: Case) -> None:
    case.robust("fab", "fab", EDGE)
    case.adaptive(changed(EDGE, FAR))


def i5_linf(case: Case) -> None:
    case.pgd(reach=changed(EDGE, FAR, MANY), eps=(0.1, 1.0))


def i5_l2(case: Case) -> None:
    case.pgd(reach=changed(EDGE, 99.0, MANY), eps=(0.5, 28.0), fields={"norm": "l2"})


def i6_rows(case: Case) -> None:
    rows = pd.DataFrame({"id": IDS, "label": 0, "prediction": 0, "count": 90, "draws": 100, "radius": 0.0})
    right = [np.isin(IDS, LAST), np.isin(IDS, [*LAST, *NAMES])]
    tables = [rows.assign(asked=r, radius=r, prediction=np.where(ok, 0, 1)) for r, ok in zip((0.25, 0.5), right, strict=True)]
    case.certified(table=pd.concat(tables), fields={"estimator": "sequential", "radii": [0.25, 0.5]})


def i7(case: Case) -> None:
    rows = Case(case.store.root / "x").certified()  # for its radii
    radius = Store(case.store.root / "x").rows(rows).radius.to_numpy()
    case.certified(radius=changed(radius, 2.0))


def i8(case: Case) -> None:
    case.certified(fewest=1000)
    case.smoothed(changed(np.full(N, 2.0), 0.2, slice(N - 8, N)))


def i9(case: Case) -> None:
    case.pgd(reach=changed(EDGE, FAR))
    case.robust("fgsm", "fgsm", EDGE)


def i10_distance(case: Case) -> None:
    rows = Case.rows(EDGE, 0.1)
    case.pgd(eps=(0.1,), table=rows.assign(distance=changed(rows.distance.to_numpy(float), 0.10001)))


def i10_nan(case: Case) -> None:
    rows = Case.rows(EDGE, 0.1)
    case.pgd(eps=(0.1,), table=rows.assign(distance=changed(rows.distance.to_numpy(float), np.nan)))


def hidden(case: Case) -> None:
    case.adaptive(by=changed(np.full(N, "apgd_ce", dtype=object), "members: half"))


VIOLATIONS: list[tuple[Callable[[Case], None], str, list[int]]] = [
    (i1, "accuracy_rises_with_eps", FIRST),
    (i2_steps, "more_effort_does_less", NAMES),
    (i2_proposals, "more_effort_does_less", NAMES),
    (i2_family, "more_effort_does_less", NAMES),
    (i2_random_start, "more_effort_does_less", NAMES),
    (i2_on_itself, "more_effort_does_less", NAMES),
    (i3_square, "black_box_stronger", NAMES),
    (i3_surrogates, "black_box_stronger", NAMES),
    (i3_transfer, "black_box_stronger", NAMES),
    (i3_second_member, "black_box_stronger", NAMES),
    (i3_single_step, "black_box_stronger", NAMES),
    (i3_cascade, "black_box_stronger", NAMES),
    (i4_component, "worst_case_beaten", NAMES),
    (i4_adaptive, "worst_case_beaten", NAMES),
    (i5_linf, "unbounded_stands", IDS[MANY].tolist()),
    (i5_l2, "unbounded_stands", IDS[MANY].tolist()),
    (i6_rows, "certified_rises_with_radius", NAMES),
    (i7, "radius_above_ceiling", NAMES),
    (i8, "certified_above_attacked", LAST),
    (i9, "fgsm_stronger_than_pgd", NAMES),
    (i10_distance, "outside_budget", NAMES),
    (i10_nan, "not_a_number", NAMES),
    (hidden, "adaptive_much_stronger", NAMES),
]


@pytest.mark.parametrize(("violate", "kind", "images"), VIOLATIONS, ids=lambda one: getattr(one, "__name__", None))
def test_each_violation_is_found_alone_with_its_images(
    case: Case, violate: Callable[[Case], None], kind: str, images: list[int]
) -> None:
    violate(case)
    assert case.kinds == [kind], [finding.detail for finding in case.found.findings]
    (finding,) = case.found.findings
    assert finding.evidence["images"] == images and finding.evidence["count"] == len(images)
    assert {record.eval["name"] for record in case.found.records} >= set(finding.evidence["evaluations"])
    assert str(len(images)) in finding.detail and SIGNS[kind].flags and case.found.status == "flagged"


@pytest.mark.parametrize(("more", "fewer", "told"), [(4, 0, False), (5, 0, True), (8, 1, True), (8, 2, False), (8, 3, False)])
def test_what_chance_may_do_is_not_found(case: Case, more: int, fewer: int, told: bool) -> None:
    """Over two standard errors: five images against none, eight against one."""
    case.pgd(reach=changed(EDGE, FAR, slice(0, more)), eps=(0.3,))
    case.robust("fgsm", "fgsm", changed(EDGE, FAR, slice(20, 20 + fewer)), eps=(0.3,))
    assert case.kinds == (["fgsm_stronger_than_pgd"] if told else [])


@pytest.mark.parametrize(("count", "told"), [(10, False), (11, True)])
def test_a_gap_to_attacks_that_know_the_defense_may_be_of_a_twentieth(case: Case, count: int, told: bool) -> None:
    """Of 200 images, where so many are beyond chance."""
    by = np.where(np.arange(200) < count, "members: half", "apgd_ce")
    rows = pd.DataFrame({"id": np.arange(200), "eps": 0.1, "clean_correct": True, "broken_by": by})
    case.write("adaptive", "adaptive", rows, {"norm": "linf", "eps": [0.1], "images": 200})
    assert case.kinds == ["adaptive_much_stronger"] * told


@pytest.mark.parametrize(
    ("dataset", "count", "told"),
    [("digits", 10, False), ("digits", 11, True), ("cifar100", 2, False), ("cifar100", 3, True)],
)
def test_as_many_may_stand_within_everything_as_are_guessed(case: Case, dataset: str, count: int, told: bool) -> None:
    """Two standard errors above one image of ten, or of a hundred: 10.6 and 2.1 of 60."""
    task = {"dataset": dataset, "architecture": "lenet5"}
    case.pgd(reach=changed(EDGE, FAR, slice(0, count)), eps=(1.0,), task=task)
    assert case.kinds == ["unbounded_stands"] * told


@pytest.mark.parametrize(
    ("norm", "beyond", "told"), [("linf", 1e-7, False), ("linf", 4e-7, True), ("l2", 4e-5, False), ("l2", 7e-5, True)]
)
def test_a_point_may_lie_outside_its_ball_by_rounding_alone(case: Case, norm: str, beyond: float, told: bool) -> None:
    case.pgd(eps=(0.1,), fields={"norm": norm}, table=Case.rows(EDGE, 0.1).assign(distance=0.1 + beyond))
    assert case.kinds == ["outside_budget"] * told


@pytest.mark.parametrize("other", [{"noise": 0.25}, {"noise": 0.0}, {"norm": "linf"}], ids=str)
def test_a_certificate_says_nothing_of_another_noise_or_norm(case: Case, other: dict[str, Any]) -> None:
    """What falls within its radius elsewhere takes nothing from it."""
    case.certified(fewest=1000)
    case.smoothed(np.full(N, 0.2), **other)
    assert case.kinds == []


def test_certified_accuracy_that_rises_in_the_numbers_is_found(case: Case) -> None:
    values = {0.3: 0.09, 0.4: 0.07, 0.5: 0.09}  # as a published table has it (methods 10.2)
    numbers = [Metric(metric="certified_accuracy", value=v, n=N, radius=r) for r, v in values.items()]
    case.certified(metrics=numbers)
    (finding,) = case.found.findings
    assert finding.kind == "certified_rises_with_radius" and finding.evidence["radius"] == [0.4, 0.5]


def test_a_weak_attack_is_no_mask_where_another_gradient_attack_does_better(case: Case) -> None:
    case.robust("bim", "bim", changed(EDGE, FAR), fields={"loss": "ce", "steps": 10, "restarts": 1})
    case.robust("square", "square", 1.01 * EDGE)
    assert case.kinds == ["black_box_stronger"]
    case.pgd()
    assert case.kinds == ["weak_attack"] and case.found.status == "unreviewed"
    assert case.found.findings[0].evidence["evaluations"] == ["bim", "square"]


@pytest.mark.parametrize(("count", "kinds"), [(5, ["weak_attack"]), (6, ["pgd_misled"])])
def test_pgd_far_behind_square_is_a_sign_though_autoattack_does_better(case: Case, count: int, kinds: list[str]) -> None:
    """As in KAP's paper: 63 % under PGD, 20 under Square, 19 under AutoAttack. A tenth of the images is enough."""
    fall = 0.05 * np.ones(N)
    case.pgd(reach=changed(fall, FAR, slice(count)))
    case.robust("square", "square", fall)
    case.autoattack(fall)
    assert case.kinds == kinds and (case.found.status == "flagged") == (kinds == ["pgd_misled"])


@pytest.mark.parametrize(("rows", "told"), [(HIT, True), (slice(14, 19), False)])
def test_an_attack_far_behind_autoattack_is_called_weak(case: Case, rows: slice, told: bool) -> None:
    case.pgd(reach=changed(EDGE, FAR, rows))
    case.autoattack()
    assert case.kinds == ["weak_attack"] * told and case.found.status == "autoattack-ok"


def test_a_weak_attack_is_told_by_what_beats_it_most(case: Case) -> None:
    """Square breaks eight of the images that BIM leaves, AutoAttack twenty."""
    case.robust("bim", "bim", changed(EDGE, FAR, MANY), fields={"loss": "ce", "steps": 10, "restarts": 1})
    case.robust("square", "square", changed(EDGE, FAR, slice(HIT.stop, MANY.stop)))
    case.pgd()
    case.autoattack()
    (finding,) = case.found.findings
    assert finding.kind == "weak_attack" and finding.evidence["evaluations"] == ["bim", "autoattack"]


def test_other_classifiers_norms_and_images_are_not_compared(case: Case) -> None:
    case.pgd(reach=changed(EDGE, FAR))
    case.robust("noisy", "fgsm", EDGE, fields={"noise": 0.3, "eot": 20})
    case.robust("l2", "fgsm", EDGE, fields={"norm": "l2"})
    case.robust("elsewhere", "fgsm", EDGE, table=Case.rows(EDGE, 0.2).assign(id=IDS + 1000))
    case.robust("wider", "fgsm", EDGE, eps=(0.3,))
    assert case.kinds == []


def effort_on_another(case: Case) -> None:
    case.robust("r_fgsm", "r_fgsm", EDGE)
    case.black_box(changed(EDGE, FAR), "fgsm")


def effort_on_members(case: Case) -> None:
    case.robust("r_fgsm", "r_fgsm", EDGE)
    case.transfer(EDGE, changed(EDGE, FAR), attack="fgsm", steps=1)


def less_on_another(case: Case) -> None:
    case.robust("fgsm", "fgsm", changed(EDGE, FAR))
    case.black_box(EDGE, "r_fgsm")


def all_on_another(case: Case) -> None:
    """Auto-PGD ends where its source is wrong, and PGD takes all its steps."""
    case.black_box(changed(EDGE, FAR), "apgd", "black_apgd")
    case.black_box(EDGE, "pgd", "black_pgd")


@pytest.mark.parametrize("make", [effort_on_another, effort_on_members, less_on_another, all_on_another])
def test_effort_spent_on_another_model_is_not_compared(case: Case, make: Callable[[Case], None]) -> None:
    make(case)
    assert case.kinds == []


def test_attacks_on_one_draw_of_a_noise_are_named(case: Case) -> None:
    case.robust("noisy", "pgd", EDGE, fields={"noise": 0.3, "eot": 1})
    assert case.kinds == ["no_expectation"]
    case.robust("noisy", "pgd", EDGE, fields={"noise": 0.3, "eot": 20})
    assert case.kinds == []
    case.pgd()
    case.autoattack(findings=[Finding(kind="randomised", detail="draws", evidence={"images": [1]})])
    assert case.kinds == ["randomised", "no_expectation"]
    assert case.found.findings[1].evidence["evaluations"] == ["pgd", "autoattack"]


# The status


def reduced(case: Case) -> None:
    case.autoattack(fields={"version": "cear"})


def unsound(case: Case) -> None:
    case.certified(findings=[Finding(kind="unsound", detail="pooled")])


def beaten(case: Case) -> None:
    case.certified()
    case.write("challenge", "challenge", None, {"estimator": "fixed"}, status="error", metrics=[], error="beats 3")


def lost(case: Case) -> None:
    case.autoattack()
    (case.store.root / "made/d/quick/seed0/autoattack.parquet").unlink()


def unnamed(case: Case) -> None:
    case.autoattack()
    case.adaptive(findings=[Finding(kind="unreviewed", detail="no views")])


def failed(case: Case) -> None:
    case.autoattack(status="error", error="no")


@pytest.mark.parametrize(
    ("make", "status"),
    [
        (lambda case: case.pgd(), "unreviewed"),
        (lambda case: case.autoattack(), "autoattack-ok"),
        (reduced, "unreviewed"),
        (failed, "unreviewed"),
        (lost, "unreviewed"),
        (lambda case: (case.autoattack(), case.adaptive()), "adaptive"),
        (unnamed, "unreviewed"),
        (lambda case: case.certified(), "certified"),
        (beaten, "unreviewed"),
        (unsound, "flagged"),
    ],
)
def test_every_status(case: Case, make: Callable[[Case], Any], status: str) -> None:
    make(case)
    assert case.found.status == status and status in STATUSES


@pytest.mark.parametrize(("fell", "flagged"), [(1, False), (2, True)])
def test_one_image_of_sixty_to_square_alone_may_be_luck(case: Case, fell: int, flagged: bool) -> None:
    evidence = {"eps": 0.1, "images": NAMES[:fell], "count": fell}
    case.autoattack(findings=[Finding(kind="square_helps", detail="Square", evidence=evidence)], eval={
        "name": "autoattack", "fields": {"kind": "robust", "attack": "autoattack", "version": "standard", "norm": "linf",
        "eps": [0.1, 0.2], "images": 100},
    })  # fmt: skip
    assert case.found.status == ("flagged" if flagged else "autoattack-ok") and case.kinds == ["square_helps"]


def test_masked_gradients_take_nothing_from_a_certificate(case: Case) -> None:
    i3_square(case)
    case.certified()
    one = case.found
    assert (one.status, one.attacks.status, one.certificates.status) == ("flagged", "flagged", "certified")
    tables = {table.title.rpartition(": ")[2]: body(table)[0][-1] for table in summaries(case.store)}
    assert tables == {"accuracy under attack": "flagged; black_box_stronger", "certified accuracy at sigma = 0.5": "certified"}


def test_the_table_tells_seeds_apart_and_keeps_errors(case: Case) -> None:
    case.autoattack()
    case.autoattack(seed=1)
    case.pgd(reach=changed(EDGE, FAR), seed=2)
    case.robust("square", "square", EDGE, seed=2)
    case.write("clean", "clean", None, {}, status="error", metrics=[], error="no")
    (table,) = summaries(case.store)
    assert body(table)[0][-1] == "autoattack-ok (seed 0, 1); flagged (seed 2); black_box_stronger; clean error"
    assert table.caption.endswith(
        f"flagged: {STATUSES['flagged']}; autoattack-ok: {STATUSES['autoattack-ok']}; more by bench diagnose RUNS/made."
    )


def test_every_kind_of_finding_has_a_meaning() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "bench").rglob("*.py"))
    told = set(re.findall(r'(?:Finding\(kind=|_sign\(\s*|finding\(\s*|_between\(\s*)"(\w+)"', text))
    assert len(told) >= 20 and told <= set(SIGNS)
    from attacks.checks import CHECKS

    assert set(CHECKS) <= set(SIGNS)


def test_every_attack_has_its_role() -> None:
    assert set(ATTACKS) - set(ROLES) == {"fab", "fab_t", "ddn", "fmn"}  # minimum-norm attacks
    assert {name for name, kind in ATTACKS.items() if issubclass(kind, Fgsm)} == set(SINGLE)
    assert {name for name, kind in ATTACKS.items() if issubclass(kind, Pgd | Apgd | DiverseMim)} == {*SINGLE, *ITERATED}
    assert set(BLACK_BOX) <= set(ATTACKS) and {name.partition(":")[0] for name in KNOWN} <= set(ITERATED) | {"apgd_ce"}


# What nobody looked at

LEAD = "where gradients lead, unbounded eps, single noise draws (no probe"
OTHERS = "images of other models (no transfer or black_box"


def suite_of(name: str) -> dict[str, Any]:
    return {"name": name, "version": 1, "budget": "quick"}


def told(store: Store) -> list[str]:
    """The lines that are about it, and the commands."""
    lines = render([(one, one.findings) for one in diagnose(store, store.records())]).splitlines()
    return [line.strip() for line in lines if line.startswith(("  ?", "What", "bench"))]


def probe(case: Case, **changes: Any) -> None:
    columns = {"id": IDS, "eps": 0.1, "stands_50_1": True}
    case.write("probe", "probe", pd.DataFrame(columns), {"norm": "linf", "steps": [50], "restarts": [1]}, **changes)


def test_what_was_not_looked_at_is_told_with_the_command_that_would(case: Case) -> None:
    """By the first of the suite's evaluations that a run can still finish, until one of each is there."""
    here = {"suite": suite_of("smd_mnist")}
    case.pgd(**here)
    evals = load_suite("smd_mnist").evals
    others = [name for name, own in evals.items() if own.kind in ("transfer", "black_box") or name == "adaptive"]
    run = "bench run --defense d --suite smd_mnist --budget quick --seeds 0 --only "
    assert others[0] == "transfer" and len(others) == 8
    assert told(case.store) == [
        f"? not looked at: {LEAD}); {OTHERS})",
        "What would look:",
        run + "probe,transfer",
    ]
    case.write("transfer", "transfer", None, {}, status="skipped", metrics=[], error="one network", **here)
    probe(case, status="error", metrics=[], error="no", **here)
    assert told(case.store)[-1] == run + f"probe,{others[1]}"
    probe(case, **here)
    assert told(case.store) == [f"? not looked at: {OTHERS})", "What would look:", run + others[1]]
    case.black_box(2 * EDGE, **here)
    assert told(case.store) == [] and case.kinds == []
    (case.store.root / "smd_mnist/d/quick/seed0/surrogates.parquet").unlink()
    assert told(case.store)[0] == f"? not looked at: {OTHERS})"


def test_adaptive_attacks_show_images_of_other_models_where_they_have_any(case: Case) -> None:
    rows = pd.DataFrame({"id": IDS, "eps": 0.1, "clean_correct": True, "broken_by": ""})
    for sources, blind in (([], 2), (["naive"], 1)):
        case.write("adaptive", "adaptive", rows, {"norm": "linf", "sources": sources})
        assert told(case.store)[0].count("(no ") == blind


def test_a_transfer_shows_images_of_other_models_too(case: Case) -> None:
    case.transfer(EDGE, 2 * EDGE)
    assert told(case.store) == [f"? not looked at: {LEAD}; suite made is not known here)"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("digits", "suite digits has none"), ("made", "suite made is not known here"), ("edlcm_cifar10", "skipped")],
)
def test_where_no_command_would_look_the_reason_is_told(case: Case, name: str, reason: str) -> None:
    probe(case, suite=suite_of(name))
    for kind in ("transfer", "adaptive"):
        case.write(kind, kind, None, {}, status="skipped", metrics=[], error="one network", suite=suite_of(name))
    assert told(case.store) == [f"? not looked at: {OTHERS}; {reason})"]


def test_certificates_alone_ask_for_no_gradients(case: Case) -> None:
    case.certified()
    assert told(case.store) == []
    case.write("clean", "clean", None, {})
    assert len(told(case.store)) == 1


def test_one_command_looks_at_all_variants_of_a_seed(case: Case) -> None:
    here = {"suite": suite_of("mnist")}
    case.pgd(**here)
    case.pgd(**here, seed=1)
    case.pgd(**here, defense={"name": "d", "variant": "d@members=5", "fields": {}})
    case.pgd(**here, defense={"name": "mine", "variant": "mine", "fields": {}, "file_hash": "0123456789abcdef"})
    told_of, looks = "--suite mnist --budget quick", "probe,adaptive"
    assert told(case.store)[-2:] == [
        f"bench run --defense d,d@members=5,FILE.py:mine {told_of} --seeds 0 --only {looks}",
        f"bench run --defense d {told_of} --seeds 1 --only {looks}",
    ]


# Old records, and the command


SUITES = sorted(path.name for path in (ROOT / "leaderboards/results").iterdir() if any(path.glob("*/*/seed*/*.json")))


def test_committed_records_are_diagnosed_whatever_they_lack() -> None:
    store = Store(ROOT / "leaderboards/results")
    for one in diagnose(store, store.records()):
        assert not [finding for finding in one.findings if finding.kind == "unreadable_rows"], one.place
        suite = one.place[0]
        if suite == "unsound_mnist":
            assert one.certificates.status == "flagged"
        elif one.certificates.records:
            assert one.certificates.status == "certified", one.place


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", "diagnose", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_the_command_at_every_level(case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    i3_square(case)
    case.pgd(seed=1)
    suite = case.store.root / "made"
    for place, lines in ((suite.parent, 2), (suite, 2), (suite / "d", 2), (suite / "d/quick", 2), (suite / "d/quick/seed0", 1)):
        assert call(monkeypatch, str(place)) == 0
        out = capsys.readouterr().out
        assert len(re.findall(r"(?m)^made, quick, d, seed", out)) == lines
        assert "made, quick, d, seed 0: flagged" in out
        assert "! black_box_stronger (sign of masked gradients; pgd, square)" in out
        assert "eps: 0.2; other: 0; n: 60; images: 114, 115, 116, 117, 118, 119, 120, 121" in out
    assert call(monkeypatch, str(suite / "d/quick/seed1"), "--format", "json") == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one == {
        "suite": "made", "budget": "quick", "defense": "d", "seed": 1, "status": "unreviewed", "of": {}, "findings": [],
        "not_looked_at": [{"what": what, "kinds": kinds, "evaluations": [], "reason": "suite made is not known here"}
                          for what, kinds in (("where gradients lead, unbounded eps, single noise draws", ["probe"]),
                                              ("images of other models", ["transfer", "black_box"]))],
        "commands": [],
    }  # fmt: skip
    case.pgd(suite=suite_of("mnist"))
    assert call(monkeypatch, str(case.store.root / "mnist"), "--format", "json") == 0
    (one,) = json.loads(capsys.readouterr().out)
    transfers = ["cear_transfer_l2", "cear_transfer_linf"]
    assert [own["evaluations"] for own in one["not_looked_at"]] == [["probe"], ["adaptive", *transfers]]
    assert one["commands"] == ["bench run --defense d --suite mnist --budget quick --seeds 0 --only probe,adaptive"]


def test_of_a_record_only_what_is_about_it(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    i3_square(case)
    case.robust("other", "fmn", EDGE)
    folder = case.store.root / "made/d/quick/seed0"
    for name, count in (("square", 1), ("other", 0)):
        assert call(monkeypatch, str(folder / f"{name}.json"), "--format", "json") == 0
        (one,) = json.loads(capsys.readouterr().out)
        assert len(one["findings"]) == count and one["status"] == "flagged"
    assert one["defense"] == "d"


def test_what_cannot_be_read_is_told(case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case.pgd()
    folder = case.store.root / "made/d/quick/seed0"
    (folder / "broken.json").write_text("{")
    (folder / "moved.json").write_text((folder / "pgd.json").read_text())
    case.robust("lost", "square", EDGE)
    (folder / "lost.parquet").unlink()
    case.robust("short", "square", EDGE, table=Case.rows(EDGE, 0.1).drop(columns="broken"))
    assert call(monkeypatch, str(folder)) == 0
    shown = capsys.readouterr()
    assert "broken.json is no record" in shown.err and "moved.json belongs to" in shown.err
    assert "the rows of lost cannot be read" in shown.out and "the rows of short cannot be read" in shown.out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nowhere"], "there is no"),
        (["empty"], "holds no records"),
        (["runs/made/parts"], "holds no records"),
        (["runs/made/d/quick/seed0/pgd.parquet"], "holds no records"),
        (["runs/made", "--format", "pdf"], "unknown 'pdf'"),
    ],
)
def test_wrong_requests_get_one_line(
    case: Case, words: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case.pgd()
    monkeypatch.chdir(case.store.root.parent)
    Path("empty").mkdir()
    Path("runs/made/parts").mkdir()
    Path("runs/made/parts/0.json").write_text("{}")
    assert call(monkeypatch, *words) == 2
    shown = capsys.readouterr()
    assert text in shown.err and len(shown.err.splitlines()) == 1 and not shown.out
