"""Pieces of evaluations: halves are the whole, memory that runs out is met by halving, and what pieces cost is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch

from bench.evals import Evaluation, Piece, Robust, Skipped, Subject
from bench.pieces import measured
from bench.request import Request
from bench.runner import Run
from bench.store import Store
from bench.suites import load_suite
from bench.tasks import prepare
from defenses.api import Images
from defenses.smoothed_ensemble import smoothed_ensemble
from defenses.views import views

SUITE = load_suite("smd_mnist", "smoke")
DIGITS = load_suite("digits", "smoke")


@pytest.fixture(scope="module")
def asked() -> tuple[Subject, Images]:
    """An untrained smoothed ensemble, and images of which it gets some right."""
    task, test = prepare(DIGITS, "cpu", None)
    torch.manual_seed(0)
    model = smoothed_ensemble.build(task)
    other = smoothed_ensemble.build(task)
    for parameter in other.parameters():
        parameter.data.mul_(0.9)  # no network of the one that is attacked
    right = (model.predict(test.floats()) == test.labels).nonzero().flatten()
    wrong = (model.predict(test.floats()) != test.labels).nonzero().flatten()
    assert len(right) >= 4
    some = test.take(torch.cat([right[:4], wrong[:3]]))
    return Subject(model, 0.25, 0, views=lambda: views(model), other=lambda spec: other), some


EVALS = {
    f"{own.kind} {getattr(own, 'attack', '')}": own
    for own in (*SUITE.evals.values(), *DIGITS.evals.values())
    if (own.divides and own.kind != "black_box") or getattr(own, "attack", "") == "pgd"
}


@pytest.mark.parametrize("name", EVALS)
def test_halves_one_after_the_other_are_the_whole(name: str, asked: tuple[Subject, Images]) -> None:
    (subject, images), evaluation = asked, EVALS[name]
    try:
        piece = Piece(slice(0, len(images)), evaluation.pieces(subject)[0].setting)
    except Skipped as reason:
        pytest.skip(str(reason))
    (whole,) = measured(evaluation, [subject], images, piece)
    (halves,) = measured(evaluation, [subject], images, piece, most=4)
    floats = [column for column in whole if whole[column].dtype.kind == "f"]
    pd.testing.assert_frame_equal(halves.drop(columns=floats), whole.drop(columns=floats))
    # Another batch may be summed in another order; no verdict may turn on it.
    pd.testing.assert_frame_equal(halves[floats], whole[floats], rtol=1e-4)


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Make attacks on more images than ``most`` run out of memory; returns how many each was asked for."""
    original, seen = Robust.measure, []

    def measure(self: Robust, subjects: Sequence[Subject], images: Images, piece: Piece) -> list[pd.DataFrame]:
        seen.append(len(images))
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, subjects, images, piece)

    monkeypatch.setattr(Robust, "measure", measure)
    return seen


def test_a_shard_that_runs_out_of_memory_is_halved_and_the_record_is_the_same(tiny: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (plain,) = Run(Request(defense="randsmooth", suite=str(tiny), runs=tiny.parent / "plain", only=("pgd",))).execute()
    seen = short_of_memory(monkeypatch, 10)
    (short,) = Run(Request(defense="randsmooth", suite=str(tiny), runs=tiny.parent / "short", only=("pgd",))).execute()
    assert seen == [30, 15, 8, 8, 8, 6] * 2
    assert short.model_copy(update={"cost": {}, "made": {}}) == plain.model_copy(update={"cost": {}, "made": {}})
    stores = [Store(tiny.parent / name) for name in ("short", "plain")]
    pd.testing.assert_frame_equal(*[store.rows(short) for store in stores])
    examples = [pd.read_parquet(store.path(short).with_suffix(".examples.parquet")) for store in stores]
    pd.testing.assert_frame_equal(*examples)


def test_a_single_image_that_does_not_fit_is_an_error_that_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_memory(monkeypatch, 0)
    (record,) = Run(Request(defense="randsmooth", suite=str(tiny), runs=tiny.parent / "r", only=("pgd",))).execute()
    assert record.status == "error" and "one image needs more memory than there is: CUDA out of memory" in str(record.error)


def test_what_pieces_cost_outlives_an_interruption(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Request(defense="randsmooth", suite=str(tiny), runs=tiny.parent / "r", only=("pgd",)))
    original, calls = Robust.measure, []

    def interrupted(self: Robust, *arguments: object) -> list[pd.DataFrame]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Robust, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.execute()
    (piece,) = (tiny.parent / "r").glob("tiny/randsmooth/quick/seed0/pgd.partial/*.parquet")
    first = pd.read_parquet(piece).attrs["seconds"]
    (record,) = run.execute()
    assert len(calls) == 3 and record.cost["seconds"] > first > 0


def test_a_damaged_piece_is_moved_aside_named_and_measured_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(defense="randsmooth", suite=str(tiny), runs=tiny.parent / "r", only=("pgd",), shard=(1, 2))
    Run(request).execute()
    (piece,) = (tiny.parent / "r").glob("tiny/randsmooth/quick/seed0/pgd.partial/*.parquet")
    content = piece.read_bytes()
    piece.write_bytes(content[:100])
    again = Run(request)
    again.execute()
    assert pd.read_parquet(piece).drop(columns="x_adv").shape[0] == 30
    assert piece.with_name(f"{piece.name}.corrupt").read_bytes() == content[:100]
    assert any("00000.parquet is damaged" in problem for problem in again.store.problems)


def test_every_evaluation_says_whether_it_divides() -> None:
    kinds: list[type[Evaluation]] = [type(own) for suite in (DIGITS, SUITE) for own in suite.evals.values()]
    assert {kind.model_fields["kind"].default for kind in kinds if not kind.divides} <= {"probe", "noise", "activations"}
