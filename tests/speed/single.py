"""What a training step of each single network costs, as a ratio to the same network trained by cross-entropy.

    python -m tests.speed.single [--architecture resnet18] [--batch N] [--rounds R] [--defenses kap,at_es] [--out FILE]

A step is the defense's own loss on random images, its backward pass and the optimiser's step. Works are interleaved, and a
ratio is the median of the rounds' ratios. Time is CPU time of one thread (on CUDA: wall time, synchronised). The paper of
kernel average pooling prints 1.16 for KAP and 8.06 for adversarial training (its table A2, seconds an epoch over plain ones).
"""

from __future__ import annotations

import argparse
from typing import Any

from bench.registry import resolve
from defenses.api import Task
from defenses.training import Trained
from tests.speed.timing import Step, arguments, batch_of, report, rows_of

DEFENSES = "nt@noise=0.1,kap,kap@noise=0.1,kmp,at_es,at_es@norm=l2,eps=1.0,steps=20,trades,fast_at"

PLAIN = "cross-entropy"


def main() -> None:
    report(arguments(__doc__.splitlines()[0] if __doc__ else None, DEFENSES), {"steps": steps})


def steps(task: Task, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each defense: its step, as training takes it, over plain training."""
    plain = Trained(role="plain", seed=0, member=0, architecture=options.architecture, recipe=task.recipe)
    works = {PLAIN: Step(plain.untrained(task), plain.loss, batch_of(task))}
    for variant in resolve(options.defenses, {}):
        known: Any = variant.defense
        part = known.part(task, 0)
        works[variant.label] = Step(part.untrained(task), part.loss, batch_of(task))
    return rows_of(works, PLAIN, options)


if __name__ == "__main__":
    main()
