"""Evaluations, one file each."""

from typing import Annotated

from pydantic import Field

from bench.evals.api import Outcome, Piece, Skipped, Subject
from bench.evals.certified import Certified
from bench.evals.challenge import Challenge
from bench.evals.clean import Clean
from bench.evals.diversity import Diversity
from bench.evals.robust import Robust
from bench.evals.transfer import Transfer
from bench.evals.variance import Variance
from bench.evals.votes import Votes

Evaluation = Annotated[
    Clean | Robust | Certified | Challenge | Variance | Diversity | Votes | Transfer, Field(discriminator="kind")
]
KINDS = ("clean", "robust", "certified", "challenge", "variance", "diversity", "votes", "transfer")

__all__ = [
    "KINDS",
    "Certified",
    "Challenge",
    "Clean",
    "Diversity",
    "Evaluation",
    "Outcome",
    "Piece",
    "Robust",
    "Skipped",
    "Subject",
    "Transfer",
    "Variance",
    "Votes",
]
