"""From numbers of single items to a mean and its confidence interval.

    value = sum of totals / sum of weights

An item is a completion, an answer or a pair. Items of one prompt are no independent draws, so intervals resample whole
prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from logitless.training.statistics import Interval, bootstrap_interval, wilson_interval


class Measure(NamedTuple):
    """The items of one metric, `[N]` each."""

    total: torch.Tensor
    weight: torch.Tensor
    prompt: torch.Tensor
    """Int64: equal numbers are items of one prompt."""
    share: bool = False
    """Whether it is a share: each total is from 0 to its weight."""


class Figure(NamedTuple):
    """A metric as it is shown."""

    value: float
    interval: Interval
    prompts: int
    items: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values; None where a number is not known."""
        low, high = self.interval
        found = {"value": self.value, "low": low, "high": high, "prompts": self.prompts, "items": self.items}
        return {name: None if isinstance(x, float) and math.isnan(x) else x for name, x in found.items()}


def measured(
    total: torch.Tensor, prompt: torch.Tensor, weight: torch.Tensor | None = None, *, share: bool = False
) -> Measure:
    """A measure of the items whose total is known, not NaN; `weight` is 1 by default, and the tokens of a sum of them.

    Args:
        share: whether every total is from 0 to its weight.
    """
    known = ~total.isnan()
    weight = torch.ones(total.shape) if weight is None else weight
    return Measure(total[known].double(), weight[known].double(), prompt[known], share)


def all_of(parts: Sequence[dict[str, Measure]]) -> dict[str, Measure]:
    """The measures of several batches as those of all of their items."""
    return {name: _concatenated([part[name] for part in parts]) for name in parts[0]}


def _concatenated(parts: Sequence[Measure]) -> Measure:
    totals, weights, prompts, shares = zip(*parts, strict=True)
    return Measure(torch.cat(totals), torch.cat(weights), torch.cat(prompts), shares[0])


def figure(found: Measure, *, seed: int = 0) -> Figure:
    """The mean of a measure with its 95% interval.

    The interval is `bootstrap_interval`'s over prompts. A share of which every prompt has one item that is 0 or 1, or
    that is 0 or 1 as a whole, where a bootstrap would have no width, has `wilson_interval`'s over prompts. NaN with
    fewer than two prompts, and the value too where no item is known.

    Args:
        seed: of the resamples.
    """
    total, weight, prompt, share = found
    prompts, items = len(prompt.unique()), len(prompt)
    if not items or not weight.sum():
        return Figure(math.nan, Interval(math.nan, math.nan), prompts, items)
    value = float(total.sum() / weight.sum())
    if prompts < 2:
        return Figure(value, Interval(math.nan, math.nan), prompts, items)
    single = prompts == items and bool((((total == 0) | (total == 1)) & (weight == 1)).all())
    if share and (single or value in (0.0, 1.0)):
        return Figure(value, wilson_interval(round(value * prompts), prompts), prompts, items)
    interval = bootstrap_interval(lambda times: (times @ total) / (times @ weight), prompt, seed=seed)
    return Figure(value, interval, prompts, items)
