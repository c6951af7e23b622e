"""Evaluations, one file each."""

from typing import Annotated, get_args

from pydantic import Field

from bench.evals.activations import Activations
from bench.evals.adaptive import Adaptive
from bench.evals.api import Outcome, Piece, Skipped, Subject
from bench.evals.black_box import BlackBox
from bench.evals.certified import Certified
from bench.evals.challenge import Challenge
from bench.evals.clean import Clean
from bench.evals.diversity import Diversity
from bench.evals.first_kernels import FirstKernels
from bench.evals.noise import UnderNoise
from bench.evals.probe import Probe
from bench.evals.robust import Robust
from bench.evals.transfer import Transfer
from bench.evals.variance import Variance
from bench.evals.votes import Votes

Evaluation = Annotated[
    Activations
    | Adaptive
    | BlackBox
    | Certified
    | Challenge
    | Clean
    | Diversity
    | FirstKernels
    | Probe
    | Robust
    | Transfer
    | UnderNoise
    | Variance
    | Votes,
    Field(discriminator="kind"),
]
KINDS = {kind.model_fields["kind"].default: kind for kind in get_args(get_args(Evaluation)[0])}
"""Evaluations by the word that suites and records have for them."""

__all__ = [
    "KINDS",
    "Activations",
    "Adaptive",
    "BlackBox",
    "Certified",
    "Challenge",
    "Clean",
    "Diversity",
    "Evaluation",
    "FirstKernels",
    "Outcome",
    "Piece",
    "Probe",
    "Robust",
    "Skipped",
    "Subject",
    "Transfer",
    "UnderNoise",
    "Variance",
    "Votes",
]
