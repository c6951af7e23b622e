"""From a suite to what defenses are fitted to and tested on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from bench import data
from bench.suites import Suite, SuiteError
from defenses.api import Images, Task


def splits(
    dataset: str, held_out: int, device: str, folder: Path | None, download: bool = True
) -> tuple[Images, Images, Images]:
    """(train, validation, test) of a data set, all its images, the validation images held out of those that train.

    Raises:
        bench.data.DataError: if the data set is absent or damaged.
    """
    load = partial(data.load, dataset, data=folder, download=download, device=device)
    return *data.hold_out(load("train"), held_out), load("test")


def prepare(suite: Suite, device: str, folder: Path | None) -> tuple[Task, Images]:
    """The task of a suite, and its test images, on a device.

    Raises:
        bench.data.DataError: if the data set is absent or damaged.
        SuiteError: if the suite asks for more images than there are.
    """
    facts = suite.facts
    train, validation, test = splits(suite.dataset, suite.validation_images, device, folder)
    wanted = max(evaluation.images for evaluation in suite.evals.values())
    if wanted > len(test) or (suite.train_images or 0) > len(train):
        raise SuiteError(
            f"{suite.name}: asks for {wanted} test and {suite.train_images or 'all'} training images; "
            f"{suite.dataset} has {len(test)} and {len(train)} (after {len(validation)} for validation)"
        )
    if suite.train_images:
        train = train.first(suite.train_images)
    roles = {role: suite.training(role) for role in suite.roles}
    task = Task(
        dataset=suite.dataset,
        train=train,
        validation=validation,
        classes=facts.classes,
        mean=facts.mean,
        std=facts.std,
        architecture=suite.architecture,
        recipe=suite.training(),
        roles=roles,
        test=test if suite.unsound else None,
    )
    return task, test.first(wanted)
