"""The commands that make stored records again make these, and nothing else of their suite."""

from __future__ import annotations

from typing import Any

from test_store import record

from bench.registry import resolve
from bench.suites import load_suite
from bench.wanted import again


def of(variant: str, evaluation: str = "clean", seed: int = 0, suite: str = "mnist", **changes: Any) -> Any:
    version = load_suite(suite).version
    return record(**{
        "suite": {"name": suite, "version": version, "budget": "quick"},
        "defense": {"name": variant.partition("@")[0], "variant": variant, "fields": {"sigma": 0.25}},
        "eval": {"name": evaluation, "fields": {"kind": evaluation}},
        "seed": seed,
        **changes,
    })  # fmt: skip


def test_a_variant_is_made_at_its_own_sigma_where_the_suite_runs_through_several() -> None:
    told = "bench run --defense randsmooth@sigma=0.25 --suite mnist --budget quick --seeds 0 --only clean,certified"
    assert again([of("randsmooth"), of("randsmooth", "certified")]) == [told]
    (made,) = resolve("randsmooth@sigma=0.25", load_suite("mnist").sweep)
    assert made.label == "randsmooth" and len(resolve("randsmooth", load_suite("mnist").sweep)) == 3
    (command,) = again([of("sween@members=3")])
    assert "--defense sween@members=3,sigma=0.25 " in command
    (command,) = again([of("randsmooth", suite="cear_mnist")])
    assert "--defense randsmooth --suite cear_mnist" in command, "its only sigma needs no words"


def test_seeds_stand_together_where_they_answered_the_same() -> None:
    both = [of(name, "clean", seed, "smd_mnist") for name in ("naive", "adp") for seed in (2, 0)]
    assert again([*both, of("adp", "pgd", 2, "smd_mnist")]) == [
        "bench run --defense naive,adp --suite smd_mnist --budget quick --seeds 0,2 --only clean",
        "bench run --defense adp --suite smd_mnist --budget quick --seeds 2 --only pgd",
    ]


def test_nothing_is_promised_for_what_failed_or_a_suite_that_asks_something_else_by_now() -> None:
    older = {"name": "smd_mnist", "version": 0, "budget": "quick"}
    failed = of("naive", suite="smd_mnist", status="error", error="E", metrics=[])
    assert again([of("naive", suite="smd_mnist").model_copy(update={"suite": older}), failed]) == []


def test_where_a_file_of_the_users_lies_is_left_to_be_named() -> None:
    own = of("mine@weight=2.0", "clean", suite="smd_mnist").model_copy(
        update={
            "suite": {"name": "theirs", "version": 7, "budget": "smoke"},
            "defense": {"name": "mine", "variant": "mine@weight=2.0", "fields": {}, "file_hash": "sha256:1"},
        }
    )
    assert again([own]) == [
        "bench run --defense FILE.py:mine@weight=2.0 --suite FILE.toml --budget smoke --seeds 0 --only clean"
    ]
