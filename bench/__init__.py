"""The harness: suites, runner, records, tables, plots and the command line. Importing it is cheap; names load on first use."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

# MKL rounds a row of a matrix product by how many rows there are, unless asked not to before its first product: without this
# logits of up to 15 images (AVX-512; AVX2: 68) differ from those of the same images in a larger batch.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

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
