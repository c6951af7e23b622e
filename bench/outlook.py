"""What models need before it is made: a defense is fitted to placeholders, and what it asks for on the way is noted."""

from __future__ import annotations

from pathlib import Path

from bench.parts import PartStore
from bench.progress import Progress
from bench.registry import Variant
from defenses.api import Part, Task, Weights


class Outlook(PartStore):
    """Parts that exist are read; of others the tensors' shapes are told, as far as they can be, and the parts noted.

    Attributes:
        absent: parts that do not exist, with those they need, by key.
    """

    def __init__(self, folder: Path, task: Task, progress: Progress) -> None:
        super().__init__(folder, task, progress)
        self.absent: dict[str, Part] = {}

    def _get(self, part: Part) -> Weights:
        weights = self._read(self.folder / f"{part.key(self.task)}.safetensors")
        if weights is not None:
            return weights
        self._note(part)
        outline = part.outline(self.task)
        if outline is None:
            raise LookupError(f"{part.role} {part.member} is not made, and nothing can be said of it before")
        return outline

    def _note(self, part: Part) -> None:
        """Note a part that does not exist, after what it needs."""
        key = part.key(self.task)
        if key in self.absent or (self.folder / f"{key}.safetensors").exists():
            return
        for need in part.needs:
            self._note(need)
        self.absent[key] = part


def absent(variant: Variant, seed: int, task: Task, folder: Path) -> dict[str, Part]:
    """Parts that the variant lacks, by key, needs first, as far as can be told before they are made; empty if it can be fitted.

    Whatever goes wrong on the way is left to the fitting itself, which tells.
    """
    outlook = Outlook(folder, task, Progress(None))
    try:
        if not variant.defense.unsuited(task):
            variant.defense.fit(variant.defense.build(task), task, outlook, seed)
    except Exception:  # placeholders fit as far as their shapes; a defense that looks at their numbers may stumble
        pass
    return outlook.absent
