"""The page in a real browser: sorting, filters, details, links, colours, widths; and what a hostile record can do to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from test_board import lies, put
from test_ranking import attack, rows

from bench import site
from bench.boards import Ranking, boards
from bench.entries import Entry
from bench.ranking import Threat
from bench.store import Store
from bench.suites import SUITES

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="the page: no chromium, chromium-browser, google-chrome or chrome on PATH")

COMMITTED = Store(SUITES.parent / "results")

ROW = "smd_mnist/1/quick:0:gal"


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the committed records."""
    return site.write([COMMITTED], tmp_path_factory.mktemp("board"))


@pytest.fixture(scope="session")
def attacked() -> tuple[list[Entry], Ranking]:
    """What the page must say of one suite: its entries, those with a rank first, and the ranking that it opens with."""
    board = next(board for board in boards([COMMITTED])[0] if board.key[0] == "smd_mnist")
    ranking = board.tables()[0].rankings[0]
    order = sorted(ranking.places, key=lambda number: (ranking.places[number][0], -ranking.values[number].mean()))
    return [board.entries[number] for number in [*order, *sorted(ranking.without)]], ranking


def gal(attacked: tuple[list[Entry], Ranking]) -> Entry:
    """The entry of :data:`ROW`."""
    return next(entry for entry in attacked[0] if entry.variant == "gal")


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests."""
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(tab: Browser) -> Iterator[Browser]:
    """The browser; whatever a test does there must leave no error and ask no network."""
    yield tab
    assert tab.problems == [] and tab.requests == []


def column(browser: Browser, table: str, number: int) -> list[str]:
    """The texts of a column of a table, of the rows that are shown."""
    rows = f"[...document.querySelectorAll('[aria-label=\"{table}\"] tbody tr')].filter(row => !row.hidden)"
    return browser.js(f"{rows}.map(row => (row.cells[{number}].querySelector('b, button') ?? row.cells[{number}]).textContent)")


def shown(browser: Browser) -> list[str]:
    """Names of the boards that are shown."""
    return browser.js(
        "[...document.querySelectorAll('.board')].filter(one => !one.hidden).map(one => one.firstChild.textContent)"
    )


def choose(browser: Browser, label: str, value: str) -> None:
    """Set a filter as a reader would."""
    control = f"[...document.querySelectorAll('.bar label')].find(one => one.firstChild.textContent === '{label}').lastChild"
    event = "input" if label == "Search" else "change"
    browser.js(f"{{const own = {control}; own.value = '{value}'; own.dispatchEvent(new Event('{event}')); null}}")


ATTACKED, CERTIFIED = "smd_mnist: Accuracy under attack", "fashion_mnist: Certified accuracy, σ = 0.25"


def test_the_page_shows_every_committed_entry_with_its_rank(
    browser: Browser, page: Path, attacked: tuple[list[Entry], Ranking]
) -> None:
    browser.open(page)
    assert set(shown(browser)) == {record.suite["name"] for record in COMMITTED.records()}
    assert set(column(browser, ATTACKED, 1)) == {
        record.defense["variant"].partition("@")[0] for record in COMMITTED.records("smd_mnist")
    }
    entries, ranking = attacked
    ranks = [f"{rank}{'=' * tied}" for rank, tied in sorted(ranking.places.values())]
    assert column(browser, ATTACKED, 0) == [*ranks, *("–" for _ in ranking.without)] and len(ranks) > 1
    assert dict(zip(column(browser, ATTACKED, 1), column(browser, ATTACKED, 0), strict=True))[entries[0].variant] == ranks[0]


def test_a_column_is_sorted_by_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page)
    heads = f"[...document.querySelectorAll('[aria-label=\"{ATTACKED}\"] th button')]"
    place = browser.js(f"{heads}.findIndex(own => own.textContent.includes('clean'))")
    for direction in ("descending", "ascending"):
        browser.js(f"{heads}[{place}].focus()")
        browser.press("Enter")
        assert browser.js(f"{heads}[{place}].parentNode.ariaSort") == direction
        assert browser.js(f"document.activeElement === {heads}[{place}]")
        values = [float(text[:4]) for text in column(browser, ATTACKED, place)]
        assert values == sorted(values, reverse=direction == "descending") and len(set(values)) > 2


def test_an_entry_without_a_number_stays_last(browser: Browser, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    for variant, broken in {"good": [0], "lost": [], "bad": [0, 1, 2]}.items():
        put(store, attack("pgd", [0.1]), rows(0.1, broken, 10), variant)
    next(store.root.glob("*/lost/*/*/pgd.parquet")).unlink()
    page = site.write([store], tmp_path / "board")
    for direction, names in {"descending": ["good", "bad", "lost"], "ascending": ["bad", "good", "lost"]}.items():
        browser.open(page, f"sort=tiny/1/quick/attack~worst|linf 0.1~{direction}")
        assert column(browser, "tiny: Accuracy under attack", 1) == names


def test_filters_leave_what_matches_and_say_how_much(browser: Browser, page: Path) -> None:
    browser.open(page)
    choose(browser, "Data set", "cifar10")
    assert set(shown(browser)) == {folder.name for folder in COMMITTED.root.iterdir() if folder.name.endswith("cifar10")}
    choose(browser, "Threat", "ℓ₂ certificates")
    choose(browser, "Family", "sween")
    assert shown(browser) == ["cifar10"] and column(browser, "cifar10: Certified accuracy, σ = 0.25", 1) == ["sween"]
    assert browser.js("document.querySelector('.count').textContent").startswith("1 of ")
    choose(browser, "Status", "flagged")
    assert shown(browser) == [] and not browser.js("document.querySelector('.empty').hidden")
    browser.js("document.querySelector('.empty button').click()")
    choose(browser, "Budget", "quick")
    choose(browser, "Search", "UNSOUND gm")
    assert shown(browser) == ["unsound_mnist"]
    choose(browser, "Search", "")
    choose(browser, "Threat", "ℓ₂, smoothed")
    assert set(shown(browser)) == {"cifar10", "mnist"}


def test_columns_are_chosen(browser: Browser, page: Path, attacked: tuple[list[Entry], Ranking]) -> None:
    _, ranking = attacked
    browser.open(page)
    words = f"[...document.querySelectorAll('[aria-label=\"{ATTACKED}\"] th')].map(own => own.textContent)"
    strongest, single = f"{ranking.label}AutoAttack", f"{ranking.label}fgsm"
    assert strongest in browser.js(words) and single not in browser.js(words)
    browser.js(
        "[...document.querySelectorAll('.chooser label')].find(own => own.textContent === 'Single attacks').firstChild.click()"
    )
    assert single in browser.js(words)
    assert "show=attack" in browser.js("location.hash")


def test_a_link_keeps_the_view(browser: Browser, page: Path) -> None:
    browser.open(page)
    choose(browser, "Family", "dverge")
    choose(browser, "Search", "mnist")
    browser.js("[...document.querySelectorAll('.ranking:not([hidden]) th button')].at(-1).click()")
    picture = "JSON.stringify([document.querySelector('main').innerText, location.hash])"
    first = browser.js(picture)
    browser.open(page, browser.js("location.hash.slice(1)"))
    assert browser.js(picture) == first


def test_details_open_by_keyboard_and_give_the_focus_back(browser: Browser, page: Path) -> None:
    browser.open(page)
    buttons = f"document.querySelectorAll('[aria-label=\"{ATTACKED}\"] tbody tr button')"
    name = f"[...{buttons}].find(own => own.textContent.trim() === 'gal')"
    browser.js(f"{name}.focus()")
    browser.press("Enter")
    browser.wait("document.querySelector('dialog[open] .record')")
    titles = browser.js("[...document.querySelectorAll('dialog h3')].map(own => own.textContent)")
    assert titles == [
        "Diagnosis",
        "Accuracy against ε, ℓ∞",
        "Transfer between members (transfer)",
        "Published values",
        f"Records ({len(list(COMMITTED.root.glob('smd_mnist/gal/quick/*/*.json')))})",
    ]
    assert "weak_attack" in browser.js("document.querySelector('dialog').innerText")
    browser.press("Escape")
    browser.wait("!document.querySelector('dialog[open]')")
    browser.wait("!location.hash.includes('row=')")
    assert browser.js(f"document.activeElement === {name}")


def test_a_link_opens_the_details_of_an_entry(browser: Browser, page: Path) -> None:
    browser.open(page, f"row={ROW}")
    browser.wait("document.querySelector('dialog[open] .record')")
    assert browser.js("document.querySelector('#panel-title').textContent") == "gal"
    text = browser.js("document.querySelector('dialog').textContent")
    assert "bench run --defense gal --suite smd_mnist --budget quick --seeds 0 --only autoattack" in text
    record = COMMITTED.root / "smd_mnist/gal/quick/seed0/autoattack.json"
    stored = json.loads(record.read_text())
    assert (
        stored["hashes"]["weights"] in text and stored["made"]["commit"] in text and stored["made"]["versions"]["torch"] in text
    )


def test_a_downloaded_record_is_the_stored_one(browser: Browser, page: Path) -> None:
    browser.open(page, f"row={ROW}")
    browser.wait("document.querySelector('dialog[open] .record')")
    browser.js("window.made = []; window.URL.createObjectURL = blob => { made.push(blob.text()); return '#'; }; null")
    browser.js("document.querySelector('.record button').click()")
    text = browser.js("made[0]")
    assert json.loads(text) == json.loads(
        COMMITTED.read(COMMITTED.root / "smd_mnist/gal/quick/seed0/autoattack.json").model_dump_json()
    )


def test_plots_can_be_read_without_a_mouse(browser: Browser, page: Path, attacked: tuple[list[Entry], Ranking]) -> None:
    worst = {
        column.threat.eps: f"{100 * number[0]:.1f}"
        for column, number in gal(attacked).numbers.items()
        if column.kind == "worst" and column.threat == Threat("linf", column.threat.eps)
    }
    assert len(worst) > 3
    browser.open(page, f"row={ROW}")
    browser.wait("document.querySelector('dialog[open] .record')")
    browser.js("document.querySelector('dialog svg[tabindex]').focus()")
    read = []
    for _ in range(len(worst) + 1):  # the clean accuracy, at 0, is read too
        browser.press("ArrowRight")
        read.append(browser.js("document.querySelector('.reading').textContent"))
    told = {text: [own for own in read if own.startswith(f"ε {eps:g}: worst case {text}")] for eps, text in worst.items()}
    assert all(told.values()) and any("autoattack" in own and "fgsm" in own for own in read)
    table = browser.js("document.querySelector('figure details table').textContent")
    assert "worst case" in table and all(text in table for text in told)
    assert browser.js("document.querySelector('td.heat').textContent") == "100.0"


def test_certified_curves_are_drawn(browser: Browser, page: Path) -> None:
    browser.open(page, "row=fashion_mnist/1/quick:0:sween")
    browser.wait("document.querySelector('dialog[open] svg path')")
    steps = browser.js("document.querySelector('dialog svg path').getAttribute('d')")
    assert steps.count("L") == 6  # of four radii, two for each step down
    record = COMMITTED.read(COMMITTED.root / "fashion_mnist/sween/quick/seed0/certified.json")
    values = [f"{100 * own.value:.1f}" for own in record.metrics if own.metric == "certified_accuracy"]
    assert all(value in browser.js("document.querySelector('figure details').textContent") for value in values)


def test_dark_and_light_follow_the_system_or_the_reader(browser: Browser, page: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for dark in (False, True):
        browser.open(page, dark=dark)
        seen[dark] = browser.js(background)
    assert seen[False] != seen[True]
    for name, expected in {"light": seen[False], "dark": seen[True], "system": seen[True]}.items():
        browser.js("document.getElementById('theme').click()")
        assert browser.js("document.getElementById('theme').textContent") == f"Theme: {name}"
        assert browser.js(background) == expected


@pytest.mark.parametrize("hash_", ["", "show=attack&show=every&show=both&show=family", f"row={ROW}"])
def test_a_phone_need_not_scroll_sideways(browser: Browser, page: Path, hash_: str) -> None:
    browser.open(page, hash_, width=375)
    if "row" in hash_:
        browser.wait("document.querySelector('dialog[open] .record')")
        browser.js("document.querySelectorAll('dialog details').forEach(own => { own.open = true; })")
        assert browser.js("document.querySelector('dialog').scrollWidth") <= 375
    assert browser.js("document.documentElement.scrollWidth") <= 375


def test_without_scripts_every_ranking_is_a_plain_table(
    browser: Browser, page: Path, attacked: tuple[list[Entry], Ranking]
) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        rows = browser.js("[...document.querySelectorAll('noscript tbody tr')].map(row => row.innerText)")
        entry, ranking = gal(attacked), attacked[1]
        value, lower, upper, *_ = entry.numbers[ranking.column]
        number = f"{100 * value:.1f}" + (f" [{100 * lower:.1f}, {100 * upper:.1f}]" if lower is not None else " ±")
        assert any(row.split("\t")[1:3] == ["gal", "flagged"] and number in row for row in rows)
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_who_submitted_an_entry_is_told_and_found(browser: Browser, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    put(store, attack("pgd", [0.1]), rows(0.1, [0], 10), "theirs")
    said = {"name": "<b>Mine</b>", "paper": "https://example.org/paper", "code": "none", "contact": "me@example.org"}
    own = {"suite": "tiny", "variant": "theirs", "answers": said, "date": "2026-01-02", "files": {}}
    (store.root / "tiny/theirs/submission.json").write_text(json.dumps(own))
    browser.open(site.write([store], tmp_path / "board"), "q=mine&row=tiny/1/quick:0:theirs")
    browser.wait("document.querySelector('dialog[open] .record')")
    assert "<b>Mine</b>" in browser.js("document.querySelector('tbody .name').textContent")
    told = browser.js("document.querySelector('dialog header').textContent")
    assert "<b>Mine</b>, submitted 2026-01-02; paper: https://example.org/paper; code: none; contact: me@example.org" in told
    assert browser.js("[...document.querySelectorAll('dialog a')].map(own => own.href)") == ["https://example.org/paper"]


def test_records_that_lie_run_nothing_and_break_nothing(browser: Browser, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    unread = lies(store)
    browser.open(site.write([store], tmp_path / "board"))
    names = browser.js("[...document.querySelectorAll('button.open')].map(own => own.closest('th').textContent)")
    assert any("<script>window.hacked = 1" in name for name in names)
    told = browser.js("document.querySelector('.problems').textContent")
    assert all(f"{name}.json" in told for name in unread)
    for place in range(len(names)):
        browser.js(f"document.querySelectorAll('button.open')[{place}].click()")
        browser.wait("document.querySelector('dialog[open] .record')")
        browser.js("document.querySelectorAll('dialog details').forEach(own => { own.open = true; })")
    assert "characters)" in browser.js("document.querySelector('dialog').textContent + document.body.textContent")
    assert browser.js("typeof window.hacked") == "undefined"
