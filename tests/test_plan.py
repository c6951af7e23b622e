"""Plans: schedules against known optima, and estimates that name where they come from."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import Scripted

from attacks import Streams
from bench.costs import Costs, Probe, counted, kept
from bench.forecast import forecast
from bench.plan import Item, duration, schedule, tails
from bench.request import Request
from bench.runner import Run
from bench.work import probed
from defenses.api import Recipe, Wrapped
from defenses.joint import Together
from defenses.naive import Separate
from defenses.training import Trained


def test_the_longest_goes_first() -> None:
    # In the order given, two workers take 1 + 1 + 4 = 6 seconds; with the longest first 4.
    items = [Item(f"short {place}", 1.0) for place in range(4)] + [Item("long", 4.0)]
    found = schedule(items, 2)
    assert found.makespan == 4.0 and found.efficiency == 1.0


def test_what_others_wait_for_goes_before_longer_work() -> None:
    items = [Item("long", 3.0), Item("first", 1.0), Item("second", 1.0, ("first",)), Item("third", 3.0, ("second",))]
    assert tails(items) == {"long": 3.0, "first": 5.0, "second": 4.0, "third": 3.0}
    found = schedule(items, 1)
    assert found.makespan == 8.0 and found.efficiency == 1.0
    found = schedule(items, 2)
    assert found.makespan == 5.0 and found.efficiency == pytest.approx(0.8)
    assert found.chain == ("first", "second", "third") and "longest chain" in found.limit
    assert "the work itself" in schedule([Item(str(place), 1.0) for place in range(100)], 4).limit


def test_needs_that_can_never_be_met_are_named() -> None:
    with pytest.raises(ValueError, match=r"can never be met.*'a', 'b'"):
        schedule([Item("a", 1.0, ("b",)), Item("b", 1.0, ("a",))], 1)
    with pytest.raises(ValueError, match=r"can never be met.*'gone'"):
        schedule([Item("a", 1.0, ("gone",))], 1)
    assert schedule([], 8).makespan == 0.0


def test_durations_have_the_unit_that_suits_them() -> None:
    assert [duration(s) for s in (0.25, 42, 600, 9000, 400_000)] == ["0.2 s", "42 s", "10.0 min", "2.5 h", "4.6 days"]


def plan_of(tiny: Path, defense: str = "cear_rw@members=2", **words: Any) -> Any:
    run = Run(Request(defense=defense, suite=str(tiny), runs=tiny.parent / "runs", device="cpu", **words))
    return forecast(run, run.missing())


def test_a_plan_has_every_part_and_evaluation_with_its_basis(tiny: Path) -> None:
    plan = plan_of(tiny)
    assert [line.title for line in plan.lines if line.job is None] == [
        "teacher 0 (seed 0)", "student 0 (seed 0)", "student 1 (seed 0)", "robust weights 0 (seed 0)",
    ]  # fmt: skip
    by = {line.title: line for line in plan.lines}
    teacher, student = by["teacher 0 (seed 0)"], by["student 1 (seed 0)"]
    assert student.needs == (teacher.key,) and teacher.estimate.basis == "2 epochs of 2 steps, three timed"
    certified = by["cear_rw@members=2  seed 0  certified"]
    assert certified.estimate.basis.startswith("300 x 2 network passes an image") and set(certified.needs) > {student.key}
    told = (
        r"plan: about .* on 1 worker \(.* of work; 0 estimates from stored records, 6 from a probe; 1 steps .*\); about \d+ MB"
    )
    assert re.match(told, str(plan))


def test_memory_is_what_the_largest_step_keeps() -> None:
    """A linear layer keeps what enters it, ReLU what leaves it, which enters the next layer."""
    net = Wrapped(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)))
    assert kept(net, torch.rand((5, 1, 2, 2))) == 4 * (4 + 8)
    part = Trained(role="plain", seed=0, architecture="lenet5", recipe=Recipe(epochs=1, batch=20))
    together = Together(role="adp", seed=0, architecture="lenet5", recipe=part.recipe, members=3, loss=Separate())
    costs = Costs([], "cpu", Probe(1.0, 1.0, {}, kept=1000.0, weights=500.0))
    assert costs.memory([part], []) == 20 * 1000 + 4 * 500 and costs.memory([part, together], []) == 3 * (20 * 1000 + 4 * 500)
    assert math.isnan(Costs([], "cpu", None).memory([part], []))


def test_costs_of_stored_records_take_the_place_of_the_probe(tiny: Path) -> None:
    (record,) = Run(
        Request(defense="randsmooth", suite=str(tiny), runs=tiny.parent / "runs", only=("pgd",), device="cpu")
    ).execute()
    own = plan_of(tiny, "randsmooth", only=("pgd",), seeds=(1,)).lines[-1].estimate
    assert own.basis == "as 1 stored records of this variant" and own.seconds == pytest.approx(record.cost["seconds"])
    tiny.write_text(tiny.read_text().replace("restarts = 2\nimages = 30", "restarts = 2\nimages = 15"))
    half = plan_of(tiny, "randsmooth@sigma=0.5", only=("pgd",)).lines[-1].estimate
    assert half.basis == "as 1 stored records of other defenses" and half.seconds == pytest.approx(record.cost["seconds"] / 2)
    assert str(plan_of(tiny, "randsmooth", only=("clean",)).lines[-1].estimate.basis).startswith("1 x 1 network passes")
    other = plan_of(tiny, "nt@architecture=cnn1", only=("pgd",)).lines[-1].estimate
    assert "network passes" in other.basis  # of a network of its own


@pytest.mark.parametrize(("name", "suite"), [("pgd", "digits"), ("mim", "digits"), ("autoattack", "digits")])
def test_counted_passes_are_those_of_an_image_that_stands(name: str, suite: str, tiny: Path) -> None:
    run = Run(Request(defense="naive@members=2", suite=suite, budget="smoke", only=(name,), device="cpu"))
    (job,) = run.jobs
    attack = job.evaluation._plain(1e-9)

    class First(torch.nn.Module):
        """Always class 0, by far."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.eye(10)[0] + 0.01 * x.flatten(1)[:, :10]

    x, labels = torch.full((2, 1, 28, 28), 0.5), torch.zeros(2, dtype=torch.int64)
    result = attack(First().eval(), x, labels, Streams(0, "plan", ids=torch.arange(2)))
    assert not result.broken.any()
    told = sum(counted(job) or ()) / len(job.evaluation.eps)
    spent = (result.forwards + result.backwards).float().mean()
    assert spent / 2 <= told <= 2 * spent, f"told {told}, spent {spent}"


def test_a_plan_is_probed_by_a_worker_and_the_longest_work_begins_first(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = Scripted()
    with monkeypatch.context() as patch:
        patch.setattr("bench.runner.opened", lambda *asked: executor)
        run = Run(Request(defense="randsmooth,cear_rw@members=2", suite=str(tiny), runs=tiny.parent / "runs"))
    run.plan = forecast(run, run.missing())
    assert executor.seen[0][0] is probed and run.plan.workers == 2
    run.execute()
    assert executor.seen[1][1][1].role == "teacher", "students and their weights wait for it"
