"""What comes from a stranger is read and never executed, and its names stay inside its folder."""

from __future__ import annotations

import ast
import json
import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError
from test_store import record

from bench import audit, diagnose, site, tables, verify
from bench.arrays import published
from bench.request import Request
from bench.runner import Run
from bench.store import Store

ROOT = Path(__file__).parent.parent

EVIL = """
import os
os.mkdir({marker!r})
from defenses.randsmooth import randsmooth as evil
"""


class Trap:
    """A pickle that makes a folder when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return __import__("os").mkdir, (str(self.marker),)


@pytest.fixture
def stranger(tiny: Path) -> tuple[Store, Path]:
    """A run folder whose records name a file that would leave a mark if it were executed, beside pickles that would, too."""
    runs, marker = tiny.parent / "runs", tiny.parent / "executed"
    Run(Request(defense="randsmooth", suite=str(tiny), runs=runs, device="cpu")).execute()
    evil = runs / "tiny/evil.py"
    evil.write_text(EVIL.format(marker=str(marker)))
    store = Store(runs)
    for found in store.records():
        other = found.model_dump()
        other["defense"] |= {"name": str(evil), "variant": f"{evil}:evil"}
        other["eval"]["fields"] = {**other["eval"]["fields"], "sources": [f"{evil}:evil"]}
        place = store.path(found)
        store.write_rows(type(found)(**other), pd.read_parquet(place.with_suffix(".parquet")))
        store.write(type(found)(**other))
    for name in ("parts/0123456789abcdef.safetensors", "randsmooth/quick/seed0/clean.pkl", "sitecustomize.py"):
        (runs / "tiny" / name).write_bytes(pickle.dumps(Trap(marker)))
    return store, marker


def test_a_stranger_s_folder_is_read_without_executing_anything_of_it(stranger: tuple[Store, Path], tmp_path: Path) -> None:
    store, marker = stranger
    text = tables.render_all(tables.summaries(store, None), "text")
    assert "evil.py" in text and "randsmooth" in text
    assert audit.audit([store.root])
    assert site.write([store], tmp_path / "board").exists()
    assert diagnose.read(store.root / "tiny")
    reports = verify.verify(store.root)
    assert any("not registered here" in why for report in reports for why in report.not_checked.values())
    assert not marker.exists()


@pytest.mark.parametrize(
    ("place", "name"),
    [("suite.name", "../elsewhere"), ("suite.name", ".."), ("suite.budget", "a/b"), ("defense.variant", "../.."),
     ("eval.name", "/etc/passwd"), ("eval.name", "a\0b"), ("eval.name", "")],
)  # fmt: skip
def test_names_of_records_cannot_leave_the_run_folder(place: str, name: str, tmp_path: Path) -> None:
    table, key = place.split(".")
    good = record()
    with pytest.raises(ValidationError, match="names no file of a run folder"):
        record(**{table: {**getattr(good, table), key: name}})
    store = Store(tmp_path / "runs")
    path = store.write(good)
    told = json.loads(path.read_text())
    told[table][key] = name
    path.write_text(json.dumps(told))
    assert store.records() == [] and "names no file of a run folder" in store.problems[0]
    assert store.find(good) is None and path.with_suffix(".json.corrupt").exists()


def test_a_slash_in_a_variant_stays_a_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.write(record(defense={"name": "x", "variant": "x@architectures=torchvision/resnet18", "fields": {}}))
    assert path.relative_to(tmp_path).parts[1] == "x@architectures=torchvision_resnet18"


def test_a_published_pickle_is_read_as_arrays_alone(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    with pytest.raises(pickle.UnpicklingError, match=r"posix\.mkdir, which no array is made of"):
        published(pickle.dumps({"data": Trap(trap)}))
    assert not trap.exists()


LIBRARIES = {"pickle", "marshal", "shelve", "joblib", "cloudpickle", "dill", "np", "torch", "pd", "yaml", "hub"}
READERS = {"load", "loads", "read_pickle", "Unpickler", "unsafe_load", "load_state_dict_from_url"}
KNOWN = {
    ("bench/arrays.py", "np.load"),  # allow_pickle=False
    ("bench/arrays.py", "pickle.Unpickler"),  # arrays alone
    ("bench/executors.py", "pickle.loads"),  # of what was pickled in the same line
    ("bench/processes.py", "pickle.loads"),  # over the line between driver and worker
    ("attacks/state.py", "np.load"),  # without pickles, by NumPy's default
}


def calls(tree: ast.AST) -> list[str]:
    """Calls in a file that could read something executable."""
    found = []
    for node in ast.walk(tree):
        function = node.func if isinstance(node, ast.Call) else None
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.attr in READERS:
            found.append(f"{function.value.id}.{function.attr}")
        if isinstance(function, ast.Name) and function.id in {"eval", "exec", "compile", "__import__"}:
            found.append(function.id)
        if isinstance(node, ast.ClassDef):
            found += [ast.unparse(base) for base in node.bases if "Unpickler" in ast.unparse(base)]
    return [call for call in found if "." not in call or call.split(".")[0] in LIBRARIES]


def test_nothing_that_could_be_executed_is_read_from_disk() -> None:
    files = [path for package in ("attacks", "bench", "defenses") for path in sorted((ROOT / package).rglob("*.py"))]
    found = {(path.relative_to(ROOT).as_posix(), call) for path in files for call in calls(ast.parse(path.read_text()))}
    assert found == KNOWN
    assert "allow_pickle=True" not in "".join(path.read_text() for path in files)
