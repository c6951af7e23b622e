"""What an estimator would have said of votes that are stored, all of them or the last count alone."""

from __future__ import annotations

import numpy as np

from defenses.bounds import Bools, Floats, most
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


def recount(
    rule: Estimator, question: Question, count: Floats, draws: Floats, chance: Floats, error: float
) -> tuple[Floats, Floats, Bools]:
    """What an estimator can have said where of all its looks the last count alone is stored.

    That is one radius where a trial looks once. Where a bound may stem from an earlier look of the last trial, the counts that
    are lost are taken for as high as the last one lets them be, at all looks together but for a probability of ``error``: draws
    are exchangeable, so that the votes among some of them lie anywhere.

    Args:
        rule: the estimator.
        question: what was asked.
        count: votes (images) for the selected class among the draws of the last trial.
        draws: of all trials (images).
        chance: a number of U[0, 1] for each image.
        error: probability that an honest radius is above the largest one.

    Returns:
        the smallest and the largest radius (images), NaN where it abstains; and whether the rule looks after so many draws and
        is then finished. Counts that so many draws cannot have prove nothing.
    """
    rule.check(question)
    low, high, ended, before = np.zeros(len(count)), np.zeros(len(count)), np.zeros(len(count), bool), 0
    for trial, looks in enumerate(rule.trials(question)):
        own = draws - before
        counted = (count >= 0) & (count <= own) & (own > 0) & (own <= looks[-1])
        pairs = max(1, len(looks) * (len(looks) - 1) // 2)  # of a look and a later one, which may have been the last
        for index, now in enumerate(looks):
            made, last = counted & (own >= now), counted & (own == now)
            if made.any():
                earlier = np.minimum(count[made], most(count[made] / own[made], now, error / pairs))
                votes = np.where(last[made], count[made], earlier)
                high[made], finished = rule.look(question, trial, index, Tally(votes, high[made], chance[made]))
                ended[made] = finished & last[made]
                alone = Tally(count[last], np.zeros(last.sum()), chance[last])
                low[last] = rule.look(question, trial, index, alone)[0]
        before += looks[-1]
    return rule.radius(question, low), rule.radius(question, high), ended
