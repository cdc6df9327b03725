"""How time and memory grow along an axis: the exponent of a power law, fitted to the points of a curve."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from .targets import Json, allocated, median

#: Fewer points have no standard error.
FEWEST = 3


class Fit(NamedTuple):
    """`y = scale x^exponent`, by least squares of log y against log x."""

    exponent: float
    error: float  # standard, of the exponent
    scale: float
    points: int

    def at(self, x: float) -> float:
        return self.scale * x**self.exponent

    def __str__(self) -> str:
        return f"{self.exponent:.2f} ± {self.error:.2f}"


Series = list[tuple[int, float]]


def fit(points: Sequence[tuple[float, float]]) -> Fit | None:
    """The power law of these x and y; None where fewer than three have both above 0, or all have one x.

    Source of the standard error: Draper and Smith, Applied Regression Analysis (1998), section 1.4.
    """
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len(logs) < FEWEST or len({x for x, _ in logs}) < 2:
        return None
    exponent, intercept = statistics.linear_regression(*zip(*logs, strict=True))
    middle = statistics.fmean(x for x, _ in logs)
    left = sum((y - intercept - exponent * x) ** 2 for x, y in logs)
    spread = sum((x - middle) ** 2 for x, _ in logs)
    return Fit(exponent, math.sqrt(left / (len(logs) - 2) / spread), math.exp(intercept), len(logs))


def times(curve: Json, provider: str) -> Series:
    """Median seconds by value, at the points where the provider was timed."""
    found = ((value, median(row["seconds"])) for value, row in _rows(curve, provider))
    return [(value, seconds) for value, seconds in found if seconds is not None]


def memories(curve: Json, provider: str) -> Series:
    """Extra bytes by value, at the points where the provider's memory is known."""
    found = ((value, allocated(row)) for value, row in _rows(curve, provider))
    return [(value, bytes_) for value, bytes_ in found if bytes_ is not None]


def _rows(curve: Json, provider: str) -> list[tuple[int, Json]]:
    pairs = ((point["value"], row) for point in curve["points"] for row in point["rows"])
    return [(value, row) for value, row in pairs if row["provider"] == provider and not row["failure"]]


def providers(curve: Json) -> dict[str, str]:
    """The role of each provider of a curve, in the order of the rows."""
    return {row["provider"]: row["role"] for point in curve["points"] for row in point["rows"]}
