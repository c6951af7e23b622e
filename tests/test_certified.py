"""Certificates as evaluations: every estimator in a suite, numerics, unsound protocols, attacks on certificates, shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from bench import tables
from bench.evals import Certified
from bench.evals.challenge import beats
from bench.evals.votes import RULES
from bench.merge import merge
from bench.partial import StoreError
from bench.request import Request
from bench.runner import Run
from bench.store import Record, Store
from bench.suites import SuiteError, load_suite
from bench.verify import verify
from defenses.estimators import ESTIMATORS, WHOLE
from defenses.smoothing import POOLED


def suite_with(tiny: Path, name: str, **fields: Any) -> Path:
    """The tiny suite with a further evaluation."""
    given = {"kind": "certified", "radii": "[0.0, 0.1, 0.2]", "n": 300, "images": 12, **fields}
    lines = [f"{key} = {value if str(value)[:1] in '[{' else json.dumps(value)}" for key, value in given.items()]
    # A little more training, so that the noise moves votes.
    text = tiny.read_text().replace("epochs = 2\n", "epochs = 10\n").replace("train_images = 64", "train_images = 200")
    tiny.write_text(text + "\n".join([f"[evals.{name}]", *lines, ""]))
    return tiny


def ask(suite: Path, name: str, defense: str = "cear_rw@members=3,sigma=0.5", **changes: Any) -> tuple[Record, pd.DataFrame]:
    fields = {"suite": str(suite), "runs": suite.parent / "runs", "device": "cpu", "only": (name,), **changes}
    (record,) = Run(Request(defense=defense, **fields)).execute()
    assert record.status == "success", record.error
    return record, Store(fields["runs"]).rows(record)


def values(record: Record, metric: str) -> dict[Any, float]:
    return {m.radius: m.value for m in record.metrics if m.metric == metric}


@pytest.mark.parametrize("name", [*ESTIMATORS, POOLED])
def test_every_estimator_makes_a_record_and_a_table_of_its_own(name: str, tiny: Path) -> None:
    suite = suite_with(tiny, "one", estimator=name)
    record, rows = ask(suite, "one")
    accuracies = values(record, "certified_accuracy")
    assert list(accuracies) == [0.0, 0.1, 0.2] and accuracies[0.0] >= accuracies[0.2]
    preset = name in ESTIMATORS and ESTIMATORS[name].preset
    assert len(rows) == (36 if preset else 12)
    for radius, value in accuracies.items():
        part = rows[rows.asked == radius] if preset else rows
        assert value == np.mean((part.prediction == part.label) & (part.radius >= radius))
    assert list(values(record, "draws_per_image")) == ([0.0, 0.1, 0.2] if preset else [None])
    assert bool(values(record, "acr")) == (name in (*WHOLE, POOLED))
    assert ("chance" in rows) == (name == "randomised")
    (table,) = [t for t in tables.summaries(Store(suite.parent / "runs")) if "certified" in t.title]
    assert f"{name} estimator, n0 = 100, n <= 300, alpha = 0.001" in table.caption
    (certified,) = verify(Store(suite.parent / "runs").path(record))
    assert "radii" in certified.checked and not certified.mismatches
    status = tables.body(table)[0][-1]
    assert status.startswith("flagged; " if name == POOLED else "certified") and ("unsound" in status) == (name == POOLED)


def test_the_pooled_protocol_counts_every_member_s_vote_and_says_that_it_is_unsound(tiny: Path) -> None:
    suite = suite_with(tiny, "pooled", estimator=POOLED)
    record, rows = ask(suite, "pooled")
    assert 300 < rows["count"].max() <= 900 and (rows.draws == 300).all() and (rows.evaluations == 1200).all()
    assert [finding.kind for finding in record.findings] == ["unsound"]


def test_wrong_images_may_be_left_alone_without_changing_an_accuracy(tiny: Path) -> None:
    suite = suite_with(tiny, "all", estimator="fixed", images=30)
    suite = suite_with(suite, "spared", estimator="fixed", images=30, skip_wrong=True)
    (whole, rows), (spared, fewer) = (ask(suite, name, "randsmooth@sigma=0.7") for name in ("all", "spared"))
    for metric in ("certified_accuracy", "acr", "median_radius"):
        assert values(whole, metric) == values(spared, metric)
    assert values(whole, "abstention") and not values(spared, "abstention")
    wrong = (rows.prediction != rows.label) & (rows.prediction >= 0)
    assert wrong.any() and (fewer.draws[wrong] == 0).all()
    assert not any(report.mismatches for report in verify(suite.parent / "runs"))


def test_numerics_stand_in_the_record_and_change_who_votes(tiny: Path) -> None:
    suite = suite_with(suite_with(tiny, "plain", estimator="fixed"), "half", estimator="fixed", numerics="bfloat16")
    (plain, rows), (half, others) = ask(suite, "plain"), ask(suite, "half")
    assert plain.numerics["dtype"] == "float32" and half.numerics["dtype"] == "bfloat16"
    assert half.eval["fields"]["numerics"] == "bfloat16" and "numerics" not in plain.eval["fields"]
    assert not rows["count"].equals(others["count"])
    with pytest.raises(SuiteError, match=r"evals.wrong.numerics: unknown 'float8'; known are float32"):
        load_suite(suite_with(tiny, "wrong", numerics="float8"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"radii": "[]"}, r"radii: must be non-negative and increasing, at least one, got \[\]"),
        ({"radii": "[0.2, 0.1]"}, "must be non-negative and increasing"),
        ({"estimator": "cohen"}, "unknown 'cohen'; known are fixed, randomised, grid"),
        ({"kind": "challenge", "estimator": "phases"}, "attacks sound certificates of all radii, got estimator 'phases'"),
    ],
)
def test_a_wrong_evaluation_is_refused(fields: dict[str, Any], message: str, tiny: Path) -> None:
    with pytest.raises(SuiteError, match=message):
        load_suite(suite_with(tiny, "wrong", **fields))


def test_weights_from_test_images_exist_for_comparison_and_say_so(tiny: Path) -> None:
    closed = Run(Request(defense="all", suite=str(tiny), runs=tiny.parent / "runs"))
    assert "cear_rw_test_weights" not in {variant.name for variant in closed.variants}
    (refused,) = Run(
        Request(defense="cear_rw_test_weights", suite=str(tiny), runs=tiny.parent / "a", only=("clean",))
    ).execute()
    assert refused.status == "skipped" and "unsound = true" in (refused.error or "")
    tiny.write_text("unsound = true\n" + tiny.read_text())
    leaked, _ = ask(tiny, "certified", "cear_rw_test_weights@members=3,weight_images=30", runs=tiny.parent / "b")
    honest, _ = ask(tiny, "certified", "cear_rw@members=3,weight_images=20", runs=tiny.parent / "b")
    assert [finding.kind for finding in leaked.findings] == ["unsound"] and not honest.findings
    made = [json.loads(line) for line in (tiny.parent / "b/tiny/parts/log.jsonl").read_text().splitlines()]
    # One teacher and three students serve both; only the weights are made twice.
    assert [line["role"] for line in made].count("robust weights") == 2 and len(made) == 6


# --- certified against attacked


def test_honest_certificates_withstand_the_attack(tiny: Path) -> None:
    suite = suite_with(suite_with(tiny, "plain", images=6), "one", kind="challenge", steps=5, eot=4, images=6)
    (record, rows), (_, plain) = ask(suite, "one"), ask(suite, "plain")
    assert rows.drop(columns="beaten").equals(plain), "what is attacked is what was certified"
    assert (rows.radius > 0).any() and not rows.beaten.any()
    found = {m.metric: m.value for m in record.metrics}
    assert found == {"certificates_attacked": (rows.radius > 0).sum(), "certificates_beaten": 0}


def test_a_certificate_that_an_attack_beats_fails_the_run_and_names_the_image(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Radii thirty times too large; the first image's is left alone."""
    from bench.evals import certified, challenge

    honest = certified.certify_together

    def boastful(*args: Any, **kwargs: Any) -> Any:
        found = honest(*args, **kwargs)
        for own in found:
            own.radius[1:] *= 30
        return found

    monkeypatch.setattr(certified, "certify_together", boastful)
    monkeypatch.setattr(Certified, "check_ceiling", lambda *_: None)
    monkeypatch.setitem(challenge.JUDGE, "n", 5000)
    suite = suite_with(tiny, "one", kind="challenge", steps=10, eot=4, images=4)
    (record,) = Run(Request(defense="randsmooth", suite=str(suite), runs=tiny.parent / "runs", only=("one",))).execute()
    assert record.status == "error"
    assert "beats the certificates of images [" in (record.error or "")
    named = json.loads((record.error or "").split("of images ")[1].split(":")[0])
    shown = Run(Request(defense="randsmooth", suite=str(suite), runs=tiny.parent / "runs")).test.ids.tolist()
    assert named and set(named) <= set(shown[1:4])


def test_the_judge_is_predict_at_the_adversarial_point() -> None:
    """A half-space: beyond its border PREDICT returns another class, on it nobody can tell, before it nothing is beaten."""
    from test_smoothing import Coin

    from attacks import Streams
    from defenses.smoothing import Smoothed

    smoothed = Smoothed(Coin().eval(), 0.5).eval()
    for shift, label, beaten in [(0.2, 1, False), (-0.2, 1, True), (0.0, 1, False), (0.2, 0, True)]:
        point = torch.full((1, 1, 1, 1), shift)
        assert beats(smoothed, point, label, Streams(0, ids=[0])) is beaten


# --- estimators on the same votes


def test_stored_votes_give_every_estimator_s_certificates(tiny: Path) -> None:
    grid = "[0.0, 0.1, 0.2]"
    suite = suite_with(tiny, "votes", kind="votes", n=5000, images=6)
    for name in ESTIMATORS:
        suite = suite_with(suite, name, estimator=name, n=5000, images=6, radii=grid)
    votes, rows = ask(suite, "votes", "randsmooth@sigma=0.5")
    assert np.stack(rows.votes.to_list()).shape == (6, 50)
    for name in ESTIMATORS:
        if RULES[name] is not ESTIMATORS[name]:
            continue  # the phases' last one is smaller, so that all fit into n
        own, _ = ask(suite, name, "randsmooth@sigma=0.5")
        mine = [m for m in votes.metrics if m.estimator == name]
        for metric in ("certified_accuracy", "acr"):
            assert {m.radius: m.value for m in mine if m.metric == metric} == values(own, metric), name
        draws = {m.radius: m.value + 100 for m in mine if m.metric == "draws_per_image"}
        assert draws == pytest.approx(values(own, "draws_per_image")), name
    oracle = {m.radius: m.value for m in votes.metrics if m.estimator == "oracle" and m.metric == "draws_per_image"}
    assert set(oracle) == {0.0, 0.1, 0.2}
    (table,) = [t for t in tables.summaries(Store(suite.parent / "runs")) if "same votes" in t.title]
    assert [line[0] for line in tables.body(table)] == sorted(f"randsmooth: {name}" for name in [*ESTIMATORS, "oracle"])


# --- shards


def results(runs: Path) -> dict[str, Any]:
    """Bytes of rows, and records without what tells of the time."""
    found: dict[str, Any] = {}
    for path in sorted(runs.glob("tiny/*/*/seed*/*")):
        found[path.name] = path.read_bytes()
        if path.suffix == ".json":
            record = json.loads(path.read_text())
            del record["cost"], record["made"]
            found[path.name] = record
    return found


def test_shards_that_ran_apart_and_were_merged_give_the_same_files(tiny: Path) -> None:
    folder = tiny.parent

    def run(runs: str, shard: tuple[int, int] = (1, 1)) -> list[Record]:
        request = Request(defense="cear_rw@members=2", suite=str(tiny), runs=folder / runs, shard=shard, device="cpu")
        return Run(request).execute()

    run("whole")
    for place in (1, 2, 3):
        # One piece of work (clean accuracy) is finished by the shard it belongs to, the others are left open.
        assert "running" in {record.status for record in run(f"shard{place}", (place, 3))}
    found = [merge(folder / f"shard{place}", folder / "merged") for place in (1, 2, 3)]
    assert found[0]["parts"] and not found[1]["parts"]
    assert all(record.status == "success" for record in run("merged"))
    assert results(folder / "merged") == results(folder / "whole")
    assert merge(folder / "shard1", folder / "merged")["pieces"] == 0


def test_shards_of_other_requests_are_not_mixed(tiny: Path) -> None:
    folder = tiny.parent
    for seed in ("0", "1"):
        run = Run(Request(defense="randsmooth", suite=str(tiny), runs=folder / seed, shard=(2, 2), only=("certified",)))
        run.execute()
        tiny.write_text(tiny.read_text().replace("n = 200", "n = 300"))
    with pytest.raises(StoreError, match=r"pieces of another request: eval.fields.n was 200, now 300"):
        merge(folder / "1", folder / "0")
    with pytest.raises(ValueError, match="holds no results"):
        merge(folder / "nowhere", folder / "0")
    with pytest.raises(ValueError, match="cannot be merged into itself"):
        merge(folder / "0", folder / "0")
    with pytest.raises(ValueError, match=r"--shard: I/K with 1 <= I <= K, such as 2/3, got 3/2"):
        Run(Request(defense="randsmooth", suite=str(tiny), shard=(3, 2)))
