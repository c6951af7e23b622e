"""The leaderboard's data: who competes with whom, what is shown of everybody, and records that lie."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_ranking import attack, rows
from test_store import record
from test_tables import certified

from bench import published, site
from bench.boards import NOT_ASKED, NOT_ATTACKED, NOT_TRUE, Board, boards
from bench.claims import claims
from bench.diagnose import diagnose
from bench.entries import Entry
from bench.ranking import Threat
from bench.store import Metric, Record, Store

TINY = {"name": "tiny", "version": 1, "budget": "quick"}


def put(store: Store, own: Record, table: pd.DataFrame, variant: str = "one", **changes: Any) -> None:
    """Store a record of a variant with its rows."""
    own = own.model_copy(update={"defense": {"name": "d", "variant": variant, "fields": {"members": 3}}, **changes})
    store.write(own)
    store.write_rows(own, table)


def only(store: Store) -> Board:
    found, problems = boards([store])
    assert len(found) == 1 and not problems
    return found[0]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def test_suites_versions_budgets_and_sources_never_compete(store: Store) -> None:
    put(store, attack("pgd", [0.1]), rows(0.1, [], 10))
    put(store, attack("pgd", [0.1]), rows(0.1, [], 10), "two", suite={**TINY, "version": 2})
    put(store, attack("pgd", [0.1]), rows(0.1, [], 10), suite={**TINY, "budget": "paper"})
    put(store, attack("pgd", [0.1]), rows(0.1, [], 10), "three", hashes={"data": "other pixels"})
    found, _ = boards([store])
    assert [board.key for board in found] == [
        ("tiny", 1, "paper", "unknown source"), ("tiny", 1, "quick", "other pixels"), ("tiny", 1, "quick", "unknown source"),
        ("tiny", 2, "quick", "unknown source"),
    ]  # fmt: skip


def test_who_was_attacked_less_has_no_rank_among_those_who_were_attacked_more(store: Store) -> None:
    put(store, attack("autoattack", [0.1], version="standard"), rows(0.1, [0, 1], 10), "strong")
    put(store, attack("pgd", [0.1]), rows(0.1, [], 10), "weak")
    put(store, attack("pgd", [0.3]), rows(0.3, [], 10), "elsewhere")
    (table,) = only(store).tables()
    names = {number: entry.variant for number, entry in enumerate(only(store).entries)}
    (ranking,) = table.rankings  # 0.3 is no place to compare where AutoAttack was asked at 0.1
    assert {names[number]: place for number, place in ranking.places.items()} == {"strong": (1, False)}
    assert {names[number]: why for number, why in ranking.without.items()} == {"weak": NOT_ATTACKED, "elsewhere": NOT_ASKED}


def test_numbers_that_cannot_be_true_have_no_rank(store: Store) -> None:
    far = rows(0.1, [0], 10).assign(distance=0.2)
    put(store, attack("pgd", [0.1]), far, "cheat")
    put(store, attack("pgd", [0.1]), rows(0.1, [0], 10), "honest")
    (ranking,) = only(store).tables()[0].rankings
    assert ranking.places == {1: (1, False)} and ranking.without == {0: NOT_TRUE}


def test_the_default_radius_tells_most_apart(store: Store) -> None:
    for variant, broken in {"a": [], "b": list(range(8))}.items():
        two = pd.concat([rows(0.1, broken, 10), rows(0.3, list(range(10)), 10)])
        put(store, attack("pgd", [0.1, 0.3]), two, variant)
    assert [one.label for one in only(store).tables()[0].rankings] == ["ℓ∞ 0.1", "ℓ∞ 0.3"]


def test_several_seeds_have_mean_and_deviation_and_the_worst_word(store: Store) -> None:
    put(store, attack("pgd", [0.1]), rows(0.1, [0, 1], 10))
    put(store, attack("pgd", [0.1]), rows(0.1, [0, 1, 2, 3], 10).assign(distance=0.2), seed=4)
    board = only(store)
    (entry,) = board.entries
    worst = next(column for column in board.columns() if column.kind == "worst")
    assert entry.numbers[worst] == [0.7, None, None, pytest.approx(0.141421, abs=1e-6), 2, 10]
    page = site.write([store], store.root / "board").read_text()
    assert '"status":{"0":"flagged"}' in page


AUTOATTACK = attack("autoattack", [0.1], version="standard")


@pytest.mark.parametrize(
    ("seeds", "told", "count"),
    [
        # Two seeds under AutoAttack, of which one, the worse, was spared or given an attack more.
        ({0: {"autoattack": 5, "fgsm": 0}, 1: {"autoattack": 9, "fgsm": 0}}, 0.3, 2),
        ({0: {"autoattack": 5, "fgsm": 0}, 1: {"autoattack": 9}}, 0.1, 1),
        ({0: {"autoattack": 9, "fgsm": 0}, 1: {"autoattack": 5}}, 0.1, 1),
        # A seed that was spared what breaks the other, with something harmless in its place, or nothing.
        ({0: {"autoattack": 0, "pgd": 8}, 1: {"autoattack": 0, "fgsm": 2}}, 0.2, 1),
        ({0: {"autoattack": 5}, 1: {"pgd": 0}, 2: {"pgd": 0}}, 0.5, 1),
        # All seeds, where those that faced less stand less.
        ({0: {"autoattack": 2}, 1: {"pgd": 8}, 2: {"pgd": 4}}, 0.4, 2),
    ],
)
def test_no_attack_that_a_seed_was_spared_raises_a_mean(
    store: Store, seeds: dict[int, dict[str, int]], told: float, count: int
) -> None:
    for seed, broken in seeds.items():
        for name, images in broken.items():
            own = AUTOATTACK if name == "autoattack" else attack(name, [0.1])
            put(store, own, rows(0.1, list(range(images)), 10), seed=seed)
    board = only(store)
    (worst,) = [board.entries[0].numbers[column] for column in board.columns() if column.kind == "worst"]
    stands = board.entries[0].stands(Threat("linf", 0.1))
    assert (worst[0], worst[4]) == (pytest.approx(told), count) and stands is not None and stands.mean() == pytest.approx(told)
    assert board.strong == {Threat("linf", 0.1)}


def proven(store: Store, variant: str, radius: float, estimator: str, right: int = 10) -> None:
    own = certified(variant, {0.0: 1.0, 0.5: right / 10}, estimator)
    own.eval["fields"] |= {"sigma": 0.5, "radii": [0.0, 0.5], "images": 10}
    acr = [Metric(metric="acr", value=radius, n=10, unit="l2")] if estimator == "fixed" else []
    table = pd.DataFrame({"id": range(10), "label": 0, "prediction": 0, "radius": [radius] * right + [0.0] * (10 - right)})
    put(store, own.model_copy(update={"metrics": [*own.metrics, *acr]}), table, variant)


def test_certificates_rank_by_average_radius_or_by_accuracy_each_estimator_alone(store: Store) -> None:
    proven(store, "one", 0.6, "fixed")
    proven(store, "two", 0.7, "fixed")
    proven(store, "one", 0.5, "grid")
    proven(store, "two", 0.5, "grid", right=2)
    fixed, grid = only(store).tables()
    assert "fixed estimator" in fixed.note and "grid estimator" in grid.note
    assert fixed.rankings[0].label == "average certified radius"
    assert fixed.rankings[0].places == {0: (2, False), 1: (1, False)}
    assert grid.rankings[0].label == "certified accuracy at radius 0.5" and grid.rankings[0].places == {
        0: (1, False),
        1: (2, False),
    }


def test_records_of_two_stores_are_two_entries(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    put(store, attack("pgd", [0.1]), rows(0.1, [], 10))
    put(other, attack("pgd", [0.1]), rows(0.1, [0], 10))
    (board,), _ = boards([store, other])
    assert len(board.entries) == 2


def test_the_page_holds_what_it_needs_and_no_rows_per_image(store: Store, tmp_path: Path) -> None:
    put(store, attack("pgd", [0.1]), rows(0.1, [0], 5000))
    page = site.write([store, Store(tmp_path / "nowhere")], tmp_path / "board").read_text()
    assert len(page) < 80_000
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and "innerHTML" not in page
    assert "There are no records yet" in site.write([Store(tmp_path / "nowhere")], tmp_path / "empty").read_text()


def test_what_several_tables_print_alike_stands_once_in_a_cell() -> None:
    one = {"column": "clean", "value": 0.911, "flag": "", "where": "SMD, table 1", "title": "SMD"}
    others = [{**one, "where": "SMD, table 2"}, {**one, "value": 0.9}, {**one, "flag": "suspicious"}, {**one, "column": "tsr"}]
    assert site._beside([one, *others], ["worst", "clean"]) == [
        [1, [0.911, "SMD, table 1: SMD; SMD, table 2: SMD", ""]],
        [1, [0.9, "SMD, table 1: SMD", ""]],
        [1, [0.911, "SMD, table 1: SMD", "suspicious"]],
    ]


def test_published_numbers_stand_beside_measured_ones_of_the_same_thing(store: Store) -> None:
    asked = {"kind": "robust", "attack": "pgd", "norm": "linf", "eps": [0.02, 0.01], "noise": 0.0, "nearest": False}
    own = record(eval={"name": "pgd20", "fields": asked}, task={"dataset": "cifar10"})
    numbers = [Metric(metric="robust_accuracy", value=0.3, n=10, eps=eps, denominator="all") for eps in (0.01, 0.02)]
    own = own.model_copy(
        update={"metrics": numbers, "defense": {"name": "edlcm", "variant": "edlcm", "fields": {"members": 3}}}
    )
    store.write(own)
    (entry,) = only(store).entries
    told = claims(entry)
    beside = {one["column"]: one["printed"] for one in told if one["column"]}
    printed = published.known(dataset="cifar10", defense="edlcm", attack="pgd", metric="robust_accuracy", members=3)
    assert beside == {f"attack|linf {row.eps:g}|pgd20": row.printed for row in printed.itertuples() if row.eps in (0.01, 0.02)}
    assert beside and len(told) > len(beside)  # what was not measured is told, too
    doubted = [one["remark"] for one in told if one["flag"]]
    assert doubted and all(doubted), "a doubt has its reason"
    other = own.model_copy(update={"defense": {"name": "edlcm", "variant": "edlcm@members=5", "fields": {"members": 5}}})
    assert not any(one["column"] for one in claims(Entry(store, diagnose(store, [other]))))


LIAR = "</script><script>window.hacked = 1</script><img src=x onerror=hacked=1>&amp;\u2028"


def lies(store: Store) -> list[str]:
    """Records that lie; returns what the page must say of the files that cannot be read."""
    hostile = attack("pgd", [0.1]).model_copy(update={"error": LIAR * 100_000, "made": {"device": LIAR, "note": float("nan")}})
    put(store, hostile, rows(0.1, [0], 10), LIAR.replace("/", "_"), suite={**TINY, "name": "lies"})
    good = store.write(record(suite={**TINY, "name": "lies"}, status="error", metrics=[], error="x"))
    folder = good.parent
    for name, change in {
        "no_suite": {"suite": {}}, "no_fields": {"eval": {"name": "no_fields"}}, "other_version": {"format": 99},
        "elsewhere": {"suite": {**TINY, "name": "../../elsewhere"}},
        "nan": {"metrics": [{"metric": "acr", "value": "NaN", "n": 1}]},
        "odd_version": {"suite": {"name": "lies", "version": "<b>", "budget": "quick"}},
    }.items():  # fmt: skip
        raw = {**json.loads(good.read_text()), "eval": {"name": name, "fields": {}}, **change}
        (folder / f"{name}.json").write_text(json.dumps(raw).replace('"NaN"', "NaN"))
    (folder / "cut.json").write_text(good.read_text()[:40])
    strange = {"kind": "robust", "attack": 3, "norm": ["l2"], "eps": "many", "noise": {}}
    put(store, record(eval={"name": "strange", "fields": strange}), pd.DataFrame({"id": ["a"], "eps": [None]}), "strange")
    return ["no_suite", "no_fields", "other_version", "elsewhere", "nan", "odd_version", "cut"]


def test_records_that_lie_are_shown_as_text_or_named(store: Store, tmp_path: Path) -> None:
    unread = lies(store)
    page = site.write([store], tmp_path / "board").read_text()
    assert "<script>window" not in page and "<img" not in page
    assert len(page) < 200_000  # 9 million characters of error are cut
    told = page[page.index('<details class="problems">') :]
    assert all(f"{name}.json" in told for name in unread)
    packed = re.findall(r'id="details-\d+">([^<]*)<', page)
    records = [own for text in packed for own in json.loads(gzip.decompress(base64.b64decode(text)))["records"]]
    cut = [json.loads(own["text"])["error"] for own in records if not own["whole"]]
    assert len(cut) == 1 and cut[0].endswith(f"({len(LIAR) * 100_000:,} characters)") and len(cut[0]) < 5000
