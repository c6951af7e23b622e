"""How far adversarial images crafted on one network fool the others, among members and ensemble (methods 9.3 to 9.5).

As with AutoAttack, nothing is crafted on an image that the source gets wrong: it stays as it is, which counts where it is among
the denominator's, so in ``all``, ``tsr_all`` and the success on an ensemble, and lowers those rates where members are weak.

Known differences from papers: an image's point is the same for all targets, the one that costs the source most over all steps
and restarts, where DVERGE asks every target about every restart; EDLCM's TSR is a mean over images, where it prints a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from attacks import AllSteps, Attack, Streams
from attacks.all_steps import climbs
from attacks.oracle import decide
from bench.evals.api import Outcome, Piece, Skipped, Subject, mean_of, refuse_nearest, share
from bench.evals.robust import Attacking
from bench.store import Metric
from bench.verdicts import ENSEMBLE
from defenses.api import Classifier, Images

SUMMED = "percent, sum over targets"
"""Unit of TSR: between 0 and 100 (members - 1)."""


class Transfer(Attacking):
    """Images crafted on every member and on the ensemble, each judged by every member and by the ensemble.

    Attributes:
        early_stop: whether a search ends as soon as its source is wrong. Its point then lies just beyond the source's boundary,
            and fools few others; published transfer attacks take all their steps, and so do gradient attacks (fgsm, r_fgsm,
            bim, pgd, mim) here by default. Other attacks end as they do: giving it for them is an error.
    """

    kind: Literal["transfer"] = "transfer"
    early_stop: bool | None = None

    def check(self, place: str, shape: tuple[int, int, int]) -> None:
        super().check(place, shape)
        refuse_nearest(place, self.attack, "which is no test of another network", "pgd")
        if self.early_stop is not None and not climbs(self._plain(self.eps[0])):
            raise ValueError(
                f"{place}.early_stop: {self.attack} ends its search in its own way; only fgsm, r_fgsm, bim, pgd and mim "
                "of the native engine can be told when to stop"
            )

    def attacker(self, eps: float, scratch: Path | None = None) -> Attack:
        """The attack at one budget, made to take all its steps unless early stops are asked for."""
        attack = super().attacker(eps, scratch)
        return AllSteps(attack) if climbs(attack) and not self.early_stop else attack

    def resolved(self, subject: Subject) -> dict[str, Any]:
        stops = {"early_stop": bool(self.early_stop)} if climbs(self._plain(self.eps[0])) else {}
        return {**super().resolved(subject), **stops}

    def pieces(self, subject: Subject) -> list[Piece]:
        if len(subject.model.members) < 2:
            raise Skipped("transfer is between two members or more, this is one network")
        if any(network.randomized for network in networks(subject.model).values()):
            raise Skipped("the members draw noise, so that what fools one of them once need not do so again")
        return [Piece(rows, {"eps": eps}) for eps in self.eps for rows in self._slices(100)]

    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        return [self._measure(subject, images, piece.setting["eps"]) for subject in subjects]

    def _measure(self, subject: Subject, images: Images, eps: float) -> pd.DataFrame:
        """Rows: id, label, eps, correct_<network> on the images as they are, wrong_<source>_<target>."""
        x, y, known = images.floats(), images.labels, networks(subject.model)
        columns: dict[str, Any] = {"id": images.ids.cpu(), "label": y.cpu(), "eps": eps}
        columns |= {f"correct_{name}": (decide(network, x) == y).cpu() for name, network in known.items()}
        for source, network in known.items():
            purpose = ("transfer", self.attack, self.norm, source)
            streams = Streams(subject.seed, *purpose, ids=images.ids, device=images.pixels.device)
            # A cascade's unfinished work belongs to one network.
            attack = self.attacker(eps, subject.scratch / source if subject.scratch else None)
            x_adv = attack(network, x, y, streams).x_adv
            columns |= {f"wrong_{source}_{target}": (decide(judge, x_adv) != y).cpu() for target, judge in known.items()}
        return pd.DataFrame(columns)

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        names, numbers = list(networks(subject.model)), []
        for eps in self.eps:
            part = rows[rows.eps == eps]
            numbers += [*matrix(part, names, eps), *averages(part, names, eps)]
        once = rows[rows.eps == self.eps[0]]
        errors = np.mean([~once[f"correct_{member}"].to_numpy(bool) for member in names[:-1]], axis=0)
        numbers.append(mean_of("tsr_floor", 100 * (len(names) - 2) * errors, unit=SUMMED, denominator="all"))
        return Outcome(numbers, [])


def networks(model: Classifier) -> dict[str, Classifier]:
    """Sources and targets by name, in their order: members "0", "1", ..., then :data:`ENSEMBLE`."""
    return {**{str(place): member for place, member in enumerate(model.members)}, ENSEMBLE: model}


def matrix(part: pd.DataFrame, names: Sequence[str], eps: float) -> list[Metric]:
    """Share of images crafted on each source that each target gets wrong, over four denominators; none where one is empty."""
    everybody = _all_correct(part, names)
    found = []
    for source, target in product(names, names):
        wrong, right = part[f"wrong_{source}_{target}"].to_numpy(bool), part[f"correct_{source}"].to_numpy(bool)
        groups = {
            "all": np.ones(len(part), bool),
            "source_correct": right,
            "all_correct": everybody,
            "successful_at_source": right & part[f"wrong_{source}_{source}"].to_numpy(bool),
        }
        for denominator, group in groups.items():
            if group.any():
                facts = {"eps": eps, "source": source, "target": target, "denominator": denominator}
                found.append(share("transfer_rate", wrong[group], **facts))
    return found


def averages(part: pd.DataFrame, names: Sequence[str], eps: float) -> list[Metric]:
    """TSR and attack success rates at one eps, means over images with bootstrap intervals; none where no image counts.

    tsr, tsr_all: mean over sources of the sum over other members of the share that they get wrong, in :data:`SUMMED`, of images
    that all members get right, and of all images.
    tsr_normalised: tsr as a share of its largest value, which is the mean transfer rate between two members.
    asr_members, asr_ensemble: share of the images that the ensemble gets right which it gets wrong when they are crafted on a
    member, mean over members (CEAR, table 3), and when they are crafted on itself.
    """
    members, right = names[:-1], part[f"correct_{ENSEMBLE}"].to_numpy(bool)
    between = np.mean([part[f"wrong_{i}_{j}"] for i, j in permutations(members, 2)], axis=0)
    largest, everybody = 100 * (len(members) - 1), _all_correct(part, names)
    found = [mean_of("tsr_all", largest * between, unit=SUMMED, eps=eps, denominator="all")]
    if everybody.any():
        facts: dict[str, Any] = {"eps": eps, "denominator": "all_correct"}
        found.append(mean_of("tsr_normalised", between[everybody], **facts))
        found.append(mean_of("tsr", largest * between[everybody], unit=SUMMED, **facts))
    if right.any():
        facts = {"eps": eps, "target": ENSEMBLE, "denominator": "ensemble_correct"}
        passed = np.mean([part[f"wrong_{member}_{ENSEMBLE}"] for member in members], axis=0)
        found.append(mean_of("asr_members", passed[right], **facts))
        itself = part[f"wrong_{ENSEMBLE}_{ENSEMBLE}"].to_numpy(bool)
        found.append(share("asr_ensemble", itself[right], source=ENSEMBLE, **facts))
    return found


def _all_correct(part: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Images that every member gets right, bool (n)."""
    return np.logical_and.reduce([part[f"correct_{member}"].to_numpy(bool) for member in names[:-1]])
