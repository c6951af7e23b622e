"""Estimators compared on the same votes: counts per hundred draws, stored once, and every estimator replayed on them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from attacks import Streams
from bench.evals.api import Outcome, Piece, Smoothing, Subject, share
from bench.evals.certified import Step, check_radii
from bench.store import Metric
from defenses.api import Images
from defenses.bounds import wald
from defenses.estimators import ESTIMATORS, FUTILITY, WHOLE, Estimator, Phases, Question, grid_up_to, replay
from defenses.numerics import NUMERICS, under
from defenses.voting import BLOCK, Voting

RULES: dict[str, Estimator] = {**ESTIMATORS, "phases": Phases((0.01, 0.1, 0.89))}
"""What is replayed. The phases' fresh draws must fit into the stored ones, so the last phase is smaller than the paper's; all
phases count the one selected class, where certification selects anew."""


class Votes(Smoothing):
    """Votes of the smoothed classifier for the selected class, and what every estimator makes of them.

    Attributes:
        radii: a step or a list, l2 in pixels.
        n: draws, a multiple of 100.
        numerics: a name of :data:`defenses.numerics.NUMERICS`.
    """

    kind: Literal["votes"] = "votes"
    radii: Step | tuple[float, ...]
    n: int = Field(100_000, ge=BLOCK, multiple_of=BLOCK)
    numerics: str | None = None

    def check(self, place: str, shape: tuple[int, int, int]) -> None:
        if self.numerics is not None and self.numerics not in NUMERICS:
            raise ValueError(f"{place}.numerics: unknown {self.numerics!r}; known are {', '.join(NUMERICS)}")
        check_radii(place, self.radii)

    def grid(self, subject: Subject) -> tuple[float, ...]:
        """The radii that are decided: up to what the grid estimator can reach."""
        top = ESTIMATORS["grid"].ceiling(Question(self.noise(subject), self.alpha, self.n))
        return grid_up_to(self.radii.step, top) if isinstance(self.radii, Step) else self.radii

    def resolved(self, subject: Subject) -> dict[str, Any]:
        given = {name: value for name, value in self.model_dump(mode="json").items() if value is not None}
        return {**given, "sigma": self.noise(subject), "radii": list(self.grid(subject))}

    def pieces(self, subject: Subject) -> list[Piece]:
        self.noise(subject)
        return [Piece(rows, {}) for rows in self._slices(2)]

    def company(self, subject: Subject) -> Hashable | None:
        return "votes", self.noise(subject)

    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        batch = 100 if images.pixels.device.type == "cpu" else 1000
        voters = [under(subject.model, self.numerics or "float32", batch) for subject in subjects]
        voting = Voting(voters, images.floats(), self.noise(subjects[0]), batch)
        # The noise of a certificate: what is replayed is what certification would have drawn.
        streams = Streams(subjects[0].seed, "certified", ids=images.ids, device=images.pixels.device)
        chosen = [votes.argmax(1) for votes in voting.count(streams.child("selection"), self.n0)]
        everybody = voting.evaluations.new_ones(voting.evaluations.shape).bool()
        votes = np.zeros((len(subjects), len(images), self.n // BLOCK), np.uint8)
        for pick, block, labels in voting.ballots(streams.child("estimation"), everybody, (0, self.n)):
            for base, label in enumerate(chosen):
                votes[base, pick.cpu(), block.cpu()] = (labels[base] == label[pick].unsqueeze(1)).sum(1).cpu()
        chance = streams.child("chance").uniform((1,))[:, 0].double()
        return [
            pd.DataFrame(
                {
                    "id": images.ids.cpu(),
                    "label": images.labels.cpu(),
                    "selected": chosen[base].cpu(),
                    "chance": chance.cpu(),
                    "evaluations": voting.evaluations[base].cpu(),
                    "votes": list(votes[base]),
                }
            )
            for base in range(len(subjects))
        ]

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        votes = np.stack(rows.votes.to_list())
        grid, numbers = self.grid(subject), []
        for name, rule in RULES.items():
            for radii in [(radius,) for radius in grid] if rule.preset else [grid]:
                question = Question(self.noise(subject), self.alpha, self.n, () if name in WHOLE else radii)
                numbers += self._replayed(name, rows, votes, question, radii)
        numbers += self._limits(rows, votes, subject)
        return Outcome(numbers, [])

    def _replayed(
        self, name: str, rows: pd.DataFrame, votes: np.ndarray, question: Question, grid: tuple[float, ...]
    ) -> list[Metric]:
        """Certified accuracies, draws, and the factor of draws saved, of one estimator."""
        found, draws = replay(RULES[name], question, votes, rows.chance.to_numpy())
        right = (rows.selected == rows.label).to_numpy() & ~np.isnan(found)
        radii = np.where(right, found, -1.0)
        numbers = [share("certified_accuracy", radii >= radius, radius=radius, estimator=name) for radius in grid]
        at = grid[0] if RULES[name].preset else None
        spent, facts = float(draws.mean()), {"n": len(rows), "radius": at, "estimator": name}
        numbers.append(Metric(metric="draws_per_image", value=spent, unit="draws", **facts))  # type: ignore[arg-type]
        numbers.append(Metric(metric="draws_saved", value=self.n / spent, unit="factor", **facts))  # type: ignore[arg-type]
        if name in WHOLE:
            average = float(np.where(right, found, 0.0).mean())
            numbers.append(Metric(metric="acr", value=average, n=len(rows), unit="l2", estimator=name))
        return numbers

    def _limits(self, rows: pd.DataFrame, votes: np.ndarray, subject: Subject) -> list[Metric]:
        """What an oracle would need at each radius, that knew each image's probability (here its frequency in all n draws)."""
        p = (votes.sum(1, dtype=np.int64) + 0.5) / (self.n + 1)
        question = Question(self.noise(subject), self.alpha, self.n, self.grid(subject))
        numbers = []
        for radius, wanted in zip(question.radii, question.wanted, strict=True):
            draws = float(np.clip(wald(p, wanted, self.alpha, FUTILITY), 1, self.n).mean())
            facts = {"n": len(rows), "radius": radius, "estimator": "oracle"}
            numbers.append(Metric(metric="draws_per_image", value=draws, unit="draws", **facts))  # type: ignore[arg-type]
            numbers.append(Metric(metric="draws_saved", value=self.n / draws, unit="factor", **facts))  # type: ignore[arg-type]
        return numbers
