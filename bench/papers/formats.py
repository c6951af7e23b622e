"""Tables of papers as text, Markdown, LaTeX (booktabs), HTML, CSV and JSON; the last two carry raw numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from statistics import mean, stdev
from typing import Any

from bench import latex
from bench.papers import words
from bench.papers.cells import Cell, Number, number
from bench.papers.join import Label, PaperTable, Where
from bench.papers.layout import CELL
from bench.tables import FORMATS, HOLE

Change = Callable[[str], str]


@dataclass(frozen=True)
class Style:
    """How a format writes a struck-out number, a bold one, and marks of remarks; ``plain`` protects any other text."""

    strike: Change
    bold: Change
    mark: Change
    plain: Change


def _ruled(text: str) -> str:
    """A line through a short text by plain LaTeX, without a package."""
    return rf"\rlap{{\rule[0.6ex]{{{0.5 * len(text) + 0.1:.1f}em}}{{0.5pt}}}}{latex.escaped(text)}"


STYLES = {
    "text": Style("~~{}~~".format, "**{}**".format, " ({})".format, str),
    "md": Style("~~{}~~".format, "**{}**".format, "<sup>{}</sup>".format, lambda text: text.replace("|", r"\|")),
    "latex": Style(_ruled, lambda text: rf"\textbf{{{latex.escaped(text)}}}", r"\textsuperscript{{{}}}".format, latex.escaped),
    "html": Style(
        lambda text: f"<s>{escape(text)}</s>",
        lambda text: f"<b>{escape(text)}</b>",
        lambda text: f"<sup>{escape(text)}</sup>",
        escape,
    ),
}


def render(table: PaperTable, fmt: str = "text") -> str:
    """A table of a paper in a format of :data:`bench.tables.FORMATS`.

    Raises:
        ValueError: for another format.
    """
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt!r}; known are {', '.join(FORMATS)}")
    if fmt == "json":
        return json.dumps(tidy(table), indent=1, allow_nan=False)
    if fmt == "csv":
        import pandas as pd

        return pd.DataFrame(tidy(table)).to_csv(index=False).strip()
    return {"text": _text, "md": _markdown, "latex": _latex, "html": _html}[fmt](table)


def _text(table: PaperTable) -> str:
    from tabulate import tabulate

    grid = tabulate(_body(table, STYLES["text"]), _heads(table, STYLES["text"]), "simple", disable_numparse=True)
    parts = [table.layout.title, str(grid), words.caption(table)]
    parts += ["\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in words.lists(table)]
    return "\n\n".join(parts)


def _markdown(table: PaperTable) -> str:
    from tabulate import tabulate

    grid = tabulate(_body(table, STYLES["md"]), _heads(table, STYLES["md"]), "github", disable_numparse=True)
    parts = [f"### {table.layout.title}", str(grid), words.caption(table)]
    for title, lines in words.lists(table):
        shown = [f"- `{line}`" if line.startswith("bench ") else f"- {line}" for line in lines]
        parts.append("\n".join([title, "", *shown]))
    return "\n\n".join(parts)


def _latex(table: PaperTable) -> str:
    """Floats for each value of the first label, and the sentences as text behind them."""
    names, marks = table.layout.rows, words.remarks(table)[0]
    several = len(names) > 1
    heads = _heads(table, STYLES["text"])[several:]
    parts = []
    for first, rows in groupby(table.rows, key=lambda row: row[0] if several else ""):
        own = replace(table, cells=_of_rows(table, list(rows)))
        plain, written = (_groups(own, STYLES[style], marks) for style in ("text", "latex"))
        groups = [
            [[latex.Cell(*pair) for pair in zip(*lines, strict=True)][several:] for lines in zip(*group, strict=True)]
            for group in zip(plain, written, strict=True)
        ]
        told = f" ({words.shown(table.layout, names[0], first, alone=False)})" if several else ""
        parts.append(latex.floats(table.layout.title + told, words.caption(table), heads, groups, len(names) + 1 - several))
    # Behind the floats, which would drift behind it.
    lines = [r"\clearpage\begingroup\scriptsize\raggedright"]
    for title, items in words.lists(table):
        lines += [rf"\par\smallskip {latex.escaped(title)}", r"\begin{itemize}"]
        lines += [*(rf"\item {{}}{latex.sentence(item)}" for item in items), r"\end{itemize}"]
    return "\n\n".join([*parts, "\n".join([*lines, r"\par\endgroup"])])


def _of_rows(table: PaperTable, rows: list[Label]) -> dict[Where, Cell]:
    return {where: cell for where, cell in table.cells.items() if where[0] in rows}


def _html(table: PaperTable) -> str:
    style = STYLES["html"]
    lines = ["<table>", f"<caption>{escape(table.layout.title)}</caption>"]
    lines.append("<thead><tr>" + "".join(f"<th>{head}</th>" for head in _heads(table, style)) + "</tr></thead>")
    lines.append("<tbody>")
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in _body(table, style)]
    lines += ["</tbody>", "</table>", f"<p>{escape(words.caption(table))}</p>"]
    for title, items in words.lists(table):
        listed = "".join(f"<li>{escape(item)}</li>" for item in items)
        lines.append(f"<p>{escape(title)}</p><ul>{listed}</ul>")
    return "\n".join(lines)


def _heads(table: PaperTable, style: Style) -> list[str]:
    return [style.plain(text) for text in (*table.layout.rows, "", *words.headings(table))]


def _body(table: PaperTable, style: Style) -> list[list[str]]:
    return [line for group in _groups(table, style, words.remarks(table)[0]) for line in group]


def _groups(table: PaperTable, style: Style, marks: dict[int, list[str]]) -> list[list[list[str]]]:
    """Four lines for every row of the paper, and one more where other numbers are told beside ours."""
    groups = []
    for row in table.rows:
        cells = [table.cells.get((row, column)) for column in table.columns]
        labels = [style.plain(text) for text in words.row_words(table, row)]
        more: dict[str, list[str]] = {"ours": [_ours(cell, style) for cell in cells]}
        if any(cell and cell.filled for cell in cells):
            more["95 %"] = [style.plain(_interval(cell)) for cell in cells]
            more["difference"] = [style.plain(_difference(cell)) for cell in cells]
            more["to the first"] = [style.plain(_to_first(cell)) for cell in cells]
            for name in dict.fromkeys(one.words for cell in cells if cell for one in cell.answer.beside):
                more[name] = [style.plain(_beside(cell, name)) for cell in cells]
        blank = [""] * len(labels)
        told = [[*blank, style.plain(name), *texts] for name, texts in more.items() if any(texts)]
        groups.append([[*labels, "paper", *(_printed(cell, marks, style) for cell in cells)], *told])
    return groups


def _printed(cell: Cell | None, marks: dict[int, list[str]], style: Style) -> str:
    if cell is None:
        return ""
    text, own = str(cell.row["printed"]), marks[id(cell)]
    if not cell.impossible and cell.row["std"] != "" and not cell.deviation:
        text += f" ± {cell.row['printed_std']}"
    return (style.strike(text) if cell.impossible else style.plain(text)) + (style.mark(",".join(own)) if own else "")


def _ours(cell: Cell | None, style: Style) -> str:
    if cell is None or not cell.filled:
        return style.plain(HOLE if cell else "")
    text = "0 by n" if cell.too_few else _short(cell, cell.value)
    if cell.spread is not None:
        text += f" ± {_short(cell, cell.spread)} ({len(cell.ours)})"
    return (style.bold(text) if cell.best else style.plain(text)) + (style.mark("!") if cell.flagged else "")


def _interval(cell: Cell | None) -> str:
    if cell is None or not cell.filled or cell.interval is None:
        return ""
    return f"{_short(cell, cell.interval[0])} to {_short(cell, cell.interval[1])}"


def _difference(cell: Cell | None) -> str:
    if cell is None or not cell.filled:
        return ""
    if not cell.in_percent:
        return "other network" if cell.ratio is None else _times(cell.ratio)
    if cell.difference is None:
        return ""
    # Rounding leaves no sign before a difference of nothing.
    return f"{round(cell.difference, 1) + 0.0:+.1f}" + (" out" if cell.inside is False else "")


def _times(ratio: float) -> str:
    return f"x {ratio:.2g}" if ratio < 100 else f"x {ratio:.0f}"


def _to_first(cell: Cell | None) -> str:
    """How many times the first method a time is."""
    if cell is None or cell.multiples is None:
        return ""
    return "{} (paper {})".format(*map(_times, cell.multiples))


def _beside(cell: Cell | None, name: str) -> str:
    if cell is None or not cell.filled:
        return ""
    found = [one.value for one in _other(cell, name)]
    if len(found) < 2:
        return "" if cell.deviation else "".join(_short(cell, value) for value in found)
    if cell.deviation:
        return _short(cell, stdev(found))
    return f"{_short(cell, mean(found))} ± {_short(cell, stdev(found))} ({len(found)})"


def _other(cell: Cell, name: str) -> list[Number]:
    """Another number of each record behind a cell."""
    found = [number(record, one, cell.row) for one in cell.answer.beside if one.words == name for record in cell.records]
    return [one for one in found if one is not None]


def _short(cell: Cell, value: float) -> str:
    return f"{value:.1f}" if cell.in_percent else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def tidy(table: PaperTable) -> list[dict[str, Any]]:
    """Every cell with all facts, a row each; None where there is nothing."""
    columns = dict(zip(table.columns, words.headings(table), strict=True))
    return [_facts(table, row, columns[column], cell) for (row, column), cell in table.cells.items()]


def _facts(table: PaperTable, row: Label, heading: str, cell: Cell) -> dict[str, Any]:
    interval = cell.interval if cell.filled else None
    return {
        "table": table.layout.name,
        "row": ", ".join(words.row_words(table, row)),
        "column": heading,
        **{name: None if cell.row[name] == "" else cell.row[name] for name in CELL},
        "printed": cell.row["printed"],
        "published": cell.printed,
        "published_deviation": None if cell.row["std"] == "" else cell.row["std"],
        "unit": cell.row["unit"],
        "flag": cell.row["flag"] or None,
        "remark": cell.row["remark"] or None,
        "note": cell.row["note"] or None,
        "suite": cell.suite,
        "suite_version": cell.records[0].suite["version"] if cell.records else None,
        "budget": cell.budget,
        "variant": cell.label,
        "evaluation": cell.answer.eval,
        "number": cell.answer.metric,
        "seeds": " ".join(str(record.seed) for record in cell.records),
        "n": cell.ours[0].n if cell.ours else None,
        "data": ", ".join(sorted({record.hashes.get("data", "unknown") for record in cell.records})) or None,
        "ours": cell.value if cell.filled else None,
        "deviation": cell.spread if cell.filled else None,
        "lower": interval[0] if interval else None,
        "upper": interval[1] if interval else None,
        "too_few_draws": cell.too_few,
        "difference": cell.difference,
        "ratio": cell.ratio,
        "multiple_of_first": cell.multiples[0] if cell.multiples else None,
        "published_multiple_of_first": cell.multiples[1] if cell.multiples else None,
        "published_inside": cell.inside,
        "best": cell.best,
        "status": cell.status or None,
        **{one.words: ", ".join(f"{own.value:.6g}" for own in _other(cell, one.words)) or None for one in cell.answer.beside},
        "hole": cell.why or None,
        "command": None if cell.filled else cell.command(table.seeds, table.options),
    }
