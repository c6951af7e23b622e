"""What a run and a comparison of engines print at their end."""

from __future__ import annotations

from pathlib import Path

from tabulate import tabulate

from bench import engines, plots, tables
from bench.store import Record, Store


def finished(root: Path, suite: str, records: list[Record]) -> None:
    """Summary, failures, and where everything is, after a run."""
    store = Store(root)
    for table in tables.summaries(store, suite):
        print(f"\n{tables.render(table, 'text')}\n")
    facts = {record.defense["variant"]: record.facts for record in records if record.facts}
    for variant, known in facts.items():
        print(f"{variant}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in known.items()))
    for record in records:
        if record.status == "skipped":
            print(f"skipped: {record.defense['variant']} {record.eval['name']}: {record.error}")
        if record.status == "error":
            last = (record.error or "").strip().splitlines()[-1]
            print(f"failed: {record.defense['variant']} {record.eval['name']} (seed {record.seed}): {last}")
    drawn = plots.draw(store, suite, root / suite / "plots")
    print(f"\nrecords: {root / suite}\nplots:   {', '.join(str(path) for path in drawn if path.suffix == '.png')}")


def agreement(data: Path | None) -> bool:
    """Print how engines agree; whether all do."""
    table = engines.agreement(data)
    rows = []
    for line in table:
        mark = "--" if line.error else "ok" if line.agrees else "BAD"
        numbers = (line.broken, line.ours, line.only_engine, line.only_ours, line.moved, f"{line.seconds:.1f}")
        rows.append(
            (mark, line.attack, line.norm, line.engine, *(numbers if not line.error else ("", "", "", "", "", line.error)))
        )
    headers = [
        "",
        "attack",
        "norm",
        "engine",
        f"broken of {engines.IMAGES}",
        "by ours",
        "only engine",
        "only ours",
        "moved",
        "seconds",
    ]
    print(tabulate(rows, headers, disable_numparse=True))
    return all(line.agrees or line.error for line in table)
