"""Schedules for training on demonstrations: how much of one is shown, and what weight it has."""

from __future__ import annotations

import math

import torch

__all__ = ["chord_mu", "prefix_rft_length", "uft_hint_length"]


def _cosine(step: int, total_steps: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at `total_steps`; `end` beyond."""
    if step < 0 or total_steps < 1:
        raise ValueError(f"step, total_steps: expected 0 <= step and 1 <= total_steps, got {step} and {total_steps}")
    done = min(step / total_steps, 1.0)
    return end + 0.5 * (1 + math.cos(math.pi * done)) * (start - end)


def prefix_rft_length(
    length: int,
    step: int,
    total_steps: int,
    *,
    start: float = 0.95,
    end: float = 0.05,
    high: float = 0.95,
    generator: torch.Generator | None = None,
) -> int:
    """How many of a demonstration's `length` tokens Prefix-RFT shows: `floor(u length)`, at most `length - 1`.

    u is uniform in [low, high]; low falls along a cosine from `start` to `end` over `total_steps`, so that prefixes are
    long at first and of any length later.

    Raises:
        ValueError: a length below 1, a negative step, no steps in all, or shares that are not in [0, 1].

    Source: arXiv 2507.01679's code for the rule: a random share between two schedules, and the length rounded down. It
    also never shows less than its `min_prefix_len`. The three shares are a port's, which cites the paper's appendix.
    """
    if length < 1:
        raise ValueError(f"length: expected at least 1, got {length}")
    if not (0 <= end <= high <= 1 and 0 <= start <= high):
        raise ValueError(f"start, end, high: expected shares with start, end <= high, got {start}, {end}, {high}")
    low = _cosine(step, total_steps, start, end)
    share = low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
    return min(int(share * length), length - 1)


def uft_hint_length(
    length: int,
    step: int,
    hint_steps: int = 300,
    *,
    pieces: int = 5,
    start: float = 0.95,
    end: float = 0.05,
    generator: torch.Generator | None = None,
) -> int:
    """How many of a solution's `length` tokens UFT shows: each of up to `pieces` equal pieces with a falling chance.

    The number of pieces is binomial with a chance that falls along a cosine from `start` to `end` over `hint_steps`; 0
    after these. Source: arXiv 2505.16984's code, with its defaults; there the solution is a list of sentences, cut at
    `round(length * shown / pieces)` of them. Here it is tokens, and the share is rounded down.

    Raises:
        ValueError: a negative length or step, no steps or pieces, or chances that are not in [0, 1].
    """
    if length < 0 or pieces < 1:
        raise ValueError(f"length, pieces: expected length >= 0 and pieces >= 1, got {length} and {pieces}")
    if not (0 <= start <= 1 and 0 <= end <= 1):
        raise ValueError(f"start, end: expected chances in [0, 1], got {start} and {end}")
    chance = _cosine(step, hint_steps, start, end)
    count = min(pieces, length)
    if step > hint_steps or count == 0:
        return 0
    shown = int((torch.rand(count, generator=generator, dtype=torch.float64) < chance).sum())
    return length * shown // count


def chord_mu(step: int, *, warmup: int = 0, decay: int = 0, peak: float = 0.1, valley: float = 0.1) -> float:
    """`CHORD.mu` at a step: linear from 0 to `peak` over `warmup` steps, then a cosine to `valley` over `decay` steps.

    The defaults, its code's, are a constant 0.1. Source: arXiv 2508.11408's code.

    Raises:
        ValueError: a negative number of steps, or weights that are not in [0, 1].
    """
    if min(step, warmup, decay) < 0 or not (0 <= peak <= 1 and 0 <= valley <= 1):
        got = f"{step}, {warmup}, {decay}, {peak}, {valley}"
        raise ValueError(f"chord_mu: expected steps >= 0 and weights in [0, 1], got {got}")
    if step < warmup:
        return peak * step / warmup
    return valley if decay == 0 else _cosine(step - warmup, decay, peak, valley)
