"""Statistics of scores and of right answers: the area under the ROC curve, intervals, pass@k.

Prompts differ in how hard they are, so answers to one prompt are no independent draws. `bootstrap_interval` therefore
resamples whole clusters, here prompts with all of their answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 1000
LEVEL = 0.95

#: From how often each item was drawn, float64 `[R, N]`, to a number for each of R resamples, `[R]`.
Statistic = Callable[[Tensor], Tensor]

_CHUNK = 2**22  # entries of such a matrix at once: 32 MiB


class Interval(NamedTuple):
    """The ends of a confidence interval; NaN where there is none."""

    low: float
    high: float


class Wins(NamedTuple):
    """What each positive item won against negative ones, float64 `[N]`; 0 for a negative item."""

    won: Tensor
    """Negative items that score below it, and half of those that score the same."""
    met: Tensor
    """Negative items that it was compared with."""


def auc(score: Tensor, label: Tensor, group: Tensor | None = None) -> float:
    """Area under the ROC curve: how often a positive item scores above a negative one, `P(s+ > s-) + P(s+ = s-) / 2`.

    It is the Mann-Whitney statistic, in O(N log N).

    Args:
        score: `[N]`, any real dtype; compared in float64.
        label: bool `[N]`, True for a positive item.
        group: int64 `[N]`, or None. With it only pairs of one group are compared, and each pair counts once.

    Returns:
        A number in [0, 1]; NaN where no positive item meets a negative one.

    Raises:
        ValueError: shapes differ or are not `[N]`, labels are not bool, or a score is NaN.

    Source: Hanley and McNeil, Radiology 143 (1982), for the equality with the Mann-Whitney statistic.
    """
    won, met = wins(score, label, group)
    return float(won.sum() / met.sum())


def wins(score: Tensor, label: Tensor, group: Tensor | None = None) -> Wins:
    """The comparisons that `auc` sums, by positive item. Arguments and errors are those of `auc`."""
    group = torch.zeros(score.shape, dtype=torch.int64) if group is None else group
    _require_scores(score, label, group)
    _, number = torch.unique(group, return_inverse=True)
    level, levels = _levels(torch.stack([number.double(), score.double()], -1))
    negative = (~label).double()
    equal = torch.zeros(levels, dtype=torch.float64).index_add(0, level, negative)
    inside = torch.zeros(int(number.max()) + 1 if len(number) else 0, dtype=torch.float64).index_add(
        0, number, negative
    )
    below = (equal.cumsum(0) - equal)[level] - (inside.cumsum(0) - inside)[number]
    return Wins(*(torch.where(label, x, 0.0) for x in (below + equal[level] / 2, inside[number])))


def weighted_auc(score: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """`auc` of items that are there several times: each pair of items counts with the product of their weights.

    Args:
        score: `[N]`, as in `auc`, and `label` too.
        weight: `[R, N]`, how often each item is there.

    Returns:
        float64 `[R]`; NaN where no positive item meets a negative one.

    Raises:
        ValueError: as `auc`, or `weight` has another N.
    """
    _require_scores(score, label, label)
    if weight.dim() != 2 or weight.shape[1] != len(score):
        raise ValueError(f"weight: expected shape [R, {len(score)}], got {list(weight.shape)}")
    level, levels = _levels(score.double()[:, None])
    negative, positive = (weight.double() * side for side in (~label, label))
    equal = torch.zeros(len(weight), levels, dtype=torch.float64).index_add(1, level, negative)
    won = ((equal.cumsum(1) - equal / 2)[:, level] * positive).sum(1)
    return won / (positive.sum(1) * negative.sum(1))


def _levels(keys: Tensor) -> tuple[Tensor, int]:
    """The place of each row of `[N, K]` among the distinct rows in their order, and how many these are."""
    distinct, place = torch.unique(keys, dim=0, return_inverse=True)
    return place, len(distinct)


def _require_scores(score: Tensor, label: Tensor, group: Tensor) -> None:
    if score.dim() != 1 or label.shape != score.shape or group.shape != score.shape:
        shapes = ", ".join(str(list(x.shape)) for x in (score, label, group))
        raise ValueError(f"score, label and group: expected one shape [N], got {shapes}")
    if label.dtype != torch.bool:
        raise ValueError(f"label: expected bool, got {label.dtype}")
    if score.isnan().any():
        raise ValueError("score: expected numbers that can be compared, got NaN")


def numbered(keys: Sequence[Hashable]) -> Tensor:
    """The clusters of these keys, int64 `[N]` from 0 on: equal keys have equal numbers."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int64)


def bootstrap_interval(
    statistic: Statistic,
    cluster: Tensor,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """The percentile interval of a statistic under resampling of whole clusters with replacement.

    Each resample draws as many clusters as there are, and takes all items of each as often as it was drawn. With few
    clusters (below some 20) the interval is too narrow.

    Args:
        statistic: of R resamples at once, from how often each item is in them, float64 `[R, N]`, to `[R]`. A mean of
            values is `lambda weight: weight @ values / weight.sum(1)`. NaN where a resample has none; such resamples
            are left out.
        cluster: int64 `[N]`, the cluster of every item.
        resamples: 1000 by default, at which the ends vary by a few hundredths of the interval's width.
        level: of confidence, 0.95 by default.
        seed: equal seeds give equal intervals.

    Returns:
        `Interval`; NaN where every resample's statistic is.

    Raises:
        ValueError: no items, or a number out of range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; resampling clusters: Field and
    Welsh, J. R. Statist. Soc. B 69 (2007).
    """
    if cluster.dim() != 1 or not len(cluster):
        raise ValueError(f"cluster: expected shape [N] with N at least 1, got {list(cluster.shape)}")
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    _check_level(level)
    distinct, number = torch.unique(cluster, return_inverse=True)
    random = torch.Generator().manual_seed(seed)
    values = []
    for part in torch.arange(resamples).split(max(1, _CHUNK // len(cluster))):
        drawn = torch.randint(len(distinct), (len(part), len(distinct)), generator=random)
        times = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add(1, drawn, torch.ones_like(drawn).double())
        values.append(statistic(times[:, number]))
    found = torch.cat(values).double()
    found = found[~found.isnan()]
    if not len(found):
        return Interval(math.nan, math.nan)
    ends = found.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return Interval(*ends.tolist())


def wilson_interval(right: int, total: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a proportion of independent trials, which also serves near 0 and 1.

    `(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)` with p = right / n, n = total, z the normal
    quantile of the level; [0, 1] of no trials.

    Raises:
        ValueError: `right` is not in [0, total], or the level is out of range.

    Source: Wilson, J. Am. Statist. Assoc. 22 (1927).
    """
    if not 0 <= right <= total:
        raise ValueError(f"right: expected a number in [0, total={total}], got {right}")
    _check_level(level)
    if not total:
        return Interval(0.0, 1.0)
    z, p = NormalDist().inv_cdf((1 + level) / 2), right / total
    middle = p + z**2 / (2 * total)
    half = z * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return Interval(max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))


def pass_at_k(right: int, samples: int, k: int) -> float:
    """The unbiased estimate of the probability that one of k answers is right: `1 - C(n - c, k) / C(n, k)`.

    Args:
        right: c, the right ones among the samples of one prompt.
        samples: n, at least k.
        k: at least 1.

    Raises:
        ValueError: a number is out of range.

    Source: arXiv 2107.03374, equation 1.
    """
    if not 0 <= right <= samples:
        raise ValueError(f"right: expected a number in [0, samples={samples}], got {right}")
    if not 1 <= k <= samples:
        raise ValueError(f"k: expected a number in [1, samples={samples}], got {k}")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level}")
