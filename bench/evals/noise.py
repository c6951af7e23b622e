"""Finished adversarial images under Gaussian noise (KAP, table 2), and, if asked for, attacks that know of the noise.

Images are crafted against the network without noise, and only then judged with noise on the image, behind every convolution, or
on both. What noise repairs there says nothing about an attacker who knows of it: ``eot`` adds that attacker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from attacks import Attack, AttackResult, Eot, Streams
from attacks.oracle import VERDICT_DRAWS, Oracle, decide
from bench.evals.api import Number, Outcome, Piece, Subject, mean_of, share
from bench.evals.convolutions import check_uses_budget, quiet_network
from bench.evals.robust import Attacking
from bench.store import Finding, Metric
from defenses.api import Images
from defenses.kernels import PLACES, with_noise
from defenses.nets import Network

REPAIRED = 0.1
"""Share of the broken images that noise makes right again, above which a finding says what that means."""

FEWEST = 10
"""Broken images of which a share is one."""


class UnderNoise(Attacking):
    """Accuracy with noise in evaluation, of clean and of finished adversarial images, by mean prediction and by single draws.

    Attributes:
        sigma: standard deviation of the noise, in pixels, and in units of the activations.
        places: where noise is added, names of :data:`defenses.kernels.PLACES`.
        repeats: single draws of every image.
        eot: noise draws per gradient of the same attack against the noisy network, at each place; 0: no such attack.
    """

    divides: ClassVar[bool] = False
    """A piece has one place after the other, with all images in each."""

    kind: Literal["noise"] = "noise"
    sigma: Number = Field(gt=0)
    places: tuple[str, ...] = Field(tuple(PLACES), min_length=1)
    repeats: int = Field(10, ge=2)
    eot: int = Field(0, ge=0)

    def check(self, place: str, shape: tuple[int, int, int]) -> None:
        super().check(place, shape)
        check_uses_budget(place, self.attack)
        for name in self.places:
            if name not in PLACES:
                raise ValueError(f"{place}.places: unknown {name!r}; known are {', '.join(PLACES)}")
        if len(set(self.places)) < len(self.places):
            raise ValueError(f"{place}.places: each only once, got {', '.join(self.places)}")

    def pieces(self, subject: Subject) -> list[Piece]:
        quiet_network(subject)
        return [Piece(rows, {"eps": eps}) for eps in (0.0, *self.eps) for rows in self._slices(100)]

    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        return [self._measure(subject, images, piece.setting["eps"]) for subject in subjects]

    def _measure(self, subject: Subject, images: Images, eps: float) -> pd.DataFrame:
        """A row an image, way of making and place: id, label, eps (0 for clean images); made: "clean", "attacked" (against the
        network without noise) or "eot" (against the noisy one); place of the noise; clean_correct, broken and distance as the
        attack tells; whether the network is right by mean prediction (correct) and by single draws (single_0, ...)."""
        net, x, y = quiet_network(subject), images.floats(), images.labels
        if not eps:
            right = decide(net, x) == y
            made = _Made("clean", x, right, ~right, torch.zeros_like(y, dtype=x.dtype))
            return self._judged(subject, images, made, self.places).assign(eps=eps)
        # The same streams, and so the same images, as those of a `robust` evaluation with this attack.
        streams = Streams(subject.seed, self.attack, self.norm, ids=images.ids, device=x.device)
        finished = _Made.by("attacked", self._attack(subject, eps, "none")(net, x, y, streams))
        tables = [self._judged(subject, images, finished, self.places)]
        for place in self._noisy() if self.eot else ():
            known = Eot(self._attack(subject, eps, place), self.eot)
            result = known(with_noise(net, place, self.sigma), x, y, streams.child("eot", place))
            tables.append(self._judged(subject, images, _Made.by("eot", result), [place]))
        return pd.concat(tables, ignore_index=True).assign(eps=eps)

    def _noisy(self) -> list[str]:
        """Places where there is noise."""
        return [place for place in self.places if PLACES[place]]

    def _attack(self, subject: Subject, eps: float, place: str) -> Attack:
        """The attack; unfinished work belongs to the noise that it meets."""
        return self.attacker(eps, subject.scratch / place if subject.scratch else None)

    def _judged(self, subject: Subject, images: Images, made: _Made, places: Sequence[str]) -> pd.DataFrame:
        net, y = quiet_network(subject), images.labels
        tables = []
        for place in places:
            # The same draws for all ways of making: differences between them are not those of luck.
            streams = Streams(subject.seed, "noise", place, ids=images.ids, device=made.x.device)
            noisy = with_noise(net, place, self.sigma)
            columns: dict[str, Any] = {
                "id": images.ids,
                "label": y,
                "clean_correct": made.right,
                "broken": made.broken,
                "distance": made.distance.double(),
                # The attack through the noise has had its verdict, in which an image that was wrong before stays wrong.
                "correct": ~made.broken if made.how == "eot" else decide(noisy, made.x, streams.child("mean")) == y,
                **{f"single_{draw}": own for draw, own in enumerate(singles(noisy, made.x, streams, self.repeats) == y)},
            }
            table = pd.DataFrame({name: column.cpu() for name, column in columns.items()})
            tables.append(table.assign(made=made.how, place=place))
        return pd.concat(tables, ignore_index=True)

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        """In its numbers ``source`` is where noise was while an image was crafted, ``target`` where it is when judged."""
        numbers: list[Metric] = []
        for eps in (0.0, *self.eps):
            for made in ("clean", "attacked", "eot"):
                for place in self.places:
                    part = rows[(rows.eps == eps) & (rows.made == made) & (rows.place == place)]
                    source = {"clean": None, "attacked": "none", "eot": place}[made]
                    if len(part):
                        numbers += self._numbers(part, place, {"eps": eps or None, "source": source, "target": place})
        return Outcome(numbers, [found for eps in self.eps for found in self._repaired(rows[rows.eps == eps], eps)])

    def _numbers(self, part: pd.DataFrame, place: str, facts: dict[str, Any]) -> list[Metric]:
        """Accuracies of one way of making under noise at one place."""
        draws = VERDICT_DRAWS if PLACES[place] else None
        numbers = [share("noisy_accuracy", part.correct, denominator="all", draws=draws, **facts)]
        if facts["source"] and part.clean_correct.any():
            right = part.correct[part.clean_correct]
            numbers.append(share("noisy_accuracy", right, denominator="clean_correct", draws=draws, **facts))
        if PLACES[place]:
            single = part[[f"single_{draw}" for draw in range(self.repeats)]]
            numbers.append(mean_of("noisy_accuracy_single", single.mean(axis=1), denominator="all", draws=1, **facts))
            spread = float(single.mean(axis=0).std(ddof=1))
            name = "noisy_accuracy_single_deviation"
            numbers.append(Metric(metric=name, value=spread, n=self.repeats, denominator="all", draws=1, **facts))
        return numbers

    def _repaired(self, rows: pd.DataFrame, eps: float) -> list[Finding]:
        """What it means that noise repairs, where it does."""
        broken, known = rows[(rows.made == "attacked") & rows.clean_correct & rows.broken], rows[rows.made == "eot"]
        number, places = broken.id.nunique(), self._noisy()
        again = {place: int(broken[broken.place == place].correct.sum()) for place in places}
        if number < FEWEST or max(again.values(), default=0) / number <= REPAIRED:
            return []
        detail = f"noise of {self.sigma:g} makes {_words(again)} of {number} adversarial images at eps {eps:g} right again; "
        stands = {place: int(known[known.place == place].correct.sum()) for place in places if len(known)}
        if stands:
            detail += f"{_words(stands)} of {known.id.nunique()} images stand when the attack knows of the noise"
        else:
            detail += "that says nothing about an attacker who knows of the noise (eot)"
        evidence = {"eps": eps, "broken": number, "repaired": again, "stand_attacked_through_noise": stands}
        return [Finding(kind="noise_repairs", detail=detail, evidence=evidence)]


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} ({place})" for place, count in counts.items())


@dataclass(frozen=True)
class _Made:
    """Images and how they were made.

    Attributes:
        how: "clean", "attacked" or "eot".
        x: (n c h w).
        right, broken: (n) bool, before and after, as the attack tells.
        distance: (n), from the image as it was, in the attack's norm.
    """

    how: str
    x: Tensor
    right: Tensor
    broken: Tensor
    distance: Tensor

    @classmethod
    def by(cls, how: str, result: AttackResult) -> _Made:
        # The contract of attacks: an image that was wrong before costs nothing, any other at least one forward.
        return cls(how, result.x_adv, result.forwards > 0, result.broken, result.distance)


def singles(model: Network, x: Tensor, streams: Streams, repeats: int) -> Tensor:
    """Labels (r n) of images x (n c h w) by each of ``repeats`` single draws; r times the same of a model without noise."""
    noise = streams.child("single") if model.randomized else None
    with torch.inference_mode():
        logits = Oracle(model, noise, repeats)(x, torch.arange(len(x), device=x.device))
    return logits.argmax(-1).expand(repeats, -1)
