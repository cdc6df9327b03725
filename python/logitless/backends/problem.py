"""The vocabulary between the ops and a backend: one call's tensors, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import DivergenceOptions, LogitTransform, TokenStats


@dataclass(frozen=True)
class Problem:
    """Tokens that count, and the head. N may be 0."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N] int64 in [0, V)
    transform: LogitTransform
    chunk_bytes: int | None = None  # budget for a chunk of logits; None: the backend's default
    chunk_dtype: torch.dtype | None = None  # of a chunk's logits; None: the statistics'
    vocabulary_order: Tensor | None = None  # [V] int64, of the tail's blocks (`order`); None: the head's own
    rounds_head: bool = False  # the head's gradient may come in the head's dtype, where one product makes it


@dataclass(frozen=True)
class Side:
    """Tokens that count, and the head that makes their distributions: the model's, or the reference's."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    transform: LogitTransform


@dataclass(frozen=True)
class DivergenceProblem:
    """Two distributions for each token. H may differ between the sides, V and N may not."""

    model: Side
    ref: Side
    options: DivergenceOptions
    chunk_bytes: int | None = None  # budget for both sides' logits of a chunk; None: the backend's default


class Needs(NamedTuple):
    """Which gradients somebody asked for."""

    hidden: bool
    weight: bool
    bias: bool


class Upstream(NamedTuple):
    """Gradients that reach the differentiable statistics, `[N]` each; None means zero."""

    logprob: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None

    def rows(self, rows: slice) -> Upstream:
        return Upstream(*(None if g is None else g[rows] for g in self))


class Forward(NamedTuple):
    stats: TokenStats  # [N]; always with logprob and lse, which the backward needs
    unit: Tensor | None  # [N, H] d logprob / d hidden, where asked for


class Gradients(NamedTuple):
    """Gradients in the sums' dtype (float32, or float64; see `Problem.rounds_head`); None where not needed."""

    hidden: Tensor | None  # [N, H]
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]


#: What a tail-corrected forward leaves for its backward; what stands in these is the backend's own affair:
#: counts [N] int32, of each token's in column [K] int32 and value [K]; by_block [N, as many as `tail_blocks` says].
Saved = tuple[Tensor, Tensor, Tensor, Tensor]


class SinglePass(NamedTuple):
    loss: Tensor  # [] the sum of the per-token losses
    logprob: Tensor  # [N]
    gradients: Gradients  # of that sum


class DivergenceResult(NamedTuple):
    values: Tensor  # [N]
    model: Gradients  # of the sum of the values, each times its upstream gradient
    ref: Gradients


#: (statistics of a chunk, its rows) -> (sum of its losses, gradients to those statistics)
Coefficients = Callable[[TokenStats, slice], tuple[Tensor, Upstream]]


def empty_gradients(problem: Problem | Side, needs: Needs, dtype: torch.dtype) -> Gradients:
    """Memory for the sums that are needed: zeros for the bias, for the others what a first product overwrites."""
    hidden, weight, bias = problem.hidden, problem.weight, problem.bias
    return Gradients(
        empty_sum(hidden, dtype, len(hidden)) if needs.hidden else None,
        empty_sum(weight, dtype, len(hidden)) if needs.weight else None,
        torch.zeros(bias.shape, dtype=dtype, device=bias.device) if needs.bias and bias is not None else None,
    )


def empty_sum(like: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Memory for a sum over `count` tokens; zeros where there is none, and so no product to overwrite it."""
    make = torch.empty if count else torch.zeros
    return make(like.shape, dtype=dtype, device=like.device)


def zero_gradients(problem: Problem, needs: Needs, dtype: torch.dtype) -> Gradients:
    """Of a loss that no statistic reaches."""
    return Gradients(*(None if x is None else x.zero_() for x in empty_gradients(problem, needs, dtype)))
