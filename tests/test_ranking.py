"""Worst cases over everything known of a threat, and ranks that images cannot tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_store import record

from bench.ranking import SMOOTHED, Threat, apart, over_seeds, ranks, worst_cases
from bench.store import Record, Store


def attack(name: str, eps: list[float], **fields: Any) -> Record:
    asked = {"kind": "robust", "attack": name, "norm": "linf", "eps": eps, "noise": 0.0, "nearest": False, **fields}
    return record(eval={"name": name, "fields": asked}, metrics=[])


def rows(eps: float, broken: list[int], images: int) -> pd.DataFrame:
    """Verdicts on the first images; ``broken`` are the ids that fall."""
    ids = range(images)
    hit = [image in broken for image in ids]
    return pd.DataFrame({"id": ids, "eps": eps, "broken": hit, "clean_correct": True, "distance": eps})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def standing(store: Store, threat: Threat, *told: tuple[Record, pd.DataFrame]) -> tuple[list[int], int]:
    """Ids that stand at a threat, and how many images count."""
    for own, table in told:
        store.write(own)
        store.write_rows(own, table)
    stands = worst_cases(store, [own for own, _ in told])[threat].stands
    return stands.index[stands].tolist(), len(stands)


HERE = Threat("linf", 0.1)


def test_every_attack_counts_on_the_images_of_the_strongest(store: Store) -> None:
    strong = attack("autoattack", [0.1], version="standard"), rows(0.1, [0], 4)
    weak = attack("pgd", [0.1]), rows(0.1, [1, 7], 10)
    assert standing(store, HERE, strong, weak) == ([2, 3], 4)
    case = worst_cases(store, [strong[0], weak[0]])[HERE]
    assert case.strong and case.attacks == ("autoattack", "pgd")
    assert not worst_cases(store, [weak[0]])[HERE].strong


def test_what_falls_within_a_smaller_radius_has_fallen(store: Store) -> None:
    two = pd.concat([rows(0.05, [3], 5), rows(0.1, [1], 5)])
    assert standing(store, HERE, (attack("pgd", [0.05, 0.1]), two)) == ([0, 2, 4], 5)
    assert standing(store, Threat("linf", 0.05), (attack("pgd", [0.05, 0.1]), two)) == ([0, 1, 2, 4], 5)


def test_adaptive_and_transferred_images_count(store: Store) -> None:
    adaptive = record(eval={"name": "adaptive", "fields": {"kind": "adaptive", "norm": "linf", "eps": [0.1]}}, metrics=[])
    own = pd.DataFrame({"id": range(3), "eps": 0.1, "clean_correct": [True, True, False], "broken_by": ["view: ce", "", ""]})
    carried = record(eval={"name": "transfer", "fields": {"kind": "transfer", "attack": "pgd", "norm": "linf"}}, metrics=[])
    wrong = {"wrong_0_ensemble": [False, True, True], "wrong_ensemble_ensemble": False, "correct_ensemble": True}
    other = pd.DataFrame({"id": range(3), "eps": 0.1, **wrong})
    assert standing(store, HERE, (adaptive, own)) == ([1], 3)
    assert standing(store, HERE, (adaptive, own), (carried, other)) == ([], 3)


def test_noise_makes_another_classifier(store: Store) -> None:
    plain = attack("pgd", [0.1]), rows(0.1, [0], 3)
    smoothed = attack("smoothed", [0.1], attack="pgd", noise=0.5), rows(0.1, [1], 3)  # the record's defense has sigma 0.5
    noisy = attack("noisy", [0.1], attack="pgd", noise=0.3), rows(0.1, [2], 3)
    assert standing(store, HERE, plain, smoothed, noisy)[0] == [1, 2]
    assert standing(store, Threat("linf", 0.1, SMOOTHED), plain, smoothed, noisy)[0] == [0, 2]
    assert standing(store, Threat("linf", 0.1, "noise 0.3"), plain, smoothed, noisy)[0] == [0, 1]


def test_rows_that_are_lost_count_for_nothing(store: Store) -> None:
    lost = attack("pgd", [0.1])
    store.write(lost)
    assert worst_cases(store, [lost]) == {}
    store.write_rows(lost, pd.DataFrame({"id": [0]}))
    assert worst_cases(store, [lost]) == {}


def verdicts(right: int, images: int = 100) -> pd.Series:
    return pd.Series([image < right for image in range(images)])


@pytest.mark.parametrize(("more", "told"), [(5, False), (6, True)])  # 2 / 2^5 = 0.0625, 2 / 2^6 = 0.031
def test_verdicts_are_told_apart_by_the_exact_test(more: int, told: bool) -> None:
    assert apart(verdicts(50 + more), verdicts(50)) is told


def test_only_images_that_both_were_asked_about_are_compared() -> None:
    assert not apart(verdicts(50, images=50), verdicts(50, images=100))


def test_means_over_seeds_are_told_apart_by_signs() -> None:
    a = over_seeds([verdicts(60), verdicts(60)])
    b = over_seeds([verdicts(60), verdicts(30)])
    assert b.mean() == pytest.approx(0.45)
    assert apart(a, b), "30 of 100 images are half as often right"
    assert apart(a, over_seeds([verdicts(60), verdicts(54)])), "six images, all one way: p = 2 / 2^6"
    assert not apart(a, over_seeds([verdicts(60), verdicts(55)])), "five: p = 2 / 2^5"
    assert not apart(a, a + 1e-12 * pd.Series([1, -1] * 50))


def test_a_rank_is_shared_with_the_best_of_those_that_have_it() -> None:
    values = {"a": verdicts(90), "b": verdicts(86), "c": verdicts(83), "d": verdicts(40), "e": verdicts(41)}
    assert ranks(values) == {"a": (1, True), "b": (1, True), "c": (3, False), "e": (4, True), "d": (4, True)}
    assert ranks({}) == {}
