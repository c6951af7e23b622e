"""What a table of a paper says besides its numbers: names, caption, remarks on single cells, statuses, commands for holes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Any

from bench import published
from bench.columns import certificate
from bench.diagnose import STATUSES
from bench.papers.cells import Cell, by_seed
from bench.papers.join import Label, PaperTable
from bench.papers.layout import Layout
from bench.store import Record
from bench.wanted import AGAIN, again, commands, suite

WORDS: dict[str, dict[str, str]] = {
    "dataset": {
        "mnist": "MNIST",
        "fashion_mnist": "Fashion-MNIST",
        "cifar10": "CIFAR-10",
        "cifar100": "CIFAR-100",
        "tiny_imagenet": "Tiny ImageNet",
        "imagenet": "ImageNet",
    },
    "defense": {
        "randsmooth": "RandSmooth",
        "sween": "SWEEN",
        "cear_rw": "CEAR(RW)",
        "cear_gm": "CEAR(GM)",
        "cear_minus_rw": "CEAR-minus(RW)",
        "cear_minus_gm": "CEAR-minus(GM)",
        "naive": "Naive",
        "adp": "ADP",
        "gal": "GAL",
        "dverge": "DVERGE",
        "smd": "SMD",
        "smd_plus": "SMD+",
        "deg": "DEG",
        "pdd": "PDD",
        "edlcm": "EDLCM",
        "edlcm_lg": "only L_g",
        "edlcm_lr": "only L_r",
        "nt": "NT",
        "kap": "KAP",
        "at_es": "AT-ES",
        "trades": "TRADES",
        "fast_at": "Fast AT",
    },
    "attack": {
        "": "clean",
        "fgsm": "FGSM",
        "r_fgsm": "R-FGSM",
        "pgd": "PGD",
        "bim": "BIM",
        "mim": "MIM",
        "apgd": "APGD",
        "square": "Square",
        "autoattack": "AutoAttack",
    },
    "norm": {"linf": "l_inf", "l2": "l2"},
    "metric": {
        "epoch_seconds": "seconds an epoch",
        "runtime_seconds": "seconds",
        "inference_ms": "milliseconds a batch",
        "clean_accuracy": "clean accuracy",
        "attack_success_rate": "attack success",
    },
}
"""How values of published columns are shown, unless a layout says otherwise."""

CONVENTIONS = (
    "paper: as printed; ours: mean over training seeds, ± their deviation (number of seeds) where there are several",
    "95 %: interval of ours, over images (of several seeds: over images and seeds together)",
    "difference: ours - paper, in points; out: the paper's number, with what rounding may have taken from it, lies outside our "
    "interval, which of one seed leaves out how much another training would move it",
    "accuracies and rates are in percent of all images unless said otherwise",
    "bold: the best of ours that answer the same question, different from every other on the same images (McNemar's exact test "
    "for one seed, else sign flips) and, of several seeds, over trainings (paired t), the larger p <= 0.05 after Holm's "
    "correction for the others; of one seed it tells of these networks alone; without stored rows nothing is, nor "
    "where the best is flagged",
    "struck out: cannot be true; small letters: remarks below; !: flagged, see the status",
)
"""How to read a table."""

TIMES = (
    "of times: difference is x ours / paper; to the first: how many times the first of its data set, which depends less on the "
    "machine, but on what else it did: one run each, without an interval"
)

SIZES = "evaluations ask different numbers of images (Ours): compare defenses under one of them, not one with another"

DEVIATIONS = (
    "of deviations: ours is over the training seeds that are told below; out leaves out that the paper's, too, is an estimate "
    "from few trainings"
)

BY_N = "0 by n: no image can be certified there with as many draws as this budget has, so that no difference is told"


def shown(layout: Layout, column: str, value: Hashable, alone: bool = True) -> str:
    """A value of a published column as text; with the column's name where it does not stand under it."""
    names = {**WORDS.get(column, {}), **layout.words.get(column, {})}
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if text in names:
        return names[text]
    return text if alone or not text else f"{column} {text}"


def headings(table: PaperTable) -> list[str]:
    """Of the columns that hold numbers."""
    names = table.layout.columns
    return [
        ", ".join(filter(None, (shown(table.layout, *pair, alone=False) for pair in zip(names, label, strict=True))))
        for label in table.columns
    ]


def row_words(table: PaperTable, row: Label) -> list[str]:
    """The labels before a row."""
    return [shown(table.layout, name, value) or "–" for name, value in zip(table.layout.rows, row, strict=True)]


def remarks(table: PaperTable) -> tuple[dict[int, list[str]], list[str], list[str]]:
    """Remarks on published numbers: the marks of each cell, by its id; what they mean, in order; and notes without marks, which
    most numbers share."""
    cells = list(table.cells.values())
    why = {id(cell): _parts(cell.row["remark"]) for cell in cells}
    notes = {id(cell): _parts(cell.row["note"]) for cell in cells}
    often = Counter(part for own in notes.values() for part in own)
    common = [part for part, times in often.items() if times >= SHARED]
    every = {key: [part for part in (*why[key], *notes[key]) if part not in common] for key in why}
    flags = {part: str(cell.row["flag"]) for cell in reversed(cells) for part in why[id(cell)]}
    order = list(dict.fromkeys(part for own in every.values() for part in own))
    marks = {part: _letters(number) for number, part in enumerate(order)}
    told = [f"{marks[part]}: " + (f"{flags[part]}: " if part in flags else "") + part for part in order]
    whose = {part: {cell.row["defense"] for cell in cells if part in notes[id(cell)]} for part in common}
    names = {cell.row["defense"]: shown(table.layout, "defense", cell.row["defense"]) for cell in cells}
    said = [
        part if len(who) == len(names) else f"{', '.join(names[n] for n in names if n in who)}: {part}"
        for part, who in whose.items()
    ]
    return {key: [marks[part] for part in own] for key, own in every.items()}, told, said


SHARED = 4
"""Numbers of a table from which on a note is told once, without marks."""


def _parts(text: str) -> list[str]:
    return [part for part in text.split("; ") if part]


def _letters(number: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    text = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        text = chr(ord("a") + rest) + text
    return text


def lists(table: PaperTable) -> list[tuple[str, list[str]]]:
    """Everything that a reader needs to trust or doubt a number: titles, each with its sentences."""
    layout, cells = table.layout, list(table.cells.values())
    marks, common = remarks(table)[1:]
    used = [cell for cell in cells if cell.filled]
    runs = _unique(layout.variant(cell.row)[1].remark for cell in cells)
    found = [
        ("How to read it:", [*CONVENTIONS, *_more_conventions(table)]),
        ("Ours:", [_suite(table, name) for name in dict.fromkeys(cell.suite for cell in cells)]),
        (AGAIN, again(record for cell in cells for record in cell.records)),
        ("Status (bench diagnose RUNS/SUITE says why):", _statuses(used)),
        ("Protocol:", [*runs, *_unique(cell.answer.remark for cell in cells), *table.left_out]),
        ("About the paper's numbers:", [*layout.remarks, *common]),
        ("Remarks:", marks),
        ("No number although there is a record:", _holes(table)),
        (
            "– is filled by (the first does all, after its plan, which is all that --dry-run does; the others one by one):",
            _commands(table),
        ),
    ]
    return [(title, lines) for title, lines in found if lines]


def _more_conventions(table: PaperTable) -> list[str]:
    """What only some tables need."""
    cells = list(table.cells.values())
    images = {record.eval["fields"]["images"] for cell in cells if cell.in_percent for record in cell.records}
    needed = {
        TIMES: any(not cell.in_percent for cell in cells),
        SIZES: len(images) > 1,
        DEVIATIONS: any(cell.deviation for cell in cells),
        BY_N: any(cell.too_few for cell in cells),
    }
    return [words for words, is_needed in needed.items() if is_needed]


def caption(table: PaperTable) -> str:
    """What a table is, in two sentences."""
    layout = table.layout
    paper, size = (
        published.PAPERS[next(iter(table.cells.values())).row["paper"]],
        "published size" if table.budget == "paper" else "reduced budget",
    )
    few = sum(cell.too_few for cell in table.cells.values())
    filled = f"Budget {table.budget} ({size}): {table.filled} of {len(table.cells)} cells filled"
    filled += f", {few} of them by 0 for want of draws." if few else "."
    return f'{layout.caption}. Published numbers are those of "{paper}", ours those of stored records. {filled}'


def _unique(texts: Any) -> list[str]:
    return [text for text in dict.fromkeys(texts) if text]


def _suite(table: PaperTable, name: str) -> str:
    """A suite at the table's budget, and what of the published size that leaves."""
    now, full = suite(name, table.budget), suite(name, "paper")
    cells = [cell for cell in table.cells.values() if cell.suite == name]
    data = sorted({record.hashes.get("data", "unknown data") for cell in cells for record in cell.records})
    asked: dict[str, set[int]] = {}
    for record in (record for cell in cells for record in cell.records):
        asked.setdefault(_asked(record), set()).add(record.seed)
    several = len(set().union(*asked.values())) > 1
    sizes = [words + f" (seed {', '.join(map(str, sorted(own)))})" * several for words, own in sorted(asked.items())]
    size = "published size" if table.budget == "paper" else "reduced budget"
    reduced = []
    for words, here, there in (
        ("network", now.architecture, full.architecture),
        ("epochs", now.recipe["epochs"], full.recipe["epochs"]),
        ("training images", now.train_images or "all", full.train_images or "all"),
    ):
        reduced.append(f"{words} {here}" + (f" instead of {there}" if here != there else ""))
    text = f"suite {name} version {now.version} ({_place(table, cells)}), budget {table.budget} ({size}): {', '.join(reduced)}"
    if not sizes:
        return f"{text}; no records"
    devices = {str(record.made.get("device", "unknown")) for cell in cells if not cell.in_percent for record in cell.records}
    machine = f"; times on: {', '.join(sorted(devices))}" if devices else ""
    return f"{text}; data: {', '.join(data)}; images: {', '.join(sizes)}{machine}"


def _place(table: PaperTable, cells: list[Cell]) -> str:
    """Of which part of a table cells are: data set, and what else its blocks share."""
    rows = [cell.row for cell in cells]
    names = dict.fromkeys(("dataset", *table.layout.block))
    values = {name: _unique(shown(table.layout, name, row[name]) for row in rows) for name in names}
    return ", ".join(name * (name != "dataset") + " " * (name != "dataset") + ", ".join(own) for name, own in values.items())


def _asked(record: Record) -> str:
    """An evaluation, its number of images, its queries, and how it certifies."""
    fields, how = record.eval["fields"], certificate(record)
    asks = fields.get("attack") == "square" or fields.get("version") in ("standard", "plus")  # of AutoAttack, those with Square
    queries = f"{fields['proposals']} queries" if asks and "proposals" in fields else ""
    more = ", ".join(filter(None, (how, queries)))
    return f"{record.eval['name']} {fields['images']}" + (f" ({more})" if more else "")


def _statuses(cells: list[Cell]) -> list[str]:
    """What may be believed of whose numbers."""
    stated: dict[tuple[str, str], set[tuple[str, int]]] = {}
    for cell in cells:
        stated.setdefault((cell.suite, cell.label), set()).update(cell.stated)
    whose: dict[tuple[str, str], list[str]] = {}
    for (name, label), own in stated.items():
        whose.setdefault((by_seed(sorted(own, key=lambda one: one[::-1])), name), []).append(label)
    told = [f"{status} in {name}: {', '.join(labels)}" for (status, name), labels in sorted(whose.items())]
    used = {status for cell in cells for status in cell.statuses}
    return [*told, *(f"{status}: {meaning}" for status, meaning in STATUSES.items() if status in used)]


def _commands(table: PaperTable) -> list[str]:
    """What fills the holes: everything by the paper's protocol, and what is shown of each suite apart."""
    holes = [cell for cell in table.cells.values() if not cell.filled and not cell.why.startswith("makes no sense")]
    if not holes:
        return []
    taken = [cell.need for cell in holes if cell.taken]
    apart = commands((cell.need for cell in holes), table.budget, table.seeds, taken, table.options)
    at_once = f"bench reproduce {table.layout.name} --budget {table.budget}" + " --fresh" * bool(taken) + table.options
    own, used = table.layout.protocol.suites, [(cell.row["dataset"], cell.suite) for cell in table.cells.values()]
    instead: dict[str, list[str]] = {}
    for data, name in dict.fromkeys(used):
        if name != own[data][0]:
            instead.setdefault(own[data][0], []).append(name)
    other = [f"{name} where {' or '.join(others)} is shown" for name, others in instead.items()]
    told = [f"the first runs all of the paper's protocol, suite {', '.join(other)}; the others fill what is shown"]
    return [at_once, *apart, *(told if other else [])]


def _holes(table: PaperTable) -> list[str]:
    """Why cells are empty although there is a record."""
    why: dict[str, list[str]] = {}
    for cell in table.cells.values():
        if cell.why:
            why.setdefault(cell.why, []).append(f"{cell.label} {cell.answer.eval}")
    return [f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in why.items()]
