"""The only place that divides: per-token losses to one number, weight_t = 1 / Z with Z explicit and global."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import Reduction


def count(targets: Tensor, ignore_index: int) -> Tensor:
    """Number of tokens that count, `[]` float32 on the targets' device (no synchronisation)."""
    return (targets != ignore_index).sum().float()


def mean(total: Tensor, normalizer: Tensor | float) -> Tensor:
    """`total / normalizer`; 0, connected to the graph, where there is nothing to average (normalizer 0)."""
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(device=total.device, dtype=total.dtype).reshape(())
        return total / torch.where(normalizer == 0, torch.ones_like(normalizer), normalizer)
    return total / normalizer


def reduce(per_token: Tensor, reduction: Reduction, normalizer: Tensor | float) -> Tensor:
    """`"none"`, `"sum"`, or `"mean"` by `normalizer`."""
    if reduction == "none":
        return per_token
    total = per_token.sum()
    return total if reduction == "sum" else mean(total, normalizer)
