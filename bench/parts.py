"""Trained networks and other parts, keyed by content: made once, shared by whoever needs them, continued after a kill."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from bench.partial import write_atomic
from bench.progress import Progress, Report
from defenses.api import Part, Task, Weights


class PartStore:
    """Parts of one task in a folder: ``<key>.safetensors`` with a ``<key>.json`` log beside it.

    Attributes:
        events: what was made and what was read, in order; for logs and tests.
    """

    def __init__(self, folder: Path, task: Task, progress: Progress) -> None:
        self.folder = folder
        self.task = task
        self.progress = progress
        self.events: list[tuple[str, str]] = []
        self._used: dict[str, None] = {}

    def get(self, part: Part) -> Weights:
        """The weights of a part on the task's device, made now if they do not exist."""
        self._used[part.key(self.task)] = None
        return self._get(part)

    def epoch_seconds(self) -> float | None:
        """Mean seconds of a training epoch, summed over all that was got, by their logs; None if one has no log of epochs."""
        total = 0.0
        for key in self._used:
            seconds = [line["seconds"] for line in json.loads((self.folder / f"{key}.json").read_text())["log"]]
            if not seconds:
                return None
            total += sum(seconds) / len(seconds)
        return total or None

    def ended(self) -> list[str]:
        """Of all that was got, what ended before its recipe did: who, when and why."""
        notes = [json.loads((self.folder / f"{key}.json").read_text()) for key in self._used]
        return [note["ended"] for note in notes if "ended" in note]

    def _get(self, part: Part) -> Weights:
        key = part.key(self.task)
        path = self.folder / f"{key}.safetensors"
        weights = self._read(path)
        if weights is not None:
            self.events.append(("read", f"{part.role} {part.member} {key}"))
            return weights
        needs = [self._get(need) for need in part.needs]
        began = time.perf_counter()
        with self.progress.step(f"{part.role} {part.member} (seed {part.seed})") as report:
            workshop = self.workshop(key, report)
            weights = part.make(self.task, needs, workshop)
        note = {"key": key, "part": part.identity(self.task), "log": workshop.log, "seconds": time.perf_counter() - began}
        if workshop.ended:
            epoch = workshop.log[-1]["epoch"]
            when = f"ended after epoch {epoch}, with the weights of epoch {workshop.log[-1].get('kept', epoch)}"
            ended = f"{part.role} {part.member} (seed {part.seed}) {when}: {workshop.ended}"
            note["ended"] = ended
            self.progress.say(ended)
        write_atomic(path.with_suffix(".json"), (json.dumps(note, indent=1, allow_nan=False) + "\n").encode())
        write_atomic(path, save({name: tensor.contiguous().cpu() for name, tensor in weights.items()}))
        workshop.clear()
        self.made(part, key)
        return weights

    def workshop(self, key: str, report: Report) -> DiskWorkshop:
        """Where a part is made."""
        return DiskWorkshop(self, self.folder / f"{key}.checkpoint", report)

    def read(self, path: Path) -> tuple[Weights, dict[str, str]] | None:
        """Tensors and metadata of a safetensors file; None if it does not exist or is damaged (then it is moved aside)."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            weights = load(content)
        except SafetensorError:
            path.rename(path.with_name(path.name + ".corrupt"))
            self.progress.say(f"{path.name} is damaged; it was moved aside and is made again")
            return None
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__", {})
        return {name: tensor.to(self.task.device) for name, tensor in weights.items()}, metadata

    def _read(self, path: Path) -> Weights | None:
        found = self.read(path)
        return found[0] if found else None

    def made(self, part: Part, key: str) -> None:
        """Note that a part was made and is stored."""
        self.events.append(("made", f"{part.role} {part.member} {key}"))
        line = json.dumps({"event": "made", "role": part.role, "member": part.member, "seed": part.seed, "key": key})
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(line + "\n")


class DiskWorkshop:
    """A part's checkpoint on disk and its voice in the progress display (:class:`defenses.api.Workshop`)."""

    def __init__(self, store: PartStore, path: Path, report: Report) -> None:
        self._store = store
        self._path = path
        self._report = report
        self.log: list[dict[str, float]] = []
        self.ended = ""

    def load(self) -> tuple[Weights, dict[str, Any]] | None:
        found = self._store.read(self._path)
        if found is None:
            return None
        state = json.loads(found[1]["state"])
        self.log = state.get("log", [])
        self.ended = state.get("ended", "")
        return found[0], state

    def save(self, weights: Weights, state: dict[str, Any]) -> None:
        self.log = list(state.get("log", []))
        self.ended = state.get("ended", "")
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
        write_atomic(self._path, save(tensors, {"state": json.dumps(state)}))

    def report(self, done: int, total: int, facts: dict[str, float]) -> None:
        self._report(done, total, facts)

    def clear(self) -> None:
        """Remove the checkpoint of a finished part."""
        self._path.unlink(missing_ok=True)
