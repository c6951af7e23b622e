"""What can be measured again of a finished record: clean decisions, stored adversarial examples, certificates of a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attacks.norms import norm
from attacks.streams import generator
from bench.evals import Clean, Piece
from bench.evals.api import Base, Smoothing
from bench.mismatch import Mismatch, few, named, same_rows
from bench.restore import Case
from bench.stock import Impossible
from defenses.api import Images

CLEAN = 10_000
"""Clean images that are decided anew, at most."""

ROUNDING = 1e-6
"""Relative difference of stored distances, which are float32."""

BATCH = 100
"""Images that are measured at a time."""


def measured(case: Case) -> tuple[str, Callable[[Case], Iterable[Mismatch]]]:
    """What of a record can be measured again, in words, and the check that does it."""
    evaluation = case.evaluation
    count = evaluation.images
    if isinstance(evaluation, Clean):
        return f"clean decisions ({min(CLEAN, count)} of {count} images)", clean
    if isinstance(evaluation, Smoothing):
        some = min(case.sample, count)
        return f"certificates ({some} of {count} images, {100 * some / count:.3g} %)", certificates
    if type(evaluation).judged is not Base.judged:
        return "adversarial examples", examples
    return "measurements", nothing


def nothing(case: Case) -> Iterator[Mismatch]:
    """Of evaluations that store no points."""
    raise Impossible(f"evaluations of kind {case.evaluation.kind} store nothing that could be judged again")


def clean(case: Case) -> Iterator[Mismatch]:
    """The decision on every image, or on a random sample of very many, is that of the rows."""
    yield from _again(case, CLEAN)


def certificates(case: Case) -> Iterator[Mismatch]:
    """A random sample of images is certified anew, under the same noise, and agrees exactly."""
    if not case.sample:
        raise Impossible("a sample of 0 images was asked for")
    yield from _again(case, case.sample)


def _again(case: Case, count: int) -> Iterator[Mismatch]:
    """Measure a random sample of the images anew, under every setting."""
    some, subject = case.known, case.subject
    if count < len(some):
        order = torch.randperm(len(some), generator=generator(case.record.seed, "verify", case.record.eval["name"]))
        some = some.take(order[:count].sort().values.to(some.labels.device))
    for setting in dict.fromkeys(tuple(piece.setting.items()) for piece in case.evaluation.pieces(subject)):
        fresh = [
            case.evaluation.measure([subject], some.take(rows), Piece(rows, dict(setting)))[0]
            for rows in (slice(start, min(start + BATCH, len(some))) for start in range(0, len(some), BATCH))
        ]
        yield from same_rows(case.rows, pd.concat(fresh, ignore_index=True))


def examples(case: Case) -> Iterator[Mismatch]:
    """Adversarial examples lie in ball and box, as far away as the rows say, and fool the model exactly where they say so."""
    points, table = case.examples, case.rows
    of = {what: set(zip(table.id, table.eps, strict=True)) for what, table in {"points": points, "rows": table}.items()}
    for what, there, wanted in (("adversarial examples", of["points"], of["rows"]), ("rows", of["rows"], of["points"])):
        if wanted - there:
            yield Mismatch(
                what, f"{len(there)}", f"those of {named(sorted(number for number, _ in wanted - there))} are missing"
            )
    if len(points.drop_duplicates(["id", "eps"])) < len(points):
        yield Mismatch("adversarial examples", f"{len(points)}", "several of one image and eps")
    for eps, some, part in _batches(case):
        yield from _geometry(case, eps, some, part)
    subject = case.subject
    for eps, some, part in _batches(case):
        if _right_size(part.x_adv, some).all():
            fresh = case.evaluation.judged(subject, some, part, _decoded(part.x_adv, some))
            assert fresh is not None
            yield from same_rows(part, fresh.assign(id=part.id, eps=eps))


def _batches(case: Case) -> Iterator[tuple[float, Images, pd.DataFrame]]:
    """Piece by piece as they were measured: eps, images, and the rows and points that there are of them, in their order."""
    both = case.rows.merge(case.examples, on=["id", "eps"]).drop_duplicates(["id", "eps"])
    for piece in case.evaluation.pieces(case.outline):
        some, eps = case.known.take(piece.rows), piece.setting["eps"]
        part = both[both.eps == eps].set_index("id", drop=False)
        have = [place for place, number in enumerate(some.ids.tolist()) if number in part.index]
        some = some.take(torch.tensor(have, dtype=torch.int64, device=some.ids.device))
        if have:
            yield eps, some, part.loc[some.ids.tolist()].reset_index(drop=True)


def _right_size(files: pd.Series, some: Images) -> np.ndarray:
    return (files.map(len) == 4 * some.pixels[0].numel()).to_numpy()


def _decoded(files: pd.Series, some: Images) -> Tensor:
    """Points (n c h w) from float32 in bytes."""
    found = np.stack([np.frombuffer(file, np.float32) for file in files])
    return torch.from_numpy(found).reshape(len(files), *some.shape).to(some.pixels.device)


def _geometry(case: Case, eps: float, some: Images, part: pd.DataFrame) -> Iterator[Mismatch]:
    """Size, box, ball and distance of points; those of images that were wrong as they are must be the images themselves."""
    where = f", eps {eps:g}"
    fits = _right_size(part.x_adv, some)
    if not fits.all():
        yield Mismatch(f"x_adv of {named(part.id[~fits])}{where}", f"pixels {some.shape} in float32", "another number of bytes")
        some, part = some.take(torch.tensor(fits, device=some.pixels.device)), part[fits]
    if part.empty:
        return
    ball, x, points = norm(case.record.eval["fields"]["norm"]), some.floats(), _decoded(part.x_adv, some)
    moved = ball.length(points.double() - x.double())
    length, reach = moved.cpu().numpy(), float(ball.reach(x, eps))
    low, high = (edge.cpu().numpy() for edge in points.flatten(1).aminmax(dim=1))
    rules: list[tuple[np.ndarray, str, str | np.ndarray, np.ndarray]] = [
        (~((low >= 0) & (high <= 1)), "x_adv", "in the box [0,1]", np.where(low < 0, low, high)),
        (~(length <= reach), "x_adv", f"in the {ball.name} ball of {eps:g}", length),
        ((length > 0) & ~part.clean_correct.to_numpy(bool), "x_adv", "the image itself, which was wrong as it is", length),
    ]
    if "distance" in part:
        stored = part.distance.to_numpy()
        rules.append((~np.isclose(length, stored, rtol=ROUNDING, atol=ROUNDING), "distance", stored, length))
    for wrong, column, said, found in rules:
        if wrong.any():
            told = said if isinstance(said, str) else few(said[wrong])
            yield Mismatch(f"{column} of {named(part.id[wrong])}{where}", told, few(found[wrong]))
