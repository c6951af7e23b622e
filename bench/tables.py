"""Tables of stored records, one for each suite, version, budget, estimator and sigma; every number with its interval."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import mean, stdev
from typing import Any

from bench import captions, columns, latex
from bench.diagnose import STATUSES, Diagnosis, Place, certifies, diagnose, place
from bench.store import Metric, Record, Store
from bench.wanted import AGAIN, again

FORMATS = ("text", "md", "latex", "csv", "json", "html")

HOLE = "–"

# The number of each seed, with the record it stands in.
Cell = list[tuple[Record, Metric]]


@dataclass(frozen=True)
class Table:
    """A finished table.

    Attributes:
        title, caption: what it is; the caption names everything that a reader needs to trust or doubt a cell.
        columns: headings, the first two are "defense" and "seeds", the last is "status".
        rows: variant -> heading -> the records and numbers behind a cell; an absent heading is a hole.
        unfinished: variant -> records without numbers.
        trust: variant -> what is known of each of its seeds, of attacks or of certificates, as the table is about.
        records: everything that it tells of, be it by a status alone.
    """

    title: str
    caption: str
    columns: list[str]
    rows: dict[str, dict[str, Cell]]
    unfinished: dict[str, list[Record]]
    trust: dict[str, list[Diagnosis]]
    records: list[Record]


def summaries(store: Store, suite: str | None = None) -> list[Table]:
    """All tables of a store, or of one suite. Budgets, suite versions, estimators and sigmas never share a table.

    Where an evaluation makes no sense for a defense there is a record that says so, but no row.
    """
    tables, records = [], store.records(suite or "*")
    known = {own.place: own for own in diagnose(store, records)}
    for _, group in groupby(sorted(records, key=_block), key=_block):
        block = list(group)
        sensible = {record.defense["variant"] for record in block if record.status != "skipped"}
        if sensible:
            tables.append(_table([record for record in block if record.defense["variant"] in sensible], known))
    return tables


def _block(record: Record) -> tuple[Any, ...]:
    """What the records of one table share; attacks, certificates, the variance view and diversity have tables of their own."""
    return (record.suite["name"], record.suite["version"], record.suite["budget"], *_kind(record))


def _kind(record: Record) -> tuple[str, str, float]:
    """Kind of the table, how certificates were made, and their sigma."""
    fields = record.eval["fields"]
    if fields.get("kind") == "variance":
        how = f"fixed estimator, n0 = {fields['n0']}, n = {max(fields['n'])}, alpha = {fields['alpha']:g}"
        return "variance view", how, _sigma(record)
    if fields.get("kind") == "votes":
        how = f"n0 = {fields['n0']}, n <= {fields['n']}, alpha = {fields['alpha']:g}"
        return "estimators on the same votes", how, _sigma(record)
    if fields.get("kind") in _OWN:
        name, describe = _OWN[fields["kind"]]
        return name, describe(record), 0.0
    how = columns.certificate(record)
    return ("certified accuracy", how, _sigma(record)) if how else ("accuracy under attack", "", 0.0)


_OWN: dict[str, tuple[str, Callable[[Record], str]]] = {
    "diversity": ("diversity of members", columns.steps),
    "transfer": ("transfer between members", columns.crafted),
    "black_box": ("accuracy on images of other models", lambda record: ""),
    "noise": ("accuracy under noise", columns.under_noise),
    "activations": ("activations under noise and attack", columns.crafted),
    "kernels": ("kernels of the first layer", lambda record: ""),
}
"""Kinds of evaluations with a table of their own, whose numbers are not of one sigma: its name, and how they came about."""


def _sigma(record: Record) -> float:
    """The noise of a certificate, 0 where the evaluation was skipped because there is none."""
    return float(record.eval["fields"].get("sigma") or 0.0)


def without_sigma(variant: str) -> str:
    """A variant's label without its sigma, where the heading tells it: "cear_rw@members=3,sigma=0.5" -> "cear_rw@members=3"."""
    name, _, fields = variant.partition("@")
    kept = [field for field in fields.split(",") if field and not field.startswith("sigma=")]
    return f"{name}@{','.join(kept)}" if kept else name


def _table(records: list[Record], known: Mapping[Place, Diagnosis]) -> Table:
    name, _, budget, kind, _, sigma = _block(records[0])
    rows: dict[str, dict[str, Cell]] = {}
    order: dict[tuple[Any, ...], str] = {}
    unfinished: dict[str, list[Record]] = {}
    trust: dict[str, dict[Place, Diagnosis]] = {}
    # A challenge has one column of its own; it makes no other ambiguous.
    several = len({record.eval["name"] for record in records if record.eval["fields"].get("kind") != "challenge"}) > 1
    for record in records:
        variant = record.defense["variant"]
        if not record.metrics:
            rows.setdefault(variant, {})
            trust.setdefault(variant, {})[place(record)] = known[place(record)]
            unfinished.setdefault(variant, []).append(record)
        for metric in numbers(record):
            key = columns.key(record, metric)
            label = f"{without_sigma(variant)}: {metric.estimator}" if metric.estimator else variant
            row = rows.setdefault(label, {})
            trust.setdefault(label, {})[place(record)] = known[place(record)]
            if key:
                row.setdefault(order.setdefault(key, columns.heading(key, several)), []).append((record, metric))
    title = f"{name}, {budget}: {kind}" + (f" at sigma = {sigma:g}" if sigma else "")
    headings = ["defense", "seeds", *(order[key] for key in sorted(order)), "status"]
    certificates = any(map(certifies, records))
    sides = {
        label: [own.certificates if certificates else own.attacks for _, own in sorted(seeds.items())]
        for label, seeds in trust.items()
    }
    words = {own.status for seeds in sides.values() for own in seeds}
    told = "; ".join(f"{word}: {STATUSES[word]}" for word in STATUSES if word in words)
    caption = f"{_caption(records)} Status: {told}; more by bench diagnose RUNS/{name}."
    return Table(title, caption, headings, rows, unfinished, sides, records)


def _caption(records: list[Record]) -> str:
    first = records[0]
    name, version, budget, kind, how, sigma = _block(first)
    size = "published size" if budget == "paper" else "reduced budget"
    images = sorted({(r.eval["name"], r.eval["fields"]["images"]) for r in records if "images" in r.eval["fields"]})
    sentences = [
        f"Suite {name} version {version}, budget {budget} ({size}), {first.task.get('architecture')}",
        "data: " + ", ".join(sorted({record.hashes.get("data", "unknown") for record in records})),
        "accuracies in percent of all images: one seed with its 95 % interval, or mean ± deviation over training seeds"
        " (how many)",
        "images: " + ", ".join(f"{evaluation} {count}" for evaluation, count in images),
        *captions.of_kind(kind, f"sigma = {sigma:g}, {how}" if sigma else how, records),
    ]
    found = {metric.metric for record in records for metric in numbers(record)}
    sentences += [text for word, text in captions.OF_NUMBERS.items() if word in found]
    return "; ".join(sentences) + "."


def numbers(record: Record) -> list[Metric]:
    """The numbers of a record, and, beside clean accuracy, what its training cost."""
    seconds = record.cost.get("training_seconds_per_epoch")
    if seconds is None or record.eval["fields"].get("kind") != "clean":
        return record.metrics
    epochs = record.task["recipe"]["epochs"]
    return [*record.metrics, Metric(metric="training_seconds_per_epoch", value=seconds, n=epochs, unit="seconds")]


_DIGITS = {"draws": 0, "network evaluations": 0, "factor": 1, "percent, sum over targets": 1, "seconds": 1}
"""Digits after the point by unit; 3 for others."""


def _show(cell: Cell | None) -> str:
    """A cell as text: value and interval of one seed, mean and deviation of several; never a number where there is none."""
    if not cell:
        return HOLE
    one = cell[0][1]
    scale = 100.0 if one.unit == "fraction" else 1.0
    digits = 1 if scale == 100.0 else _DIGITS.get(one.unit, 3)
    values = [metric.value * scale for _, metric in cell]
    if len(values) > 1:
        return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f} ({len(values)})"
    if one.lower is None or one.upper is None:
        return f"{values[0]:.{digits}f}"
    return f"{values[0]:.{digits}f} [{one.lower * scale:.{digits}f}, {one.upper * scale:.{digits}f}]"


def body(table: Table) -> list[list[str]]:
    """The rows as text, in the order of the columns."""
    lines = []
    for variant, cells in sorted(table.rows.items()):
        records = [record for cell in cells.values() for record, _ in cell] + table.unfinished.get(variant, [])
        seeds = ", ".join(map(str, sorted({record.seed for record in records})))
        shown = without_sigma(variant) if " at sigma = " in table.title else variant
        status = _status(records, table.trust[variant])
        lines.append([shown, seeds, *(_show(cells.get(name)) for name in table.columns[2:-1]), status])
    return lines


def _status(records: Iterable[Record], trust: Sequence[Diagnosis]) -> str:
    """The status of every seed, evaluations without a result, and kinds of findings: those about the row's own evaluations, and
    all signs that make it flagged."""
    words = {own.status: [str(other.place[3]) for other in trust if other.status == own.status] for own in trust}
    status = [word if len(words) == 1 else f"{word} (seed {', '.join(seeds)})" for word, seeds in words.items()]
    told = {f"{r.eval['name']} {r.status}" for r in records if r.status != "success"}
    names = {record.eval["name"] for record in records}
    for own in trust:
        told |= {f.kind for f in own.findings if own.flags(f) or names & set(f.evidence["evaluations"])}
    return "; ".join([*status, *sorted(told - set(words))])


def render_all(tables: list[Table], fmt: str = "text") -> str:
    """Several tables as one text that its format can hold: JSON and CSV put all rows into one list.

    Raises:
        ValueError: for an unknown format.
    """
    if fmt in ("json", "csv"):
        return _raw([row for table in tables for row in tidy(table)], fmt)
    commands = again(record for table in tables for record in table.records)
    # LaTeX holds few floats back at a time.
    between = "\n\n\\clearpage\n\n" if fmt == "latex" else "\n\n"
    return "\n\n".join([between.join(render(table, fmt) for table in tables), *([_told(commands, fmt)] if commands else [])])


def _told(commands: Sequence[str], fmt: str) -> str:
    """The commands that make records again, as a format can hold them below tables; in LaTeX as comments."""
    if fmt == "html":
        from html import escape

        return f"<p>{AGAIN}</p><ul>{''.join(f'<li><code>{escape(command)}</code></li>' for command in commands)}</ul>"
    head, line = {"text": ("{}", "  {}"), "md": ("{}\n", "- `{}`"), "latex": ("% {}", "% {}")}[fmt]
    return "\n".join([head.format(AGAIN), *map(line.format, commands)])


def _raw(rows: list[dict[str, Any]], fmt: str) -> str:
    if fmt == "json":
        return json.dumps(rows, indent=1, allow_nan=False)
    import pandas as pd

    return pd.DataFrame(rows).to_csv(index=False).strip()


def tidy(table: Table) -> list[dict[str, Any]]:
    """Raw numbers, a row each."""
    rows = []
    for variant, cells in sorted(table.rows.items()):
        for heading, cell in cells.items():
            for record, metric in cell:
                common = {"table": table.title, "defense": variant, "seed": record.seed, "column": heading}
                rows.append({**common, "status": record.status, **metric.model_dump()})
        for record in table.unfinished.get(variant, []):
            common = {"table": table.title, "defense": variant, "seed": record.seed, "column": record.eval["name"]}
            rows.append({**common, "status": record.status, "value": None})
    return rows


def render(table: Table, fmt: str = "text") -> str:
    """A table as text, Markdown, LaTeX (booktabs), HTML, CSV or JSON; the last two carry raw numbers.

    Raises:
        ValueError: for another format.
    """
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt!r}; known are {', '.join(FORMATS)}")
    if fmt in ("json", "csv"):
        return _raw(tidy(table), fmt)
    if fmt == "latex":
        rows = [[[latex.Cell.of(cell) for cell in row]] for row in body(table)]
        return latex.floats(table.title, table.caption, table.columns, rows, labels=2)
    from tabulate import tabulate

    if fmt == "html":
        from html import escape

        grid = str(tabulate(body(table), table.columns, tablefmt="html", disable_numparse=True))
        return grid.replace("<table>", f"<table>\n<caption>{escape(table.caption)}</caption>", 1)
    style = {"text": "simple", "md": "github"}[fmt]
    cells = [[cell.replace("|", r"\|") for cell in row] for row in body(table)] if fmt == "md" else body(table)
    grid = str(tabulate(cells, table.columns, tablefmt=style, disable_numparse=True))
    return f"{grid}\n\n{table.caption}" if fmt == "md" else f"{table.title}\n{grid}\n{table.caption}"
