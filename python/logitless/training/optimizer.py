"""AdamW and the learning rate, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from logitless.losses import Loss, PairLoss
from logitless.training.config import LEARNING_RATE, PREFERENCE_LEARNING_RATE, TrainOptions
from logitless.training.subsets import Everything


def make_optimizer(subset: Everything, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW over what the updates move; weight decay on matrices only, as is usual for norms and biases."""
    matrices, vectors = subset.groups()
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=options.optim == "adamw_torch_fused",
    )


def peak_learning_rate(options: TrainOptions, losses: Iterable[Loss]) -> float:
    """The learning rate after the warm-up; by default that of preference losses if one of the losses is of pairs."""
    if options.learning_rate is not None:
        return options.learning_rate
    return PREFERENCE_LEARNING_RATE if any(isinstance(loss, PairLoss) for loss in losses) else LEARNING_RATE


def learning_rate(step: int, total: int, warmup: int, peak: float, schedule: str) -> float:
    """The rate of optimizer step `step` (from 0) of `total`: linear warm-up from 0, then the schedule.

    Step for step what Transformers' schedulers of the same names give. "constant" has no warm-up.
    """
    if schedule == "constant":
        return peak
    if step < warmup:
        return peak * step / max(1, warmup)
    if schedule == "constant_with_warmup":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    return peak * max(0.0, 1 - progress)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One rate for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
