"""Which completions are right: those of which the reward, or one function's part of it, comes to a threshold."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from logitless.training.errors import InputError, nearest
from logitless.training.rollouts.rewards import Scores
from logitless.training.rollouts.rounds import Judge


class Right(NamedTuple):
    """What counts as right.

    Args:
        threshold: least reward of a right completion, 1 by default.
        function: name of the reward function that is compared with it; None, the default, is the weighted sum of all.
    """

    threshold: float = 1.0
    function: str | None = None

    def require(self, judge: Judge) -> None:
        """Raises InputError for a threshold that is not finite, or a function that is none of the judge's."""
        if not math.isfinite(self.threshold):
            raise InputError(f"threshold must be finite, got {self.threshold}")
        names = [reward.name for reward in judge.rewards]
        if self.function is not None and self.function not in names:
            raise InputError(f"threshold_func: expected one of {', '.join(names)}, got {self.function!r}"
                             f"{nearest(self.function, names)}")  # fmt: skip

    def __call__(self, scores: Scores) -> torch.Tensor:
        """`[S]` float64: 1 for right, 0 for wrong, NaN where the reward is unknown."""
        reward = scores.total if self.function is None else scores.parts[self.function]
        right = (reward >= torch.tensor(self.threshold, dtype=reward.dtype)).double()
        return right.masked_fill(reward.isnan(), math.nan)
