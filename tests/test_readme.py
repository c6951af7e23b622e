"""The README is short, its table is made of committed records, and its commands exist."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from bench import tables
from bench.papers.formats import render
from bench.papers.join import join
from bench.papers.layout import load
from bench.registry import resolve
from bench.store import Store
from bench.suites import load_suite
from defenses.bounds import ceiling

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_it_is_short_and_names_no_machine() -> None:
    assert len(README.splitlines()) <= 150
    assert not re.search(r"/(home|root|work)/", README)


RESULTS = ROOT / "leaderboards/results"
SUITES = sorted(path.parent.name for path in RESULTS.glob("*/summary.md"))


def test_its_table_is_the_committed_records() -> None:
    shown = README.partition("<!-- table begin -->\n")[2].partition("<!-- table end -->")[0]
    made = [table for table in tables.summaries(Store(RESULTS), "fashion_mnist") if "certified accuracy" in table.title]
    assert shown.strip() == tables.render(made[0], "md").strip()
    assert "cear_rw" in shown and len(made) == 1


@pytest.mark.parametrize("suite", SUITES)
def test_every_committed_summary_is_the_committed_records(suite: str) -> None:
    made = tables.render_all(tables.summaries(Store(RESULTS), suite), "md")
    assert (RESULTS / suite / "summary.md").read_text().strip() == made.strip()
    assert f"leaderboards/results/{suite}/summary.md" in README


@pytest.mark.parametrize("suite", SUITES)
def test_the_commands_below_a_committed_summary_make_its_records_and_no_others(suite: str) -> None:
    """Everything that is shown, each once: no other sigma of the suite, no other seed, nothing of an older version."""
    made: list[tuple[str, str, int]] = []
    for command in re.findall(r"- `(bench run .*)`", (RESULTS / suite / "summary.md").read_text()):
        words = shlex.split(command)
        options = dict(zip(words[2::2], words[3::2]))
        asked = load_suite(options["--suite"], options["--budget"])
        assert asked.name == suite and set(options["--only"].split(",")) <= set(asked.evals)
        labels = [variant.label for variant in resolve(options["--defense"], asked.sweep)]
        places = (labels, options["--only"].split(","), map(int, options["--seeds"].split(",")))
        made += itertools.product(*places)
    records = [record for record in Store(RESULTS).records(suite) if record.status == "success"]
    assert sorted(made) == sorted((one.defense["variant"], one.eval["name"], one.seed) for one in records)


@pytest.mark.parametrize("path", sorted((RESULTS / "papers").glob("*.md")), ids=lambda path: path.stem)
def test_every_committed_table_of_a_paper_is_the_committed_records(path: Path) -> None:
    made = render(replace(join(load(path.stem), Store(RESULTS)), options=" --runs leaderboards/results"), "md")
    again = f"bench table {path.stem} --format md --runs leaderboards/results > {path.relative_to(ROOT)}"
    assert path.read_text().strip() == made.strip(), f"records were committed since; make it again: {again}"


COMMANDS = re.findall(r"bench run [^\n`]*", README)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_run_command_names_things_that_exist(command: str) -> None:
    words = shlex.split(command.split("`", maxsplit=1)[0])
    options = dict(zip(words[2::2], words[3::2]))
    if options["--suite"] != "S":
        suite = load_suite(options["--suite"])
        if not options["--defense"].endswith(".py"):
            assert resolve(options["--defense"], suite.sweep)


def test_every_command_is_documented() -> None:
    from bench.cli import app

    for command in app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        assert f"bench {name}" in README, f"README does not show bench {name}"


@pytest.mark.parametrize(("suite", "sigmas"), [("mnist", 3), ("fashion_mnist", 1)])
def test_the_committed_training_log_shows_each_part_made_once(suite: str, sigmas: int) -> None:
    """Eight defenses: one teacher in all; at each sigma five students with and five without variable noise, five on noise."""
    lines = (RESULTS / suite / "parts/log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    made = [event["role"] for event in events if event["event"] == "made"]
    counts = (made.count("teacher"), made.count("student"), made.count("gaussian"))
    assert counts == (1, 10 * sigmas, 5 * sigmas)
    assert len({event["key"] for event in events}) == len(events)


EIGHT = {
    "randsmooth", "smoothed_ensemble", "sween", "sween_cear", "cear_minus_rw", "cear_minus_gm", "cear_rw", "cear_gm",
}  # fmt: skip


@pytest.mark.parametrize(("suite", "sigmas"), [("mnist", {0.25, 0.5, 1.0}), ("fashion_mnist", {0.25})])
def test_no_committed_certificate_passes_its_ceiling_and_all_eight_are_there(suite: str, sigmas: set[float]) -> None:
    store = Store(RESULTS)
    certified = [record for record in store.records(suite) if record.eval["name"] == "certified"]
    shown = {(record.defense["name"], record.eval["fields"]["sigma"]) for record in certified}
    assert shown == {(name, sigma) for name in EIGHT for sigma in sigmas}
    for record in certified:
        fields = record.eval["fields"]
        top = ceiling(fields["sigma"], fields["n"], 0.9 * fields["alpha"])
        at = {m.radius: m.value for m in record.metrics if m.metric == "certified_accuracy" and m.radius is not None}
        values = [at[radius] for radius in sorted(at)]
        assert max(at) <= top and store.rows(record).radius.max() <= top
        assert values == sorted(values, reverse=True)


def test_committed_certificates_of_mnist_are_as_good_as_promised() -> None:
    for record in Store(RESULTS).records("mnist"):
        if record.eval["name"] == "certified" and record.eval["fields"]["sigma"] == 0.25:
            at = {m.radius: m.value for m in record.metrics if m.metric == "certified_accuracy"}
            assert at[0.0] >= (0.97 if record.defense["name"] == "randsmooth" else 0.95)
            assert at[0.5] >= 0.88


@pytest.mark.parametrize("suite", ["mnist", "fashion_mnist"])
def test_committed_margins_vary_less_with_members_down_to_their_correlation(suite: str) -> None:
    views = [record for record in Store(RESULTS).records(suite) if record.eval["name"] == "variance" and record.metrics]
    assert views
    for record in views:
        ratios = {m.members: m.value for m in record.metrics if m.metric == "margin_variance_ratio"}
        zeta = next(m.value for m in record.metrics if m.metric == "margin_correlation")
        assert set(ratios) == {1, 2, 3, 4, 5}
        assert ratios[1] > ratios[3] > ratios[5] > zeta
