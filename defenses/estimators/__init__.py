"""Estimators: how vote counts become certified radii, and when there are enough of them (methods 7.2, 7.5 and 3.2).

Every one keeps this promise, with the proof in its docstring: for every image, whatever the truth, the radius it returns is too
large with probability at most alpha. Pure numpy; the same object serves certification and the replay of stored votes.
"""

from defenses.estimators.api import FUTILITY, Estimator, Question, Tally
from defenses.estimators.fixed import Fixed, Phases, Randomised
from defenses.estimators.replay import recount, replay
from defenses.estimators.sequential import LOOKS, Betting, GroupSequential, OneRadius, Sequential, UnionBound

ESTIMATORS: dict[str, Estimator] = {
    "fixed": Fixed(),
    "randomised": Randomised(),
    "grid": GroupSequential(),
    "group_sequential": OneRadius(preset=True),
    "union_bound": UnionBound(preset=True),
    "betting": Betting(preset=True),
    "anytime": Betting(),
    "phases": Phases(),
}
"""By name. "grid" decides all radii in one run, "group_sequential" decides one; "anytime" gives whole radii."""

WHOLE = ("fixed", "randomised", "anytime")
"""Estimators that give whole radii, of which there is an average, rather than members of a grid."""


def grid_up_to(step: float, top: float) -> tuple[float, ...]:
    """Radii 0, step, 2 step, ... up to ``top``."""
    return tuple(i * step for i in range(int(top / step) + 1))


__all__ = [
    "ESTIMATORS", "FUTILITY", "LOOKS", "WHOLE", "Betting", "Estimator", "Fixed", "GroupSequential", "OneRadius", "Phases",
    "Question", "Randomised", "Sequential", "Tally", "UnionBound", "grid_up_to", "recount", "replay",
]  # fmt: skip
