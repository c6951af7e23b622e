"""What a long attack has finished, on disk: small files that are only added, in a folder that belongs to one question."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks.oracle import Meter, Oracle
from attacks.streams import Streams

if TYPE_CHECKING:
    from attacks.autoattack import AutoAttack, Plan


class StateError(ValueError):
    """A folder holds work on another question; names what differs."""


def identity(attack: AutoAttack, plan: Plan, oracle: Oracle, x: Tensor, y: Tensor, streams: Streams) -> dict[str, Any]:
    """Everything that the answer depends on.

    Raises:
        StateError: if the model is a plain function, whose weights nobody can name.
    """
    if not isinstance(oracle.model, nn.Module):
        raise StateError("a state names the weights it belongs to: pass the model as a torch.nn.Module")
    model = hashlib.sha256(repr(oracle.model).encode())
    for name, tensor in sorted(oracle.model.state_dict().items()):
        model.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        model.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    data = hashlib.sha256(repr((streams.ids, tuple(x.shape), y.tolist())).encode())
    data.update(x.cpu().contiguous().numpy().tobytes())
    return {
        "weights": model.hexdigest(),
        "data": data.hexdigest(),
        "norm": attack.norm,
        "eps": attack.eps,
        "version": plan.version,
        "components": [f"{name}: {component}" for name, component in plan.components],
        "seed": streams.seed,
        "purpose": [str(word) for word in streams.purpose],
        "draws": oracle.cost if oracle.randomized else 0,
        "average": oracle.average,
        "queries": oracle.meter.queries if oracle.meter else None,
        "dtype": str(x.dtype),
        "device": x.device.type,
    }


class State:
    """A folder with the finished images of each component.

    Args:
        folder: made if it is not there.
        identity: what the work belongs to.

    Raises:
        StateError: if the folder belongs to something else; names every field that differs.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / "identity.json"
        mine = json.loads(json.dumps(identity))
        if not note.exists():
            _write(note, json.dumps(mine, indent=1).encode())
        theirs = json.loads(note.read_text())
        wrong = [name for name in mine if theirs.get(name) != mine[name]]
        if wrong:
            differences = "; ".join(f"{name} was {theirs.get(name)!r}, now {mine[name]!r}" for name in wrong)
            raise StateError(f"{self.folder} holds work on another question: {differences}; give another folder, or remove it")

    def keep(self, number: int, rows: Tensor, oracle: Oracle, x_adv: Tensor, broken_by: Tensor) -> None:
        """Store what component ``number`` did to images ``rows``: points, verdicts, and all that they have cost so far."""
        _meter(oracle, rows)[0].check()  # what NaN decided is not worth keeping
        content = io.BytesIO()
        spent = _spent(oracle, rows)
        points, verdicts = x_adv[rows].cpu().numpy(), broken_by[rows].cpu().numpy()
        np.savez(content, rows=rows.cpu().numpy(), x_adv=points, broken_by=verdicts, spent=spent.cpu().numpy())
        _write(self.folder / f"{number:02d}-{int(rows.min()):07d}-{len(rows)}.npz", content.getvalue())

    def load(self, number: int, oracle: Oracle, x_adv: Tensor, broken_by: Tensor) -> Tensor:
        """Put back what component ``number`` did; returns the images that it has finished."""
        done = [broken_by[:0]]
        for path in sorted(self.folder.glob(f"{number:02d}-*.npz")):
            with np.load(path) as file:
                arrays = {name: torch.from_numpy(file[name]).to(x_adv.device) for name in file.files}
            rows = arrays["rows"]
            x_adv[rows], broken_by[rows] = arrays["x_adv"], arrays["broken_by"]
            _restore(oracle, rows, arrays["spent"])
            done.append(rows)
        return torch.cat(done)


def _meter(oracle: Oracle, rows: Tensor) -> tuple[Meter, Tensor]:
    if oracle.meter is None:
        raise StateError("a state needs a metered search: call the attack, not its run")
    return oracle.meter, rows if oracle.places is None else oracle.places[rows]


def _spent(oracle: Oracle, rows: Tensor) -> Tensor:
    meter, places = _meter(oracle, rows)
    return torch.stack([meter.forwards[places], meter.backwards[places], meter.zeros[places]])


def _restore(oracle: Oracle, rows: Tensor, spent: Tensor) -> None:
    meter, places = _meter(oracle, rows)
    meter.forwards[places], meter.backwards[places], meter.zeros[places] = spent


def _write(path: Path, content: bytes) -> None:
    """Write to a temporary name, sync, rename: a kill leaves the whole file or none."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
