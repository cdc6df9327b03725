"""Whether two lists of times differ: an exact permutation test of their ranks, and its interval of the ratio.

Ranks, for now and then a round is slow for reasons of its own, and would hide in a mean what the others show.
"""

from __future__ import annotations

import itertools
import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from logitless.training.statistics import LEVEL, Interval


class Ratio(NamedTuple):
    """How many times as long the second list's rounds take."""

    estimate: float  # the median ratio of all pairs of a round of the one and a round of the other
    interval: Interval  # NaN where no interval of these few rounds has the level
    p: float  # two-sided
    smallest: float  # the smallest p that so many rounds can have


def ratio_of(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """Compares two lists of positive times, at least one each.

    All splits of the pooled rounds into lists of these sizes are equally likely where nothing differs. p is twice the
    share of splits with a rank sum as extreme as this one, and the interval has the ratios that the test does not
    reject.

    Source: Hollander and Wolfe, Nonparametric Statistical Methods (1999), sections 4.1 to 4.3.
    """
    ratios = sorted(y / x for x in first for y in second)
    splits = math.comb(len(first) + len(second), len(second))
    return Ratio(statistics.median(ratios), _interval(ratios, len(first), len(second)), p_of(first, second), 2 / splits)


def p_of(first: Sequence[float], second: Sequence[float]) -> float:
    """The two-sided p of the exact rank sum test; equal values share the mean of their ranks."""
    ranks = _doubled_ranks([*first, *second])
    ways = _rank_sums(ranks, len(second))
    own, splits = sum(ranks[len(first) :]), math.comb(len(ranks), len(second))
    low = sum(count for total, count in ways.items() if total <= own)
    high = sum(count for total, count in ways.items() if total >= own)
    return min(1.0, 2 * min(low, high) / splits)


def _doubled_ranks(values: Sequence[float]) -> list[int]:
    """Twice the rank of each value, from 2 on, so that the mean rank of equal values is whole."""
    ordered = sorted(values)
    return [bisect_left(ordered, value) + bisect_right(ordered, value) + 1 for value in values]


def _rank_sums(ranks: Iterable[int], size: int) -> dict[int, int]:
    """How many subsets of this size have each sum of ranks."""
    ways: list[dict[int, int]] = [{0: 1}, *({} for _ in range(size))]
    for rank in ranks:
        for taken in range(size, 0, -1):
            for total, count in ways[taken - 1].items():
                ways[taken][total + rank] = ways[taken].get(total + rank, 0) + count
    return ways[size]


def _interval(ratios: Sequence[float], first: int, second: int, level: float = LEVEL) -> Interval:
    """The narrowest interval between two of the ordered ratios that holds the true one with at least this probability.

    The number of pairs whose ratio is below the true one has the distribution of Mann and Whitney's statistic.
    """
    ways = _rank_sums(range(1, first + second + 1), second)
    least, splits = second * (second + 1) // 2, math.comb(first + second, second)
    below = itertools.accumulate(ways[least + count] for count in range(len(ratios)))
    left_out = sum(2 * total <= (1 - level) * splits for total in below)
    return Interval(ratios[left_out - 1], ratios[-left_out]) if left_out else Interval(math.nan, math.nan)


def holm(p: Sequence[float]) -> list[float]:
    """Each p, corrected for their number: where nothing differs, the smallest is below x with probability x at most.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    order = sorted(range(len(p)), key=lambda place: p[place])
    scaled = (min(1.0, (len(p) - rank) * p[place]) for rank, place in enumerate(order))
    corrected = dict(zip(order, itertools.accumulate(scaled, max), strict=True))
    return [corrected[place] for place in range(len(p))]
