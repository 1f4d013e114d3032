"""Objectives and the heads that they can train."""

from __future__ import annotations

from umm_zoo.blocks.denoisers import Denoiser, RegressionHead
from umm_zoo.objectives.base import Objective
from umm_zoo.objectives.learned_variance import LearnedRangeVariance
from umm_zoo.objectives.regression import Regression
from umm_zoo.objectives.several_draws import SeveralDraws


def assert_trains(objective: Objective, head: Denoiser | RegressionHead) -> None:
    """Refuse a head that is not of the kind that an objective calls.

    Raises:
        ValueError: says which go together.
    """
    own = objective.objective if isinstance(objective, SeveralDraws) else objective
    pair = f"head and objective: a {type(own).__name__} cannot train a {type(head).__name__}"
    if isinstance(head, RegressionHead) != isinstance(own, Regression):
        raise ValueError(f"{pair}; regression objectives go with regression heads, all others with denoisers")
    if isinstance(head, Denoiser) and head.learned_variance != isinstance(own, LearnedRangeVariance):
        article = "a" if head.learned_variance else "no"
        raise ValueError(f"{pair} that gives {article} variance; LearnedRangeVariance goes with learned_variance: true")
