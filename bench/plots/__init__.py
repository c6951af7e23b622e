"""Figures of stored records for a paper, one file a kind."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure

from bench.plots.activations import activations, histograms
from bench.plots.certificates import certified, estimators
from bench.plots.convergence import convergence, gradients
from bench.plots.kernels import kernels
from bench.plots.noise import noise
from bench.plots.robust import robust
from bench.plots.saliency import saliency
from bench.plots.style import save, styles_of
from bench.plots.training import training
from bench.plots.transfer import differences, transfer
from bench.plots.variance import variance
from bench.store import Store

__all__ = [
    "activations", "certified", "convergence", "differences", "draw", "estimators", "gradients", "histograms", "kernels",
    "noise", "robust", "saliency", "training", "transfer", "variance",
]  # fmt: skip


def draw(store: Store, suite: str, out: Path) -> list[Path]:
    """Draw every figure that the suite's records allow.

    Returns:
        the files written: ``<figure>_<budget>.pdf`` and ``.png`` (``certified.png`` where there is one budget).
    """
    records = [record for record in store.records(suite) if record.status == "success"]
    records.sort(key=lambda record: record.suite["budget"])
    figures: dict[str, Figure | None] = {"training": training(store.root / suite / "parts")}
    styles = styles_of(record.defense["variant"] for record in records)  # a defense looks the same in every figure
    budgets = {record.suite["budget"] for record in records}
    for budget, group in groupby(records, key=lambda record: record.suite["budget"]):
        chosen, suffix = list(group), f"_{budget}" if len(budgets) > 1 else ""
        figures[f"certified{suffix}"] = certified(chosen, store, styles)
        figures[f"estimators{suffix}"] = estimators(chosen)
        figures[f"robust{suffix}"] = robust(chosen, styles)
        figures[f"convergence{suffix}"] = convergence(chosen, styles)
        figures[f"gradients{suffix}"] = gradients(chosen, styles)
        figures[f"variance{suffix}"] = variance(chosen)
        figures[f"transfer{suffix}"] = transfer(chosen)
        figures[f"noise{suffix}"] = noise(chosen)
        figures[f"activations{suffix}"] = activations(chosen)
        for name, pages in {"saliency": saliency, "activation_histograms": histograms, "kernels": kernels}.items():
            figures |= _numbered(f"{name}{suffix}", pages(chosen, store))
    return _write(figures, out)


def against(store: Store, suite: str, budget: str, variants: tuple[str, str], out: Path) -> list[Path]:
    """Draw what of two variants is best seen as a difference: transfer between their members, as ``differences``.

    Returns:
        the files written, as :func:`draw`; none where the records allow no figure.
    """
    records = [r for r in store.records(suite) if r.status == "success" and r.suite["budget"] == budget]
    one, other = ([r for r in records if r.defense["variant"] == variant] for variant in variants)
    return _write({"differences": differences(one, other)}, out)


def _write(figures: dict[str, Figure | None], out: Path) -> list[Path]:
    files = []
    for name, figure in figures.items():
        if figure is not None:
            out.mkdir(parents=True, exist_ok=True)
            for kind in ("pdf", "png"):
                files.append(out / f"{name}.{kind}")
                save(figure, files[-1])
    return sorted(files)


def _numbered(name: str, pages: list[Figure]) -> dict[str, Figure]:
    """Pages by name, with numbers where there are several."""
    return {f"{name}_{number}" if len(pages) > 1 else name: page for number, page in enumerate(pages, start=1)}
