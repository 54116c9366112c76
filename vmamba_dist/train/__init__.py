"""Training: what a start of a run does, step by step."""

from vmamba_dist.train.run import Outcome
from vmamba_dist.train.start import run

__all__ = ["Outcome", "run"]
