"""Accuracy under attacks that know the defense: through each view of it, from Square's best points, image by image the worst.

Views are what the defense says can be differentiated in its place (methods 12.2, 12.3); what they find counts only where it
fools the model as it is deployed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from attacks import Apgd, ApgdT, Attack, DiverseMim, Eot, Pgd, Square, Streams
from attacks.api import verdicts
from attacks.guided import ApgdAfter, Guided
from attacks.oracle import decide
from bench.evals.api import Base, Number, Outcome, Piece, Subject, check_threat, share
from bench.evals.black_box import surrogate
from bench.store import Finding, Metric
from bench.verdicts import HELPS, KNOWN, NAMED
from defenses.api import Images


class Adaptive(Base):
    """Attacks in turn, each on the images that still stand: APGD and long PGD on the model and through every view, images of
    other models, Square, and APGD from Square's best points.

    Attributes:
        norm, eps: the threat; ``eps`` may be fractions such as "8/255".
        steps, pgd_steps: of APGD, and of the long PGD in steps of 2.5 eps / T.
        restarts: of every gradient attack but those on other models.
        sources: variants, trained with other seeds, whose adversarial images (momentum, input diversity) are tried as well.
        proposals: of Square.
        eot: noise draws per gradient, where the model or a view draws noise.
    """

    kind: Literal["adaptive"] = "adaptive"
    norm: str
    eps: tuple[Number, ...] = Field(min_length=1)
    steps: int = Field(100, ge=1)
    pgd_steps: int = Field(200, ge=1)
    restarts: int = Field(5, ge=1)
    sources: tuple[str, ...] = ()
    proposals: int = Field(5000, ge=1)
    eot: int = Field(20, ge=1)

    @property
    def others(self) -> tuple[str, ...]:
        return self.sources

    def check(self, place: str, shape: tuple[int, int, int]) -> None:
        check_threat(place, self.norm, self.eps, shape)

    def pieces(self, subject: Subject) -> list[Piece]:
        return [Piece(rows, {"eps": eps}) for eps in self.eps for rows in self._slices(50)]

    def measure(self, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        return [self._measure(subject, images, piece.setting["eps"]) for subject in subjects]

    def attacks(self, subject: Subject, eps: float) -> Iterator[tuple[str, Attack]]:
        """The attacks by name, in order."""
        threat: dict[str, Any] = {"norm": self.norm, "eps": eps}
        climb: dict[str, Any] = {**threat, "steps": self.steps, "restarts": self.restarts}
        long: dict[str, Any] = {**climb, "steps": self.pgd_steps, "step": "2.5eps/T"}
        square = Square(**threat, proposals=self.proposals)
        yield "apgd_ce", Apgd(**climb)
        yield "apgd_t", ApgdT(**climb)
        yield "pgd", Pgd(**long)
        yield "pgd: margin", Pgd(**long, loss="margin")
        for name, view in (subject.views() or {}).items():
            for loss, function in view.losses.items():
                yield f"{name}: {loss}", Guided(Apgd(**climb, loss=function), view.model, self.eot)
            loss, function = list(view.losses.items())[-1]
            yield f"{name}: pgd, {loss}", Guided(Pgd(**long, loss=function), view.model, self.eot)
        for source in self.sources:
            known = surrogate(subject, source)
            for loss in ("ce", "margin"):
                yield f"from {source}: {loss}", Guided(DiverseMim(**threat, steps=self.steps, loss=loss), known, self.eot)
        yield "square", square
        yield "after square", ApgdAfter(**{**climb, "restarts": 1}, loss="margin", first=square)

    def _measure(self, subject: Subject, images: Images, eps: float) -> pd.DataFrame:
        """Rows: id, label, eps, clean_correct, broken_by (name of the attack, or ""), tried (all names, in order), x_adv."""
        x, y, model = images.floats(), images.labels, subject.model
        streams = self._streams(subject, images)
        right = decide(model, x, streams.child("clean")) == y
        x_adv, broken_by, tried = x.clone(), np.full(len(y), "", dtype=object), []
        standing = right.clone()
        for name, attack in self.attacks(subject, eps):
            tried.append(name)
            rows = standing.nonzero().flatten()
            if len(rows) == 0:
                continue
            asked = Eot(attack, self.eot) if model.randomized else attack
            found = asked(model, x[rows], y[rows], streams.take(rows).child(name))
            x_adv[rows] = found.x_adv
            fell = rows[found.broken]
            broken_by[fell.cpu().numpy()] = name
            standing[fell] = False
        return pd.DataFrame(
            {
                "id": images.ids.cpu(),
                "label": y.cpu(),
                "eps": eps,
                "clean_correct": right.cpu(),
                "broken_by": broken_by,
                "tried": "\n".join(tried),
                "reviewed": subject.views() is not None,
                "x_adv": [point.numpy().tobytes() for point in x_adv.float().cpu()],
            }
        )

    def _streams(self, subject: Subject, images: Images) -> Streams:
        return Streams(subject.seed, "adaptive", self.norm, ids=images.ids, device=images.pixels.device)

    def judged(self, subject: Subject, images: Images, rows: pd.DataFrame, points: Tensor) -> pd.DataFrame:
        """A point is judged under the noise of the attack that it is from; that of an image that stands, of the last."""
        x, y, model, streams = images.floats(), images.labels, subject.model, self._streams(subject, images)
        right = (decide(model, x, streams.child("clean")) == y).cpu().numpy()
        told, by = rows.broken_by.to_numpy(), np.full(len(y), "", dtype=object)
        asked = np.where(told == "", rows.tried.iloc[0].split("\n")[-1], told)
        for name in set(asked[right]):
            some = torch.from_numpy((asked == name) & right).nonzero().flatten().to(x.device)
            _, broken = verdicts(model, x[some], points[some], y[some], streams.take(some).child(name))
            by[some[broken].cpu().numpy()] = name
        return pd.DataFrame({"clean_correct": right, "broken_by": by})

    def summarise(self, rows: pd.DataFrame, subject: Subject) -> Outcome:
        numbers, findings = [], []
        if not rows.reviewed.all():
            detail = "its defense names no view of the model that an attacker could differentiate: see Defense.views"
            findings.append(Finding(kind="unreviewed", detail=detail))
        for eps in self.eps:
            part = rows[rows.eps == eps]
            stands = part.clean_correct & (part.broken_by == "")
            numbers.append(share("robust_accuracy", stands, eps=eps, denominator="all"))
            if part.clean_correct.any():
                numbers.append(share("robust_accuracy", stands[part.clean_correct], eps=eps, denominator="clean_correct"))
            numbers += self._after_each(part, eps)
            findings += self._helped(part, eps)
        return Outcome(numbers, findings)

    def _after_each(self, part: pd.DataFrame, eps: float) -> list[Metric]:
        """Accuracy after each attack."""
        names, stands, found = part.tried.iloc[0].split("\n"), part.clean_correct.copy(), []
        for name in names:
            stands &= part.broken_by != name
            found.append(share("robust_accuracy_after", stands, eps=eps, source=name))
        return found

    def _helped(self, part: pd.DataFrame, eps: float) -> list[Finding]:
        """Whether knowledge of the defense, or a search without its gradients, broke what climbing it had left standing."""
        later = part[part.clean_correct & (part.broken_by != "") & ~part.broken_by.isin(KNOWN)]
        if len(later) / len(part) <= HELPS:
            return []
        by = later.broken_by.value_counts().to_dict()
        words = ", ".join(f"{count} to {name}" for name, count in by.items())
        stood = "stood after APGD and PGD on the model"
        detail = f"{len(later)} of {len(part)} images at eps {eps:g} {stood} and fell later: {words}"
        evidence = {"eps": float(eps), "images": later.id.tolist()[:NAMED], "by": by}
        return [Finding(kind="adaptive_helps", detail=detail, evidence=evidence)]
