"""Attacks as evaluations: settings, security curves, examples on disk, what a cascade tells, and going on after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from attacks.reference import installed
from bench import tables
from bench.evals import Robust, Subject
from bench.jobs import Fitted
from bench.progress import Progress
from bench.request import Request
from bench.runner import Run
from bench.store import EXAMPLES, Record, Store
from bench.suites import SuiteError, load_suite
from defenses.api import Images, Wrapped

EVALS = """
[evals.autoattack]
kind = "robust"
attack = "autoattack"
norm = "linf"
eps = ["0.03", "0.1"]
steps = 5
proposals = 20
images = 30
[evals.security]
kind = "robust"
attack = "fmn"
norm = "linf"
eps = ["0.01", "0.03", "0.1", "0.3"]
steps = 40
images = 30
"""


@pytest.fixture
def suite(tiny: Path) -> Path:
    tiny.write_text(tiny.read_text() + EVALS)
    return tiny


def made(suite: Path, only: str, **changes: Any) -> Run:
    fields = {"defense": "randsmooth", "suite": str(suite), "runs": suite.parent / "runs", "device": "cpu", "only": (only,)}
    return Run(Request(**{**fields, **changes}))


def one(suite: Path, only: str) -> tuple[Record, pd.DataFrame]:
    (record,) = made(suite, only).execute()
    assert record.status == "success", record.error
    return record, Store(suite.parent / "runs").rows(record)


def values(record: Record, metric: str) -> dict[Any, float]:
    return {
        (m.eps, m.source) if m.source else m.eps: m.value
        for m in record.metrics
        if m.metric == metric and m.denominator != "clean_correct"
    }


def changed(tiny: Path, **lines: str) -> Path:
    """The suite with the pgd evaluation changed."""
    text = tiny.read_text()
    for old, new in lines.values():
        assert old in text
        text = text.replace(old, new)
    tiny.write_text(text)
    return tiny


@pytest.mark.parametrize(
    "line, text",
    [
        ("proposals = 5", r"evals\.pgd\.proposals: pgd has no such setting; it has steps, step, restarts, loss, start, engine"),
        ("nearest = true", r"evals\.pgd\.nearest: pgd never looks for the nearest point"),
        ('engine = "autoattack"', "Pgd has no engine 'autoattack'; it has native, advertorch"),
        ("queries = 0", r"evals\.pgd\..*queries: .*greater than or equal to 1"),
    ],
)
def test_a_setting_that_an_attack_does_not_have_is_refused_before_anything_runs(tiny: Path, line: str, text: str) -> None:
    changed(tiny, line=("restarts = 2\n", f"restarts = 2\n{line}\n"))
    with pytest.raises((SuiteError, ValueError), match=text):
        load_suite(str(tiny), "quick").evals["pgd"].check("evals.pgd", (1, 28, 28))


def test_every_attack_has_a_place_in_a_suite(tiny: Path) -> None:
    from attacks import ATTACKS

    for name in ATTACKS:
        norm = "l2" if name == "ddn" else "linf"
        text = tiny.read_text()
        text += f'[evals.{name}_of_all]\nkind = "robust"\nattack = "{name}"\nnorm = "{norm}"\neps = ["0.1"]\nimages = 5\n'
        tiny.write_text(text)
    suite = load_suite(str(tiny), "quick")
    assert {f"{name}_of_all" for name in ATTACKS} <= set(suite.evals)


def test_a_cascade_tells_what_each_component_left(suite: Path) -> None:
    record, rows = one(suite, "autoattack")
    final, after = values(record, "robust_accuracy"), values(record, "robust_accuracy_after")
    for eps in (0.03, 0.1):
        steps = [after[eps, name] for name in ("apgd_ce", "apgd_t", "fab_t", "square")]
        assert steps == sorted(steps, reverse=True) and steps[-1] == final[eps]
        part = rows[rows.eps == eps]
        assert steps[0] == (part.clean_correct & (part.broken_by != 0)).mean()
    assert final[0.1] <= final[0.03] < 1
    assert record.eval["fields"]["version"] == "standard" and record.eval["fields"]["steps"] == 5


def test_a_security_curve_comes_from_one_search_and_its_distances(suite: Path) -> None:
    record, rows = one(suite, "security")
    assert len(rows) == 30, "one search for all radii"
    curve = values(record, "robust_accuracy")
    assert list(curve.values()) == sorted(curve.values(), reverse=True) and curve[0.3] < curve[0.01]
    for eps, accuracy in curve.items():
        assert accuracy == (rows.clean_correct & ~(rows.broken & (rows.distance <= eps))).mean()
    found = rows[rows.clean_correct & rows.broken].distance
    assert values(record, "median_distance")[None] == found.median()
    # Fixed budgets and nearest points are two ways to ask the same.
    cascade, _ = one(suite, "autoattack")
    for eps, accuracy in values(cascade, "robust_accuracy").items():
        assert abs(accuracy - curve[eps]) <= 2 / 30


def test_adversarial_examples_are_stored_without_loss_and_checked_at_8_bit(suite: Path) -> None:
    record, rows = one(suite, "autoattack")
    run = made(suite, "autoattack")
    path = run.store.path(record).with_suffix(EXAMPLES)
    assert "x_adv" not in rows
    stored = pd.read_parquet(path)
    assert (stored.id == rows.id).all() and (stored.eps == rows.eps).all()
    x_adv = torch.from_numpy(np.stack([np.frombuffer(one, np.float32) for one in stored.x_adv])).view(-1, 1, 28, 28)
    subject = Fitted(run.task, run.store.root / "tiny" / "parts", Progress(None), run.jobs).take(run.jobs)[0]
    model = subject.model  # type: ignore[union-attr]
    assert ((model(x_adv).argmax(1) != torch.tensor(rows.label)).numpy() == rows.broken).all()
    eight = (x_adv * 255).round() / 255
    assert ((model(eight).argmax(1) != torch.tensor(rows.label)).numpy() == rows.broken_8bit).all()
    clean = run.test.take(slice(0, 30)).floats().repeat(2, 1, 1, 1)
    distance = (x_adv - clean).flatten(1).abs().amax(1)
    assert np.allclose(distance.detach(), rows.distance)
    (table,) = tables.summaries(run.store)
    assert [name for name in table.columns if "8 bit" in name] == ["autoattack linf 8 bit 0.03", "autoattack linf 8 bit 0.1"]
    assert "rounded to 256 levels" in table.caption


def test_a_limit_of_queries_is_kept_and_stands_in_the_record(tiny: Path) -> None:
    changed(tiny, line=("restarts = 2\n", "restarts = 2\nqueries = 3\n"))
    record, rows = one(tiny, "pgd")
    assert rows.forwards.max() == 3 and record.eval["fields"]["queries"] == 3


def test_a_kill_in_the_middle_of_a_cascade_loses_no_finished_component(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = suite.parent / "whole"
    (expected,) = made(suite, "autoattack", runs=whole).execute()
    from attacks import fab

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fab.Fab, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            made(suite, "autoattack").execute()
    kept = sorted(path.name for path in (suite.parent / "runs").rglob("*.partial/00000/*.npz"))
    assert [name[:2] for name in kept] == ["00", "01"], "APGD-CE and APGD-T are done"
    from attacks import apgd

    asked = []
    original = apgd.Apgd.run
    monkeypatch.setattr(apgd.Apgd, "run", lambda self, *rest: asked.append(self.eps) or original(self, *rest))
    (record,) = made(suite, "autoattack").execute()
    assert 0.03 not in asked and 0.1 in asked, "what was finished is not done again"
    assert record.metrics == expected.metrics
    stores = [Store(suite.parent / "runs"), Store(whole)]
    pd.testing.assert_frame_equal(*(store.rows(record) for store in stores))
    assert not list((suite.parent / "runs").rglob("*.npz"))


@pytest.mark.skipif("autoattack" not in installed(), reason="autoattack is not installed")
def test_another_engine_stands_in_the_record_with_its_version(suite: Path) -> None:
    changed(suite, line=('attack = "autoattack"\n', 'attack = "autoattack"\nengine = "autoattack"\n'))
    record, _ = one(suite, "autoattack")
    assert record.eval["fields"]["engine"] == "autoattack"
    assert record.eval["fields"]["engine_version"] == installed()["autoattack"]


def test_masking_is_found_and_stands_in_the_record(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = suite.parent / "masked.py"
    source.write_text(
        "import torch\n"
        "from defenses.api import Pretrained\n"
        "class Blind(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        x = (4 * x).round() / 4\n"
        "        flat = x.flatten(1)\n"
        "        return flat @ torch.linspace(-1, 1, flat.shape[1] * 10).reshape(flat.shape[1], 10).sin()\n"
        "blind = Pretrained(load=lambda: Blind())\n"
    )
    (record,) = made(suite, "autoattack", defense=str(source)).execute()
    assert record.status == "success", record.error
    kinds = {finding.kind for finding in record.findings}
    assert {"zero_gradient", "zero_gradients"} <= kinds
    noted = {finding.kind: finding for finding in record.findings}
    assert noted["zero_gradients"].evidence["share"] == 1 and noted["zero_gradient"].evidence["count"] > 0
    assert "zero_gradients" in tables.render(tables.summaries(Store(suite.parent / "runs"))[0])


def test_the_smoothed_classifier_gets_the_version_for_noise_and_says_so(suite: Path) -> None:
    changed(suite, line=("proposals = 20\nimages = 30\n", 'proposals = 20\nimages = 4\nnoise = "sigma"\neot = 2\n'))
    record, rows = one(suite, "autoattack")
    notes = [finding.detail for finding in record.findings if finding.kind == "changed_attack"]
    assert notes == ["the model draws noise: version rand instead of standard"]
    assert {m.source for m in record.metrics if m.metric == "robust_accuracy_after"} == {"apgd_ce", "apgd_dlr"}
    assert rows.randomised.all()


def test_a_cascade_that_finds_nobody_right_says_so() -> None:
    """No component ran, so that there is nothing to tell of them."""
    always = Wrapped(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 5))).eval()
    always.module[1].weight.data.zero_()  # type: ignore[union-attr, operator, index]
    always.module[1].bias.data = torch.arange(5.0)  # type: ignore[union-attr, operator, index]
    some = Images(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), torch.arange(3), "dark")
    asked = Robust(attack="autoattack", norm="l2", eps=[0.5], steps=2, proposals=5, images=3)
    subject = Subject(always, None, 0)
    (piece,) = asked.pieces(subject)
    (rows,) = asked.measure([subject], some, piece)
    outcome = asked.summarise(rows, subject)
    assert {m.metric: m.value for m in outcome.metrics if m.denominator == "all"} == {
        "robust_accuracy": 0.0,
        "robust_accuracy_8bit": 0.0,
    }
    assert not [found for found in outcome.findings if found.kind == "square_helps"]
