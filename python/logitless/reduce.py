"""Reduction of per-token losses to one number, `sum_t m_t a_t loss_t / Z`. No other module divides by a count.

    name               a_t                     Z (`normalizer` replaces the number of tokens or of sequences)
    "mean"             1                       tokens that count
    "sequence_mean"    1                       sequences
    "mean_of_means"    1 / |y|                 sequences; |y| is the length of the token's sequence
    "constant_length"  1                       sequences * max_length
    "sum"              1                       1

m_t is 1 for a token that counts, else 0. A sequence without a token that counts does not count either, so padding of
any width changes nothing. Z may be given from outside, because under gradient accumulation and data parallelism it is
the number of the global batch.

A loss may take tokens out of Z (`Loss.divided_by`). Z is then the number of the tokens left, or of the sequences that
hold one of them; |y| stays the length of the sequence.
"""

from __future__ import annotations

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from .peers import value_hint
from .types import LossReduction

OF_SEQUENCES = ("sequence_mean", "mean_of_means", "constant_length")


class Rule(NamedTuple):
    """A named reduction of one batch."""

    length: Tensor | None  # |y| of each token's sequence, float32 of the mask's shape; None: a_t is 1
    normalizer: Tensor | float  # Z

    def token_weight(self, dtype: torch.dtype) -> Tensor | None:
        """The factors a_t; None: 1. In the losses' own dtype, as 1 / |y| of float32 has no digits for float64."""
        return None if self.length is None else self.length.to(dtype).reciprocal()


def check(reduction: str, normalizer: object, max_length: object = None) -> None:
    """Raises unless reduction, normalizer and max_length fit together."""
    if reduction not in get_args(LossReduction):
        expected = f"one of {list(get_args(LossReduction))}"
        raise ValueError(f"reduction: expected {expected}, got {reduction!r}{value_hint('reduction', reduction)}")
    if (max_length is not None) != (reduction == "constant_length"):
        raise ValueError(f"max_length: goes with reduction='constant_length', got {max_length} with {reduction!r}")
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise ValueError(f"max_length: expected a positive int, got {max_length!r}")
    if normalizer is None:
        return
    if reduction in ("none", "sum"):
        raise ValueError(f"normalizer: divides reduction='mean' and its like only, got reduction={reduction!r}")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer: expected one number, got a tensor of shape {list(normalizer.shape)}")
    elif isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)):
        raise TypeError(f"normalizer: expected a number or a tensor of one, got {type(normalizer).__name__}")
    elif not 0 < normalizer < math.inf:
        raise ValueError(f"normalizer: expected a positive number, got {normalizer}")


def rule(
    reduction: LossReduction,
    mask: Tensor,
    *,
    sequence: Tensor | None = None,
    num_sequences: int = 0,
    normalizer: Tensor | float | None = None,
    max_length: int | None = None,
    divided_by: Tensor | None = None,
) -> Rule:
    """The tokens' factors a_t and the divisor Z of a reduction.

    Args:
        reduction: a name in the table of this module. "none" and "sum" divide by 1.
        mask: `[...]` bool, the tokens that count.
        sequence: int64 of the mask's shape, the number of each token's sequence, in [0, num_sequences). The three
            reductions that count sequences need it.
        normalizer: the count to divide by, in place of this batch's own. Under gradient accumulation and data
            parallelism it is the global number of tokens, or of sequences.
        max_length: for "constant_length", the constant in place of every sequence's length (Dr. GRPO: the longest
            completion that may be generated).
        divided_by: bool of the mask's shape, the tokens that Z counts where these are fewer than those of the mask.
    """
    if reduction in ("none", "sum"):
        return Rule(None, 1.0)
    counted = mask if divided_by is None else mask & divided_by
    if reduction == "mean":
        return Rule(None, counted.sum().float() if normalizer is None else normalizer)
    assert sequence is not None
    if normalizer is None:
        normalizer = (sequence_lengths(counted, sequence, num_sequences) > 0).sum().float()
    if reduction == "mean_of_means":
        return Rule(sequence_lengths(mask, sequence, num_sequences).clamp(min=1)[sequence], normalizer)
    return Rule(None, normalizer if max_length is None else normalizer * max_length)


def sequence_lengths(mask: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """The number of the mask's tokens in each sequence, `[num_sequences]` float32, which counts to 2^24."""
    zeros = torch.zeros(num_sequences, dtype=torch.float32, device=mask.device)  # whatever PyTorch's default dtype
    return zeros.index_add_(0, sequence.flatten(), mask.flatten().float())


def mean(total: Tensor, normalizer: Tensor | float) -> Tensor:
    """`total / normalizer`. If the normalizer is 0 there is nothing to average: 0, connected to the graph."""
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(device=total.device, dtype=total.dtype).reshape(())
        return total / torch.where(normalizer == 0, torch.ones_like(normalizer), normalizer)
    return total / normalizer


def zero_outside(mask: Tensor, x: Tensor) -> Tensor:
    """`x [..., *]` with 0 where the mask `[...]` is False."""
    return torch.where(mask.view((*mask.shape, *[1] * (x.dim() - mask.dim()))), x, torch.zeros_like(x))


def apply(per_token: Tensor, mask: Tensor, rule: Rule, *, keep_tokens: bool = False) -> Tensor:
    """`sum_t m_t a_t loss_t / Z`. With `keep_tokens`, for reduction "none", the tokens' `m_t loss_t`."""
    per_token = zero_outside(mask, per_token)
    if keep_tokens:
        return per_token
    weight = rule.token_weight(per_token.dtype)
    if weight is not None:
        per_token = per_token * weight
    return mean(per_token.sum(), rule.normalizer)
