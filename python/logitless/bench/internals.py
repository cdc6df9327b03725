"""What the harness takes from below logitless's public names.

A floor is cut as the chunked backend cuts its products, and a registered loss gets the statistics of another library:
neither is public.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from logitless import Head, TokenStats, backends
from logitless.losses import Loss
from logitless.losses.layout import token_layout
from logitless.types import Options

from .problem import Inputs


def evaluate_rows(
    loss: Loss, stats: TokenStats, constants: dict[str, Tensor], max_length: int | None, divergence: Tensor | None
) -> Any:
    """A registered loss from statistics `[sequences, length]` that all count, as its paper reduces it."""
    assert stats.logprob is not None or divergence is not None
    shape = next(x.shape for x in (*stats, divergence) if x is not None)[:2]  # without the axis of lists
    device = next(x.device for x in (*stats, divergence) if x is not None)
    rows = token_layout(torch.ones(shape, dtype=torch.bool, device=device), None)
    return loss.evaluate(stats, rows, constants, reduction=loss.reduction, max_length=max_length, divergence=divergence)


def tokens_at_once(inputs: Inputs) -> int:
    """Tokens in a chunk of the chunked backend."""
    options = Options(chunk_bytes=inputs.problem.chunk_bytes)
    return backends.BACKENDS["chunked"].tokens_at_once(inputs.hidden, Head(inputs.weight), options)
