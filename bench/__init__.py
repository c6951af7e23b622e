"""The harness: suites, runner, records, tables, plots and the command line. Importing it is cheap; names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from bench import environment

environment.steady_sums()  # before anything is multiplied

_HOMES = {
    "Request": "bench.request",
    "Run": "bench.runner",
    "run": "bench.runner",
    "Store": "bench.store",
    "load_suite": "bench.suites",
    "certify": "defenses.smoothing",
}

__all__ = ["Request", "Run", "Store", "certify", "load_suite", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bench' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
