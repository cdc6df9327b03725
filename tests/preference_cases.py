"""Pair losses from per-token log-probabilities, written out for rows `[2B, T]`: what `linear_loss` does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from logitless.losses import Loss


def tail_weights(mask: Tensor, tail_weight: float) -> Tensor:
    """LD-DPO's weight of every token: 1 up to the pair's shorter length, `tail_weight` beyond, 0 where masked."""
    shorter = torch.minimum(*mask.sum(-1).chunk(2)).repeat(2)
    beyond = mask.cumsum(-1) > shorter[:, None]
    return torch.ones(mask.shape, dtype=torch.float64).masked_fill(beyond, tail_weight) * mask


def pair_loss(loss: Loss, logprob: Tensor, ref: Tensor, mask: Tensor, log_sum_sq: Tensor) -> Any:
    """A pair loss of the first half of the rows, chosen, and the second, rejected."""
    weight, length = tail_weights(mask, loss.tail_weight).to(logprob.dtype), mask.sum(-1)
    count = length.clamp(min=1)
    sums = [(x * weight).sum(-1) / (count if loss.average_logprob else 1) for x in (logprob, ref)]
    sides = [half for total in (sums if loss.inputs else sums[:1]) for half in total.chunk(2)]
    wpo = torch.exp(((logprob.detach() - log_sum_sq) * mask).sum(-1) / count)
    extras = {}
    for name, value in (("length", length), ("weight", wpo)):
        if name in loss.extras:
            extras |= {f"{side}_{name}": x for side, x in zip(("chosen", "rejected"), value.chunk(2), strict=True)}
    return loss(*sides, **extras)
