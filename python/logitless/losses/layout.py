"""The layout of a batch's tokens: which of them count, and which sequence each belongs to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reduce
from ..types import LossReduction


class TokenLayout(NamedTuple):
    """Which tokens of a batch count, and which sequence each belongs to."""

    mask: Tensor  # [...] bool
    sequence: Tensor | None = None  # [...] int64 in [0, sequences); None: unknown
    sequences: int = 0
    rows: bool = True  # a row of the last axis is a sequence


def check_boundaries(cu_seqlens: Tensor, tokens: int) -> None:
    """Raises unless `cu_seqlens` holds boundaries; on a GPU, or while compiling, only its form is checked."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: expected a tensor of S + 1 integers, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 1:
        got = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens: expected a tensor of S + 1 integers, got {got}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != tokens or sorted(values) != values:
        raise ValueError(
            f"cu_seqlens: expected boundaries that rise from 0 to the number of tokens {tokens}, got {values}"
        )


def token_layout(mask: Tensor, cu_seqlens: Tensor | None) -> TokenLayout:
    """The layout of the tokens that count, `mask`, and of their sequences.

    `cu_seqlens` bounds the sequences of the flattened tokens. Without it the rows of the last axis are the sequences,
    and flat tokens `[N]` belong to none.
    """
    if cu_seqlens is None:
        if mask.dim() < 2:
            return TokenLayout(mask)
        count = mask.shape[:-1].numel()
        sequence = torch.arange(count, device=mask.device).view(*mask.shape[:-1], 1)
        return TokenLayout(mask, sequence.expand(mask.shape), count)
    check_boundaries(cu_seqlens, mask.numel())
    tokens = torch.arange(mask.numel(), device=mask.device)
    ends = cu_seqlens.to(mask.device)[1:].contiguous()
    sequence = torch.searchsorted(ends, tokens, right=True).view(mask.shape)
    return TokenLayout(mask, sequence, len(cu_seqlens) - 1, rows=False)


def need_sequences(tokens: TokenLayout, why: str) -> Tensor:
    """The tokens' sequences; raises if these are unknown, and says `why` they are needed."""
    if tokens.sequence is None:
        raise ValueError(f"cu_seqlens: {why} needs it where hidden is flat, got None")
    return tokens.sequence


def reduction_rule(
    tokens: TokenLayout,
    reduction: LossReduction,
    normalizer: Tensor | float | None,
    max_length: int | None,
    divided_by: Tensor | None = None,
) -> reduce.Rule:
    """The reduction of this batch's tokens; `divided_by` as in `reduce.rule`."""
    sequence = None
    if reduction in reduce.OF_SEQUENCES:
        sequence = need_sequences(tokens, f"reduction={reduction!r}")
    return reduce.rule(
        reduction,
        tokens.mask,
        sequence=sequence,
        num_sequences=tokens.sequences,
        normalizer=normalizer,
        max_length=max_length,
        divided_by=divided_by,
    )


def spread(name: str, value: Tensor, tokens: TokenLayout) -> Tensor:
    """An input as one value a token; it may have one a sequence."""
    if value.shape == tokens.mask.shape:
        return value
    if tokens.sequence is not None and value.shape == (tokens.sequences,):
        return value[tokens.sequence]
    sequences = "" if tokens.sequence is None else f" or [{tokens.sequences}], one a sequence"
    expected = f"{list(tokens.mask.shape)} like targets{sequences}"
    raise ValueError(f"{name}: expected shape {expected}, got {list(value.shape)}")
