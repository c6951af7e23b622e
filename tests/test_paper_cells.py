"""Every cell of every paper's table shows the number that its column means: a mapping of its own, against synthetic records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import stdev
from typing import Any
from zlib import crc32

import pytest
from test_store import record

from bench.papers.formats import render
from bench.papers.join import join
from bench.papers.layout import available, load
from bench.registry import variant_of
from bench.store import Metric, Record, Store
from bench.suites import Suite, load_suite

TRAINED, TRIED = 20_000, 500
"""Images in training, and in every evaluation."""

SUMMED = ("tsr", "tsr_all", "tsr_floor")
RADII = sorted({round(step * count, 2) for step in (0.1, 0.25) for count in range(21)})
PLACES = ("none", "input", "activations", "both")

Facts = dict[str, Any]
Row = Mapping[str, Any]
"""A published number."""


@cache
def suite(name: str) -> Suite:
    return load_suite(name)


@dataclass(frozen=True)
class Asked:
    """A record: whose it is, and what it was asked."""

    suite: str
    spec: str
    eval: str
    seed: int = 0

    def value(self, metric: str, **facts: Any) -> float:
        """One of its numbers, between 0 and 1, that no other number of any record shares."""
        return crc32(repr((self, metric, sorted(facts.items()))).encode()) / 2**32

    def percent(self, metric: str, **facts: Any) -> float:
        return 100 * self.value(metric, **facts)

    @property
    def record(self) -> Record:
        """With all numbers that such an evaluation can have, and what it and the training cost."""
        own, who = suite(self.suite), variant_of(self.spec)
        metrics = [
            Metric(
                metric=metric,
                value=self.value(metric, **facts),
                n=TRIED,
                unit="percent, sum over targets" if metric in SUMMED else "fraction",
                **facts,
            )
            for metric, facts in numbers(own.evals[self.eval])
        ]
        return record(
            suite={"name": self.suite, "version": own.version, "budget": "quick"},
            defense={"name": who.name, "variant": who.label, "fields": {}},
            eval={"name": self.eval, "fields": {"kind": own.evals[self.eval].kind, "images": TRIED}},
            seed=self.seed,
            task={"architecture": "lenet5", "recipe": {"epochs": 7}, "train_images": TRAINED},
            cost={name: self.value(name) for name in ("seconds", "training_seconds_per_epoch", "forward_milliseconds")},
            metrics=metrics,
        )


def numbers(asked: Any) -> Iterator[tuple[str, Facts]]:
    """What an evaluation of a kind measures, each number with the facts that tell it from the others."""
    eps, everything = getattr(asked, "eps", ()), {"denominator": "all"}
    if asked.kind == "clean":
        yield "clean_accuracy", {}
    if asked.kind == "certified":
        yield from ((name, {"radius": at}) for at in RADII for name in ("certified_accuracy", "certified_accuracy_whole_set"))
    if asked.kind in ("robust", "black_box"):
        for own, denominator in product(eps, ("all", "clean_correct")):
            yield "robust_accuracy", {"eps": own, "denominator": denominator}
    if asked.kind == "robust":
        yield from (("robust_accuracy_8bit", {"eps": own, **everything}) for own in eps)
    if asked.kind == "black_box":
        for own, source in product(eps, asked.sources):
            yield "black_box_accuracy", {"eps": own, "source": source, **everything}
    if asked.kind == "noise":
        yield from (("noisy_accuracy", {"target": place, **everything}) for place in PLACES)
        made = {("none", place) for place in PLACES} | {(place, place) for place in PLACES}
        for own, (source, target), denominator in product(eps, sorted(made), ("all", "clean_correct")):
            yield "noisy_accuracy", {"eps": own, "source": source, "target": target, "denominator": denominator}
    if asked.kind == "transfer":
        yield from between_networks(eps)


def between_networks(eps: tuple[float, ...]) -> Iterator[tuple[str, Facts]]:
    """Of images crafted on each member and on the ensemble."""
    yield "tsr_floor", {"denominator": "all"}
    for own in eps:
        yield "tsr_all", {"eps": own, "denominator": "all"}
        yield "tsr", {"eps": own, "denominator": "all_correct"}
        yield "tsr_normalised", {"eps": own, "denominator": "all_correct"}
        right = {"eps": own, "target": "ensemble", "denominator": "ensemble_correct"}
        yield "asr_members", right
        yield "asr_ensemble", {**right, "source": "ensemble"}
        for source, target in product(("0", "1", "ensemble"), repeat=2):
            for denominator in ("all", "source_correct", "all_correct", "successful_at_source"):
                yield "transfer_rate", {"eps": own, "source": source, "target": target, "denominator": denominator}


def spec(row: Row) -> str:
    """What a row of a paper stands for, as on the command line."""
    name = row["defense"]
    if row["paper"] == "cear":
        # SWEEN as CEAR's code has it. Table 3 and the times tell no noise: the least of those of its networks.
        return f"{'sween_cear' if name == 'sween' else name}@sigma={row['sigma'] or 0.25}"
    if row["paper"] == "smd":
        return f"{name}{'+eat' if row['eat'] else ''}@members={row['members']:g}"
    if row["paper"] == "edlcm":
        return f"{name}@members=3"
    fields = {"norm": "l2", "eps": 1.0} if name in ("at_es", "trades", "fast_at") else {"noise": row["noise"]}
    if name == "at_es" and row["dataset"].startswith("cifar"):
        fields["steps"] = 20
    if name == "trades":
        fields["keep"] = "best"  # of the epochs, as AT-ES
    if name == "kap" and row["dataset"].endswith("imagenet"):
        fields["norm_first"] = "true"
    if row["architecture"] == "resnet18_x4":
        fields["architecture"] = "resnet18_x4"
    return f"{name}@{','.join(f'{field}={value}' for field, value in fields.items())}"


def evaluation(row: Row) -> str:
    """The evaluation that asks what the paper asked."""
    if not row["attack"]:
        return "certified" if row["threat"] == "certified" else "clean"
    if row["paper"] == "cear":
        return f"cear_{'attack' if row['threat'] == 'whitebox' else 'transfer'}_{row['norm']}"
    if row["metric"] == "tsr":
        return "transfer"
    if row["place"]:
        return "noise"
    if row["source"]:
        return f"black_box_{row['attack']}" if row["paper"] == "smd" else "black_box"
    return str(row["attack"])


def meant(row: Row, asked: Asked) -> dict[str, float]:
    """What stands in a cell, in the paper's unit: "ours", and what is told beside it."""
    epoch, prediction = asked.value("training_seconds_per_epoch") / TRAINED, asked.value("seconds") / TRIED
    simple = {
        "clean_accuracy": asked.percent("clean_accuracy"),
        "certified_accuracy": asked.percent("certified_accuracy", radius=row["radius"]),
        "inference_ms": 1000 * prediction * 128,  # of the batch that is trained on
        "epoch_seconds": epoch * 50_000,  # CIFAR-10 and CIFAR-100
        "runtime_seconds": prediction * 10_000 if row["paper"] == "cear" else epoch * 60_000 * 50,
    }
    if row["metric"] in simple:
        return {"ours": simple[row["metric"]]}
    if row["metric"] == "robust_accuracy":
        return left_by_attack(row, asked, 0.3 if row["paper"] == "smd" else row["eps"])
    return {"attack_success_rate": turned, "tsr": passed_on}[row["metric"]](asked, row["eps"], row["threat"])


def left_by_attack(row: Row, asked: Asked, eps: float) -> dict[str, float]:
    """Accuracy on adversarial images, of all images."""
    everything = {"eps": eps, "denominator": "all"}
    if row["place"]:  # crafted without noise, which is added afterwards; and by an attacker who expects it
        own = {"ours": asked.percent("noisy_accuracy", source="none", target=row["place"], **everything)}
        if row["place"] != "none":
            own["EOT"] = asked.percent("noisy_accuracy", source=row["place"], target=row["place"], **everything)
        return own
    if row["source"] == "itself":
        others = [asked.percent("black_box_accuracy", source=source, **everything) for source in ("itself", "naive")]
        return dict(zip(("ours", "naive's images"), others))
    if row["source"]:
        source = {"nt": "nt", "at_es": "at_es@norm=l2,eps=1.0,steps=20"}[row["source"]]
        return {"ours": asked.percent("black_box_accuracy", source=source, **everything)}
    return {"ours": asked.percent("robust_accuracy", **everything)}


def turned(asked: Asked, eps: float, threat: str) -> dict[str, float]:
    """Share of the rightly classified images that an attack turns: on the network itself, or crafted on one member."""
    if threat == "whitebox":
        return {"ours": 100 - asked.percent("robust_accuracy", eps=eps, denominator="clean_correct")}
    right = {"eps": eps, "target": "ensemble", "denominator": "ensemble_correct"}
    itself = asked.percent("asr_ensemble", source="ensemble", **right)
    return {"ours": asked.percent("asr_members", **right), "white-box": itself}


def passed_on(asked: Asked, eps: float, threat: str) -> dict[str, float]:
    """How many of the other members images of one fool."""
    assert threat == "transfer"
    return {
        "ours": asked.value("tsr", eps=eps, denominator="all_correct"),
        "normalised": asked.percent("tsr_normalised", eps=eps, denominator="all_correct"),
        "all images": asked.value("tsr_all", eps=eps, denominator="all"),
        "floor": asked.value("tsr_floor", denominator="all"),
    }


@pytest.mark.parametrize("name", available())
def test_every_cell_shows_what_its_column_means(name: str, tmp_path: Path) -> None:
    layout, store = load(name), Store(tmp_path)
    seeds = range(2 if name in ("smd_table3", "smd_table4") else 1)
    cells = [(row, Asked(f"{row['paper']}_{row['dataset']}", spec(row), evaluation(row))) for row in layout.cells]
    for asked in {asked for _, asked in cells}:
        for seed in seeds:
            store.write(replace(asked, seed=seed).record)
    shown = json.loads(render(join(layout, store), "json"))
    for (row, asked), cell in zip(cells, shown, strict=True):
        where = f"{cell['row']} / {cell['column']}"
        own = suite(asked.suite).evals[asked.eval]
        if row["attack"]:
            assert (own.attack, own.norm) == (row["attack"], row["norm"]), where  # type: ignore[attr-defined]
        found = (cell["printed"], cell["suite"], cell["variant"], cell["evaluation"])
        assert found == (row["printed"], asked.suite, variant_of(asked.spec).label, asked.eval), where
        each = [meant(row, replace(asked, seed=seed)) for seed in seeds]
        ours = stdev(one["ours"] for one in each) if len(each) > 1 else each[0]["ours"]
        assert cell["ours"] == pytest.approx(ours, abs=1e-6), where
        told = {one.words for answer in layout.answers for one in answer.beside if cell.get(one.words) is not None}
        assert told == set(each[0]) - {"ours"}, where
        for words in told:
            beside = [float(text) for text in cell[words].split(", ")]
            assert beside == pytest.approx([one[words] for one in each], rel=1e-5), f"{where}, {words}"
