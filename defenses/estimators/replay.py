"""What an estimator would have said of votes that are stored."""

from __future__ import annotations

import numpy as np

from defenses.bounds import Floats
from defenses.estimators.api import Estimator, Question, Tally


def replay(rule: Estimator, question: Question, votes: np.ndarray, chance: Floats) -> tuple[Floats, np.ndarray]:
    """What an estimator would have said of stored votes.

    Args:
        rule: the estimator; several trials take stretches of the votes in turn.
        question: what is asked.
        votes: int (images, blocks), votes for the selected class in each block of 100 draws.
        chance: a number of U[0, 1] for each image.

    Returns:
        radius (images), NaN where it abstains; draws (images).

    Raises:
        ValueError: if the estimator needs more draws than there are, or looks between blocks.
    """
    rule.check(question)
    trials, block = rule.trials(question), 100
    needed = sum(looks[-1] for looks in trials)
    if needed > votes.shape[1] * block or any(look % block for looks in trials for look in looks):
        raise ValueError(f"{needed} draws needed in whole hundreds, {votes.shape[1] * block} are stored")
    total = np.concatenate([np.zeros((len(votes), 1), np.int64), votes.cumsum(1, dtype=np.int64)], axis=1)
    bound, draws, going, start = np.zeros(len(votes)), np.zeros(len(votes), np.int64), np.ones(len(votes), bool), 0
    for trial, looks in enumerate(trials):
        before = 0
        for index, now in enumerate(looks):
            if not going.any():
                break
            count = total[going, (start + now) // block] - total[going, start // block]
            draws[going] += now - before
            tally = Tally(count.astype(float), bound[going], chance[going])
            bound[going], finished = rule.look(question, trial, index, tally)
            going[going] = ~finished
            before = now
        start += looks[-1]
    return rule.radius(question, bound), draws
