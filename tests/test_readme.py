"""The README is short, its table is made of committed records, and its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bench import tables
from bench.registry import resolve
from bench.store import Store
from bench.suites import load_suite

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_it_is_short_and_names_no_machine() -> None:
    assert len(README.splitlines()) <= 150
    assert not re.search(r"/(home|root|work)/", README)


def test_its_table_is_the_committed_records() -> None:
    shown = README.partition("<!-- table begin -->\n")[2].partition("<!-- table end -->")[0]
    made = tables.render_all(tables.summaries(Store(ROOT / "leaderboards/results"), "mnist"), "md")
    assert shown.strip() == made.strip()
    assert "cear_rw" in shown


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


def test_the_committed_training_log_shows_each_part_made_once() -> None:
    import json

    lines = (ROOT / "leaderboards/results/mnist/parts/log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    made = [event["role"] for event in events if event["event"] == "made"]
    assert (made.count("teacher"), made.count("student"), made.count("gaussian")) == (1, 10, 1)
    assert len({event["key"] for event in events}) == len(events)


def test_no_committed_certificate_passes_its_ceiling_and_accuracies_are_as_promised() -> None:
    from defenses.bounds import ceiling

    store = Store(ROOT / "leaderboards/results")
    certified = {r.defense["variant"]: r for r in store.records("mnist") if r.eval["name"] == "certified"}
    assert set(certified) == {"randsmooth", "cear_minus_rw", "cear_minus_gm", "cear_rw", "cear_gm"}
    for variant, record in certified.items():
        top = ceiling(0.25, record.eval["fields"]["n"], 0.9 * record.eval["fields"]["alpha"])
        at = {m.radius: m.value for m in record.metrics if m.metric == "certified_accuracy"}
        assert all(radius <= top for radius in at if radius is not None)
        assert store.rows(record).radius.max() <= top
        assert at[0.0] >= (0.97 if variant == "randsmooth" else 0.95)
        if variant == "randsmooth":
            assert at[0.5] >= 0.88
