"""Accuracy under adversarial images of other models, image by image the worst of all (methods 9.6).

The others are variants of the suite, trained with other seeds than the subject; none may share weights with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import Field

from attacks import AllSteps, Attack, Streams
from attacks.all_steps import climbs
from attacks.losses import LOSSES
from attacks.oracle import decide
from bench.evals.api import Outcome, Piece, Subject, refuse_nearest, share
from bench.evals.robust import Attacking
from bench.store import Metric
from defenses.api import Classifier, Images
from defenses.ensemble import in_common


class BlackBox(Attacking):
    """Images crafted on other models with each of several losses, judged by the subject.

    Gradient attacks take all their steps, whether the source is wrong already or not; images that a source gets wrong from the
    beginning are attacked as well.

    Attributes:
        sources: variants, such as "naive" or "nt@architecture=vgg16"; "itself" is the subject's own.
        losses: of the attack; "" is the attack's own.
    """

    kind: Literal["black_box"] = "black_box"
    sources: tuple[str, ...] = Field(min_length=1)
    losses: tuple[str, ...] = ("",)

    def check(self, place: str, shape: tuple[int, int, int]) -> None:
        super().check(place, shape)
        refuse_nearest(place, self.attack, "which is no test of another network", "diverse_mim")
        for loss in self.losses:
            if loss not in ("", *LOSSES):
                raise ValueError(f"{place}.losses: unknown {loss!r}; known are {', '.join(LOSSES)}")
        if self.loss is not None:
            raise ValueError(f"{place}.loss: give {place}.losses, a list")

    @property
    def others(self) -> tuple[str, ...]:
        return self.sources

    def pieces(self, subject: Subject) -> list[Piece]:
        return [Piece(rows, {"eps": eps}) for eps in self.eps for rows in self._slices(100)]

    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        return [self._measure(subject, images, piece.setting["eps"]) for subject in subjects]

    def attacker(self, eps: float, scratch: Path | None = None, loss: str = "") -> Attack:
        """The attack at one budget."""
        given = self if not loss else self.model_copy(update={"loss": loss})
        attack = super(BlackBox, given).attacker(eps, scratch)
        return AllSteps(attack) if climbs(attack) else attack

    def _measure(self, subject: Subject, images: Images, eps: float) -> pd.DataFrame:
        """Rows: id, label, eps, clean_correct, and a column "wrong <source>" or "wrong <source>, <loss>" for every search."""
        x, y = images.floats(), images.labels
        streams = Streams(subject.seed, "black box", self.attack, self.norm, ids=images.ids, device=x.device)
        right = decide(subject.model, x, streams.child("clean")) == y
        columns: dict[str, Any] = {"id": images.ids.cpu(), "label": y.cpu(), "eps": eps, "clean_correct": right.cpu()}
        sources = {source: surrogate(subject, source) for source in self.sources}
        for source, loss in product(sources, self.losses):
            name = f"{source}, {loss}" if loss else source
            scratch = subject.scratch / name.replace("/", "_") if subject.scratch else None
            noise = streams.child(source, loss)
            points = self.attacker(eps, scratch, loss)(sources[source], x, y, noise, everything=True).x_adv
            columns[f"wrong {name}"] = (decide(subject.model, points, noise.child("verdict")) != y).cpu()
        return pd.DataFrame(columns)

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        numbers: list[Metric] = []
        searches = [str(column) for column in rows if str(column).startswith("wrong ")]
        for eps in self.eps:
            part = rows[rows.eps == eps]
            right = part.clean_correct.to_numpy(bool)
            stands = right & ~part[searches].to_numpy(bool).any(axis=1)
            numbers.append(share("robust_accuracy", stands, eps=eps, denominator="all"))
            if right.any():
                numbers.append(share("robust_accuracy", stands[right], eps=eps, denominator="clean_correct"))
            for column in searches:
                survived = right & ~part[column].to_numpy(bool)
                facts = {"source": column.removeprefix("wrong "), "denominator": "all"}
                numbers.append(share("black_box_accuracy", survived, eps=eps, **facts))
        return Outcome(numbers, [])


def surrogate(subject: Subject, name: str) -> Classifier:
    """The fitted model of another variant.

    Raises:
        ValueError: if it shares weights with the subject.
    """
    assert subject.other is not None, "the runner provides the models that an evaluation needs"
    source = subject.other(name)
    common = in_common(source, subject.model)
    if common:
        raise ValueError(
            f"the source {name!r} shares weights with the model that is attacked ({common[0]}, {len(common)} in all), "
            "so its images are no black-box test; give another source"
        )
    return source
