"""Tables and figures show what is stored, cell by cell, and nothing else."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from test_store import record

from bench import plots, tables
from bench.store import Metric, Record, Store


def attacked(variant: str, value: float, **changes: Any) -> Record:
    interval = Metric(
        metric="robust_accuracy", value=value, n=200, lower=value - 0.05, upper=value + 0.05, eps=0.1, denominator="all"
    )
    conditional = interval.model_copy(update={"value": 0.99, "denominator": "clean_correct"})
    return record(
        defense={"name": "d", "variant": variant, "fields": {}},
        eval={"name": "pgd", "fields": {"kind": "robust", "attack": "pgd", "norm": "linf", "images": 200}},
        metrics=[interval, conditional],
        hashes={"data": "cifar10 parquet (JPEG re-encoding)"},
        **changes,
    )


def certified(variant: str, values: dict[float, float], estimator: str = "grid", **changes: Any) -> Record:
    numbers = [
        Metric(metric="certified_accuracy", value=v, n=100, lower=v / 2, upper=(1 + v) / 2, radius=r) for r, v in values.items()
    ]
    fields = {"kind": "certified", "estimator": estimator, "n0": 100, "n": 1000, "alpha": 0.001, "images": 100}
    return record(
        defense={"name": "d", "variant": variant, "fields": {}},
        eval={"name": f"certified_{estimator}", "fields": fields},
        metrics=numbers,
        **changes,
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path)
    made.write(attacked("one", 0.5))
    made.write(attacked("two", 0.4))
    made.write(attacked("two", 0.6, seed=4))
    made.write(attacked("broken", 0.1).model_copy(update={"status": "error", "metrics": [], "error": "x\nValueError: no"}))
    made.write(certified("one", {0.0: 0.9, 0.25: 0.7}))
    made.write(certified("two", {0.0: 0.8}))
    return made


def cells(table: tables.Table) -> dict[tuple[str, str], str]:
    return {(row[0], name): cell for row in tables.body(table) for name, cell in zip(table.columns, row)}


def test_every_cell_is_the_stored_number(store: Store) -> None:
    attack, certificate = tables.summaries(store)
    shown = cells(attack)
    assert shown["one", "pgd linf 0.1"] == "50.0 [45.0, 55.0]"
    assert shown["two", "pgd linf 0.1"] == "50.0 ± 14.1 (2)"  # mean and deviation over two training seeds
    assert shown["two", "seeds"] == "3, 4"
    assert shown["broken", "pgd linf 0.1"] == tables.HOLE
    assert shown["broken", "status"] == "unreviewed; pgd error"
    shown = cells(certificate)
    assert shown["one", "CA 0.25"] == "70.0 [35.0, 85.0]"
    assert shown["two", "CA 0.25"] == tables.HOLE
    assert shown["one", "status"] == "unreviewed; unreadable_rows"  # nobody can check it


def test_captions_name_data_budget_and_estimator(store: Store) -> None:
    attack, certificate = tables.summaries(store)
    assert "JPEG re-encoding" in attack.caption and "reduced budget" in attack.caption
    assert "grid estimator, n0 = 100, n <= 1000, alpha = 0.001" in certificate.caption
    assert "unrounded radius is at least r" in certificate.caption


def test_estimators_budgets_and_versions_never_share_a_table(store: Store) -> None:
    store.write(certified("one", {0.0: 0.9}, estimator="fixed"))
    store.write(attacked("one", 0.5, suite={"name": "tiny", "version": 1, "budget": "paper"}))
    store.write(attacked("three", 0.5, suite={"name": "tiny", "version": 2, "budget": "quick"}))
    assert len(tables.summaries(store)) == 5
    figure = plots.certified([r for r in store.records() if r.eval["name"].startswith("certified")])
    assert figure is not None and len(figure.axes[0].get_lines()) == 3


def test_images_of_other_models_have_a_table_of_their_own(store: Store) -> None:
    fields = {"kind": "black_box", "attack": "pgd", "norm": "linf", "images": 200}
    store.write(attacked("one", 0.3).model_copy(update={"eval": {"name": "black_box_pgd", "fields": fields}}))
    (own,) = [table for table in tables.summaries(store) if "images of other models" in table.title]
    assert cells(own)["one", "black_box_pgd linf 0.1"] == "30.0 [25.0, 35.0]"
    assert "the defense is right on all of them" in own.caption
    others = [table for table in tables.summaries(store) if table.title != own.title]
    assert len(others) == 2 and not any("black_box" in name for table in others for name in table.columns)


def test_two_certified_evaluations_of_one_kind_keep_their_columns(store: Store) -> None:
    other = certified("one", {0.0: 0.5})
    store.write(other.model_copy(update={"eval": {**other.eval, "name": "again"}}))
    shown = cells(tables.summaries(store)[1])
    assert shown["one", "again CA 0"].startswith("50.0") and shown["one", "certified_grid CA 0"].startswith("90.0")


def test_several_tables_make_one_valid_json(store: Store) -> None:
    rows = json.loads(tables.render_all(tables.summaries(store), "json"))
    assert {row["table"] for row in rows} == {"tiny, quick: accuracy under attack", "tiny, quick: certified accuracy"}


def test_formats_carry_the_same_numbers(store: Store) -> None:
    table = tables.summaries(store, "tiny")[0]
    raw = json.loads(tables.render(table, "json"))
    assert {(row["defense"], row["seed"], row["value"]) for row in raw} == {
        ("one", 3, 0.5), ("two", 3, 0.4), ("two", 4, 0.6), ("broken", 3, None),
    }  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(tables.render(table, "csv"))))
    assert [row["value"] for row in rows if row["defense"] == "one"] == ["0.5"]
    for fmt in ("text", "md", "latex", "html"):
        assert "50.0 [45.0, 55.0]" in tables.render(table, fmt)
    with pytest.raises(ValueError, match="unknown format 'pdf'"):
        tables.render(table, "pdf")


HOSTILE = "<script>alert(1)</script>&_%$"


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(attacked(HOSTILE, 0.5))
    table = tables.summaries(store)[0]
    assert "<script>alert" not in tables.render(table, "html")
    latex = tables.render(table, "latex")
    assert r"\&\_\%\$" in latex


def test_figures_have_a_line_a_variant_and_a_panel_an_attack(store: Store) -> None:
    records = [r for r in store.records() if r.status == "success"]
    figure = plots.certified(records)
    assert figure is not None
    (axes,) = figure.axes
    lines = {str(line.get_label()): list(zip(line.get_xdata(), line.get_ydata())) for line in axes.get_lines()}
    assert lines == {"one": [(0.0, 90.0), (0.25, 70.0)], "two": [(0.0, 80.0)]}
    figure = plots.robust(records)
    assert figure is not None and [axes.get_title() for axes in figure.axes] == ["pgd"]
    assert plots.certified([]) is None and plots.robust([]) is None


def test_training_curves_come_from_the_parts_logs(tmp_path: Path) -> None:
    parts = tmp_path / "tiny/parts"
    parts.mkdir(parents=True)
    log = [{"epoch": e, "loss": 1 / e, "validation_accuracy": 0.5 + e / 10, "lr": 0.1, "seconds": 1.0} for e in (1, 2)]
    for member, role in enumerate(["teacher", "student", "student"]):
        note = {"key": str(member), "part": {"fields": {"role": role, "member": member}}, "log": log}
        (parts / f"{member}.json").write_text(json.dumps(note))
    figure = plots.training(parts)
    assert figure is not None
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["student (2)", "teacher"]
    assert len([line for line in figure.axes[0].get_lines() if len(line.get_xdata())]) == 3
    assert plots.training(tmp_path / "nowhere") is None


def test_drawing_writes_pdf_and_png(store: Store, tmp_path: Path) -> None:
    files = plots.draw(store, "tiny", tmp_path / "out")
    assert [path.name for path in files] == ["certified.pdf", "certified.png", "robust.pdf", "robust.png"]
    assert all(path.stat().st_size > 1000 for path in files)


def test_each_sigma_has_a_table_and_a_panel_of_its_own(tmp_path: Path) -> None:
    made = Store(tmp_path)
    for sigma in (0.25, 0.5):
        for name, top in (("randsmooth", 0.8), ("cear_rw", 0.9), ("sween", 0.85), ("cear_gm", 0.7)):
            one = certified(name + (f"@sigma={sigma}" if sigma != 0.25 else ""), {0.0: top, sigma: top / 2})
            fields = {**one.eval["fields"], "sigma": sigma}
            made.write(one.model_copy(update={"eval": {**one.eval, "fields": fields}}))
    first, second = tables.summaries(made)
    assert first.title.endswith("sigma = 0.25") and second.title.endswith("sigma = 0.5")
    assert "sigma = 0.25, grid" in tables.render(first, "md") and "sigma = 0.5, grid" in tables.render(second, "latex")
    assert first.columns[2:-1] == ["CA 0", "CA 0.25"] and second.columns[2:-1] == ["CA 0", "CA 0.5"]
    assert [row[0] for row in tables.body(second)] == ["cear_gm", "cear_rw", "randsmooth", "sween"]
    figure = plots.certified(made.records())
    assert figure is not None
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert ["0.25" in axes.get_title() for axes in panels] == [True, False]
    for axes, end in zip(panels, (0.25, 0.5), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        assert set(lines) == {"randsmooth", "cear_rw", "sween", "cear_gm"}
        assert lines["cear_rw"].get_xdata().tolist() == [0.0, end]
        assert lines["cear_rw"].get_ydata().tolist() == pytest.approx([90.0, 45.0])
    colours = [{line.get_label(): line.get_color() for line in axes.lines} for axes in panels]
    assert colours[0] == colours[1] and len(set(colours[0].values())) == 4
    assert len(figure.legends) == 1


def test_certified_tables_say_what_a_certificate_cost(tmp_path: Path) -> None:
    made = Store(tmp_path)
    one = certified("one", {0.0: 0.9})
    draws = Metric(metric="draws_per_image", value=412.4, n=100, unit="draws")
    asked = Metric(metric="evaluations_per_image", value=1237.2, n=100, unit="network evaluations")
    made.write(one.model_copy(update={"metrics": [*one.metrics, asked, draws]}))
    (table,) = tables.summaries(made)
    assert table.columns == ["defense", "seeds", "CA 0", "draws", "networks", "status"]
    assert tables.body(table)[0][3:5] == ["412", "1237"]


def test_tables_are_in_the_order_of_sigma_as_a_number_then_defense(tmp_path: Path) -> None:
    made = Store(tmp_path)
    for sigma in (10.0, 2.0, 0.5):
        for name in ("sween@members=3", "cear_rw"):
            one = certified(f"{name}{',' if '@' in name else '@'}sigma={sigma}", {0.0: 0.9})
            made.write(one.model_copy(update={"eval": {**one.eval, "fields": {**one.eval["fields"], "sigma": sigma}}}))
    found = tables.summaries(made)
    assert [table.title.rpartition(" = ")[2] for table in found] == ["0.5", "2", "10"]
    assert all([row[0] for row in tables.body(table)] == ["cear_rw", "sween@members=3"] for table in found)


def view(sigma: float = 0.25) -> Record:
    """A variance view of two members at n = 10 and 20."""
    numbers = [Metric(metric="margin_variance_ratio", value=v, n=5, unit="ratio", members=k) for k, v in ((1, 0.9), (2, 0.7))]
    numbers.append(Metric(metric="margin_correlation_fitted", value=0.4, n=5, unit="correlation"))
    numbers.append(Metric(metric="margin_correlation", value=0.5, n=5, unit="correlation", lower=0.3, upper=0.6))
    for k in (1, 2):
        for n in (10, 20):
            numbers.append(Metric(metric="acr", value=k / 10 + n / 1000, n=5, unit="l2", members=k, draws=n))
            numbers.append(Metric(metric="certified_accuracy", value=k * n / 100, n=5, radius=0.5, members=k, draws=n))
    fields = {"kind": "variance", "n": [10, 20], "n0": 100, "alpha": 0.001, "images": 5, "sigma": sigma}
    defense = {"name": "smoothed_ensemble", "variant": "smoothed_ensemble", "fields": {}}
    return record(defense=defense, eval={"name": "variance", "fields": fields}, metrics=numbers)


def test_the_variance_view_has_a_table_of_its_own_without_rows_for_those_it_makes_no_sense_for(tmp_path: Path) -> None:
    made = Store(tmp_path)
    made.write(view())
    single = view().model_copy(update={"status": "skipped", "metrics": [], "error": "one network"})
    made.write(single.model_copy(update={"defense": {"name": "randsmooth", "variant": "randsmooth", "fields": {}}}))
    made.write(certified("smoothed_ensemble", {0.0: 0.9}))
    certificate, variance = tables.summaries(made)
    assert "certified accuracy" in certificate.title and certificate.columns[2:-1] == ["CA 0"]
    shown = cells(variance)
    assert {name for name, _ in shown} == {"smoothed_ensemble"}
    assert variance.columns[2:-1] == ["ACR, k = 1", "ACR, k = 2", "variance, k = 1", "variance, k = 2", "zeta", "zeta fitted"]
    assert shown["smoothed_ensemble", "ACR, k = 2"] == "0.220"
    assert shown["smoothed_ensemble", "zeta"] == "0.500 [0.300, 0.600]"


def test_the_variance_figure_shows_members_against_samples() -> None:
    figure = plots.variance([view(0.5), view(0.25)])
    assert figure is not None
    left, middle, right, *rest = [axes for axes in figure.axes if axes.get_visible()]
    assert len(rest) == 3 and "0.25" in left.get_title() and "0.5" in rest[0].get_title()
    measured, curve, _ = left.lines
    assert measured.get_ydata().tolist() == [0.9, 0.7]
    assert curve.get_ydata()[-1] == pytest.approx((1 + 0.4) / 2)
    assert middle.lines[0].get_ydata().tolist() == pytest.approx([0.12, 0.22])
    one, many = right.lines
    assert (one.get_xdata().tolist(), one.get_ydata().tolist()) == ([10, 20], pytest.approx([10.0, 20.0]))
    assert (many.get_xdata().tolist(), many.get_ydata().tolist()) == ([10, 20], pytest.approx([10.0, 20.0]))
    assert plots.variance([certified("x", {0.0: 1.0})]) is None


def test_budgets_in_255ths_are_shown_as_such(tmp_path: Path) -> None:
    made = Store(tmp_path)
    one = attacked("one", 0.5)
    numbers = [one.metrics[0].model_copy(update={"eps": eps}) for eps in (8 / 255, 0.1, 0.2, 1.0)]
    made.write(one.model_copy(update={"metrics": numbers}))
    assert tables.summaries(made)[0].columns[2:-1] == ["pgd linf 8/255", "pgd linf 0.1", "pgd linf 0.2", "pgd linf 1"]
