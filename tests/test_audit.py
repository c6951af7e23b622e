"""The audit finds every planted fault with its rows, and nothing in honest logs; exported records say what they said."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import call
from test_store import record

from bench.audit import FORMATS, PROBLEMS, Report, audit, render
from bench.logs import export
from bench.partial import StoreError
from bench.request import Request
from bench.runner import Run
from bench.store import Finding, Record, Store
from defenses.bounds import ceiling
from defenses.estimators import ESTIMATORS
from defenses.smoothing import certify

RESULTS = Path(__file__).parent.parent / "leaderboards/results"

HEADER = ["idx", "label", "predict", "radius", "correct", "time"]

Row = dict[str, Any]


def found(report: Report) -> dict[str, list[int]]:
    """Kind -> rows."""
    assert len({problem.kind for problem in report.problems}) == len(report.problems)
    for problem in report.problems:
        assert problem.detail.startswith(PROBLEMS[problem.kind])
    return {problem.kind: problem.rows for problem in report.problems}


def honest(rng: np.random.Generator, size: int = 60, skip: int = 20, start: int = 0) -> list[Row]:
    """Rows as Cohen's script prints them at sigma 0.25: some wrong, some abstained, radii with three digits."""
    rows = []
    for i in range(size):
        label, kind = int(rng.integers(10)), rng.choice(["right", "wrong", "abstained"], p=[0.7, 0.2, 0.1])
        predict = {"right": label, "wrong": (label + 1) % 10, "abstained": -1}[str(kind)]
        radius = 0.0 if predict == -1 else float(rng.uniform(0, 0.95))
        time = f"0:00:{rng.integers(60):02}.123456"
        values = [start + i * skip, label, predict, f"{radius:.3}", int(predict == label), time]
        rows.append(dict(zip(HEADER, map(str, values))))
    return rows


def printed(rows: list[Row], header: list[str] = HEADER, end: str = "\n") -> str:
    lines = [row["raw"] if "raw" in row else "\t".join(row[name] for name in header) for row in rows]
    return end.join(["\t".join(header), *lines, ""])


def audited(folder: Path, text: str, sigma: float | None = 0.25, **changes: Any) -> Report:
    path = folder / "some.tsv"
    path.write_bytes(text.encode())
    (report,) = audit(path, sigma=sigma, **changes)
    assert report.file == str(path)
    return report


def plant(kind: str, rows: list[Row], row: Row, rng: np.random.Generator) -> None:
    """Put one fault of a kind into ``rows``, at ``row``."""
    if kind == "missing":
        rows.remove(row)
    elif kind == "stray":
        row["idx"] = str(int(row["idx"]) + int(rng.integers(1, 20)))
    elif kind == "duplicate":
        rows.insert(int(rng.integers(len(rows))), dict(row))
    elif kind == "correct":
        row["correct"] = str(1 - int(row["correct"]))
    elif kind == "abstention":
        row.update(predict="-1", correct="0", radius="0.123")
    elif kind == "unreadable":
        junk = ["  x", "1\t2\t3", "\t".join(["1"] * 9), "\t".join(HEADER)]  # whatever the order of columns
        rows.insert(rows.index(row), {"raw": junk[int(rng.integers(len(junk)))]})
    else:
        choices = {
            "radius": ["nan", "-0.1", "n/a", "", "0,5"],
            "ceiling": ["0.954", "0.96", "1.0", "3", "1e+01"],
            "rounding": ["0.953"],
        }
        row["radius"] = str(rng.choice(choices[kind]))


PER_ROW = ("missing", "stray", "duplicate", "correct", "abstention", "unreadable", "radius", "ceiling", "rounding")


def expected(kinds: dict[str, list[Row]], rows: list[Row], before: dict[int, str]) -> dict[str, list[int]]:
    """What the audit must say after those faults were planted; an index that strayed is also missing."""
    out = {
        kind: sorted(int(before[id(row)] if kind != "stray" else row["idx"]) for row in own)
        for kind, own in kinds.items()
        if own
    }
    if "unreadable" in out:
        out["unreadable"] = [number for number, row in enumerate(rows, 2) if "raw" in row]
    if "stray" in out:
        out["missing"] = sorted([*out.get("missing", []), *(int(before[id(row)]) for row in kinds["stray"])])
    return out


LAYOUT = st.fixed_dictionaries(
    {
        "order": st.permutations(HEADER),
        "time": st.booleans(),
        "crlf": st.booleans(),
        "blank": st.integers(0, 3),
        "start": st.sampled_from([0, 7, 1000]),
        "skip": st.sampled_from([20, 21, 100]),
    }
)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.sampled_from(PER_ROW), max_size=12), st.booleans(), LAYOUT)
def test_exactly_the_planted_faults_are_found(tmp_path_factory, seed, kinds, cut, layout) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    rows = honest(rng, skip=layout["skip"], start=layout["start"])
    header, end = [name for name in layout["order"] if layout["time"] or name != "time"], "\r\n" if layout["crlf"] else "\n"
    # A fault a row, away from the ends: what is lost there, a log cannot know.
    victims = [row for row in rows[2:-2] if row["predict"] != "-1"]
    before = {id(row): row["idx"] for row in rows}
    own: dict[str, list[Row]] = {kind: [] for kind in kinds}
    for kind, i in zip(kinds, rng.permutation(len(victims))):
        own[kind].append(victims[i])
        plant(kind, rows, victims[i], rng)
    text = printed(rows, header, end)
    wanted = expected(own, rows, before)
    if cut:
        line = "\t".join(dict(zip(HEADER, ["99999", "1", "1", "0.5", "1", "0:00:01"]))[name] for name in header)
        text += line[: int(rng.integers(1, line.rindex("\t") + 1))]
        wanted["truncated"] = [len(rows) + 2]
    else:
        text += end * layout["blank"]
    report = audited(tmp_path_factory.mktemp("log"), text)
    assert found(report) == wanted
    assert report.rows == sum("raw" not in row for row in rows)


@pytest.mark.parametrize("kind", PER_ROW)
def test_each_kind_alone_has_its_rows(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(1)
    rows = honest(rng)
    row, index = rows[10], 200
    plant(kind, rows, row, rng)
    where = {"unreadable": [12], "stray": [int(row["idx"])]}.get(kind, [index])
    assert found(audited(tmp_path, printed(rows))) == {kind: where, **({"missing": [index]} if kind == "stray" else {})}


@pytest.mark.parametrize(
    ("tail", "rows", "kinds"),
    [
        ("60\t3\t3\t0.5\t1\t0:00:01", 4, {}),  # whole, only its line break is lost
        ("60\t3\t3\t0.5\t1\t", 4, {"truncated": [5]}),  # cut in the time: a row all the same
        ("60\t3\t3\t0.5\t1", 3, {"truncated": [5]}),
        ("60\t3\t3\t0.", 3, {"truncated": [5]}),
        ("60\t3\t3\t0.\n", 3, {"truncated": [5]}),  # a later line break does not make it whole
        ("6", 3, {"truncated": [5]}),
        ("60\t3\t3\t0.5\tx\t0:00:01\n", 3, {"unreadable": [5]}),
        ("60\t3\t3\t0.5\tx\t0:00:01", 3, {"truncated": [5]}),
        ("60\t3\t3\t0.5\t1\t0:00:01\t9\n", 3, {"unreadable": [5]}),
        ("60.5\t3\t3\t0.5\t1\t0:00:01\n", 3, {"unreadable": [5]}),
        ("60\tcat\t3\t0.5\t1\t0:00:01\n", 3, {"unreadable": [5]}),
        ("60\t3\tinf\t0.5\t1\t0:00:01\n", 3, {"unreadable": [5]}),
        ("1e20\t3\t3\t0.5\t1\t0:00:01\n", 3, {"unreadable": [5]}),
        (" 60.0 \t3\t3.0\t 0.5\t True \t\n", 4, {}),
        ("\r\n \r\n\n", 3, {}),
    ],
)
def test_a_log_that_was_cut_off(tmp_path: Path, tail: str, rows: int, kinds: dict[str, list[int]]) -> None:
    text = printed([dict(zip(HEADER, [str(i), "3", "3", "0.5", "1", "0:00:01"])) for i in (0, 20, 40)])
    report = audited(tmp_path, text + tail)
    assert (report.rows, found(report)) == (rows, kinds)


def few(*rows: tuple[object, ...]) -> str:
    """A log of rows (idx, label, predict, radius, correct)."""
    return printed([dict(zip(HEADER, map(str, row))) for row in rows], HEADER[:5])


@pytest.mark.parametrize(
    ("indices", "kinds"),
    [
        ([5], {}),
        ([0, 500], {}),
        ([0, 20, 60], {"missing": [40]}),
        ([40, 0, 20, 60], {}),  # shards in any order
        ([0, 1, 2, 3, 7], {"missing": [4, 5, 6]}),
        ([3, 20, 40, 60, 80], {"stray": [3]}),
        ([0, 20, 40, 60, 80, 80, 0], {"duplicate": [0, 80]}),
        ([1044, 3, 77, 250, 913, 618], {}),  # shuffled: no stride, so nobody knows what is missing
    ],
)
def test_what_indices_tell(tmp_path: Path, indices: list[int], kinds: dict[str, list[int]]) -> None:
    assert found(audited(tmp_path, few(*((i, 1, 1, 0.5, 1) for i in indices)))) == kinds


def test_a_corrupted_index_does_not_name_a_billion_others(tmp_path: Path) -> None:
    report = audited(tmp_path, few(*((i, 1, 1, 0.5, 1) for i in (0, 1, 2, 3, 2**50))))
    (problem,) = report.problems
    assert problem.kind == "missing" and problem.rows[:2] == [4, 5] and str(2**50 - 4) in problem.detail
    assert len(problem.rows) == 100_000


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("0.952", None),
        ("0.952864", None),
        ("0.9528641408", None),
        ("0.95286415", None),  # float32 and other libraries may differ in the eighth digit
        ("0.953", "rounding"),  # the ceiling, as Cohen's script prints it
        ("0.9529", "rounding"),
        ("0.9530", "rounding"),
        ("0.9534", "ceiling"),
        ("0.95287", "ceiling"),
        ("0.954", "ceiling"),
        ("0.96", "ceiling"),  # with three digits 0.960
        ("1.0", "ceiling"),
        ("1", "ceiling"),
        ("9.53e-01", "rounding"),
    ],
)
def test_rounded_up_is_not_the_same_as_impossible(tmp_path: Path, text: str, kind: str | None) -> None:
    report = audited(tmp_path, few((0, 1, 1, text, 1), (20, 1, 2, "0.5", 0)))
    assert found(report) == ({kind: [0]} if kind else {})
    assert report.ceiling == pytest.approx(0.9528641408, abs=1e-9)


def test_one_log_has_one_precision(tmp_path: Path) -> None:
    assert found(audited(tmp_path, few((0, 1, 1, "0.953", 1), (20, 1, 1, "0.12345", 1)))) == {"ceiling": [0]}
    assert found(audited(tmp_path, few((0, 1, 1, "0.953", 1), (20, 1, 1, "0.0884", 1)))) == {"rounding": [0]}


def test_the_ceiling_is_that_of_the_stated_sigma_n_and_alpha(tmp_path: Path) -> None:
    """Cohen's log at sigma 0.25 prints 0.978, which alpha = 0.001 and n = 100,000 cannot give, but alpha = 0.01 can; SWEEN's
    print 1.91 at sigma 0.5."""
    log = few((0, 1, 1, "0.978", 1))
    assert found(audited(tmp_path, log)) == {"ceiling": [0]}
    assert found(audited(tmp_path, log, alpha=0.01)) == {"rounding": [0]}
    assert found(audited(tmp_path, log, n=150_000)) == {"rounding": [0]}
    assert found(audited(tmp_path, log, n=1_000_000)) == {}
    assert found(audited(tmp_path, few((0, 1, 1, "1.91", 1)), sigma=0.5)) == {"rounding": [0]}
    report = audited(tmp_path, few((0, 1, 1, "7", 1)), sigma=None)
    assert found(report) == {} and "not checked" in render([report])
    # Three draws prove nothing: every radius above 0 is too large.
    assert found(audited(tmp_path, few((0, 1, 1, "0.0", 1), (1, 1, 1, "0.1", 1)), n=3)) == {"ceiling": [1]}


def test_certified_accuracy_compares_floats_as_read(tmp_path: Path) -> None:
    log = few((0, 1, 1, "0.25", 1), (1, 1, 1, "0.3", 1), (2, 1, 2, "0.9", 0), (3, 1, 1, "nan", 1), (4, 1, 1, "-0.5", 1))
    report = audited(tmp_path, log, radii=[0, 0.25, 0.3, 0.1 + 0.2, np.nextafter(0.25, 1)])
    assert report.certified_accuracy == {
        "0.0": 0.4, "0.25": 0.4, "0.3": 0.2, "0.30000000000000004": 0.0, "0.25000000000000006": 0.2,
    }  # fmt: skip
    assert report.acr == pytest.approx((0.25 + 0.3 - 0.5) / 5)
    assert found(report) == {"radius": [3, 4]}


def test_fractions_are_of_the_log_as_read(tmp_path: Path) -> None:
    """Its own column `correct`, duplicates too; methods 7.4: R = (.5, .3, 0, .8, .2), correct = (1, 0, 0, 1, 1)."""
    report = audited(
        tmp_path, few((0, 1, 1, 0.5, 1), (1, 1, 2, 0.3, 0), (2, 1, -1, 0.0, 0), (3, 1, 1, 0.8, 1), (4, 1, 1, 0.2, 1))
    )
    assert report.acr == pytest.approx(0.3) and report.abstain == 0.2
    assert (report.certified_accuracy["0.25"], report.certified_accuracy["0.0"]) == (0.4, 0.6)
    report = audited(tmp_path, few((0, 1, 2, 0.5, 1), (1, 1, -1, 0.0, 1), (2, 1, 1, 0.7, 0), (2, 1, 1, 0.7, 0)))
    assert found(report) == {"duplicate": [2], "correct": [0, 1, 2]}
    assert report.rows == 4 and report.certified_accuracy["0.5"] == 0.25 and report.acr == 0.125


@pytest.mark.parametrize("text", ["", "\n", "\t".join(HEADER), "\t".join(HEADER) + "\r\n\r\n"])
def test_a_log_without_rows(tmp_path: Path, text: str) -> None:
    report = audited(tmp_path, text)
    assert found(report) == {"empty": []}
    assert (report.rows, report.abstain, report.acr, set(report.certified_accuracy.values())) == (0, None, None, {None})
    for fmt in FORMATS:
        render([report], fmt)


def test_infinite_and_huge_radii_leave_the_json_valid(tmp_path: Path) -> None:
    report = audited(tmp_path, few((0, 1, 1, "inf", 1), (1, 1, 1, "1e308", 1), (2, 1, 1, "1e308", 1)), sigma=None)
    assert found(report) == {"radius": [0]} and report.acr is None
    assert report.certified_accuracy["0.25"] == 1.0
    assert json.loads(render([report], "json"))[0]["acr"] is None
    assert found(audited(tmp_path, few((0, 1, 1, "inf", 1)))) == {"radius": [0], "ceiling": [0]}
    assert "1e+300" in render([audited(tmp_path, few((0, 1, 1, "1e300", 1)))])


def test_a_folder_is_searched_for_logs_only(tmp_path: Path) -> None:
    log = few((0, 1, 1, 0.5, 1))
    for name in ("b/sigma_0.25", "a.tsv", "b/c/deep.txt", ".hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(log)
    (tmp_path / "notes.txt").write_text("idx\tlabel\n")
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "y.json").write_text("not json")
    (tmp_path / "picture.png").write_bytes(bytes(range(256)))
    names = ["a.tsv", "b/c/deep.txt", "b/sigma_0.25"]
    assert [report.file for report in audit(tmp_path)] == [str(tmp_path / name) for name in names]
    twice = audit([tmp_path / "a.tsv", tmp_path, tmp_path / "a.tsv"])
    assert [report.file for report in twice] == [str(tmp_path / name) for name in names]


def test_the_json_is_the_contract(tmp_path: Path) -> None:
    report = audited(tmp_path, few((0, 1, 1, 0.5, 1), (1, 1, 2, 0.5, 1)), radii=[0, 8 / 255])
    (told,) = json.loads(render([report], "json"))
    assert told == {
        "file": str(tmp_path / "some.tsv"),
        "rows": 2,
        "abstain": 0.0,
        "acr": 0.5,
        "certified_accuracy": {"0.0": 1.0, "0.03137254901960784": 1.0},
        "problems": [{"kind": "correct", "detail": PROBLEMS["correct"], "rows": [1]}],
    }


def test_tables_escape_names_and_never_round_a_radius_up(tmp_path: Path) -> None:
    path = tmp_path / "a_b|50%.tsv"
    path.write_text(few(*((i, 1, 1, 0.29999, 1) for i in range(12)), (12, 1, 1, "nan", 1), (12, 1, 1, 0.29999, 0)))
    reports = audit(path, sigma=0.25, radii=[0, 0.30000000000000004])
    assert r"a\_b|50\%.tsv" in render(reports, "latex") and r"\toprule" in render(reports, "latex")
    shown = render(reports, "md")
    assert r"a_b\|50%.tsv" in shown and "\n- " in shown
    shown = render(reports)
    assert "0.2571" in shown and "0.952864 " in shown and "CA 0.30000000000000004" in shown
    assert f"{path}: duplicate: {PROBLEMS['duplicate']}: 12" in shown
    rows = list(csv.DictReader(io.StringIO(render(reports, "csv"))))
    assert rows[0]["file"] == str(path) and rows[0]["problems"] == "duplicate; correct; radius"
    assert float(rows[0]["ACR"]) == reports[0].acr and float(rows[0]["CA 0"]) == 12 / 14
    with pytest.raises(ValueError, match="unknown format 'html'; known are text, json, csv, latex, md"):
        render(reports, "html")
    assert " 0.2999 " in render([audited(tmp_path, few((0, 1, 1, 0.29999, 1)))])
    many = audited(tmp_path, few(*((2 * i, 1, 2, 0.5, 1) for i in range(12))))
    assert "0, 2, 4, 6, 8, 10, 12, 14, 16, 18, ... (12 in all)" in render([many])


# Our own records


def numbers(one: Record, metric: str) -> dict[float | None, float]:
    return {m.radius: m.value for m in one.metrics if m.metric == metric}


def assert_round_trip(one: Record, path: Path, out: Path) -> None:
    """The record and its export both say what the record's metrics say, and nothing is wrong with either."""
    fields, accuracy = one.eval["fields"], numbers(one, "certified_accuracy")
    exported = export([path], out)
    terms = {name: fields[name] for name in ("sigma", "alpha", "n")}
    for reports in (audit(path, radii=accuracy), audit(exported, radii=accuracy, **terms)):
        assert [found(report) for report in reports] == [{}] * len(exported)
        # One log for all radii, or one for each, in their order.
        of = reports if len(reports) > 1 else reports * len(accuracy)
        said = {at: report.certified_accuracy[repr(at)] for at, report in zip(sorted(accuracy), of, strict=True)}
        assert said == accuracy
        assert [reports[0].abstain] == list(numbers(one, "abstention").values())
        assert list(numbers(one, "acr").values()) in ([], [reports[0].acr])


CERTIFIED = sorted(RESULTS.glob("*/*/*/seed*/certified.json"))


@pytest.mark.parametrize("suite", ["mnist", "fashion_mnist", "cifar10"])
def test_committed_records_survive_the_round_trip(tmp_path: Path, suite: str) -> None:
    paths = [path for path in CERTIFIED if path.relative_to(RESULTS).parts[0] == suite]
    assert paths
    for path in paths:
        assert_round_trip(Store(RESULTS).read(path), path, tmp_path)
    assert len(list(tmp_path.glob("*.tsv"))) == len(paths)


EVALS = "".join(
    f'[evals.{name}]\nkind = "certified"\nestimator = "{name}"\nradii = [0.0, 0.1, 0.2]\nn = 400\nimages = 12\n'
    for name in ("fixed", "anytime", "phases", "group_sequential")
)


def test_a_run_survives_the_round_trip(tiny: Path, tmp_path: Path) -> None:
    """Ids of digits are shuffled: they have no stride, and nothing is missing."""
    tiny.write_text(tiny.read_text().replace("[evals.certified]", EVALS + "[evals.certified]"))
    only = ("certified", "fixed", "anytime", "phases", "group_sequential")
    records = Run(Request(defense="randsmooth", suite=str(tiny), runs=tmp_path / "runs", device="cpu", only=only)).execute()
    store = Store(tmp_path / "runs")
    for one in records:
        assert one.status == "success", one.error
        assert_round_trip(one, store.path(one), tmp_path / "logs")
    assert numbers(records[1], "acr") or numbers(records[0], "acr")
    assert len(audit(tmp_path / "runs")) == 1 + 1 + 1 + 3 + 3


SIGMA, N = 0.5, 2000


def made(folder: Path, estimator: str, name: str = "certified", **changes: Any) -> tuple[Store, Record, pd.DataFrame]:
    """A record of 20 images that were certified with the given estimator: votes whose probabilities run from 0.3 to 1."""
    sound = estimator in ESTIMATORS
    radii = (0.0, 0.25, 0.5, 0.75, 1.0)
    runs = [(radius,) for radius in radii] if sound and ESTIMATORS[estimator].preset else [radii if estimator == "grid" else ()]
    thresholds = (SIGMA * torch.special.ndtri(torch.linspace(0.3, 1.0, 20).double()).clamp(-9, 9)).tolist()
    tables = []
    for run in runs:
        for i, threshold in enumerate(thresholds):

            def base(x: torch.Tensor, threshold: float = threshold) -> torch.Tensor:
                return (x[:, 0, 0, 0] < threshold).long()

            own = certify(base, torch.zeros(1, 1, 1, 1), SIGMA, n=N, estimator=estimator if sound else "fixed", radii=run)
            row = {"id": i, "label": 1, "prediction": own.label.item(), "radius": own.radius.item(), "count": own.count.item()}
            row |= {"draws": own.draws.item(), "evaluations": 2100}
            row |= {"chance": own.chance.item()} if estimator == "randomised" else {}
            tables.append(row | ({"asked": run[0]} if len(runs) > 1 else {}))
    rows = pd.DataFrame(tables)
    fields = {
        "kind": "certified",
        "estimator": estimator,
        "radii": list(radii),
        "n0": 100,
        "n": N,
        "alpha": 0.001,
        "images": 20,
    }
    findings = [] if sound else [Finding(kind="unsound", detail="")]
    evaluation = {"name": name, "fields": {**fields, "sigma": SIGMA}}
    one = record(eval=evaluation, metrics=[], findings=findings, cost={"seconds": 1800.5}, **changes)
    store = Store(folder)
    store.write(one)
    store.write_rows(one, rows)
    return store, one, rows


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_no_honest_certificate_is_accused_and_no_raised_one_is_missed(tmp_path: Path, estimator: str) -> None:
    store, one, rows = made(tmp_path, estimator)
    path = store.path(one)
    reports = audit(path)
    assert [found(report) for report in reports] == [{}] * len(reports)
    assert len(reports) == (5 if ESTIMATORS[estimator].preset else 1)
    assert (rows.prediction == -1).any() and (rows.radius > 0).any()
    # Too much for the row's count: a vote for another class would have been needed.
    worse = rows.assign(radius=rows.radius.where(rows.prediction == -1, rows.radius + 0.25))
    store.write_rows(one, worse)
    accused = {
        i for report in audit(path) for kind, where in found(report).items() for i in where if kind in ("unproven", "ceiling")
    }
    predicted = set(rows.id[rows.prediction != -1])
    exact = estimator in ("fixed", "randomised", "phases") or ESTIMATORS[estimator].preset
    assert accused <= predicted and (accused == predicted if exact else len(accused) > 0)


def test_rows_of_a_record_are_held_against_their_own_votes(tmp_path: Path) -> None:
    store, one, rows = made(tmp_path, "fixed")
    top, last = ceiling(SIGMA, N, 0.001), rows.radius.to_numpy().copy()
    middle = int(np.flatnonzero((last > 0) & (last < 0.5))[0])
    store.write_rows(one, rows.assign(radius=np.where(rows.id == middle, last * 1.001, last)))
    assert found(audit(store.path(one))[0]) == {"unproven": [middle]}
    store.write_rows(one, rows.assign(radius=np.where(rows.id == middle, top * 1.001, last)))
    assert found(audit(store.path(one))[0]) == {"ceiling": [middle]}  # no `rounding`: a record prints nothing
    store.write_rows(one, rows.assign(count=rows["count"] - (rows.id == middle)))
    assert found(audit(store.path(one))[0]) == {"unproven": [middle]}
    store.write_rows(one, rows.assign(draws=N - 1))  # the fixed estimator looks at n draws only
    assert found(audit(store.path(one))[0]) == {"unproven": rows.id[rows.prediction != -1].tolist()}
    store.write_rows(one, rows.assign(radius=np.where(rows.id == middle, np.nan, last)))
    assert found(audit(store.path(one))[0]) == {"radius": [middle]}
    store.write_rows(one, rows.assign(prediction=1))
    assert found(audit(store.path(one))[0]) == {"unproven": rows.id[rows.prediction == -1].tolist()}


def test_the_sequential_limit_is_of_the_looks_that_were_made(tmp_path: Path) -> None:
    """189 votes of 200 prove at most what 100 of the first 100 would have: radius 0.25 at sigma 0.25 or 0.5, never 0.75."""
    store, one, rows = made(tmp_path, "grid")
    for radius, kinds in ((0.25, {}), (0.5, {}), (0.75, {"unproven": [19]}), (1.25, {"ceiling": [19]})):
        last = rows.id == 19
        changed = {"radius": radius, "count": 189, "draws": 200}
        store.write_rows(one, rows.assign(**{name: rows[name].where(~last, value) for name, value in changed.items()}))
        assert found(audit(store.path(one))[0]) == kinds


def test_a_coin_raises_its_own_ceiling_only(tmp_path: Path) -> None:
    """(alpha / chance)^(1/n) in place of alpha^(1/n) (methods I7), and no ceiling where the coin is at most alpha."""
    store, one, rows = made(tmp_path, "randomised")
    assert rows.chance.between(0, 1).all()
    row = 19
    top = ceiling(SIGMA, N, 0.001 / 0.5)
    for radius, chance, kinds in (
        (top, 0.5, {}),
        (top * 1.0001, 0.5, {"ceiling": [row]}),
        (top * 1.0001, 0.4, {}),
        (4.0, 0.0009, {}),
    ):
        last = rows.id == row
        changed = {"radius": radius, "count": N, "draws": N, "chance": chance}
        store.write_rows(one, rows.assign(**{name: rows[name].where(~last, value) for name, value in changed.items()}))
        assert found(audit(store.path(one))[0]) == kinds


def test_an_unsound_record_is_called_so(tmp_path: Path) -> None:
    store, one, rows = made(tmp_path, "pooled (unsound)")
    (report,) = audit(store.path(one))
    assert found(report) == {"unsound": rows.id[rows.prediction != -1].tolist()}
    store.write_rows(one, rows.assign(prediction=-1, radius=0.0))
    assert found(audit(store.path(one))[0]) == {"unsound": []}


@pytest.mark.parametrize(
    ("keep", "rename", "kinds"),
    [
        (range(20), {}, {}),
        ([*range(5), *range(7, 20)], {}, {"missing": [5, 6]}),
        (range(17), {}, {"truncated": [17, 18, 19]}),
        ([*range(5), *range(7, 18)], {}, {"missing": [5, 6], "truncated": [18, 19]}),
        ([*range(20), 3], {}, {"duplicate": [3]}),
        (range(20), {4: 400}, {"missing": [4], "stray": [400]}),
        (range(20), {i: 37 * i + 11 for i in range(20)}, {}),  # a shuffled data set: its ids are no numbering
        (range(17), {i: 37 * i + 11 for i in range(20)}, {"truncated": []}),
    ],
)
def test_a_record_knows_its_images(
    tmp_path: Path, keep: list[int], rename: dict[int, int], kinds: dict[str, list[int]]
) -> None:
    store, one, rows = made(tmp_path, "fixed")
    store.write_rows(one, rows.iloc[list(keep)].assign(id=lambda table: table.id.replace(rename)))
    (report,) = audit(store.path(one))
    assert found(report) == kinds and report.rows == len(keep)


def test_lost_rows_are_a_problem_and_a_damaged_record_an_error(tmp_path: Path) -> None:
    store, one, rows = made(tmp_path, "fixed")
    path = store.path(one)
    for spoil in (lambda: path.with_suffix(".parquet").write_bytes(b"PAR1"), path.with_suffix(".parquet").unlink):
        spoil()
        (report,) = audit(path)
        assert found(report) == {"unreadable": []} and "certified.parquet" in report.problems[0].detail
        with pytest.raises(ValueError, match="cannot be read"):
            export([path], tmp_path / "out")
    store.write_rows(one, rows.drop(columns="radius"))
    assert found(audit(path)[0]) == {"unreadable": []}
    store.write_rows(one, rows.iloc[:0])
    assert found(audit(path)[0]) == {"empty": []}
    path.write_text(path.read_text()[:100])
    with pytest.raises(StoreError, match="is no record of format 1"):
        audit(tmp_path)


def test_records_are_read_by_either_file_and_other_records_left_alone(tmp_path: Path) -> None:
    store, one, _ = made(tmp_path, "fixed")
    path = store.path(one)
    store.write(record())
    store.write(record(status="skipped", eval={**one.eval, "name": "later"}, metrics=[]))
    assert audit(path) == audit(path.with_suffix(".parquet")) == audit(tmp_path) == audit([path, tmp_path])
    assert audit(path, sigma=SIGMA, alpha=0.001, n=N) == audit(path)
    for changes, text in (
        ({"sigma": 0.25}, "sigma = 0.5, not 0.25"),
        ({"alpha": 0.01}, "alpha = 0.001"),
        ({"n": 10}, "n = 2000"),
    ):
        with pytest.raises(ValueError, match=text):
            audit(path, **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pgd.json is no finished certified record \(status success, evaluation 'pgd'\)"):
        audit(store.path(record()))


def test_an_export_is_what_cohens_script_prints(tmp_path: Path) -> None:
    store, one, rows = made(tmp_path, "fixed", defense={"name": "x", "variant": "x@architectures=a/b", "fields": {}})
    (path,) = export([tmp_path], tmp_path / "out")
    assert path == tmp_path / "out/tiny_x@architectures=a_b_quick_seed3_certified.tsv"
    first, *lines = path.read_text().splitlines()
    assert first.split("\t") == HEADER
    table = [line.split("\t") for line in lines]
    assert [float(row[3]) for row in table] == rows.radius.tolist()
    assert {row[5] for row in table} == {"0:01:30.025000"}  # 1800.5 seconds for 20 rows
    assert [int(row[4]) for row in table] == (rows.prediction == 1).astype(int).tolist()
    assert export([tmp_path], tmp_path / "out") == [path]  # logs in the folder are no records
    with pytest.raises(ValueError, match="is a log already"):
        export([path], tmp_path / "again")
    other, _, _ = made(tmp_path / "other", "fixed", defense={"name": "x", "variant": "x@architectures=a/b", "fields": {}})
    with pytest.raises(ValueError, match="export them to two folders"):
        export([store.root, other.root], tmp_path / "both")
    shared = one.model_copy(update={"cost": {"seconds": 1800.5, "measured_together": 10.0}})
    store.write(shared)
    assert "\t0:00:09.002500\n" in export([store.path(one)], tmp_path / "shared")[0].read_text()


# The command line


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    return lambda *words: call(*words, monkeypatch=monkeypatch)


def test_exit_codes_tell_clean_from_doubtful(bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("good.tsv").write_text(few((0, 1, 1, 0.5, 1)))
    Path("bad.tsv").write_text(few((0, 1, 2, 0.95, 1)))
    assert bench("audit", "good.tsv", "--sigma", "0.25") == 0
    assert "none" in capsys.readouterr().out
    assert bench("audit", "good.tsv", "bad.tsv", "--format", "json", "--radii", "0,8/255,0.5") == 1
    told = json.loads(capsys.readouterr().out)
    assert [report["file"] for report in told] == ["good.tsv", "bad.tsv"]
    assert list(told[0]["certified_accuracy"]) == ["0.0", repr(8 / 255), "0.5"]
    assert bench("audit", "good.tsv", "--sigma", "0.25", "--alpha", "0.001", "--n", "100") == 1
    assert "0.375118 at sigma 0.25, n 100, alpha 0.001" in capsys.readouterr().out


def test_records_are_exported_and_audited(bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "runs", "fixed")
    assert bench("export", "runs", "--out", "logs") == 0
    (path,) = capsys.readouterr().out.split()
    assert bench("audit", path, "runs", "--sigma", str(SIGMA), "--n", str(N)) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("audit", "nowhere.tsv"), "there is no nowhere.tsv; give a tab-separated log"),
        (("audit", "lonely.parquet"), "lonely.parquet has no record lonely.json beside it"),
        (("audit", "nothing"), "nothing holds no certification log"),
        (("audit", "notes.txt"), "notes.txt is no certification log: its first line is 'hello'"),
        (("audit", "good.tsv", "--format", "texx"), "--format: unknown 'texx'; did you mean 'text'"),
        (("audit", "good.tsv", "--radii", "0;1"), "--radii: '0;1' is no list of numbers"),
        (("audit", "good.tsv", "--radii", "1/0"), "--radii: '1/0' is no list of numbers"),
        (("audit", "good.tsv", "--radii", "-1"), "radii must be finite numbers of at least 0, got -1.0"),
        (("audit", "good.tsv", "--sigma", "0"), "sigma > 0"),
        (("audit", "good.tsv", "--alpha", "0.7"), "alpha < 0.5"),
        (("audit", "good.tsv", "--n", "0"), "n >= 1"),
        (("audit", "good.tsv", "--n", "many"), "--n"),
        (("audit",), "Missing argument"),
        (("export", "nothing", "--out", "x"), "nothing holds no certification log"),
        (("export", "good.tsv", "--out", "x"), "good.tsv is a log already"),
    ],
)
def test_a_wrong_request_is_said_clearly_with_code_2(bench, words, message, capsys) -> None:  # type: ignore[no-untyped-def]
    Path("nothing").mkdir()
    Path("lonely.parquet").write_bytes(b"")
    Path("notes.txt").write_text("hello\n")
    Path("good.tsv").write_text(few((0, 1, 1, 0.5, 1)))
    assert bench(*words) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_every_kind_is_documented_in_a_sentence() -> None:
    assert set(PER_ROW) | {"empty", "truncated", "unproven", "unsound"} == set(PROBLEMS)
    assert all(kind.islower() and kind.isidentifier() and len(text) > 10 for kind, text in PROBLEMS.items())
