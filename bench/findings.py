"""What each kind of finding means: a sign of masked gradients, numbers that cannot be true, or a word for the reader."""

from dataclasses import dataclass

from bench.verdicts import HELPS


@dataclass(frozen=True)
class Sign:
    """What a kind of finding means.

    Attributes:
        flags: whether it makes the status "flagged"; else it is for information.
        text: in words.
        least: share of the images above which it flags, with 97.5 % confidence.
    """

    flags: bool
    text: str
    least: float = -1.0


MASKED, FALSE, TOLD = "sign of masked gradients", "cannot be true", "for information"

SIGNS = {
    # of attacks
    "zero_gradients": Sign(True, MASKED),
    "zero_gradient": Sign(True, MASKED),
    "saturated_loss": Sign(True, MASKED),
    "gradient_no_better_than_random": Sign(True, MASKED),
    "shattered_gradients": Sign(True, MASKED),
    "not_converged": Sign(True, MASKED),
    "unbounded_stands": Sign(True, MASKED),
    "noise_dependent": Sign(True, MASKED),
    "no_expectation": Sign(True, MASKED),
    "randomised": Sign(True, MASKED),
    "probabilities": Sign(True, MASKED),
    "dynamic": Sign(True, MASKED),
    "square_helps": Sign(True, MASKED, least=HELPS),  # methods 8.10; one image of 100 may be luck
    "accuracy_rises_with_eps": Sign(True, MASKED),
    "more_effort_does_less": Sign(True, MASKED),
    "black_box_stronger": Sign(True, MASKED),
    "pgd_misled": Sign(True, MASKED),
    "worst_case_beaten": Sign(True, MASKED),
    "fgsm_stronger_than_pgd": Sign(True, MASKED),
    "adaptive_much_stronger": Sign(True, MASKED),
    # of whatever has numbers
    "outside_budget": Sign(True, FALSE),
    "not_a_number": Sign(True, FALSE),
    "unsound": Sign(True, FALSE),
    # of certificates
    "certified_rises_with_radius": Sign(True, FALSE),
    "radius_above_ceiling": Sign(True, FALSE),
    "radius_above_votes": Sign(True, FALSE),
    "certified_above_attacked": Sign(True, FALSE),
    "wrong_log": Sign(True, FALSE),
    # for the reader
    "weak_attack": Sign(False, TOLD),
    "unreadable_rows": Sign(False, TOLD),
    "adaptive_helps": Sign(False, TOLD),
    "changed_attack": Sign(False, TOLD),
    "noise_repairs": Sign(False, TOLD),
    "training_ended_early": Sign(False, TOLD),
    "unreviewed": Sign(False, TOLD),
}
"""Every kind of finding that this version knows."""

OTHER = Sign(False, TOLD)
"""Any other kind, such as a plugin's."""
