"""Figures of stored records for a paper, one file a kind."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure

from bench.plots.certificates import certified, estimators
from bench.plots.robust import robust
from bench.plots.saliency import saliency
from bench.plots.training import training
from bench.plots.transfer import transfer
from bench.plots.variance import variance
from bench.store import Store

__all__ = ["certified", "draw", "estimators", "robust", "saliency", "training", "transfer", "variance"]


def draw(store: Store, suite: str, out: Path) -> list[Path]:
    """Draw every figure that the suite's records allow.

    Returns:
        the files written: ``<figure>_<budget>.pdf`` and ``.png`` (``certified.png`` where there is one budget).
    """
    records = [record for record in store.records(suite) if record.status == "success"]
    records.sort(key=lambda record: record.suite["budget"])
    figures: dict[str, Figure | None] = {"training": training(store.root / suite / "parts")}
    budgets = {record.suite["budget"] for record in records}
    for budget, group in groupby(records, key=lambda record: record.suite["budget"]):
        chosen, suffix = list(group), f"_{budget}" if len(budgets) > 1 else ""
        figures[f"certified{suffix}"] = certified(chosen, store)
        figures[f"estimators{suffix}"] = estimators(chosen)
        figures[f"robust{suffix}"] = robust(chosen)
        figures[f"variance{suffix}"] = variance(chosen)
        pages = saliency(chosen, store)
        for number, page in enumerate(pages, start=1):
            figures[f"saliency{suffix}_{number}" if len(pages) > 1 else f"saliency{suffix}"] = page
        figures[f"transfer{suffix}"] = transfer(chosen)
    files = []
    for name, figure in figures.items():
        if figure is not None:
            out.mkdir(parents=True, exist_ok=True)
            for kind in ("pdf", "png"):
                files.append(out / f"{name}.{kind}")
                figure.savefig(files[-1], dpi=200)
    return sorted(files)
