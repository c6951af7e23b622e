"""What a record's numbers are means of: every mean is the record's number, by the name that its metric and facts give."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from test_store import record

from bench.evals import Adaptive, BlackBox, Certified, Subject
from bench.per_image import ACR, named, per_image
from defenses.api import Classifier

CERTIFIED = pd.DataFrame(
    {
        "id": [0, 1, 2, 3], "label": 0, "prediction": [0, 0, 1, -1], "radius": [0.5, 0.1, 0.9, 0.0],
        "draws": 100, "evaluations": 100,
    }
)  # fmt: skip
BLACK = pd.DataFrame(
    {
        "id": [0, 1, 2, 3], "label": 0, "eps": 0.3, "clean_correct": [True, True, True, False],
        "wrong itself": [True, False, False, True], "wrong naive": [False, False, True, True],
    }
)  # fmt: skip


@pytest.mark.parametrize("estimator", ["fixed", "grid"])
def test_certificates_have_a_radius_an_image_where_radii_are_whole(estimator: str) -> None:
    asked = Certified(images=4, estimator=estimator, radii=(0.0, 0.25), sigma=0.5)
    numbers = asked.summarise(CERTIFIED, Subject(Classifier(), 0.5, 0)).metrics
    values = per_image(like(asked), CERTIFIED)
    assert (ACR in values) == (estimator == "fixed")
    told = {
        named(one.metric, {"radius": one.radius}): one.value for one in numbers if one.metric in ("certified_accuracy", "acr")
    }
    assert told == pytest.approx({name: own.mean() for name, own in values.items()})
    if estimator == "fixed":
        assert told[ACR] == pytest.approx(0.15) and list(values[ACR]) == [0.5, 0.1, 0, 0]


def test_images_of_others_are_told_source_by_source_and_together() -> None:
    asked = BlackBox(images=4, attack="pgd", norm="linf", eps=(0.3,), sources=("itself", "naive"))
    numbers = asked.summarise(BLACK, Subject(Classifier(), None, 0)).metrics
    values = per_image(like(asked), BLACK)
    told = {
        named(one.metric, {"eps": one.eps, "source": one.source, "denominator": one.denominator}): one.value
        for one in numbers
        if one.denominator == "all"
    }
    assert told == pytest.approx({name: own.mean() for name, own in values.items()})
    assert told == {
        "accuracy at eps 0.3": 0.25,
        "accuracy at eps 0.3, images of itself": 0.5,
        "accuracy at eps 0.3, images of naive": 0.5,
    }


def test_the_adaptive_attacks_are_told_together() -> None:
    asked = Adaptive(images=4, norm="linf", eps=(0.3,))
    own = pd.DataFrame(
        {
            "id": range(4), "label": 0, "eps": 0.3, "clean_correct": [True, True, True, False], "reviewed": True,
            "broken_by": ["", "pgd", "view: ce", ""], "tried": "pgd\nview: ce",
        }
    )  # fmt: skip
    (number,) = [
        one.value
        for one in asked.summarise(own, Subject(Classifier(), None, 0)).metrics
        if one.metric == "robust_accuracy" and one.denominator == "all"
    ]
    name = named("robust_accuracy", {"eps": 0.3, "denominator": "all"})
    assert per_image(like(asked), own)[name].mean() == number == 0.25


def test_numbers_of_some_images_have_no_name() -> None:
    assert named("robust_accuracy", {"eps": 0.3, "denominator": "clean_correct"}) == "" == named("tsr", {})
    noise = {"eps": 1.0, "source": "none", "target": "input", "denominator": "all"}
    assert named("noisy_accuracy", noise) == "accuracy attacked at eps 1, noise: input"
    assert named("noisy_accuracy", {**noise, "source": "input"}) == "accuracy eot at eps 1, noise: input"


def like(asked: Any) -> Any:
    """A record of an evaluation."""
    return record(eval={"name": "it", "fields": asked.resolved(Subject(Classifier(), 0.5, 0))})
