"""Sweeps over chunks of tokens: one GEMM for a chunk's `[chunk, V]` logits, and a row engine for all that follows.

Forward: one GEMM a chunk, then the engine's `measure`. Backward: the chunk's GEMM again (`backward`), or at once while
its logits are at hand (`single_pass`, and the unit gradient of a frozen head in `forward`), then the engine's
`gradient` and two GEMMs. In numbers of `2 N H V` flops: forward 1, backward 3, single pass 3 in all, frozen head 2 in
all.

Memory: one chunk of logits (`chunks`), and sums of the gradients asked for (`gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...types import TokenStats
from ..interface import (
    Forward,
    Gradients,
    Needs,
    Problem,
    RowEngine,
    RowGradient,
    SinglePass,
    SummedLosses,
    Upstream,
    rows_of,
)
from .chunks import Chunks
from .gradients import Accumulators
from .products import spans


class Sums(Protocol):
    """Gradients that each chunk of a single pass adds to: `Accumulators`, or approximate ones."""

    def add(self, rows: slice, targets: Tensor, gradient: RowGradient, upstream: Upstream) -> None:
        """Adds a chunk's part."""
        ...

    def finish(self) -> Gradients:
        """The gradients; zeros where no token came."""
        ...


def forward(engine: RowEngine, problem: Problem, outputs: tuple[str, ...], unit_gradient: bool) -> Forward:
    """`TokenStats` of every token and, for a frozen head, `d logprob / d hidden`."""
    chunks = Chunks(engine, problem, outputs)
    unit = Accumulators(chunks, Needs(hidden=True, weight=False, bias=False)) if unit_gradient else None
    parts: list[TokenStats] = []
    for rows in spans(len(problem.targets), chunks.tokens):
        tile = chunks.measure(rows)
        parts.append(tile.stats)
        if unit is not None:
            assert tile.stats.lse is not None
            upstream = Upstream(logprob=torch.ones_like(tile.stats.lse))
            unit.add(rows, tile.targets, chunks.gradient(tile, upstream), upstream)
        del tile  # a softcap's derivative is as large as the next chunk
    return Forward(concatenate(parts, chunks.dtype, problem, outputs), unit.sums.hidden if unit else None)


def backward(engine: RowEngine, problem: Problem, stats: TokenStats, upstream: Upstream, needs: Needs) -> Gradients:
    """Gradients from `upstream`, the chunk's logits computed again."""
    chunks = Chunks(engine, problem, (), trainable=needs.weight)
    sums = Accumulators(chunks, needs, chunk=chunks.tokens)
    for rows in spans(len(problem.targets), chunks.tokens):
        here, tile = rows_of(upstream, rows), chunks.recall(rows, rows_of(stats, rows))
        sums.add(rows, tile.targets, chunks.gradient(tile, here), here)
        del tile  # as in `forward`
    return sums.finish()


def exact_sums(chunks: Chunks, needs: Needs) -> Sums:
    """The sums of an exact single pass."""
    return Accumulators(chunks, needs, chunk=chunks.tokens)


def single_pass(
    engine: RowEngine,
    problem: Problem,
    losses: SummedLosses,
    sums_of: Callable[[Chunks, Needs], Sums] = exact_sums,
) -> SinglePass:
    """The sum of losses and its gradients in one sweep; no group is cut by a chunk."""
    outputs, coefficients, groups, needs = losses
    chunks = Chunks(engine, problem, outputs, trainable=needs.weight, whole_groups=groups is not None)
    sums, count = sums_of(chunks, needs), len(problem.targets)
    loss = torch.zeros((), dtype=chunks.dtype, device=problem.hidden.device)
    logprob = torch.empty(problem.targets.shape, dtype=chunks.dtype, device=problem.hidden.device)
    for rows in spans(count, chunks.tokens) if groups is None else group_spans(groups, chunks.tokens):
        tile = chunks.measure(rows)
        assert tile.stats.logprob is not None
        logprob[rows] = tile.stats.logprob
        chunk_loss, upstream = coefficients(tile.stats, rows)
        loss += chunk_loss
        if any(needs):
            sums.add(rows, tile.targets, chunks.gradient(tile, upstream), upstream)
        del tile  # as in `forward`
    return SinglePass(loss, logprob, sums.finish())


def group_spans(groups: Tensor, tokens: int) -> Iterator[slice]:
    """Runs of whole groups of at most `tokens` tokens each."""
    ends = torch.unique_consecutive(groups, return_counts=True)[1].cumsum(0).tolist()
    start = stop = 0
    for end in ends:
        if end - stop > tokens:
            raise ValueError(
                f"backward: 'single_pass' needs a whole group's logits in one chunk, but {end - stop} tokens "
                f"exceed the {tokens} that chunk_bytes allows; raise chunk_bytes or use backward='recompute'"
            )
        if end - start > tokens:
            yield slice(start, stop)
            start = stop
        stop = end
    if stop > start:
        yield slice(start, stop)


def concatenate(
    parts: Sequence[TokenStats], dtype: torch.dtype, problem: Problem, outputs: tuple[str, ...]
) -> TokenStats:
    """The statistics of all chunks as one; empty ones where there is no chunk."""
    names = {"logprob", "lse", *outputs}
    if not parts:
        empty = {name: torch.empty(0, dtype=dtype, device=problem.hidden.device) for name in names}
        return TokenStats(**{**empty, "logprob": empty["logprob"].view(problem.targets.shape)})
    return TokenStats(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
