"""Evaluations, one file each."""

from typing import Annotated

from pydantic import Field

from bench.evals.api import Outcome, Piece, Skipped, Subject
from bench.evals.certified import Certified
from bench.evals.clean import Clean
from bench.evals.robust import Robust
from bench.evals.variance import Variance

Evaluation = Annotated[Clean | Robust | Certified | Variance, Field(discriminator="kind")]
KINDS = ("clean", "robust", "certified", "variance")

__all__ = ["KINDS", "Certified", "Clean", "Evaluation", "Outcome", "Piece", "Robust", "Skipped", "Subject", "Variance"]
